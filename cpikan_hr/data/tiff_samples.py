"""What the samples of a TIFF page mean: grey levels from black or from white, colours, indices of a palette, alpha.

Invariant: a page is read as its tags say, or refused by name. Alpha is dropped, and colours that were multiplied by it
are divided again; extra samples of no stated meaning are channels. Colour profiles are not applied.
"""

from collections.abc import Callable

import numpy as np
import tifffile

from cpikan_hr.errors import UserError

MINISWHITE, MINISBLACK, RGB, PALETTE, YCBCR = (
    getattr(tifffile.PHOTOMETRIC, name) for name in ("MINISWHITE", "MINISBLACK", "RGB", "PALETTE", "YCBCR")
)
_JPEG = 7  # the compression that gives back RGB for YCbCr
_DEPTHS = (*range(1, 17), 24, 32, 64)
_ASSOCIATED, _UNASSOCIATED = 1, 2

Function = Callable[[np.ndarray], np.ndarray]


def meaning(ifd: tifffile.TiffPage, name: str, dtype: np.dtype) -> tuple[int, np.dtype, list[Function]]:
    """Channels and dtype of the pixels, and the functions that make them, one after the other, of windows [h, w, S]
    of stored samples of `dtype`. UserError: a bit depth or colour scheme that is not read."""
    photometric = ifd.photometric if 262 in ifd.tags or ifd.photometric == YCBCR else MINISBLACK
    bits, samples = ifd.bitspersample, ifd.samplesperpixel
    if bits not in _DEPTHS:
        raise UserError(f"{name}: unsupported bit depth: {bits} bits per sample; convert it to 8 or 16")
    scheme = getattr(photometric, "name", photometric)
    if photometric not in (MINISWHITE, MINISBLACK, RGB, PALETTE, YCBCR) or (
        photometric == YCBCR and ifd.compression != _JPEG
    ):
        raise UserError(f"{name}: {scheme} TIFF of shape {ifd.shape}; convert it to grey or RGB")
    if dtype.kind not in "bu" and photometric in (MINISWHITE, PALETTE):
        raise UserError(f"{name}: {scheme} TIFF of {dtype.name} samples; convert it to grey from black")
    steps: list[Function] = []
    alpha = next((i for i, kind in enumerate(ifd.extrasamples) if kind in (_ASSOCIATED, _UNASSOCIATED)), None)
    if alpha is not None:
        place = samples - len(ifd.extrasamples) + alpha
        multiplied, samples = ifd.extrasamples[alpha] == _ASSOCIATED, samples - 1
        steps.append(lambda stored: _without_alpha(stored, place, multiplied))
    if photometric == PALETTE:
        if samples != 1 or ifd.colormap is None or np.shape(ifd.colormap)[1] < 2**bits:
            raise UserError(f"{name}: a TIFF of palette indices without a whole palette; save it again in RGB")
        colours = _colours(np.asarray(ifd.colormap))
        return 3, colours.dtype, [*steps, lambda stored: colours[stored[..., 0].astype(np.intp)]]
    top = 2**bits - 1
    if bits < 8:
        dtype, levels = np.dtype(np.uint8), np.rint(np.arange(2**bits) * (255 / top)).astype(np.uint8)
        levels = levels[::-1] if photometric == MINISWHITE else levels
        steps.append(lambda stored: levels[stored.astype(np.intp)])
    elif photometric == MINISWHITE:
        steps.append(lambda stored: stored.dtype.type(top) - stored)
    return samples, dtype, steps


def _colours(colormap: np.ndarray) -> np.ndarray:
    """The palette [n, 3] of a colour map [3, n] of 16 bits; uint8 where 8 bits were written, in any of three ways."""
    if colormap.max() < 256:
        return colormap.T.astype(np.uint8)
    if not (colormap % 257).any() or not (colormap % 256).any():
        return (colormap >> 8).T.astype(np.uint8)
    return colormap.T.astype(np.uint16)


def _without_alpha(stored: np.ndarray, place: int, multiplied: bool) -> np.ndarray:
    colours = np.delete(stored, place, axis=-1)
    if not multiplied:
        return colours
    top = 1.0 if stored.dtype.kind == "f" else float(np.iinfo(stored.dtype).max)
    alpha = stored[..., place : place + 1].astype(np.float64)
    divided = colours * np.divide(top, alpha, out=np.zeros_like(alpha), where=alpha != 0)
    return (divided if stored.dtype.kind == "f" else np.rint(divided).clip(0, top)).astype(stored.dtype)
