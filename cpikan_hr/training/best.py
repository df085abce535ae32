"""The best state of a run: looked at now and then on a fixed sample, so that no worse one is handed out unsaid.

The sample is alike in all processes and does not change; a look is one forward pass over it. The best state so far is a
field's file, RUN/best.safetensors, that checkpoints link to: a resumed run knows what the one that went on knew.
"""

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from cpikan_hr.errors import UserError
from cpikan_hr.problems import Problem
from cpikan_hr.problems.batches import Batches
from cpikan_hr.processes import Processes

if TYPE_CHECKING:
    from cpikan_hr.training.handed_out import HandedOut

FILE = "best.safetensors"
SHARE = 0.02  # of the time of the updates: what looks may take
BACKWARD = 3  # an update takes so many times its forward pass
LOOKS = 50  # in a run at most


class Look(NamedTuple):
    """A state of the field and its loss on the sample, with the problem's figure of merit there."""

    step: int
    loss: float
    name: str
    figure: float

    def plain(self) -> dict:
        return {"step": self.step, "loss": self.loss, self.name: self.figure}

    def __str__(self) -> str:
        shown = {"psnr_db": f"{self.figure:.2f} dB, ", "rmse_grey": f"{self.figure:.4g} grey levels, "}
        return f"{shown.get(self.name, '')}loss {self.loss:.4g}"


class Best:
    """`first`, `last` and `best`: looks. `trusted`: whether the best state may be handed out in place of the last."""

    def __init__(self, run: Path, problem: Problem, batches: Batches, processes: Processes, steps: int, micro: int):
        """micro: points that an update evaluates at once."""
        self.path, self.problem, self.processes = run / FILE, problem, processes
        self.trusted = problem.judged
        count = batches.sampled()
        rounds = -(-count // (processes.ranks * max(micro, 1024)))
        shares = rounds * processes.ranks
        self._data = [batches.sample(processes.rank + k * processes.ranks, shares) for k in range(rounds)]
        self.points = count
        self.every = max(round(count / (micro * processes.ranks * BACKWARD * SHARE)), -(-steps // LOOKS), 1)
        self.first: Look | None = None
        self.best: Look | None = None
        self.last: Look | None = None

    def restore(self, checkpoint: Path) -> None:
        """What was known when a checkpoint was written; nothing where it does not say."""
        self.first = self.best = None
        looks = _looks_of(checkpoint / FILE)
        if looks:
            self.first, self.best = looks
            if self.processes.rank == 0:
                _link(checkpoint / FILE, self.path)

    def due(self, step: int) -> bool:
        return step % self.every == 0 and (self.last is None or self.last.step != step)

    @torch.no_grad()
    def look(self, step: int, handed: "HandedOut") -> Look:
        """Collective. Looks at the field that would be handed out now, and keeps it where it is the best."""
        sums = torch.zeros(3, dtype=torch.float64, device=self.processes.device)
        with handed.averaged():
            for data in self._data:
                data = {name: value.to(self.processes.device) for name, value in data.items()}
                losses, errors = self.problem.misfit(handed.evaluate(data["points"], self.problem.order), data)
                known = data.get("known", torch.ones_like(losses))  # pixels without data are no points
                sums += torch.stack([part.double().sum() for part in (losses, errors, known)])
        self.processes.sum(sums)
        loss, error = (sums[:2] / sums[2]).tolist()
        self.last = Look(step, loss, *self.problem.figure(error))
        self.first = self.first or self.last
        if self.best is None or loss < self.best.loss:
            self.best = self.last
            handed.write(self.path, {"start": self.first.plain(), "best": self.last.plain()})
        return self.last

    @property
    def worse(self) -> bool:
        """Whether the last state is worse than the best."""
        return self.last is not None and not self.last.loss <= self.best.loss

    def outcome(self, replaced: bool) -> dict:
        """What `about` says: the start's look, the end's, and that of the field that is handed out."""
        field = self.best if replaced else self.last
        return {"points": self.points, "start": self.first.plain(), "end": self.last.plain(), "field": field.plain()}

    def told(self, replaced: bool) -> str:
        """One line: start and end side by side, and what is handed out where the end is not the best."""
        line = f"on {self.points} points: start {self.first}; end {self.last}"
        if not self.worse:
            return line
        where = "the start" if self.best.step == 0 else f"{self.best.step} updates ({self.best})"
        kept = f"the field is that of {where}" if replaced else f"the field is the end's, though {where} had less loss"
        return f"warning: {line}: the end is worse; {kept}"

    def forget(self) -> None:
        if self.processes.rank == 0:
            self.path.unlink(missing_ok=True)


def link_best(run: Path, folder: Path) -> None:
    """Keeps the best state so far beside a checkpoint."""
    if (run / FILE).is_file():
        _link(run / FILE, folder / FILE)


def _link(source: Path, target: Path) -> None:
    if source.exists() and target.exists() and source.samefile(target):
        return
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copyfile(source, target)


def _looks_of(path: Path) -> tuple[Look, Look] | None:
    from cpikan_hr.training.weights import read_file  # it imports what checkpoints are made of

    with suppress(UserError, OSError, KeyError, ValueError):
        _, metadata = read_file(path, mapped=True)
        found = json.loads(metadata["about"])["checked"]
        return _look(found["start"]), _look(found["best"])
    return None


def _look(plain: dict) -> Look:
    name = next(key for key in plain if key not in ("step", "loss"))
    return Look(plain["step"], plain["loss"], name, plain[name])
