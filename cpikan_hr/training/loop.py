"""The one loop: every problem, every field, every backend.

read pixels -> model(points) -> problem.loss -> backward -> checked update. The backend is the launch file's choice; the
global batch of a step depends on the seed and the step alone, not on how many processes or micro-batches share it.
"""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from cpikan_hr.data.sampling import PixelSampler
from cpikan_hr.errors import UserError
from cpikan_hr.fields import Field
from cpikan_hr.jets import compile_kernels
from cpikan_hr.problems import Problem, build_problem
from cpikan_hr.problems.base import pixel_centres
from cpikan_hr.recipe import Recipe, dump_recipe
from cpikan_hr.runtime import peak_rss_mb
from cpikan_hr.solvers.optimizers import build_optimizer, rate
from cpikan_hr.solvers.start import fit_field
from cpikan_hr.training import checkpoints
from cpikan_hr.training.backend import make_accelerator
from cpikan_hr.training.trackers import Tracker
from cpikan_hr.training.update import Updater
from cpikan_hr.training.weights import save_field


def train(recipe: Recipe) -> Path:
    """Trains the recipe under whatever `accelerate launch` set up, or as one process. Returns the run folder."""
    began = time.perf_counter()
    options, run = recipe.training, Path(recipe.output)
    accelerator = make_accelerator(
        precision=options.precision, accumulate=options.accumulate, clip=options.clip, offload_folder=run
    )
    if options.precision in ("bf16", "fp16") and (recipe.problem.laplacian) and accelerator.is_main_process:
        print(f"note: derivatives stay in fp32; {options.precision} applies to none of this recipe's loss", flush=True)
    shares = accelerator.num_processes * options.accumulate
    if recipe.batch.blocks < shares:
        raise UserError(f"batch.blocks is {recipe.batch.blocks}: give at least one per process and micro-batch, {shares} here")
    problem = build_problem(recipe)
    checkpoint = checkpoints.choose(run, recipe.resume)
    if accelerator.is_main_process:
        open_run(run, recipe, checkpoint)
    accelerator.wait_for_everyone()
    compile_kernels(recipe.field.compile)
    field = Field.build(recipe.field, problem.shape, problem.channels, options.seed)
    field.to(accelerator.device)
    begin_field(field, problem, recipe, accelerator, run, resumed=checkpoint is not None)
    optimizer = build_optimizer(field, options, recipe.field)
    parameters = field.count_parameters()
    updater = Updater(accelerator, field, optimizer, lambda step: rate(step, options), options.clip, options.ema)
    if checkpoint is not None:
        checkpoints.load(updater, checkpoint)
    about = {
        "shape": list(problem.shape), "channels": problem.channels, "unit": problem.unit, "dtype": problem.dtype,
        "pixel_pitch_um": problem.pixel_pitch_um, "params": parameters, "processes": accelerator.num_processes,
        "train_seconds": 0.0, "peak_rss_mb": 0.0, "gpu_peak_mb": 0.0,
    }  # fmt: skip
    if accelerator.is_main_process:
        (run / "about.json").write_text(json.dumps(about))  # what `export` needs where the run does not end
    run_steps(updater, problem, recipe, run)
    state = updater.weights()
    if accelerator.is_main_process:
        about["steps"], about["train_seconds"] = updater.steps, time.perf_counter() - began
        about["peak_rss_mb"] = peak_rss_mb()
        about["gpu_peak_mb"] = torch.cuda.max_memory_allocated() / 1e6 if torch.cuda.is_available() else 0.0
        save_field(run / "field.safetensors", state, recipe, about)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return run


def open_run(run: Path, recipe: Recipe, checkpoint: Path | None) -> None:
    """Creates the run folder with the resolved recipe; refuses to mix a different recipe into an existing run."""
    try:
        run.mkdir(parents=True, exist_ok=True)
        resolved = run / "recipe.yaml"
        if checkpoint is None:
            (run / "metrics.jsonl").unlink(missing_ok=True)
        elif resolved.exists() and _identity(resolved.read_text()) != _identity(dump_recipe(recipe)):
            raise UserError(f"{resolved}: the run was begun with another field, problem or batch; give another output, or --resume never")
        resolved.write_text(dump_recipe(recipe))
    except OSError as error:
        raise UserError(f"output {run}: cannot be written ({error.strerror}); choose another folder") from None


def _identity(text: str) -> dict:
    tree = yaml.safe_load(text)
    return {key: tree.get(key) for key in ("problem", "field", "start", "batch")}


def begin_field(field: Field, problem: Problem, recipe: Recipe, accelerator: Accelerator, run: Path, resumed: bool) -> None:
    """Closed-form start, or normalisation alone. What it leaves in buffers is kept in `start.safetensors`.

    Checkpoints of some backends hold parameters only, and a resumed run skips the start.
    """
    kept = run / "start.safetensors"
    if resumed:
        field.load_state_dict(load_file(kept), strict=False)
        return
    ranks = accelerator.num_processes
    if recipe.start.enabled:
        fit_field(
            field, problem.target, problem.shape, recipe.start, accelerator.process_index, ranks,
            torch.distributed.all_reduce if ranks > 1 else None,
        )  # fmt: skip
    else:
        stride = max(1, max(problem.shape) // 512)
        target = problem.target(0, problem.shape[0], 0, problem.shape[1], stride)
        known = torch.from_numpy(target.values[target.weight > 0]).to(accelerator.device)
        for number, level in enumerate(field.levels):
            level.scale[:] = known.std(0)
            level.mean[:] = known.mean(0) if number == 0 else 0.0
    if accelerator.is_main_process:
        save_file({name: value.contiguous() for name, value in field.named_buffers()}, kept)
    accelerator.wait_for_everyone()


def run_steps(updater: Updater, problem: Problem, recipe: Recipe, run: Path) -> None:
    """Updates until `training.steps`, reading the next micro-batch while the present one is computed."""
    options, batch, accelerator = recipe.training, recipe.batch, updater.accelerator
    sampler = PixelSampler(problem.shape, batch.blocks, batch.size, batch.stride, options.seed)
    shares = accelerator.num_processes * options.accumulate

    def read(number: int) -> dict[str, torch.Tensor]:
        step, micro = divmod(number, options.accumulate)
        return read_batch(problem, sampler, step, micro * accelerator.num_processes + accelerator.process_index, shares)

    tracker = Tracker(run, options.steps, updater.steps, accelerator.is_main_process)
    saved_at = time.perf_counter()
    last = options.steps * options.accumulate
    with ThreadPoolExecutor(1) as reader:
        number = updater.steps * options.accumulate
        coming = reader.submit(read, number) if number < last else None
        while updater.steps < options.steps:
            step, points = updater.steps, sampler.points(updater.steps)
            sums = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
            for _ in range(options.accumulate):
                data = {name: value.to(accelerator.device) for name, value in coming.result().items()}
                number += 1
                coming = reader.submit(read, number) if number < last else None
                with updater.micro_batch():
                    jet = updater.model(data["points"], problem.order, active_levels(recipe, step))
                    losses, errors = problem.loss(jet, data)
                    # The mean over ranks and micro-batches of this is the mean over the whole batch.
                    updater.backward(losses.sum() * (shares / points))
                sums += torch.stack([losses.detach().double().sum(), errors.detach().double().sum()])
            norm = updater.step()
            tracker.update(points)
            if updater.steps % options.log_every == 0 or updater.steps == options.steps:
                if accelerator.num_processes > 1:
                    torch.distributed.all_reduce(sums)
                loss, error = (sums / points).tolist()
                name, value = problem.figure(error)
                lr = max(updater.learning_rates)
                tracker.log(updater.steps, {"loss": loss, name: value, "lr": lr, "grad_norm": norm})
            if due(updater, options, saved_at):
                checkpoints.save(updater, run, options.keep)
                saved_at = time.perf_counter()
    tracker.close()


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


def read_batch(problem: Problem, sampler: PixelSampler, step: int, share: int, shares: int) -> dict[str, torch.Tensor]:
    """The share's samples and their coordinates, `points` float64 [n, 2]."""
    draws = sampler.draws(step, share, shares)
    parts = [problem.samples(*draw.window, draw.iy, draw.ix) for draw in draws]
    data = {name: torch.from_numpy(np.concatenate([part[name] for part in parts])) for name in parts[0]}
    data["points"] = torch.cat([pixel_centres(draw.iy, draw.ix) for draw in draws])
    return data
