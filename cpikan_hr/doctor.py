"""`cpikan-hr doctor`: what this machine offers, and what would stop a run before it says anything.

Invariant: reads only; every line that begins with "!!" is a fault and carries the command that mends it.
"""

import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
from pathlib import Path

import psutil

from cpikan_hr.runtime import cores
from cpikan_hr.training import operators

PACKAGES = ("torch", "accelerate", "deepspeed", "transformers", "numpy", "pydantic", "tifffile", "zarr", "scikit-image")
MIN_FREE_BYTES = 2e9  # a full 9344 x 7000 stack of 16 frames at 8 bit is 1 GB, its float32 map 0.26 GB


def doctor() -> int:
    """Prints the report. Returns 0, or 2 when something is wrong."""
    faults: list[str] = []
    _report_machine()
    _report_packages(faults)
    _report_operators(faults)
    _report_disk(faults)
    _report_launch_files(faults)
    for fault in faults:
        print(f"!! {fault}")
    print(f"{len(faults)} fault(s)" if faults else "no faults")
    return 2 if faults else 0


def _line(key: str, value: object) -> None:
    print(f"{key:22}{value}")


def _report_machine() -> None:
    memory = psutil.virtual_memory()
    _line("system", f"{platform.platform()}, Python {platform.python_version()}")
    threads = os.environ.get("OMP_NUM_THREADS", "unset")
    _line("cores", f"{cores()} usable of {os.cpu_count()}; OMP_NUM_THREADS {threads}")
    _line("memory", f"{memory.available / 1e9:.1f} GB available of {memory.total / 1e9:.1f} GB")
    import torch

    if not torch.cuda.is_available():
        _line("GPU", "none; backends run on CPU processes, fsdp2 and fp16 are not available")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        _line(f"GPU {index}", f"{properties.name}, {properties.total_memory / 1e9:.1f} GB")


def _report_packages(faults: list[str]) -> None:
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            faults.append(f"package {name} is not installed: make install")
    _line("packages", ", ".join(found))


def _report_operators(faults: list[str]) -> None:
    _line("operators' folder", operators.folder())
    for name in operators.OPERATORS:
        built = operators.is_built(name)
        _line(f"  {name}", "built" if built else "not built: its first use takes minutes; make install builds it")
    remedy = "not found; zero3_nvme needs them: apt-get install libaio-dev; make install"
    _line("libaio headers", "found" if operators.libaio_headers() else remedy)
    if shutil.which("ninja") is None:
        faults.append("ninja is not on the PATH, DeepSpeed cannot build operators: make install")
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        faults.append("no C++ compiler, DeepSpeed cannot build operators: apt-get install g++")
    for lock in operators.stale_locks():
        faults.append(f"{lock} was left by a build that was killed, DeepSpeed starts would hang: rm {lock}")


def _report_disk(faults: list[str]) -> None:
    for label, folder in (("disk, current folder", Path.cwd()), ("disk, temporary", Path(tempfile.gettempdir()))):
        free = shutil.disk_usage(folder).free
        _line(label, f"{free / 1e9:.1f} GB free in {folder}")
        if free < MIN_FREE_BYTES:
            faults.append(f"only {free / 1e9:.1f} GB free in {folder}: make room, or run elsewhere")


def _report_launch_files(faults: list[str]) -> None:
    import yaml

    folder = Path("accelerate_configs")
    files = sorted(folder.glob("*.yaml"))
    if not files:
        _line("launch files", f"no {folder}/ in {Path.cwd()}; run from the repository's root to have them checked")
        return
    _line("launch files", ", ".join(path.stem for path in files))
    for path in files:
        try:
            config = yaml.safe_load(path.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            faults.append(f"{path} is not YAML: {' '.join(str(error).split())}")
            continue
        faults.extend(f"{path}: {fault}" for fault in launch_file_faults(config))
    prefixes = ("ACCELERATE_", "DS_", "WORLD_SIZE", "LOCAL_RANK")
    variables = sorted(name for name in os.environ if name.startswith(prefixes))
    if variables:
        _line("set in this shell", ", ".join(variables))


def launch_file_faults(config: dict) -> list[str]:
    """The known traps in one parsed accelerate file, each with its remedy."""
    faults = []
    kind = str(config.get("distributed_type"))
    if kind == "MULTI_CPU":
        faults.append("MULTI_CPU expects MPI and quietly trains one process: use MULTI_GPU with use_cpu: true")
    if kind == "DEEPSPEED":
        section = config.get("deepspeed_config", {})
        name = section.get("deepspeed_config_file")
        if config.get("mixed_precision", "no") != "no":
            faults.append("mixed_precision beside a deepspeed_config_file is refused: use training.precision")
        if name is None:
            faults.append("names no deepspeed_config_file: see accelerate_configs/zero2.yaml")
        elif not Path(name).is_file():
            faults.append(f"{name} does not exist seen from {Path.cwd()}: run from the repository's root")
        if section.get("zero3_init_flag"):
            faults.append("zero3_init_flag: true builds shards which the closed-form start cannot fill: set false")
    return faults


if __name__ == "__main__":
    sys.exit(doctor())
