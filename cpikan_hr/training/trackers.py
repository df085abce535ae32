"""What a run reports while it trains, on the main process: metrics.jsonl, TensorBoard events and a progress bar."""

import json
import time
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from cpikan_hr import strict_json
from cpikan_hr.files import write_text, writing
from cpikan_hr.progress import Progress
from cpikan_hr.training.log import Log


class Tracker:
    """Appends to the run folder; a resumed run drops the lines of steps it is about to repeat."""

    def __init__(self, folder: Path, total: int, start: int, enabled: bool, log: Log):
        self.enabled, self._log = enabled, log
        if not enabled:
            return
        self.path = folder / "metrics.jsonl"
        if self.path.exists():
            whole = [line for line in self.path.read_text().splitlines() if line.endswith("}")]
            kept = [line for line in whole if json.loads(line)["step"] <= start]
            write_text(self.path, "".join(line + "\n" for line in kept))
        self.events = SummaryWriter(folder / "tensorboard", purge_step=start + 1)
        self.bar, self.done, self.total = Progress("training", "steps", leave=True, log=log), start, total
        if start < total:
            self.bar(start, total)
        self.began, self.cpu_began, self.pixels = time.perf_counter(), time.process_time(), 0

    def update(self, pixels: int) -> None:
        """One more step over so many pixels."""
        if self.enabled:
            self.pixels += pixels
            self.done += 1
            self.bar(self.done, self.total)

    def log(self, step: int, values: dict[str, float]) -> None:
        """A line of metrics.jsonl, the same to TensorBoard, loss and figure of merit on the bar."""
        if not self.enabled:
            return
        per_second = self.pixels / max(time.perf_counter() - self.began, 1e-9)
        values = {**values, "px_per_s": per_second, "cpu_s": time.process_time() - self.cpu_began}
        self._append({"step": step, **values})
        self._event(values, step)
        left_out = ("lr", "grad_norm", "px_per_s", "cpu_s", "rms_")
        shown = {name: f"{value:.4g}" for name, value in values.items() if not name.startswith(left_out)}
        shown["px/s"] = f"{per_second:.3g}"
        self.bar.show(", ".join(f"{name} {value}" for name, value in shown.items()))

    def check(self, look) -> None:
        """A line of looks.jsonl: a state's loss and figure on the sample (`best.py`)."""
        if self.enabled:
            checked = {"checked": look.loss, f"checked_{look.name}": look.figure}
            self._append({"step": look.step, **checked}, "looks.jsonl")
            self._event(checked, look.step)

    def say(self, line: str) -> None:
        """A line on stdout, above the bar."""
        if self.enabled:
            self.bar.say(line)
            self._log(line)

    def start(self, levels: list[dict]) -> None:
        """What each level of the start contributed: lines of step 0, which have a level and no loss."""
        if not self.enabled:
            return
        for row in levels:
            self._append({"step": 0, **row})
            figures = {name: value for name, value in row.items() if name in ("rmse", "psnr_db", "params")}
            self._event({f"start/level_{row['level']}/{name}": value for name, value in figures.items()}, 0)

    def _append(self, line: dict, name: str = "metrics.jsonl") -> None:
        path = self.path.with_name(name)
        with writing(path), path.open("a") as lines:
            lines.write(strict_json.dumps(line) + "\n")

    def _event(self, values: dict[str, float], step: int) -> None:
        with writing(self.path.with_name("tensorboard")):
            for name, value in values.items():
                self.events.add_scalar(name, value, step)

    def close(self) -> None:
        if self.enabled:
            self.bar.close()
            with writing(self.path.with_name("tensorboard")):
                self.events.close()
