"""The numbers of a run beside what `evaluate` says: its log, and the error of the classical decode."""

import json
import math
import tempfile
from pathlib import Path

from cpikan_hr.data.difference import difference
from cpikan_hr.data.heights import open_heights
from cpikan_hr.data.source import open_source
from cpikan_hr.data.stack import REFERENCE_UNIT
from cpikan_hr.errors import UserError
from cpikan_hr.problems import Problem
from cpikan_hr.problems.decode import decode_stack
from cpikan_hr.processes import compute_device


def classical_rmse(problem: Problem | None, folder: Path, remove_offset: bool) -> float | None:
    """RMSE of `cpikan-hr decode` in nm against the stack's own reference; None where there is none.

    The decoded map is written to `folder` for as long as it is compared.
    """
    stack = getattr(problem, "stack", None)
    if stack is None or stack.reference is None or stack.phase_steps_rad is None:
        return None
    with tempfile.TemporaryDirectory(prefix=".report-", suffix=".part", dir=folder) as scratch:
        path, _ = decode_stack(stack.stack, Path(scratch) / "classical.npy", device=compute_device())
        truth = open_heights(stack.reference, stack.reference_unit, REFERENCE_UNIT)
        found = difference(open_source(path), truth)
    rmse = found.deviation if remove_offset else found.rms
    return None if math.isnan(rmse) else rmse


def metrics_of(run: Path) -> list[dict]:
    """The lines of the run's metrics.jsonl; [] where there is none. A last line that was cut does not count."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); mend or remove it") from None
