"""What all pixels of a stack share, as it is used: phase steps as given, refined or found, and the second harmonic."""

from dataclasses import replace
from typing import Literal

import numpy as np

from cpikan_hr.data.stack import Stack
from cpikan_hr.errors import UserError
from cpikan_hr.parallel import one_thread
from cpikan_hr.problems.agreement import check_data, check_fit, piled_up
from cpikan_hr.problems.blind import guess_steps
from cpikan_hr.problems.checks import check_order, check_range
from cpikan_hr.problems.noise import Noise
from cpikan_hr.problems.orders import unambiguous_range_um
from cpikan_hr.problems.sample import read_sample
from cpikan_hr.problems.steps import Shared, refine

Steps = Literal["nominal", "refine", "unknown"]
CHECKED, FITTED = 20_000, 200_000  # pixels: to see whether the frames fit, and to fit what they share
MANY = 0.05  # part of the pixels in a wrong fringe order, or that do not fit, from which on it is said
ENOUGH = 3  # degrees of freedom of a pixel from which on its scatter is not that of a lucky order
UNLIKE = 1.7  # times the expected noise, or less than one such part of it: what is not as expected


@one_thread()
def calibrate(stack: Stack, steps: Steps = "nominal", harmonic: bool = False) -> Shared:
    """Steps [J, K] and harmonics of the stack; reads a sample of its pixels.

    `nominal`: as the stack says; `refine`: from there; `unknown`: from nothing (steps then ascend by convention, and
    the first one of every wavelength is 0).
    UserError: steps unknown but not to be found; frames that do not determine them, do not fit the model or stand in
    another order; nothing valid; wavelengths that do not resolve the height range.
    """
    height_range = stack.height_range_um or unambiguous_range_um(stack.wavelengths_um)
    check_range(stack, height_range)
    if stack.phase_steps_rad is None and steps != "unknown":
        raise UserError(f"{stack.path}: phase_steps_rad: unknown; write them there, or find them by steps: unknown")
    fitted = steps != "nominal" or harmonic
    sample = read_sample(stack, FITTED if fitted else CHECKED)
    check_data(stack, sample)
    try:
        if steps == "unknown":
            shared = Shared(guess_steps(sample, stack.present, stack.wavelengths_um, height_range))
        else:
            shared = Shared(stack.phase_steps_rad)
            if steps == "nominal" or stack.present.sum() - 2 * stack.J > ENOUGH:  # else wrong steps look like that
                check_order(stack, sample, height_range, shared)
        if fitted:
            find = dict(steps=steps != "nominal", harmonic=harmonic)
            shared = refine(sample, stack.wavelengths_um, height_range, shared, **find)
        found = check_fit(stack, sample, height_range, shared)
    except UserError as error:
        where = str(stack.path)
        raise UserError(str(error) if str(error).startswith(where) else f"{where}: {error}") from None
    return replace(shared, misfit=found, piled=piled_up(stack, sample))


def describe(shared: Shared) -> dict:
    """The same as plain numbers, for a run's description."""
    steps = [[round(float(step), 6) for step in row[np.isfinite(row)]] for row in shared.steps]
    if shared.harmonic is None:
        return {"phase_steps_rad": steps}
    r, beta = np.abs(shared.harmonic), np.angle(shared.harmonic)
    each = [[round(float(a), 6), round(float(b), 6)] for a, b in zip(r, beta, strict=True)]
    return {"phase_steps_rad": steps, "harmonic": each}


def doubts(shared: Shared, noise: Noise | None = None) -> list[str]:
    """What is suspicious of frames that were not refused, a line each. `noise`: what is said of their samples."""
    found, said = shared.misfit, []
    if shared.piled:
        level, part = shared.piled
        said.append(
            f"{part:.2g} of the samples are at {level:g}, the largest value, as if they were clipped there; bit_depth "
            "says another top, so they count as they are: set bit_depth to the camera's bits"
        )
    if found is None:
        unseen = "neither the order of the frames nor their noise was looked at"
        return [*said, f"too few pixels without clipped samples: {unseen}"]
    if found.wrong > MANY:
        said.append(
            f"frames that scatter by {found.scatter:.2g} grey levels leave {found.wrong:.0%} of the pixels in a wrong "
            "fringe order (before any repair); measure with other wavelengths or less noise, narrow height_range_um, "
            "or estimate a harmonic"
        )
    if found.stray > MANY:
        said.append(
            f"{found.stray:.0%} of the pixels do not fit as the others do; check height_range_um, and the mask"
        )
    expected = found.scatter if noise is None or found.freedom < ENOUGH else noise.variance(found.level) ** 0.5
    if not expected / UNLIKE <= found.scatter <= expected * UNLIKE:
        said.append(
            f"the frames scatter by {found.scatter:.2g} grey levels about the model, where {expected:.2g} are "
            "expected; give the noise they have (or refine the steps, or estimate a harmonic, if it is not noise)"
        )
    return said


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
