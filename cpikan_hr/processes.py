"""The processes of one launch outside of training: who writes, who computes where, and how all stop when one fails."""

import importlib
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from cpikan_hr.errors import OtherRankFailed


@dataclass(frozen=True)
class Processes:
    """Rank and number of the processes, and the device that their collectives work on."""

    rank: int = 0
    ranks: int = 1
    device: torch.device | str = "cpu"

    @contextmanager
    def together(self) -> Iterator[None]:
        """A stretch that every rank finishes, or none: where one fails, all raise, and only the first of them speaks.

        Collective at its end. Inside, a rank may wait for the others only in another `together`, which a failed rank
        joins from wherever it was.
        """
        if self.ranks == 1:
            yield
            return
        failure: BaseException | None = None
        try:
            yield
        except BaseException as error:
            if getattr(error, "agreed", False):  # by a stretch inside this one
                raise
            failure = error
        first = torch.tensor(self.ranks if failure is None else self.rank, device=self.device)
        torch.distributed.all_reduce(first, op=torch.distributed.ReduceOp.MIN)
        if first < self.ranks:
            failure = failure if first == self.rank else OtherRankFailed(int(first))
            failure.agreed = True
            # All are about to end by themselves: the launcher, which ends the others when one has, need not hurry them.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            raise failure

    def sum(self, tensor: torch.Tensor) -> None:
        """Collective. Adds `tensor` over all ranks, in place."""
        if self.ranks > 1:
            with self.together():
                pass  # a rank that has failed meanwhile joins here instead
            shared = tensor.to(self.device)
            torch.distributed.all_reduce(shared)
            tensor.copy_(shared)

    def gather(self, value: Any) -> list[Any]:
        """Collective. The value of every rank, in order (pickled: only between the processes of one launch)."""
        if self.ranks == 1:
            return [value]
        with self.together():
            pass
        values = [None] * self.ranks
        torch.distributed.all_gather_object(values, value)
        return values


ALONE = Processes()


@contextmanager
def launched() -> Iterator[Processes]:
    """The processes of this `accelerate launch`, joined over gloo for the block; this process alone without one."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks == 1:
        yield ALONE
        return
    # As default arguments its functions keep the group that is there when they are imported, which meta tensors do: its
    # threads would then go on after `destroy_process_group`, and may abort the process where the interpreter ends.
    importlib.import_module("torch.distributed.nn.functional")
    torch.distributed.init_process_group("gloo")
    try:
        yield Processes(torch.distributed.get_rank(), ranks)
    finally:
        torch.distributed.destroy_process_group()


def flagged(name: str) -> bool:
    """Whether `accelerate launch` has set this variable of the environment to true."""
    return os.environ.get(name, "false").lower() in ("1", "true", "yes")


def compute_device() -> torch.device:
    """This process's GPU, the CPU where there is none or the launch file says `use_cpu`."""
    if not torch.cuda.is_available() or flagged("ACCELERATE_USE_CPU"):
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
