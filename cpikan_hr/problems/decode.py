"""The classical height decode: N-step phase per wavelength (`phases.py`), order search (`orders.py`), weighted average.

The baseline every field is measured against, and its start. Asked to, it decides orders that noise got wrong again
(`repair.py`). One wavelength has no orders to choose from and is unwrapped (`unwrap.py`).

Invariants
* Frame model I_jk = A_j + B_j cos(4 pi (h + carrier) / lambda_j + delta_jk), the carrier a known tilt or none; one
  wavelength alone gives h modulo lambda_j / 2.
* Heights are in nm. Float64 frames are decoded in float64, everything else in float32 (rounding below 0.01 nm).
* What a window holds does not depend on the window: repair and unwrapping see as far around it as they need.
"""

import logging
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from cpikan_hr.data.source import Source
from cpikan_hr.data.stack import Stack, keep_stack
from cpikan_hr.data.writers import MapWriter
from cpikan_hr.errors import UserError
from cpikan_hr.parallel import at_once, in_threads, one_thread
from cpikan_hr.problems.calibration import calibrate
from cpikan_hr.problems.neighbours import PENALTY
from cpikan_hr.problems.noise import Noise, Weighing
from cpikan_hr.problems.orders import OrderSearch, unambiguous_range_um
from cpikan_hr.problems.phases import VECTOR, Demodulator, without_carrier
from cpikan_hr.problems.repair import HALO, repair_orders
from cpikan_hr.problems.steps import Shared
from cpikan_hr.problems.unwrap import Unwrapping

CERTAIN = 16  # chi-square by which the best order beats the next where noise hardly ever decides (4 sigma)
CHUNK = 2**16  # pixels decoded at a time
ROWS, COLUMNS = 256, 1024  # that a thread reads and decodes at a time

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Decoded:
    """Maps over a window [h, w] (background and modulation: [J, h, w], in grey levels).

    `quality` is the agreement of the order times the least contrast B / A of the wavelengths. The agreement is
    1 - s1 / s2, with s1 and s2 the scatter in nm of the wavelengths' heights in the best and the second best order: 0
    where two orders fit alike, 1 where one fits perfectly, and 1 for a single wavelength. It is no probability and
    knows nothing of the noise (`margin` does) or of other pixels: a repaired pixel keeps the number it had.
    """

    height_nm: np.ndarray
    sigma_nm: np.ndarray  # standard deviation of the height
    quality: np.ndarray  # 0 to 1, see above
    margin: np.ndarray  # chi-square by which the best order beats the next
    background: np.ndarray
    modulation: np.ndarray


def decode_window(
    frames: np.ndarray,
    wavelengths_um: Sequence[float],
    phase_steps_rad: np.ndarray,
    height_range_um: tuple[float, float] | None = None,
    *,
    harmonic: np.ndarray | None = None,
    noise: Noise | None = None,
    bit_depth: int | None = None,
    carrier_nm: np.ndarray | None = None,
) -> Decoded:
    """Decodes `frames` [J, K, h, w] with `phase_steps_rad` [J, K] into maps [h, w].

    `height_range_um`: where heights can be; default `unambiguous_range_um`. `harmonic` complex [J]: second harmonic of
    the fringes. `noise`: of a sample; default one grey level. `bit_depth`: of integer frames whose clipped samples are
    left out; a wavelength with fewer than three others drops out at that pixel, and quality falls in proportion.
    `carrier_nm` float64 [h, w]: height that the fringes show and the maps do not.
    `sigma_nm` is first-order propagation of the noise; it is infinite where nothing is modulated.
    UserError: phase steps that do not determine a phase.
    """
    clips = bit_depth if frames.dtype.kind == "u" else None
    solver = _Solver(wavelengths_um, phase_steps_rad, height_range_um, harmonic, noise, clips)
    rows = max(1, CHUNK // frames.shape[3])

    def strip(y: int) -> Decoded:
        carrier = None if carrier_nm is None else torch.from_numpy(carrier_nm[y : y + rows])
        return solver.decode(_tensor(frames[:, :, y : y + rows]), carrier)

    strips = [vars(each) for each in in_threads(strip, range(0, frames.shape[2], rows))]
    return _in_numpy(Decoded(**{name: torch.cat([each[name] for each in strips], dim=-2) for name in strips[0]}))


def _tensor(frames: np.ndarray) -> Tensor:
    """With signed numbers for those of 16 bits, which torch can only copy."""
    return torch.from_numpy(np.ascontiguousarray(frames, np.int32 if frames.dtype == np.uint16 else None))


def _in_numpy(decoded: Decoded) -> Decoded:
    return Decoded(**{name: each.cpu().numpy() for name, each in vars(decoded).items()})


class _Solver:
    """What is the same for all pixels. It computes where the frames are."""

    def __init__(self, wavelengths_um, phase_steps_rad, height_range_um, harmonic, noise, bit_depth):
        self.wavelengths_um = wavelengths_um
        self.weighing = Weighing(Demodulator(wavelengths_um, phase_steps_rad, harmonic), noise, bit_depth)
        self.orders = OrderSearch(wavelengths_um, height_range_um or unambiguous_range_um(wavelengths_um))

    def decode(self, frames: Tensor, carrier: Tensor | None) -> Decoded:
        """Frames [J, K, h, w] and the carrier's height [h, w] -> maps, as tensors."""
        J, K, h, w = frames.shape
        flat, chunk = frames.reshape(J, K, h * w), at_once(CHUNK, frames.device)
        maps = torch.empty(4 + 2 * J, h * w, dtype=_precision(frames), device=frames.device)
        for start in range(0, h * w, chunk):
            part, into = slice(start, start + chunk), maps[:, start : start + chunk]
            there = None if carrier is None else carrier.flatten()
            self._decode(flat[:, :, part], _at(there, part), into[:4], into[4:].unflatten(0, (2, J)))
        maps = maps.unflatten(1, (h, w))
        return Decoded(*maps[:4], *maps[4:].unflatten(0, (2, J)))

    def _decode(self, frames: Tensor, carrier: Tensor | None, maps: Tensor, per_wavelength: Tensor) -> None:
        """Frames [J, K, n] -> in place: height, sigma, quality, margin [4, n], `per_wavelength` (A, B) [2, J, n]."""
        background, modulation, fraction, weight = self._demodulated(frames, carrier)
        n, tiny = frames.shape[2], torch.finfo(weight.dtype).tiny
        total = weight.sum(0)
        weight = weight / total.clamp_min(tiny)
        height, agreement, margin = self.orders.search(fraction, weight)
        contrast = modulation / background.maximum(modulation).clamp_min(tiny)
        quality = agreement * contrast.amin(0)
        margin *= total.clamp_min(tiny)  # tiny: a single order's margin is infinite whatever the modulation
        if not weight.amin() > 0:
            dropped = (weight == 0).sum(0)
            contrast[weight == 0] = 1  # these say nothing, so quality falls in proportion
            left = len(weight) - dropped
            trust = left / len(weight)
            trust[(left == 1) & (margin == 0)] = 0  # a single wavelength's order is arbitrary
            quality = agreement * contrast.amin(0) * trust
        for place, each in zip(maps, (height, 1 / total.sqrt(), quality, margin), strict=True):
            place.copy_(each[:n])
        per_wavelength[0], per_wavelength[1] = background[:, :n], modulation[:, :n]

    def _demodulated(self, frames: Tensor, carrier: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Background, modulation, phase / 2 pi and weight [J, n'] of frames [J, K, n] in their native dtype.

        What lies behind n repeats the last pixel. The phases are those of the height, without the `carrier`'s [n].
        """
        J, K, n = frames.shape
        values = frames.new_empty(J, K, n + -n % VECTOR, dtype=_precision(frames))
        values[..., :n] = frames
        values[..., n:] = values[..., n - 1 : n]
        background, modulation, fraction, weight = self.weighing.demodulate(values)
        if carrier is not None:
            fraction = without_carrier(fraction, pad(carrier, [0, values.shape[2] - n]), self.wavelengths_um)
        return background, modulation, fraction, weight

    def candidates(self, frames: Tensor, carrier: Tensor | None) -> tuple[Tensor, Tensor]:
        """Frames [J, K, n] -> heights in nm and chi-squares of all orders, [orders, n].

        A pixel with fewer orders than others has infinite chi-squares in the place of the missing ones.
        """
        _, _, fraction, weight = self._demodulated(frames, carrier)
        n, total = frames.shape[2], weight.sum(0)
        weight = weight / total.clamp_min(torch.finfo(weight.dtype).tiny)
        heights = weight.new_zeros(max(map(len, self.orders.orders)), len(total))
        cost = torch.full_like(heights, torch.inf)
        for base, pixels in self.orders.groups(weight):
            for k, each in enumerate(self.orders.candidates(base, fraction[:, pixels], weight[:, pixels])):
                heights[k, pixels], cost[k, pixels] = each[0], each[1] * total[pixels]
        return heights[:, :n], cost[:, :n]


def _at(carrier: Tensor | None, place) -> Tensor | None:
    return None if carrier is None else carrier[place]


def _precision(frames: Tensor) -> torch.dtype:
    return torch.float64 if frames.dtype == torch.float64 else torch.float32


class StackDecoder:
    """Decodes a stack window by window on `device`, in several threads if need be.

    `shared`: what `calibrate` found; by default the steps are the stack's. `noise`: of a sample; default 1.
    Heights are NaN and the quality is 0 outside the mask, where too many samples are clipped to tell an order, and with
    `repair` (which needs the noise) where an order is left undecided.
    One wavelength is unwrapped as a whole when the decoder is made, tile by tile. Its order is unknown: of every
    region of the mask it is chosen so that the mean height is within a quarter wave of zero.
    UserError: phase steps unknown; of one wavelength: nothing valid, no room for a temporary file.
    """

    def __init__(
        self, stack: Stack, shared: Shared | None = None, noise: Noise | None = None, repair: bool = False,
        threads: int | None = None, device: torch.device | str = "cpu",
    ):  # fmt: skip
        self.stack, self.device, shared = stack, device, shared or calibrate(stack)
        limits = stack.height_range_um if stack.J > 1 else None  # what one wavelength shows is wrapped
        self._solver = _Solver(stack.wavelengths_um, shared.steps, limits, shared.harmonic, noise, stack.clips)
        self.turns, self.regions = None, None
        self.shown_variance = shared.misfit.scatter**2 if shared.misfit else 0.0  # of a sample, in squared grey levels
        self.repair = repair and stack.J > 1  # one wavelength has nothing to repair
        if stack.J == 1:
            self.half_wave = 500 * stack.wavelengths_um[0]
            self.turns, self.regions = self._unwrapped(threads)

    def decode(self, y0: int, y1: int, x0: int, x1: int, stride: int = 1) -> Decoded:
        """Maps of every stride-th pixel of the window, from (y0, x0) on."""
        window, thin = (y0, y1, x0, x1), np.s_[::stride, ::stride]
        with one_thread():
            if self.repair:
                decoded, valid = self._repaired(*window, stride)
            else:
                frames, carrier = self._frames(*window)
                decoded = self._solver.decode(frames[:, :, *thin], _at(carrier, thin))
                valid = self._mask(*window)[thin]
            if not self.repair and self.turns is None:
                valid = valid & (decoded.quality > 0)  # a repair decides such orders again
        decoded, valid = _in_numpy(decoded), (valid & decoded.sigma_nm.isfinite()).cpu().numpy()
        height = decoded.height_nm
        if self.turns is not None:
            height = height + self.half_wave * self.turns.read(*window)[*thin, 0].astype(height.dtype)
        height = np.where(valid, height, height.dtype.type(np.nan))
        return replace(decoded, height_nm=height, quality=np.where(valid, decoded.quality, 0))

    def _frames(self, *window: int) -> tuple[Tensor, Tensor | None]:
        """Frames and the carrier's height, on the device."""
        carrier = self.stack.carrier(*window)
        carrier = None if carrier is None else torch.from_numpy(np.ascontiguousarray(carrier)).to(self.device)
        return _tensor(self.stack.read(*window)).to(self.device), carrier

    def _mask(self, *window: int) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(self.stack.mask(*window))).to(self.device)

    def _repaired(self, y0: int, y1: int, x0: int, x1: int, stride: int) -> tuple[Decoded, Tensor]:
        """The maps, and where they hold."""
        top, left = max(y0 - HALO, 0), max(x0 - HALO, 0)
        grown = top, min(y1 + HALO, self.stack.shape[0]), left, min(x1 + HALO, self.stack.shape[1])
        inner = np.s_[y0 - top : y1 - top : stride, x0 - left : x1 - left : stride]
        (frames, carrier), valid = self._frames(*grown), self._mask(*grown)
        if stride > 1:  # the pixels between are needed only where one of those asked for is in doubt
            decoded = self._solver.decode(frames[:, :, *inner], _at(carrier, inner))
            if (decoded.margin >= PENALTY)[valid[inner]].all():
                return decoded, valid[inner]
        decoded = self._solver.decode(frames, carrier)
        valid &= decoded.sigma_nm.isfinite()

        def candidates(iy: Tensor, ix: Tensor) -> tuple[Tensor, Tensor]:
            return self._solver.candidates(frames[:, :, iy, ix], _at(carrier, (iy, ix)))

        spacing = float(np.mean(self._solver.orders.half))
        undecided = repair_orders(decoded.height_nm, decoded.margin, valid, candidates, spacing)
        maps = {name: each[..., *inner] for name, each in vars(decoded).items()}
        return Decoded(**maps), (valid & ~undecided)[inner]

    def _unwrapped(self, threads: int | None) -> tuple[Source, int]:
        def phase(*window: int) -> np.ndarray:
            return self._solver.decode(*self._frames(*window)).height_nm.double().cpu().numpy() / self.half_wave

        name = str(self.stack.path)
        turns, regions = Unwrapping(name, self.stack.shape, phase, self.stack.mask).solve(threads)
        if not regions:
            raise UserError(f"{name}: mask: no pixel is valid; check the mask")
        if regions > 1:
            _log.warning("%s: the mask has %d regions that do not touch, each with a piston of its own", name, regions)
        return turns, regions


def decode_stack(
    stack: Stack,
    out: str | os.PathLike,
    *,
    threads: int | None = None,
    repair: Noise | None = None,
    quality: str | os.PathLike | None = None,
    shared: Shared | None = None,
    progress: Callable[[int, int], None] | None = None,
    device: torch.device | str = "cpu",
) -> tuple[Path, Path | None]:
    """Decodes `stack` into the height map `out` (float32, nm; .tif or .npy) and, if asked, the map `quality`.

    Window by window in threads on `device`; pixels outside the mask become NaN (quality 0). `shared`: what `calibrate`
    found; by default the steps are the stack's. `repair`: the frames' noise; wrong orders are repaired then.
    `progress(done, total)` counts windows.
    UserError: what `calibrate` refuses, damaged frames, no room; nothing is left behind then.
    """
    if repair is not None and stack.J == 1:
        raise UserError(f"{stack.path}: one wavelength has no other order to choose; decode it without a repair")
    if quality and Path(quality).resolve() == Path(out).resolve():
        raise UserError(f"{quality}: heights and quality cannot be one file; name another")
    keep_stack(stack, out, quality)
    (rows, columns), wide = stack.shape, at_once(COLUMNS, device)
    about = dict(pixel_pitch_um=stack.pixel_pitch_um, description=f"classical decode of {stack.path.parent.name}")
    with ExitStack() as opened:
        heights = opened.enter_context(MapWriter(out, stack.shape, np.float32, unit="nm", **about))
        qualities = opened.enter_context(MapWriter(quality, stack.shape, np.float32, **about)) if quality else None
        decoder = StackDecoder(stack, shared, repair, repair is not None, threads, device)

        limit = 0.0 if decoder.repair else CERTAIN * decoder.shown_variance

        def decode(corner: tuple[int, int]) -> np.ndarray:
            y0, x0 = corner
            window = y0, min(y0 + ROWS, rows), x0, min(x0 + wide, columns)
            decoded = decoder.decode(*window)
            heights.write(y0, x0, decoded.height_nm)
            if qualities:
                qualities.write(y0, x0, decoded.quality)
            known, inside = np.isfinite(decoded.height_nm), stack.mask(*window)
            return np.array([inside.sum(), (inside & ~known).sum(), (known & (decoded.margin < limit)).sum()])

        counts = np.zeros(3, int)
        corners = [(y, x) for y in range(0, rows, ROWS) for x in range(0, columns, wide)]
        with closing(in_threads(decode, corners, device, threads)) as decoded:
            for done, counted in enumerate(decoded, start=1):
                counts += counted
                if progress:
                    progress(done, len(corners))
        for writer in filter(None, (heights, qualities)):
            writer.convert()
        _tell_lost(stack, *counts)
        return heights.finish(), qualities.finish() if qualities else None


def _tell_lost(stack: Stack, inside: int, lost: int, doubtful: int) -> None:
    """One line about pixels in the mask without a height, or whose order the noise may have got wrong."""
    said = []
    if lost:
        said.append(
            f"{lost / inside:.2g} of the pixels have no height: too few of their samples tell it (clipped ones do not; "
            "quality 0, NaN in the map)"
        )
    if doubtful:
        said.append(f"the fringe order of {doubtful / inside:.2g} of the pixels is in doubt; --repair NOISE decides it")
    if said:
        _log.warning("%s: %s", stack.path, "; ".join(said))
