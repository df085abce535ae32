"""One optimizer update, the same for every backend: backward, finite check, clipping, step.

    updater = Updater(accelerator, model, optimizer, schedule=lambda step: 1.0, clip=1.0)
    for step in range(steps):
        for _ in range(updater.accumulate):
            with updater.micro_batch():                 # around forward and backward of one micro-batch
                updater.backward(loss_of(updater.model))
        gradient_norm = updater.step()

Invariants: parameters change only in `step`; no rank changes them unless loss and local gradients were finite on every
rank since the last step; accumulated micro-batches and ranks give the gradient of the mean loss over all of them.
Accelerate's own DeepSpeed wrapper steps inside `backward`, before anyone could look; so the engine is driven here.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cpikan_hr.errors import UserError
from cpikan_hr.fields import Field, Level
from cpikan_hr.solvers.file_adam import FileAdam, clip_gradients
from cpikan_hr.solvers.optimizers import states_of
from cpikan_hr.training.backend import check_optimizer, full_state_dict, precision_of
from cpikan_hr.training.ema import WeightAverage

# With fp16 an overflow is how the loss scale is found; this many in a row (2^-25 of the first scale) is a fault.
MAX_FP16_OVERFLOWS = 25
_FINE = 2**62  # code of "nothing wrong here"; codes are compared by MIN, so any fault wins


class NonFinite(UserError):
    """Loss or gradient is NaN or Inf on some rank. Raised on all ranks together, before the update.

    Attributes: step, what ("loss" or "gradient"), parameter (name or None), tile (its number in the level's grid, or
    None), rank (the lowest one concerned). `cause`: where the problem itself knows why.
    """

    def __init__(
        self, step: int, what: str, parameter: str | None, tile: int | None, rank: int, cause: str | None = None
    ):
        self.step, self.what, self.parameter, self.tile, self.rank = step, what, parameter, tile, rank
        where = f"tile {tile} of {parameter}" if parameter is not None else "no single tile"
        super().__init__(
            f"{what} is not finite at step {step}, {where}, rank {rank}: all ranks stopped before the update; "
            + (cause or "lower the learning rate, clip gradients, or look at this tile's data")
        )

    def because(self, cause: str | None) -> "NonFinite":
        """The same with its cause, where that is known."""
        return NonFinite(self.step, self.what, self.parameter, self.tile, self.rank, cause)


class Updater:
    """Prepares model and optimizer for the backend, then makes updates.

    Attributes: `model`, `optimizer` (prepared), `steps` (updates made; set it when resuming), `accumulate`, `average`.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: Callable[[int], float] | None = None,
        clip: float | None = None,
        ema: float | None = None,
    ):
        """
        Args:
            model: not yet prepared; what initialises its parameters has to happen before.
            optimizer: of torch's interface, over `model.parameters()`, not yet prepared.
            schedule: factor on every group's learning rate as a function of the step. A function of the step needs no
                state in a checkpoint, and Accelerate's scheduler wrapper advances once per *process*.
            clip: largest global gradient norm, None for no clipping. Under DeepSpeed it has to be the value that
                `make_accelerator` wrote into the engine's configuration.
            ema: decay per update of the average of the weights that `weights` hands out, None for the weights
                themselves.

        Raises: UserError where the optimizer cannot be offloaded, or weights cannot be averaged.
        """
        check_optimizer(accelerator, optimizer)
        self.accelerator = accelerator
        self.accumulate = accelerator.gradient_accumulation_steps
        self.steps = 0
        self._schedule = schedule or (lambda step: 1.0)
        self._clip = clip or float("inf")
        self._deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
        if self._deepspeed:
            configured = accelerator.deepspeed_plugin.deepspeed_config["gradient_clipping"]
            assert configured == (clip or 0.0), f"make_accelerator was told clip={configured}, Updater {clip}"
        self.average = WeightAverage(accelerator, model, ema) if ema else None
        self._prepare(model, optimizer)
        self._loss_is_finite: Tensor | None = None
        self._micro = 0
        self._overflows = 0

    def _prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._base_rates = [group["lr"] for group in optimizer.param_groups]
        self._watch = GradientWatch(model)  # hooks belong on the parameters before any wrapper reads them
        # Gloo and NCCL know no int16; such lists of terms are alike on all processes, so DDP need not send them.
        short = [name for name, buffer in model.named_buffers() if buffer.dtype == torch.int16]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, short)
        if self.accelerator.is_fsdp2 and precision_of(self.accelerator) != "no":
            model.forward = _autocast(self.accelerator, model.forward)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        if self.accelerator.is_fsdp2:  # it has replaced the parameters by sharded ones
            self._watch = ShardedGradientWatch(self.model, self._watch)

    def whole(self, build: Callable[[dict[str, Tensor]], Field]) -> Field:
        """Collective. The field that trains, with whole weights: itself, or where they are sharded a copy.

        `build` makes a field of such a `layout`.
        """
        field = self.accelerator.unwrap_model(self.model)
        if not self._sharded:
            return field
        copy = build(field.layout()).to(field.device)
        parameters = dict(copy.named_parameters())
        for name, value in self._shards().weights():
            parameters[name].data.copy_(value)
        return copy

    def put(self, field: Field) -> None:
        """Collective. Gives the field that trains the weights of what `whole` gave, changed alike on all processes."""
        if self._sharded:
            self._shards().put(dict(field.named_parameters()))

    def states(self) -> dict[str, dict]:
        """Collective. The optimizer's state by the parameters' names, as whole tensors."""
        if self._sharded:
            return self._shards().states()
        return states_of(self.optimizer.optimizer, self.accelerator.unwrap_model(self.model))

    def replace(self, model: Field, optimizer: torch.optim.Optimizer, rows: dict[str, Tensor]) -> None:
        """Collective. Goes on between two updates with another model and its optimizer, neither of them prepared yet.

        `rows`: by the name of every trained parameter, which rows of the one before it keeps. The optimizer has the
        groups and the state it needs.
        """
        assert self._micro == 0, "replace() between two updates"
        # As `free_memory` does; garbage is collected only where an engine goes, it takes as long as ten updates.
        self.accelerator._models.clear()
        self.accelerator._optimizers.clear()
        states, before = states_of(optimizer, model), self.model
        self.model = self.optimizer = self._watch = None
        if self._sharded:
            optimizer.state.clear()  # other tensors will be stepped, with a state of theirs
        if self._deepspeed:
            from cpikan_hr.training.shards import forget

            self.accelerator.deepspeed_engine_wrapped = None
            forget(before)
            del before
            gc.collect()
        self._prepare(model, optimizer)
        if self._sharded:
            self._shards().put_states(states)
        if self.average:
            self.average.replace(model, rows)

    @property
    def _sharded(self) -> bool:
        return self._deepspeed or self.accelerator.is_fsdp2

    @property
    def _in_files(self) -> bool:
        return isinstance(self.optimizer.optimizer, FileAdam)

    def _shards(self):
        if self._deepspeed:
            from cpikan_hr.training.shards import Shards  # DeepSpeed takes a second to import

            return Shards(self.model)
        from cpikan_hr.training.fsdp_shards import FSDPShards

        return FSDPShards(self.model, self.optimizer.optimizer)

    @property
    def learning_rates(self) -> list[float]:
        """The rates of the next update, one per parameter group."""
        return [rate * self._schedule(self.steps) for rate in self._base_rates]

    @contextmanager
    def micro_batch(self) -> Iterator[None]:
        """Around forward *and* backward of one micro-batch: gradients are reduced over ranks only in the last one."""
        last = self._micro + 1 == self.accumulate
        if self._deepspeed:
            self.model.set_gradient_accumulation_boundary(last)
            yield
        elif last:
            yield
        else:
            with self.accelerator.no_sync(self.model):
                yield

    def backward(self, loss: Tensor) -> None:
        """Accumulates the gradient of `loss / accumulate`. `loss`: scalar, the mean over this rank's micro-batch."""
        assert self._micro < self.accumulate, "more micro-batches than `accumulate` before step()"
        self._micro += 1
        finite = torch.isfinite(loss.detach())
        self._loss_is_finite = finite if self._loss_is_finite is None else self._loss_is_finite & finite
        if self._deepspeed:
            self.model.backward(loss)  # the engine divides by the accumulation steps itself
        else:
            self.accelerator.backward(loss)  # so does Accelerate

    def step(self) -> float:
        """Checks, clips, updates, clears the gradients. Returns the global gradient norm before clipping.

        Raises: NonFinite on every rank together; parameters and optimizer state are then as before.
        """
        assert self._micro == self.accumulate, f"step() after {self._micro} of {self.accumulate} micro-batches"
        self._micro = 0
        self._refuse_non_finite()
        for group, rate in zip(self.optimizer.param_groups, self.learning_rates, strict=True):
            group["lr"] = rate
        if self._deepspeed:
            self.model.step()
            norm = self.model.get_global_grad_norm()
        else:
            if self._in_files:
                norm = clip_gradients(self.model.parameters(), self._clip)
            else:
                norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self._clip)
            norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        if self.average:
            self.average.update()
        return float(norm)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The model has the averaged weights meanwhile, where there are any."""
        if not self.average:
            yield
            return
        with self.average.in_place():
            yield

    def weights(self) -> dict[str, Tensor] | None:
        """Collective. The model's whole state, averaged weights where asked for, on the main process; else None.

        To be written before the next update.
        """
        if self._in_files:
            return self.model.state_dict()  # as it lies in its files
        state = full_state_dict(self.accelerator, self.model)
        return state | self.average.state() if state and self.average else state

    def _refuse_non_finite(self) -> None:
        """One all-reduce of two integers. A code is fault * ranks + rank, so MIN keeps the fault and who has it."""
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        gradient = self._watch.first_bad()
        codes = torch.full((2,), _FINE, dtype=torch.int64, device=self.accelerator.device)
        codes[0] = torch.where(self._loss_is_finite, codes[0], rank)
        codes[1] = torch.where(gradient >= 0, gradient * ranks + rank, codes[1])
        if ranks > 1:
            torch.distributed.all_reduce(codes, op=torch.distributed.ReduceOp.MIN)
        loss_code, gradient_code = codes.tolist()
        self._loss_is_finite = None
        self._watch.clear()
        if gradient_code == loss_code == _FINE:
            self._overflows = 0
            return
        if loss_code == _FINE and self.accelerator.scaler is not None and self._overflows < MAX_FP16_OVERFLOWS:
            self._overflows += 1  # the scaler sees the same overflow, skips this update and lowers its scale
            return
        parameter, tile = self._watch.locate(gradient_code // ranks) if gradient_code != _FINE else (None, None)
        what, code = ("gradient", gradient_code) if loss_code == _FINE else ("loss", loss_code)
        raise NonFinite(self.steps, what, parameter, tile, code % ranks)


def _autocast(accelerator: Accelerator, forward: Callable) -> Callable:
    @wraps(forward)
    def within(*arguments, **options):
        with accelerator.autocast():
            return forward(*arguments, **options)

    return within


class GradientWatch:
    """Notes, parameter by parameter, the first tile whose local gradient was NaN or Inf since the last `clear`.

    Works by hooks on the parameters: they see this rank's whole gradient before DDP averages it and before ZeRO
    scatters it, so the tile and the rank are the ones where it happened. A parameter's rows, its first dimension, are
    its network's tiles, or what its module's `tile_of` says; its level knows their numbers in the grid.
    """

    def __init__(self, model: nn.Module):
        self._follow(model)
        levels = [(f"{name}.", module) for name, module in model.named_modules() if isinstance(module, Level)]
        level_of = {name: level for prefix, level in levels for name in self.names if name.startswith(prefix)}
        owner_of = {name: model.get_submodule(name.rpartition(".")[0]) for name in self.names}
        self._tile_of = {
            name: (getattr(owner, "tile_of", None), level_of.get(name)) for name, owner in owner_of.items()
        }
        for index, parameter in enumerate(self._parameters):
            parameter.register_hook(lambda gradient, index=index: self._note(index, gradient))

    def _follow(self, model: nn.Module) -> None:
        parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.names = [name for name, _ in parameters]
        self._parameters = [p for _, p in parameters]
        self.rows = [p.shape[0] if p.ndim else 1 for p in self._parameters]
        self.clear()

    @torch.no_grad()
    def _note(self, index: int, gradient: Tensor) -> None:
        gradient, rows = gradient.detach(), None
        if gradient.is_sparse:  # some rows of it, in any order
            rows, gradient = gradient._indices()[0], gradient._values()
        if not gradient.numel():
            return
        if gradient.ndim > 1:  # a reduction over each row, which keeps a NaN: no copy of the gradient
            gradient = torch.linalg.vector_norm(gradient.flatten(1), ord=float("inf"), dim=1)
        bad = ~torch.isfinite(gradient.reshape(-1))
        first = torch.where(bad.any(), bad.byte().argmax(), -1)
        if rows is not None and first >= 0:
            first = rows[bad].min()
        known = self._first[index]
        self._first[index] = first if known is None else torch.where(known >= 0, known, first)

    def first_bad(self) -> Tensor:
        """int64 scalar on the gradients' device: flat index over (parameter, row) of the first bad one, -1 if none."""
        found, offset = [], 0
        for first, rows in zip(self._first, self.rows, strict=True):
            if first is not None:
                found.append(torch.where(first >= 0, first + offset, _FINE))
            offset += rows
        if not found:
            return torch.tensor(-1)
        worst = torch.stack(found).min()
        return torch.where(worst == _FINE, -1, worst)

    def locate(self, flat_index: int) -> tuple[str, int]:
        """(parameter name, tile) of a flat index of `first_bad`."""
        for name, rows in zip(self.names, self.rows, strict=True):
            if flat_index < rows:
                slot_of, level = self._tile_of[name]
                slot = slot_of(flat_index) if slot_of else flat_index
                return name, level.tile_of(slot) if level else slot
            flat_index -= rows
        raise AssertionError("index beyond the last parameter")

    def clear(self) -> None:
        self._first: list[Tensor | None] = [None] * len(self.names)


class ShardedGradientWatch(GradientWatch):
    """The same for FSDP2, where only the reduced shards of gradients exist (the rank named holds the shard).

    `whole`: the watch of the model before it was sharded, which knows the tiles.
    """

    def __init__(self, model: nn.Module, whole: GradientWatch):
        self._follow(model)
        self._tile_of = whole._tile_of

    @torch.no_grad()
    def first_bad(self) -> Tensor:
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        for index, parameter in enumerate(self._parameters):
            if parameter.grad is None:
                continue
            shard = parameter.grad.to_local()
            mesh, placements = parameter.device_mesh, parameter.placements
            _, offset = compute_local_shape_and_global_offset(parameter.shape, mesh, placements)
            if shard.numel():
                self._note(index, shard)
                first = self._first[index]
                self._first[index] = torch.where(first >= 0, first + (offset[0] if offset else 0), first)
        return super().first_bad()
