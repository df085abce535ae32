"""What the terms of a textured surface hold on average, learnt from the surface itself.

A tile's own terms say little of a texture below the noise. But a texture looks alike everywhere: the mean square of
each term over all tiles of a size, less the noise's, is its power spectrum, however noisy a tile is. Tiles differ in
how rough they are, so each has one scale of its own, the most likely one (a Gaussian scale mixture: Wainwright and
Simoncelli 2000; Portilla et al. 2003). What a term is expected to hold, the scaled spectrum and a little of what a
first average (the pilot) says, gives its gain, and the risk of a tile, by which the quadtree's leaves are chosen.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from cpikan_hr.errors import UserError
from cpikan_hr.fields import Field
from cpikan_hr.recipe import StartOptions
from cpikan_hr.solvers.blocks import Pixels, ReadTarget, read_block, sampled_blocks
from cpikan_hr.solvers.leaves import LEAST, Size, coefficients, sizes_of, thresholds

SAMPLED, PLACES = 2**19, 64  # pixels that the spectra are learnt from, and in how many places
ROUNDS = 2  # of spectrum and scales in turn
SCORING = 4  # Fisher scoring steps that find a tile's scale
OWN = 0.2  # part of what a term is expected to hold that the pilot says
LEFT = 0.25  # of the noise's energy in a term: what the pilot may still hold of it
TINY = 1e-6  # least scale, and of spectrum and noise what a term holds at least
KNOWN = 0.9  # part of a tile's pixels that are known where a spectrum is learnt: what is filled in is smooth


class Shrunk(NamedTuple):
    """Of all tiles of a size: gains [ny, nx, C, P, P] of their terms, and what risk these leave a tile, [ny, nx]."""

    gains: Tensor
    risk: Tensor


class Texture(NamedTuple):
    """`spectra`: by level number the mean square [C, P, P] of the scaled coefficients of tiles of scale one."""

    spectra: dict[int, Tensor]

    def shrunk(self, level: int, scaled: Tensor, variance: Tensor, pilot: Tensor) -> Shrunk:
        """How the scaled coefficients [ny, nx, C, P, P] of a level's tiles are shrunk.

        variance: of their noise [ny, nx, 1, 1, 1]; pilot: the coefficients of an estimate of the values.
        """
        shape, spectrum, variance = scaled.shape, self.spectra[level].to(scaled), variance.flatten(0, 1)
        scale = scales(squares(scaled), variance, spectrum)[:, None, None, None]
        known = pilot.flatten(0, 1).square()
        expected = (known - LEFT * variance).clamp_min_(0).mul_(OWN).add_(scale * spectrum, alpha=1 - OWN)
        gains = expected.div_(expected + variance)
        gains[..., 0, 0] = 1  # a tile's mean is never lost
        risk = (gains.square() * variance + (1 - gains).square_() * known).flatten(1).sum(1)
        return Shrunk(gains.view(shape), risk.view(shape[:2]))


def energies(pixels: Pixels, size: Size) -> tuple[Tensor, Tensor]:
    """Squares [t, C, P, P] of a block's scaled coefficients, 0 for the means; variance [t, 1, 1, 1] of their noise."""
    noise = thresholds(pixels, size, 0.0, 1.0).flatten(0, 1)
    return squares(coefficients(pixels, size)), noise.square().clamp_min(LEAST)


def squares(scaled: Tensor) -> Tensor:
    """Of coefficients [ny, nx, C, P, P], [t, C, P, P]; 0 for the means, which are no texture."""
    found = scaled.flatten(0, 1).square()
    found[..., 0, 0] = 0
    return found


def seen(pixels: Pixels, size: Size) -> Tensor:
    """Which tiles [t] of a block show what the surface is like."""
    noisy = thresholds(pixels, size, 0.0, 1.0).flatten() > 0
    if pixels.known is None:
        return noisy
    known = avg_pool2d(pixels.known[None].to(pixels.values), size.pixels, size.stride)
    return noisy & (known.flatten() >= KNOWN)


def scales(scaled: Tensor, variance: Tensor, spectrum: Tensor) -> Tensor:
    """The most likely scale [t] of every tile whose squares `scaled` have the means scale x spectrum + variance."""
    excess, model = (scaled - variance).flatten(1), spectrum.flatten()  # 0 at the mean, which counts for nothing
    variance, scale = variance.flatten(1), (excess @ (model > 0).to(model) / model.sum())[:, None]
    for _ in range(SCORING):
        weight = model / torch.addcmul(variance, scale.clamp_min(TINY), model).square_()
        scale = (weight * excess).sum(1, keepdim=True) / (weight @ model)[:, None]
    return scale[:, 0].clamp_min(TINY)


def spectrum_of(scaled: Tensor, variance: Tensor) -> Tensor:
    """The mean square [C, P, P] of tiles' terms before noise, per unit of a tile's scale; see `energies`."""
    weight = 1 / variance.square()
    spectrum = ((scaled - variance) * weight).sum(0) / weight.sum(0)
    for turn in range(1 + ROUNDS):
        if turn:  # what each term holds, given what it shows and the present model (expectation maximisation)
            scale = scales(scaled, variance, spectrum)[:, None, None, None]
            gain = scale * spectrum / (scale * spectrum + variance)
            held = (gain.square() * scaled + gain * variance) / scale
            spectrum = held[scale.flatten() > TINY].mean(0) if (scale > TINY).any() else spectrum
        spectrum[..., 0, 0] = 0
        spectrum = spectrum.clamp_min(TINY * (spectrum.clamp_min(0).mean() + variance.mean()))
        spectrum[..., 0, 0] = 0
    return spectrum


@torch.no_grad()
def learn(field: Field, group: int, target: ReadTarget, shape: tuple[int, int], start: StartOptions) -> Texture | None:
    """The texture of what the first `group` levels leave, the same on all processes.

    None where it is not asked for, or no tile of some size is known well enough.
    """
    if not start.texture:
        return None
    sizes, halo = sizes_of(field, group)
    stride = sizes[0].stride
    parts: dict[int, list[tuple[Tensor, Tensor]]] = {size.level: [] for size in sizes}
    for _, block in sampled_blocks(shape, stride, SAMPLED, PLACES):
        pixels = read_block(field, group, target, shape, block, stride, halo)
        if pixels.noise is None:
            raise UserError("start.texture: the noise of this problem is not known; leave it out")
        for size in sizes:
            which = seen(pixels, size)
            parts[size.level].append(tuple(each[which] for each in energies(pixels, size)))
    whole = {level: tuple(map(torch.cat, zip(*found, strict=True))) for level, found in parts.items()}
    if not all(len(scaled) for scaled, _ in whole.values()):
        return None
    return Texture({level: spectrum_of(*both) for level, both in whole.items()})
