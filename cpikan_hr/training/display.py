"""What a person sees of a run: a bar while levels are solved, a preview that sharpens, what each level contributed."""

import math
import time
from collections.abc import Callable
from pathlib import Path

from cpikan_hr.data.preview import save_preview
from cpikan_hr.errors import UserError
from cpikan_hr.fields import Field
from cpikan_hr.problems import Problem
from cpikan_hr.progress import Progress
from cpikan_hr.recipe import TargetOptions

SIDE = 1000  # pixels of a preview
PAUSE = 10.0  # seconds between previews, while steps are made


class StartBar:
    """A bar per level, with what the levels before it and its own passes have come to."""

    def __init__(self, enabled: bool, log: Callable[[str], None] | None = None):
        self.enabled, self.log, self.bar, self.reached = enabled, log, None, ""

    def __call__(self, label: str, fraction: float) -> None:
        if not self.enabled:
            return
        if self.bar is None or label != self.bar.name:
            self.close()
            self.bar = Progress(label, log=self.log)
        self.bar(min(round(100 * fraction), 99), 100)  # a level may take further passes
        self.bar.show(self.reached)

    def show(self, levels: list[dict], problem: Problem) -> None:
        """The error and the size that the levels so far have come to."""
        row = described(levels[-1], problem)
        error = f"{row['psnr_db']:.2f} dB" if "psnr_db" in row else f"rmse {row['rmse']:.4g} {problem.unit}"
        self.reached = f"level {row['level']}: {error}, {sum(row['params'] for row in levels)} parameters"
        if self.bar is not None:
            self.bar.show(self.reached)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


class Preview:
    """`RUN/preview.png`, drawn again after a pause at the earliest."""

    def __init__(self, run: Path, problem: Problem, enabled: bool):
        self.path, self.problem, self.enabled, self._drawn = run / "preview.png", problem, enabled, -math.inf

    def draw(self, field: Field, pause: float = PAUSE) -> None:
        """The field on a lattice of at most `SIDE` points a side."""
        if not self.enabled or time.perf_counter() - self._drawn < pause:
            return
        values = self.problem.picture(field, SIDE)
        if values.shape[2] == 3:
            values = (values / self.problem.full_range).clip(0, 1)  # above 1 it would be taken for 0..255
        picture = values if values.shape[2] == 3 else values[..., 0]
        try:
            save_preview(self.path, [picture], ["field"], unit=self.problem.unit)
        except UserError:  # a full disk: what matters of the run will say so, a preview is not worth it
            self.enabled = False
        self._drawn = time.perf_counter()


def decibels(rmse: float, problem: Problem) -> float:
    return 20 * math.log10(problem.full_range / max(rmse, 1e-12))


def described(row: dict, problem: Problem) -> dict:
    """A level's contribution, for pictures with the PSNR."""
    name, _ = problem.figure(0.0)
    return row | ({name: decibels(row["rmse"], problem)} if name == "psnr_db" else {})


def missed(levels: list[dict], problem: Problem, target: TargetOptions) -> list[str]:
    """One line for every target that the solved levels do not reach."""
    rmse, psnr = levels[-1]["rmse"], decibels(levels[-1]["rmse"], problem)
    per_px = sum(row["params"] for row in levels) / (problem.shape[0] * problem.shape[1] * problem.channels)
    size = f"{per_px:.4g} parameters per px"
    lines = []
    if target.psnr is not None and psnr < target.psnr - 0.005:
        lines.append(f"note: target.psnr {target.psnr:g} was not reached by the start: {psnr:.2f} dB at {size}")
    if target.rmse is not None and rmse > target.rmse * 1.0005:
        lines.append(
            f"note: target.rmse {target.rmse:g} was not reached by the start: {rmse:.4g} {problem.unit} at {size}"
        )
    if target.params_per_px is not None and per_px > target.params_per_px:
        lines.append(f"note: target.params_per_px {target.params_per_px:g} was not kept by the start: {size}")
    return lines


def contribution_table(levels: list[dict], problem: Problem) -> str:
    """One line per level of the recipe: tiles, parameters, and the error once it is added."""
    size = problem.shape[0] * problem.shape[1] * problem.channels
    lines = [f"{'level':>5} {'network':12} {'tiles':>9} {'parameters':>11} {'per px':>7} {'rmse':>10} {'psnr':>6}"]
    for row in levels:
        psnr = described(row, problem).get("psnr_db", math.nan)
        lines.append(
            f"{row['level']:>5} {row['network']:12} {row['tiles']:>9} {row['params']:>11} {row['params'] / size:>7.3f} "
            f"{row['rmse']:>10.4g} {psnr:>6.2f}".replace("   nan", "     -")
        )
    if problem.unit == "nm":
        lines.append("rmse: misfit to the heights decoded from the frames, no error; `cpikan-hr evaluate` gives errors")
    return "\n".join(lines)
