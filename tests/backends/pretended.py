"""FSDP2 on CPUs: Accelerate is told that they are accelerators, beside which alone it offers it.

All that comes after is what runs on GPUs: Accelerate's preparation, torch's `fully_shard` and its sharded checkpoints.
"""

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from cpikan_hr.training import backend


def pretend_accelerators() -> None:
    """From here on `ACCELERATE_USE_FSDP` is followed in this process, by one accelerator after the other."""
    found, begin, flagged = PartialState.__init__, AcceleratorState.__init__, backend.flagged
    known = PartialState._shared_state

    def as_gpus() -> None:
        if known.get("distributed_type") in (DistributedType.MULTI_CPU, DistributedType.FSDP):
            known["distributed_type"] = DistributedType.MULTI_GPU

    def told(self, *arguments, **options) -> None:
        found(self, *arguments, **options)
        if not AcceleratorState._shared_state:
            as_gpus()

    def begun(self, *arguments, **options) -> None:
        if not AcceleratorState._shared_state:  # the one before has left its own kind
            as_gpus()
        begin(self, *arguments, **options)

    PartialState.__init__, AcceleratorState.__init__ = told, begun
    backend.flagged = lambda name: name != "ACCELERATE_USE_FSDP" and flagged(name)  # or the program would refuse
