"""The one loop: every problem, every field, every backend.

read pixels -> model(points) -> problem.loss -> backward -> checked update. The backend is the launch file's choice; the
global batch of a step depends on the seed and the step alone, not on how many processes or micro-batches share it.
"""

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from pathlib import Path

import torch
from accelerate import Accelerator

from cpikan_hr.errors import Interrupted, UserError
from cpikan_hr.fields import Field, Region
from cpikan_hr.jets import Jet, compile_kernels
from cpikan_hr.mapped import in_files, in_memory
from cpikan_hr.problems import Problem, build_problem
from cpikan_hr.problems.batches import Batches
from cpikan_hr.processes import Processes
from cpikan_hr.recipe import Recipe, load_recipe
from cpikan_hr.runtime import peak_rss_mb
from cpikan_hr.solvers.balance import term_sizes
from cpikan_hr.solvers.optimizers import build_optimizer, rate
from cpikan_hr.solvers.start import fit_field, normalise, sweep_field
from cpikan_hr.training import checkpoints
from cpikan_hr.training.backend import make_accelerator
from cpikan_hr.training.best import Best
from cpikan_hr.training.display import Preview, StartBar, contribution_table, described, missed
from cpikan_hr.training.handed_out import HandedOut
from cpikan_hr.training.in_files import goes_into_files
from cpikan_hr.training.log import Log
from cpikan_hr.training.requirements import check_backend, idle, whole_weights
from cpikan_hr.training.run_folder import begin_run, held_run
from cpikan_hr.training.settling import settle
from cpikan_hr.training.solve import check_start, solve
from cpikan_hr.training.stopping import Stop, Stopped
from cpikan_hr.training.tensors import save_tensors
from cpikan_hr.training.trackers import Tracker
from cpikan_hr.training.update import NonFinite, Updater


def train(recipe: Recipe) -> Path:
    """Trains the recipe under whatever `accelerate launch` set up, or as one process. Returns the run folder."""
    began = time.perf_counter()
    options, run = recipe.training, Path(recipe.output)
    accelerator = make_accelerator(
        precision="no" if recipe.full_precision else options.precision,
        accumulate=options.accumulate,
        clip=options.clip,
        offload_folder=run,
    )
    if options.precision in ("bf16", "fp16") and recipe.full_precision and accelerator.is_main_process:
        print(f"note: phases and derivatives stay in fp32; {options.precision} is left out of this run", flush=True)
    processes = checkpoints.processes_of(accelerator)
    with ExitStack() as held:
        with processes.together():
            if accelerator.is_main_process:
                held.enter_context(held_run(run))
            check_backend(recipe, accelerator)
            problem = build_problem(recipe)
            problem.batches(recipe).check(accelerator.num_processes * options.accumulate)
            checkpoint = checkpoints.choose(run, recipe.resume)
            check_run(run, recipe, checkpoint)
        with Stop(recipe.target.seconds, began) as stop:
            fit(recipe, run, problem, accelerator, processes, checkpoint, began, stop)
    accelerator.end_training()
    if accelerator.is_main_process:
        Log(run, True).say(f"wrote {run}")
    if stop.signalled or stop.interrupted:
        resume = ", or resume it" if checkpoints.complete(run) else ""
        raise Interrupted(f"interrupted: {run} holds the field so far; render it{resume}")
    return run


def fit(
    recipe: Recipe,
    run: Path,
    problem: Problem,
    accelerator: Accelerator,
    processes: Processes,
    checkpoint: Path | None,
    began: float,
    stop: Stop,
) -> None:
    """The training inside its folder: start, steps, weights."""
    options = recipe.training
    compile_kernels(recipe.field.compile)
    preview, log = Preview(run, problem, accelerator.is_main_process), Log(run, accelerator.is_main_process)
    with processes.together():
        if checkpoint is None:
            field, levels = begin_field(problem, recipe, processes, preview, stop, log)
        else:
            field, levels = field_of(checkpoints.layout_of(run, checkpoint), problem, recipe), levels_of(run)
            field.to(accelerator.device)
    if problem.box is not None and checkpoint is None:
        check_start(field, problem, recipe, processes, whole_weights(accelerator))
    start, about = None if checkpoint else field.layout(), described_field(field, problem, accelerator, levels)
    second = checkpoint is not None and checkpoints.is_second_order(checkpoint)
    updater = None if second else make_updater(field, recipe, accelerator, checkpoint)
    batches, best = problem.batches(recipe), None
    if updater or recipe.solve.method != "none":  # else the start is the answer
        micro = -(-batches.points(0) // (accelerator.num_processes * options.accumulate))
        best = Best(run, problem, batches, processes, options.steps, micro)
    if updater and checkpoint is not None:
        checkpoints.load(updater, checkpoint)
    if checkpoint is not None:
        batches.restore(checkpoints.batches_of(checkpoint))
    with processes.together():
        if accelerator.is_main_process:
            begin_run(run, recipe, about, start)
            start = None  # what it holds is not the field's any more where that went into files
            tell_begin(problem, recipe, checkpoint, levels, stop, log)
    if best and checkpoint is not None:
        best.restore(checkpoint)
    handed = HandedOut(recipe, about, field, updater, processes)
    steps = updater.steps if updater else checkpoints.step_of(checkpoint) if second else 0
    total = options.steps + recipe.solve.most
    with closing(Tracker(run, total, steps, accelerator.is_main_process, log)) as tracker:

        def look(step: int) -> None:
            tracker.check(best.look(step, handed))

        tracker.start([] if checkpoint else [described(row, problem) for row in levels])
        if best and best.first is None:
            look(steps)
        if updater:
            run_steps(updater, problem, batches, recipe, run, stop, preview, tracker, best.due, look)
            steps = updater.steps
        if recipe.solve.method != "none" and steps >= options.steps:
            handed.solved = accelerator.unwrap_model(updater.model) if updater else field
            resumed = checkpoint if second else None
            steps = solve(handed.solved, problem, batches, recipe, run, resumed, processes, stop, tracker, preview)
        if best:
            look(steps)
    marching = handed.solved is not None and recipe.solve.march is not None and steps < total  # not all is solved yet
    replaced = best is not None and best.worse and best.trusted and not marching
    if replaced and handed.trains and (options.checkpoint_steps or options.checkpoint_minutes):
        checkpoints.save(updater, run, options.keep, batches.state())  # from where the run can still go on
    about |= {"steps": steps, "train_seconds": time.perf_counter() - began, "peak_rss_mb": peak_rss_mb()}
    about["gpu_peak_mb"] = torch.cuda.max_memory_allocated() / 1e6 if torch.cuda.is_available() else 0.0
    handed.end(run, best, replaced)
    with processes.together():
        if accelerator.is_main_process:
            if best:
                log.say(best.told(replaced))
                best.forget()
            points = batches.seen(recipe, steps)
            if points:
                save_tensors(run / "points.safetensors", points)


def described_field(field: Field, problem: Problem, accelerator: Accelerator, levels: list[dict]) -> dict:
    """What is kept with the field, and what `export` needs where the run does not end."""
    return {
        "shape": list(problem.shape), "channels": problem.channels, "unit": problem.unit, "dtype": problem.dtype,
        "pixel_pitch_um": problem.pixel_pitch_um, "params": field.count_parameters(),
        "processes": accelerator.num_processes, "train_seconds": 0.0, "peak_rss_mb": 0.0, "gpu_peak_mb": 0.0,
        "levels": levels, **problem.about(),
    }  # fmt: skip


def make_updater(
    field: Field, recipe: Recipe, accelerator: Accelerator, checkpoint: Path | None
) -> Updater | None:
    """None where no update is asked for: a start that is the answer is written as it lies in its files."""
    options = recipe.training
    if not options.steps and checkpoint is None:
        return None
    filed = goes_into_files(field, recipe, accelerator)
    if filed:
        in_files(field)
    elif checkpoint is None:
        in_memory(field)  # what the start has left in its files
    optimizer = build_optimizer(field, options, recipe.field, filed)
    return Updater(accelerator, field, optimizer, lambda step: rate(step, options), options.clip, options.ema)


def field_of(layout: dict[str, torch.Tensor], problem: Problem, recipe: Recipe) -> Field:
    """The field of a recipe's problem that is laid out so; its weights are fresh where `layout` has none."""
    return Field.from_layout(
        recipe.field, problem.extent, problem.channels, layout, recipe.training.seed, problem.box
    )


def check_run(run: Path, recipe: Recipe, checkpoint: Path | None) -> None:
    """Refuses to mix a different recipe into an existing run, or to replace its field by that of another."""
    resolved = run / "recipe.yaml"
    replaced = recipe.resume == "auto" and (run / "field.safetensors").exists()
    if (checkpoint or replaced) and resolved.exists() and _identity(resolved) != _identity_of(recipe):
        raise UserError(
            f"{resolved}: the run was begun with another field, problem, start, target or batch; "
            "give another output, or --resume never"
        )


def _identity(resolved: Path) -> dict:
    return _identity_of(load_recipe(resolved))


def _identity_of(recipe: Recipe) -> dict:
    return recipe.model_dump(include={"problem", "field", "start", "target", "batch"})


def tell_begin(
    problem: Problem, recipe: Recipe, checkpoint: Path | None, levels: list[dict], stop: Stop, log: Log
) -> None:
    """Says which options do nothing, what the data say, what each level contributed, and which target was missed unless
    the start was stopped.
    """
    for line in idle(recipe):
        log.say(line)
    if checkpoint is not None:
        return
    if problem.note():
        log.say(problem.note())
    if levels:
        log.say(contribution_table(levels, problem))
        for line in [] if stop.signalled or stop.interrupted else missed(levels, problem, recipe.target):
            log.say(line)


def levels_of(run: Path) -> list[dict]:
    """What each level contributed to the start of an earlier run, where it says."""
    try:
        return json.loads((run / "about.json").read_text()).get("levels", [])
    except (OSError, ValueError):
        return []


def begin_field(
    problem: Problem, recipe: Recipe, processes: Processes, preview: Preview, stop: Stop, log: Log
) -> tuple[Field, list[dict]]:
    """A new field with its levels solved, or only normalised; and what each level contributed.

    Ctrl-C and the end of `target.seconds` leave what is solved so far: the levels, the present one as of its last pass.
    """
    field = Field.build(
        recipe.field, problem.extent, problem.channels, recipe.training.seed, box=problem.box
    ).to(processes.device)
    if problem.box is not None:  # an equation has no values to start from
        return field, []
    if not recipe.start.enabled:
        normalise(field, problem.target, problem.shape, recipe)
        return field, []
    levels: list[dict] = []
    bar = StartBar(processes.rank == 0, log)

    def progress(label: str, fraction: float) -> None:
        bar(label, fraction)
        if stop.asked and levels and processes.ranks == 1:
            raise Stopped
        if stop.signalled and not levels and processes.ranks == 1:
            raise KeyboardInterrupt  # nothing is solved that could be kept

    def solved(contributions: list[dict]) -> None:
        levels[:] = contributions
        bar.show(levels, problem)
        preview.draw(field, pause=2)
        if stop.agreed(processes):
            raise Stopped

    with suppress(Stopped), closing(bar):
        target = problem.kept_target()
        fit_field(field, target, problem.shape, recipe, problem.full_range, processes, progress, solved)
    preview.draw(field, pause=0)
    return field, levels


def run_steps(
    updater: Updater,
    problem: Problem,
    batches: Batches,
    recipe: Recipe,
    run: Path,
    stop: Stop,
    preview: Preview,
    tracker: Tracker,
    due_look: Callable[[int], bool],
    look: Callable[[int], None],
) -> None:
    """Updates until `training.steps`, reading the next micro-batch while the present one is computed."""
    options, accelerator = recipe.training, updater.accelerator
    shares = accelerator.num_processes * options.accumulate

    def read(number: int, region: Region | None) -> dict[str, torch.Tensor]:
        step, micro = divmod(number, options.accumulate)
        share = micro * accelerator.num_processes + accelerator.process_index
        return batches.read(step, share, shares, region)

    @torch.no_grad()
    def evaluate(points: torch.Tensor, order: str) -> Jet:
        return updater.model(points.to(accelerator.device), order, active_levels(recipe, updater.steps), "unchecked")

    def total(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.to(accelerator.device)
        processes.sum(tensor)
        return tensor.cpu()

    processes, whole = checkpoints.processes_of(accelerator), whole_weights(accelerator)
    field = accelerator.unwrap_model(updater.model)  # its weights may be sharded
    region = Region(field) if field.settled else None

    def whole_field() -> Field:
        return updater.whole(lambda layout: field_of(layout, problem, recipe))

    saved_at = time.perf_counter()
    last = options.steps * options.accumulate
    with ThreadPoolExecutor(1) as reader:
        number = updater.steps * options.accumulate
        coming = reader.submit(read, number, region) if number < last else None
        while updater.steps < options.steps and not stop.agreed(processes):
            if options.settle_rmse and updater.steps % options.settle_every == 0:
                groups = active_levels(recipe, updater.steps)
                training = settle(updater, whole_field(), problem, recipe, groups, processes)
                if not training:
                    tracker.say(f"all tiles have settled after {updater.steps} updates")
                    break
                if training < field.trained_tiles:
                    field = accelerator.unwrap_model(updater.model)
                    region = Region(field)
                    coming = reader.submit(read, number, region)
            if balance_due(recipe, updater.steps):
                problem.weighting.rebalance(term_sizes(field, problem, problem.options.balance.method))
            if batches.prepare(updater.steps, evaluate):
                coming = reader.submit(read, number, region)
            step, points = updater.steps, batches.points(updater.steps)
            sums, seen = torch.zeros(3, dtype=torch.float64, device=accelerator.device), []
            for _ in range(options.accumulate):
                data = {name: value.to(accelerator.device) for name, value in coming.result().items()}
                number += 1
                coming = reader.submit(read, number, region) if number < last else None
                with updater.micro_batch():
                    jet = updater.model(data["points"], problem.order, active_levels(recipe, step), "unchecked")
                    losses, errors = problem.loss(jet, data)
                    if problem.box is not None:
                        seen.append((jet._replace(rows=jet.rows.detach()), data))
                    # The mean over ranks and micro-batches of this is the mean over the whole batch.
                    updater.backward(losses.sum() * (shares / points))
                known = data.get("known", torch.ones_like(losses))  # pixels without data are no points
                sums += torch.stack([part.detach().double().sum() for part in (losses, errors, known)])
            norm = stepped(updater, problem, seen, processes)
            batches.finish(total)
            tracker.update(points)
            if options.sweep_every and updater.steps % options.sweep_every == 0:
                swept = whole_field()
                sweep_field(swept, problem.target, problem.shape, recipe, processes)
                updater.put(swept)
            if updater.steps % options.log_every == 0 or updater.steps == options.steps:
                if accelerator.num_processes > 1:
                    torch.distributed.all_reduce(sums)
                loss, error = (sums[:2] / sums[2].clamp_min(1)).tolist()
                name, value = problem.figure(error)
                lr = max(updater.learning_rates)
                tiles = {"tiles": field.trained_tiles} if options.settle_rmse else {}
                told = tiles | (problem.told(field) if whole else {})
                tracker.log(updater.steps, {"loss": loss, name: value, "lr": lr, "grad_norm": norm, **told})
                if whole:
                    preview.draw(field)
            if due_look(updater.steps):
                look(updater.steps)
            if due(updater, options, saved_at):
                checkpoints.save(updater, run, options.keep, batches.state())
                saved_at = time.perf_counter()
    if stop.interrupted and 0 < updater.steps < options.steps:
        checkpoints.save(updater, run, options.keep, batches.state())  # so that it can be resumed


def stepped(
    updater: Updater, problem: Problem, seen: list[tuple[Jet, dict[str, torch.Tensor]]], processes: Processes
) -> float:
    """Collective. `Updater.step`; NonFinite says why where the problem can tell it from what this update has `seen`.

    seen: jets without a graph and data of the micro-batches, of equations.
    """
    try:
        return updater.step()
    except NonFinite as fault:
        if not seen:
            raise
        causes = processes.gather(next(filter(None, (problem.fault(jet, data) for jet, data in seen)), None))
        raise fault.because(next(filter(None, causes), None)) from None


def due(updater: Updater, options, saved_at: float) -> bool:
    """Whether a checkpoint is due; by the main process's clock, so that all ranks agree."""
    if options.checkpoint_steps and updater.steps % options.checkpoint_steps == 0:
        return True
    if not options.checkpoint_minutes:
        return False
    late = time.perf_counter() - saved_at > 60 * options.checkpoint_minutes
    flag = torch.tensor([int(late)], device=updater.accelerator.device)
    if updater.accelerator.num_processes > 1:
        torch.distributed.broadcast(flag, 0)
    return bool(flag.item())


def active_levels(recipe: Recipe, step: int) -> int | None:
    """Progressive training lets the levels join one after another, each for an equal share of the steps."""
    if recipe.field.mode == "joint":
        return None
    return 1 + step * len(recipe.field.levels) // recipe.training.steps


def balance_due(recipe: Recipe, step: int) -> bool:
    """Whether the terms of an equation's loss are weighed again before an update."""
    balance = getattr(recipe.problem, "balance", None)
    return balance is not None and step % balance.every == 0
