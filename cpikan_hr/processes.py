"""The processes of one launch outside of training: who writes, who computes where, and how all stop when one fails."""

import importlib
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
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
        # Who has failed may end before this process knows of it, and the launcher then ends the others: not before
        # they have said why and cleared up.
        asked: list[int] = []
        before = signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
        torch.distributed.all_reduce(first, op=torch.distributed.ReduceOp.MIN)
        if first < self.ranks:
            failure = failure if first == self.rank else OtherRankFailed(int(first))
            failure.agreed = True
            raise failure
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)
        if asked:
            os.kill(os.getpid(), signal.SIGTERM)

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


def speaks_for_launch(seconds: float = 20.0) -> bool:
    """Whether this process, which fails, is the one to say why, where the processes of the launch have not agreed on it
    (`Processes.together`): that of the lowest rank among those that fail within so many seconds.

    Until all have failed none ends, since the launcher then ends the others. Over the launcher's own store, because
    there may be no process group yet.
    """
    ranks, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if ranks == 1 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    names = [f"cpikan_hr/{attempt}/failed/{one}" for one in range(ranks)]
    try:
        where = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = torch.distributed.TCPStore(*where, is_master=False, timeout=timedelta(seconds=seconds))
        store.set(names[rank], "")
        with suppress(torch.distributed.DistStoreError):
            store.wait(names, timedelta(seconds=seconds))
        return not any(store.check([name]) for name in names[:rank])
    except RuntimeError:  # the launcher is gone
        return True


def flagged(name: str) -> bool:
    """Whether `accelerate launch` has set this variable of the environment to true."""
    return os.environ.get(name, "false").lower() in ("1", "true", "yes")


def compute_device() -> torch.device:
    """This process's GPU, the CPU where there is none or the launch file says `use_cpu`."""
    if not torch.cuda.is_available() or flagged("ACCELERATE_USE_CPU"):
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
