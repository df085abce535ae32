"""Height from phase-shifted interferograms: I_jk = A_j + B_j cos(4 pi (h + carrier) / lambda_j + delta_jk).

The fringes may have a second harmonic, the same one all over the frame (`steps.py`), and a carrier, a known tilt.

A_j and B_j enter linearly, so they are eliminated at every pixel and wavelength in closed form (variable projection,
Golub and Pereyra 1973): what is trained is the height alone.
"""

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cpikan_hr.data.heights import OPTION, Heights, open_heights
from cpikan_hr.data.orientation import Oriented, OrientedStack
from cpikan_hr.data.stack import MIN_STEPS, REFERENCE_UNIT, open_stack
from cpikan_hr.jets import Jet
from cpikan_hr.problems import calibration
from cpikan_hr.problems.base import PixelProblem, Prior, Target, Window
from cpikan_hr.problems.calibration import calibrate
from cpikan_hr.problems.decode import StackDecoder
from cpikan_hr.problems.image import strip_rows
from cpikan_hr.problems.noise import Noise, Weighing
from cpikan_hr.problems.phases import Demodulator, carrier_cycles
from cpikan_hr.problems.spooled import SpooledTarget
from cpikan_hr.processes import compute_device
from cpikan_hr.recipe import InterferometryProblem

MAPPED = 2**16  # pixels whose frames are looked at together
REWEIGHTED = 2  # times that samples which do not fit are weighed down, with `robust`


class Interferometry(PixelProblem):
    """Noise-weighted squared residual of the frames; its expectation is 1 at the true height."""

    channels = 1
    unit = "nm"
    maps = {"background": "grey levels", "modulation": "grey levels", "residual": "grey levels", "valid": ""}

    def __init__(self, options: InterferometryProblem):
        self.options = options
        self.stack = OrientedStack(open_stack(options.stack), options.rotate, options.flip)
        self.shared = calibrate(self.stack, options.steps, options.harmonic)
        self.noise = Noise(options.noise, options.gain, quantised=self.stack.dtype.kind == "u")
        self.shape = self.stack.shape
        self.pixel_pitch_um = self.stack.pixel_pitch_um
        self.prior = Prior(options.laplacian, options.variation)
        self.order = self.prior.order
        self.wavenumber = torch.tensor([4e-3 * math.pi / w for w in self.stack.wavelengths_um])  # rad per nm
        self.steps = torch.from_numpy(np.nan_to_num(self.shared.steps)).float()
        self.harmonic = None if self.shared.harmonic is None else torch.from_numpy(self.shared.harmonic).cfloat()
        demodulator = Demodulator(self.stack.wavelengths_um, self.shared.steps, self.shared.harmonic)
        self.weighing = Weighing(demodulator, self.noise, self.stack.clips)
        device = compute_device()
        self.decoder = StackDecoder(self.stack, self.shared, self.noise, options.repair, device=device)

    def target(self, y0: int, y1: int, x0: int, x1: int, stride: int = 1) -> Target:
        rows = strip_rows(y1 - y0, x1 - x0, stride)
        strips = [self._target(y, min(y + rows, y1), x0, x1, stride) for y in range(y0, y1, rows)]
        return strips[0] if len(strips) == 1 else Target(*map(np.concatenate, zip(*strips, strict=True)))

    def kept_target(self) -> SpooledTarget:
        return SpooledTarget(self.target, self.shape, self.decoder.device)

    def _target(self, y0: int, y1: int, x0: int, x1: int, stride: int) -> Target:
        decoded = self.decoder.decode(y0, y1, x0, x1, stride)
        height, sigma = decoded.height_nm, decoded.sigma_nm
        valid = (decoded.quality >= self.options.quality) & np.isfinite(height)
        if self.options.robust:
            valid &= self._fits((y0, y1, x0, x1), stride, height)
        noise = np.where(valid, sigma, 0).astype(np.float32)
        height = np.where(valid, height, 0).astype(np.float32)
        return Target(height[..., None], valid.astype(np.float32), noise)

    def _fits(self, window: Window, stride: int, height: np.ndarray) -> np.ndarray:
        """Where the frames' rms deviation is within `robust` times the noise (or what most pixels show, if more)."""
        y0, y1, x0, x1 = window
        found = self.shared.misfit
        shown = found.scatter**2 / self.noise.variance(found.level) if found else 0.0
        limit = self.options.robust**2 * max(1.0, shown)
        fits, rows = np.empty(height.shape, bool), max(1, MAPPED // height.shape[1])
        for row in range(0, len(height), rows):
            part = slice(row, row + rows)
            place = y0 + row * stride, min(y0 + (row + rows) * stride, y1), x0, x1
            _, _, residual, weight = self._fringes_at(place, stride, height[part])
            squared, known, _ = self._mean_squared(residual * weight.sqrt(), weight)
            fits[part] = (~known | (squared <= limit)).view(fits[part].shape).numpy()
        return fits

    def samples(self, y0, y1, x0, x1, iy, ix) -> dict[str, np.ndarray]:
        frames = self.stack.read(y0, y1, x0, x1)[:, :, iy - y0, ix - x0].astype(np.float32)
        valid = self.stack.mask(y0, y1, x0, x1)[iy - y0, ix - x0]
        weight = self.weighing.weights(torch.from_numpy(frames)).numpy() * valid
        batch = {"frames": frames, "weight": weight}
        carrier = self.stack.carrier(y0, y1, x0, x1)
        if carrier is not None:
            there = torch.from_numpy(carrier[iy - y0, ix - x0])
            batch["carrier"] = 2 * np.pi * carrier_cycles(there, self.stack.wavelengths_um).float().numpy()
        return {name: np.moveaxis(value, -1, 0) for name, value in batch.items()}

    def loss(self, jet: Jet, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        _, _, residual, weight = self.fringes(jet.value[:, 0], batch)
        error, known, freedom = self._mean_squared(residual, weight)
        chi_squared = known * self._penalty(residual * weight.sqrt()).sum((1, 2)) / freedom
        return chi_squared + known * self.prior.penalty(jet), error

    def fringes(self, height_nm: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Best A and B >= 0 of each pixel and wavelength [n, J], residual I - A - B cos(...) and weights [n, J, K].

        A, B and the residual are in grey levels. The batch holds `frames` and `weight` [n, J, K], the inverse variance
        of each sample, which is returned as it counts: 0 where fewer than three samples of a wavelength are usable,
        which determine nothing; and `carrier` [n, J], its phase in rad, if the stack has one. `robust` weighs samples
        that do not fit less in A and B too.
        """
        frames, weight = batch["frames"], batch["weight"]
        weight = weight * ((weight > 0).sum(-1, keepdim=True) >= MIN_STEPS)
        psi = height_nm[:, None] * self.wavenumber.to(height_nm.device) + batch.get("carrier", 0.0)
        psi = psi[..., None] + self.steps.to(height_nm.device)
        wave = torch.cos(psi)
        if self.harmonic is not None:
            harmonic = self.harmonic.to(height_nm.device)[:, None]
            wave = wave + harmonic.real * torch.cos(2 * psi) - harmonic.imag * torch.sin(2 * psi)
        background, modulation, residual = _fitted(frames, wave, weight)
        if self.options.robust:
            for _ in range(REWEIGHTED):
                with torch.no_grad():
                    deviation = residual.abs() * weight.sqrt()
                    trust = (self.options.robust / deviation.clamp_min(1e-9)).clamp_max(1)
                background, modulation, residual = _fitted(frames, wave, weight * trust)
        return background, modulation, residual, weight

    def map(self, name: str, window: Window, values: np.ndarray) -> np.ndarray:
        y0, y1, x0, x1 = window
        if name == "valid":
            return 255 * self.target(*window).weight[..., None]
        rows = max(1, MAPPED // (x1 - x0))
        strips = [(y, min(y + rows, y1)) for y in range(y0, y1, rows)]
        return np.concatenate([self._map(name, (a, b, x0, x1), values[a - y0 : b - y0]) for a, b in strips])

    def _map(self, name: str, window: Window, values: np.ndarray) -> np.ndarray:
        y0, y1, x0, x1 = window
        background, modulation, residual, weight = self._fringes_at(window, 1, values[..., 0])
        if name == "residual":
            squared, known = self._mean_squared(residual, weight)[:2]
            out = torch.where(known, squared.sqrt(), torch.nan)[:, None]
        else:
            out = torch.where((weight > 0).any(2), background if name == "background" else modulation, torch.nan)
        return out.reshape(y1 - y0, x1 - x0, -1).numpy()

    def _fringes_at(self, window: Window, stride: int, height: np.ndarray) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`fringes` of every stride-th pixel of the window, whose heights [h, w] are given."""
        y0, y1, x0, x1 = window
        iy, ix = (a.ravel() for a in np.mgrid[y0:y1:stride, x0:x1:stride])
        batch = {key: torch.from_numpy(np.ascontiguousarray(v)) for key, v in self.samples(*window, iy, ix).items()}
        return self.fringes(torch.from_numpy(np.ascontiguousarray(height, np.float32)).flatten(), batch)

    @staticmethod
    def _mean_squared(residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Squared residual [n] over its degrees of freedom, which pixels have any, and how many.

        Its expectation at the true height is the variance of a sample.
        """
        usable = weight > 0
        freedom = ((usable.sum(2) - 2) * usable.any(2)).sum(1)  # A and B are fitted to every wavelength
        known = freedom > 0
        freedom = freedom.clamp_min(1)
        return known * (usable * residual.square()).sum((1, 2)) / freedom, known, freedom

    def _penalty(self, deviation: Tensor) -> Tensor:
        """Squared deviations (in standard deviations); with `robust`, Huber's: linear beyond the threshold."""
        limit = self.options.robust
        if not limit:
            return deviation.square()
        size = deviation.abs()
        return torch.where(size <= limit, deviation.square(), 2 * limit * size - limit**2)

    def figure(self, mean_squared_error: float) -> tuple[str, float]:
        return "rmse_grey", math.sqrt(mean_squared_error)

    def reference(self):
        return true_height(self.options)

    def about(self) -> dict:
        """Phase steps, harmonics, whether there is a mask; of one wavelength also how many parts have own pistons."""
        regions = {} if self.decoder.regions is None else {"regions": self.decoder.regions}
        return calibration.describe(self.shared) | {"masked": self.stack.masked} | regions

    def note(self) -> str | None:
        said = [f"warning: {self.stack.path}: {doubt}" for doubt in calibration.doubts(self.shared, self.noise)]
        if self.options.steps != "nominal" or self.options.harmonic:
            said.insert(0, calibration.tell(self.shared))
        return "\n".join(said) or None


def true_height(
    options: InterferometryProblem, path: Path | None = None, unit: str | None = None
) -> Heights | None:
    """The height to compare with, in nm, NaN outside the stack's mask: the map `path`, as the frames are seen, or the
    one that the stack names, if it does. `unit`: of the map `path`, where it does not say it."""
    if path and not Path(options.stack).exists():
        return open_heights(path, unit)
    stack = OrientedStack(open_stack(options.stack), options.rotate, options.flip)
    if path is None and stack.reference is None:
        return None
    if path:
        known = open_heights(path, unit)
    else:
        own = open_heights(stack.reference, unit or stack.reference_unit, REFERENCE_UNIT if unit is None else OPTION)
        known = Oriented(own, options.rotate, options.flip)
    return Heights(known, mask=stack.mask if stack.masked and known.shape[:2] == stack.shape else None)


def _fitted(frames: Tensor, wave: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A and B >= 0 [n, J] by weighted least squares over K, and what they leave of the frames [n, J, K]."""
    share = weight / weight.sum(-1, keepdim=True).clamp_min(1e-30)
    mean_wave, mean = ((share * part).sum(-1, keepdim=True) for part in (wave, frames))
    wave, frames = wave - mean_wave, frames - mean
    power = (share * wave.square()).sum(-1, keepdim=True).clamp_min(1e-6)
    # A negative B is a wrong order.
    modulation = ((share * wave * frames).sum(-1, keepdim=True) / power).clamp_min(0)
    return (mean - modulation * mean_wave)[..., 0], modulation[..., 0], frames - modulation * wave
