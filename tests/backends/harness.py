"""Launches a shipped backend file as real CPU processes through `accelerate launch`, and compares what they trained.

Invariant: the command is the README's, with the shipped file as it is; only the number of processes is set on the
command line (and for the files of one process `--multi_gpu`, which starts torchrun). GPUs are hidden.
"""

import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import forks
import psutil
import torch

ROOT = Path(__file__).parents[2]
ONE_PROCESS = ("cpu", "single_gpu")  # distributed_type 'NO'
MULTINODE = ("multinode_ddp", "multinode_zero3_offload")
TIMEOUT_SECONDS = 900.0  # on a machine with much else to do


@dataclass
class Launch:
    """What a launch left: exit code of every `accelerate launch` call and their joint output."""

    codes: list[int]
    output: str

    def check(self) -> None:
        assert self.codes == [0] * len(self.codes), self.output[-4000:]


@dataclass
class Launched:
    """What the launches under one backend file left: a folder for each program, and how each of them ended."""

    folder: Path
    launches: list[Launch]
    ended: list[tuple[str, int]]  # name, exit code; in the order in which they ran

    @property
    def output(self) -> str:
        return "\n".join(launch.output for launch in self.launches)

    def said(self, name: str) -> str:
        """What all processes printed from the (last) beginning of a program to that of the next."""
        return self.output.rpartition(f"program {name}\n")[2].partition("\nprogram ")[0]

    def run(self, name: str, *codes: int) -> Path:
        """The folder of a program that ended with `codes` (default: 0), one for each time it was run."""
        found = [code for one, code in self.ended if one == name]
        assert found == list(codes or [0]), f"{name} ended with {found}\n{self.output[-4000:]}"
        return self.folder / name


@dataclass
class Agreement:
    """A backend against the single process: relative differences of the losses, gradient norms and final weights."""

    config: str
    processes: str
    loss: float
    norm: float
    weights: float


table: list[Agreement] = []  # printed at the end of the session by conftest.py


def launch(config: str, *program: str, processes: int = 2, gpu: bool = False, forked: bool = True) -> Launch:
    """Runs `accelerate launch --config_file accelerate_configs/CONFIG.yaml ... PROGRAM...` from the repository's root.

    `program` is a script or `-m module`, then its arguments. A multi-node file is launched once per machine rank, with
    one process each. Every process is ended at the time-out. `forked`: the launcher and each of the processes
    that it launches let a fork of the tests' server be the program in their place.
    """
    accelerate = [str(Path(sys.executable).parent / "accelerate"), "launch"]
    if forked and not gpu:  # the server sees none
        forks.ensure_server()
        accelerate = [sys.executable, "tests/forked.py", *accelerate]
        program = ("tests/forked.py", *program)
    command = [*accelerate, "--config_file", f"accelerate_configs/{config}.yaml", "--num_processes", str(processes)]
    if config in ONE_PROCESS and processes > 1:
        command += ["--multi_gpu"]
    if config in MULTINODE:
        meet = ["--num_machines", str(processes), "--main_process_ip", "127.0.0.1"]
        meet += ["--main_process_port", str(free_port())]
        commands = [[*command, *meet, "--machine_rank", str(rank)] for rank in range(processes)]
    else:
        commands = [[*command, "--main_process_port", str(free_port())]]
    running = [
        subprocess.Popen(
            [*command, *program],
            cwd=ROOT,
            env=forks.environment(gpu),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        for command in commands
    ]
    outputs = []
    try:
        for process in running:
            outputs.append(process.communicate(timeout=TIMEOUT_SECONDS)[0])
    finally:
        for process in running:
            if process.poll() is None:
                end(process)
    return Launch([process.returncode for process in running], "\n".join(outputs))


def end(process: subprocess.Popen) -> None:
    """Ends a launch with its workers, each of which has a session of its own."""
    workers = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    for one in (process, *workers):
        try:
            one.wait(forks.GRACE_SECONDS)
        except (subprocess.TimeoutExpired, psutil.TimeoutExpired):
            one.kill()


def run_alone(*program: str) -> Launch:
    """The same program as one process, without `accelerate launch`."""
    command, captured = [sys.executable, *program], dict(capture_output=True, text=True)
    done = subprocess.run(command, cwd=ROOT, env=forks.environment(), timeout=TIMEOUT_SECONDS, **captured)
    return Launch([done.returncode], done.stdout + done.stderr)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def relative_difference(values: list[float], reference: list[float]) -> float:
    """Largest of |value - reference| / |reference|."""
    assert len(values) == len(reference)
    return max(abs(v - r) / abs(r) for v, r in zip(values, reference, strict=True))


def weight_difference(weights: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> float:
    """|weights - reference| / |reference|, both as one vector."""
    assert weights.keys() == reference.keys()
    assert all(weights[name].shape == reference[name].shape for name in reference)
    trained = [
        name for name in reference if reference[name].is_floating_point() and not name.endswith(("mean", "scale"))
    ]
    flat = torch.cat([(weights[name] - reference[name]).double().flatten() for name in trained])
    size = torch.cat([reference[name].double().flatten() for name in trained])
    return (flat.norm() / size.norm()).item()
