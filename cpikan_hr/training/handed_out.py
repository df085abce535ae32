"""The field that a run would hand out if it ended now, and the end at which it does."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from torch import Tensor

from cpikan_hr import strict_json
from cpikan_hr.fields import Field
from cpikan_hr.files import write_text
from cpikan_hr.jets import Jet
from cpikan_hr.processes import Processes
from cpikan_hr.recipe import Recipe
from cpikan_hr.training.best import Best
from cpikan_hr.training.update import Updater
from cpikan_hr.training.weights import joined_state, save_again, save_field


class HandedOut:
    """What a second-order solver reached (`solved`), else the weights that train or their average, else the start.

    `about`: what describes the field, kept up to date by the run.
    """

    def __init__(self, recipe: Recipe, about: dict, field: Field, updater: Updater | None, processes: Processes):
        self.recipe, self.about, self.processes = recipe, about, processes
        self._field, self._updater, self.solved = field, updater, None

    @property
    def trains(self) -> bool:
        return self._updater is not None and self.solved is None

    def averaged(self) -> AbstractContextManager[None]:
        """A stretch in which the model that trains has the average for its weights, where one is kept."""
        return self._updater.averaged() if self.trains else nullcontext()

    def evaluate(self, points: Tensor, order: str) -> Jet:
        return (self._updater.model if self.trains else self.solved or self._field)(points, order)

    def write(self, path: Path, checked: dict) -> None:
        """Collective. The field's file; `checked`: what was seen of its states."""
        state = self._updater.weights() if self.trains else (self.solved or self._field).state_dict()
        with self.processes.together():
            if self.processes.rank == 0:
                about = self.about | {"checked": checked}
                save_field(path, joined_state(state, self.recipe, about), self.recipe, about)

    def end(self, run: Path, best: Best | None, replaced: bool) -> None:
        """Collective. RUN/field.safetensors: this field, or the best one in its place; about.json says the same."""
        self.about["checked"] = best.outcome(replaced) if best else {}
        if not replaced:
            self.write(run / "field.safetensors", self.about["checked"])
        with self.processes.together():
            if self.processes.rank == 0:
                if replaced:
                    save_again(best.path, run / "field.safetensors", self.recipe, self.about)
                write_text(run / "about.json", strict_json.dumps(self.about))
