"""Height from phase-shifted interferograms: I_jk = A_j + B_j cos(4 pi h / lambda_j + delta_jk).

A_j and B_j enter linearly, so they are eliminated at every pixel and wavelength in closed form (variable projection,
Golub and Pereyra 1973): what is trained is the height alone.
"""

import math

import numpy as np
import torch
from torch import Tensor

from cpikan_hr.data.orientation import Oriented, OrientedStack
from cpikan_hr.data.source import open_source
from cpikan_hr.data.stack import open_stack
from cpikan_hr.errors import UserError
from cpikan_hr.jets import Jet
from cpikan_hr.problems.base import Problem, Target, smoothness
from cpikan_hr.problems.decode import StackDecoder
from cpikan_hr.problems.image import strip_rows
from cpikan_hr.recipe import InterferometryProblem


class Interferometry(Problem):
    """Noise-weighted squared residual of the frames; its expectation is 1 at the true height."""

    channels = 1
    unit = "nm"

    def __init__(self, options: InterferometryProblem):
        self.options = options
        self.stack = OrientedStack(open_stack(options.stack), options.rotate, options.flip)
        if self.stack.phase_steps_rad is None:
            raise UserError(
                f"{options.stack}: phase_steps_rad is null; the interferometry problem needs the phase steps"
            )
        self.shape = self.stack.shape
        self.pixel_pitch_um = self.stack.pixel_pitch_um
        self.order = "laplacian" if options.laplacian else "value"
        self.wavenumber = torch.tensor([4e-3 * math.pi / w for w in self.stack.wavelengths_um])  # rad per nm
        self.steps = torch.as_tensor(np.asarray(self.stack.phase_steps_rad), dtype=torch.float32)
        self.decoder = StackDecoder(self.stack, options.noise if options.repair else None)

    def target(self, y0: int, y1: int, x0: int, x1: int, stride: int = 1) -> Target:
        rows = strip_rows(y1 - y0, x1 - x0, stride)
        strips = [self._target(y, min(y + rows, y1), x0, x1, stride) for y in range(y0, y1, rows)]
        return strips[0] if len(strips) == 1 else Target(*map(np.concatenate, zip(*strips, strict=True)))

    def _target(self, y0: int, y1: int, x0: int, x1: int, stride: int) -> Target:
        decoded = self.decoder.decode(y0, y1, x0, x1, stride)
        height, sigma = decoded.height_nm, decoded.sigma_nm
        valid = (decoded.quality >= self.options.quality) & np.isfinite(height)
        noise = np.where(valid, sigma, 0).astype(np.float32) * np.float32(self.options.noise)
        height = np.where(valid, height, 0).astype(np.float32)
        return Target(height[..., None], valid.astype(np.float32), noise)

    def samples(self, y0, y1, x0, x1, iy, ix) -> dict[str, np.ndarray]:
        frames = self.stack.read(y0, y1, x0, x1)[:, :, iy - y0, ix - x0]
        valid = self.stack.mask(y0, y1, x0, x1)[iy - y0, ix - x0]
        return {"frames": np.moveaxis(frames, -1, 0).astype(np.float32), "valid": valid.astype(np.float32)}

    def loss(self, jet: Jet, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        residual = self.residual(jet.value[:, 0], batch["frames"]).square()
        wavelengths, steps = residual.shape[1:]
        freedom = max(wavelengths * (steps - 2) - 1, 1)
        error = batch["valid"] * residual.sum((1, 2)) / freedom
        chi_squared = error / self.options.noise**2
        return chi_squared + batch["valid"] * smoothness(jet, self.options.laplacian), error

    def residual(self, height_nm: Tensor, frames: Tensor) -> Tensor:
        """I - A - B cos(...) in grey levels, [n, J, K], with the best A and B >= 0 of each pixel and wavelength."""
        phase = height_nm[:, None] * self.wavenumber.to(height_nm.device)
        carrier = torch.cos(phase[..., None] + self.steps.to(height_nm.device))
        carrier = carrier - carrier.mean(-1, keepdim=True)
        frames = frames - frames.mean(-1, keepdim=True)
        power = carrier.square().sum(-1, keepdim=True).clamp_min(1e-6)
        modulation = ((carrier * frames).sum(-1, keepdim=True) / power).clamp_min(0)  # negative B is a wrong order
        return frames - modulation * carrier

    def figure(self, mean_squared_error: float) -> tuple[str, float]:
        return "rmse_grey", math.sqrt(mean_squared_error)

    def reference(self):
        path = self.stack.reference
        return None if path is None else Oriented(open_source(path), self.options.rotate, self.options.flip)
