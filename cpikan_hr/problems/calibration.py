"""What all pixels of a stack share, as it is used: phase steps as given, refined or found, and the second harmonic."""

from typing import Literal

import numpy as np

from cpikan_hr.data.stack import Stack
from cpikan_hr.errors import UserError
from cpikan_hr.parallel import one_thread
from cpikan_hr.problems.blind import guess_steps
from cpikan_hr.problems.checks import check_order, check_range
from cpikan_hr.problems.orders import unambiguous_range_um
from cpikan_hr.problems.sample import read_sample
from cpikan_hr.problems.steps import Shared, refine

Steps = Literal["nominal", "refine", "unknown"]
CHECKED, FITTED = 20_000, 200_000  # pixels: to see whether the frames fit, and to fit what they share


@one_thread()
def calibrate(stack: Stack, steps: Steps = "nominal", harmonic: bool = False) -> Shared:
    """Steps [J, K] and harmonics of the stack; reads a sample of its pixels.

    `nominal`: as the stack says; `refine`: from there; `unknown`: from nothing (steps then ascend by convention, and
    the first one of every wavelength is 0).
    UserError: steps unknown but not to be found; frames that do not determine them, or stand in another order;
    wavelengths that do not resolve the height range.
    """
    height_range = stack.height_range_um or unambiguous_range_um(stack.wavelengths_um)
    check_range(stack, height_range)
    if stack.phase_steps_rad is None and steps != "unknown":
        raise UserError(f"{stack.path}: phase_steps_rad: unknown; write them there, or find them by steps: unknown")
    fitted = steps != "nominal" or harmonic
    sample = read_sample(stack, FITTED if fitted else CHECKED)
    try:
        if steps == "unknown":
            shared = Shared(guess_steps(sample, stack.present, stack.wavelengths_um, height_range))
        else:
            shared = Shared(stack.phase_steps_rad)
            check_order(stack, sample, height_range, shared)
        if fitted:
            find = dict(steps=steps != "nominal", harmonic=harmonic)
            shared = refine(sample, stack.wavelengths_um, height_range, shared, **find)
    except UserError as error:
        where = str(stack.path)
        raise UserError(str(error) if str(error).startswith(where) else f"{where}: {error}") from None
    return shared


def describe(shared: Shared) -> dict:
    """The same as plain numbers, for a run's description."""
    steps = [[round(float(step), 6) for step in row[np.isfinite(row)]] for row in shared.steps]
    if shared.harmonic is None:
        return {"phase_steps_rad": steps}
    r, beta = np.abs(shared.harmonic), np.angle(shared.harmonic)
    each = [[round(float(a), 6), round(float(b), 6)] for a, b in zip(r, beta, strict=True)]
    return {"phase_steps_rad": steps, "harmonic": each}


def tell(shared: Shared) -> str:
    """One line for each wavelength."""
    lines = []
    for j, row in enumerate(shared.steps):
        line = "phase steps (rad)" + (f", wavelength {j}" if len(shared.steps) > 1 else "") + ": "
        line += " ".join(f"{step:.4f}" for step in row[np.isfinite(row)])
        if shared.harmonic is not None:
            line += f"; second harmonic {abs(shared.harmonic[j]):.4f} at {np.angle(shared.harmonic[j]):.3f} rad"
        lines.append(line)
    return "\n".join(lines)
