"""DeepSpeed's compiled CPU operators: where they lie, how they are built ahead of time, what is wrong with them.

DeepSpeed compiles an operator when a run first needs it (minutes, on a small machine), and a compilation that was
killed leaves a `lock` file on which every later start waits for ever. So `make install` builds them once
(`python -m cpikan_hr.training.operators`), and every start looks for stale locks first.

Invariant: one folder. `TORCH_EXTENSIONS_DIR` names it; where that is unset, a source checkout uses its own
`.cache/torch_extensions` (an installed package keeps torch's default), in the build and in every later run alike.
"""

import os
import sys
import time
from functools import cache
from pathlib import Path

from cpikan_hr.errors import UserError, exit_on_user_error

# What the shipped backends load: Adam on the host, all-reduce through shared memory, pinned pages, NVMe input/output.
OPERATORS = ("cpu_adam", "deepspeed_shm_comm", "pin_memory", "async_io")
LOCK_GRACE_SECONDS = 30.0  # between taking the lock and starting ninja nobody works in the folder yet


def set_environment() -> None:
    """Lets torch find the operators' folder and `ninja`. Call it before deepspeed is imported."""
    checkout = Path(__file__).resolve().parents[2]
    if (checkout / "pyproject.toml").is_file():
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(checkout / ".cache" / "torch_extensions"))
    scripts = str(Path(sys.executable).parent)  # `.venv/bin/accelerate` runs without an activated environment
    if scripts not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = scripts + os.pathsep + os.environ.get("PATH", "")


def ask_the_processor_once() -> None:
    """DeepSpeed asks what processor this is for every operator it loads, and each answer takes a process a second."""
    try:
        import cpuinfo
    except ImportError:  # DeepSpeed brings it
        return
    if not hasattr(cpuinfo.get_cpu_info, "cache_info"):
        cpuinfo.get_cpu_info = cache(cpuinfo.get_cpu_info)


def folder() -> Path:
    """The folder that holds one sub-folder per operator."""
    set_environment()
    if "TORCH_EXTENSIONS_DIR" in os.environ:
        return Path(os.environ["TORCH_EXTENSIONS_DIR"])
    from torch.utils.cpp_extension import _get_build_directory

    return Path(_get_build_directory("cpu_adam", verbose=False)).parent


def is_built(name: str) -> bool:
    return (folder() / name / f"{name}.so").is_file()


def libaio_headers() -> bool:
    """True where the headers of libaio (Debian: libaio-dev) stand, without which `async_io` cannot be compiled."""
    prefixes = ["/usr/include", "/usr/local/include", *os.environ.get("CPATH", "").split(os.pathsep)]
    return any((Path(prefix) / "libaio.h").is_file() for prefix in prefixes if prefix)


def _someone_builds_in(build_folder: Path) -> bool:
    import psutil  # a fifth of a second, and locks are rare

    for process in psutil.process_iter():
        try:
            if Path(process.cwd()) == build_folder.resolve():
                return True
        except psutil.Error:  # a process of another user, or one that just ended
            continue
    return False


def stale_locks(grace_seconds: float = LOCK_GRACE_SECONDS) -> list[Path]:
    """Lock files older than `grace_seconds` in whose folder no process works: left by a build that was killed."""
    stale = []
    for lock in sorted(folder().glob("*/lock")):
        try:
            age = time.time() - lock.stat().st_mtime
        except FileNotFoundError:  # its build has just ended
            continue
        if age > grace_seconds and not _someone_builds_in(lock.parent):
            stale.append(lock)
    return stale


def refuse_stale_locks() -> None:
    """Raises: UserError where a stale lock would let the next start of DeepSpeed wait for ever."""
    for lock in stale_locks():
        raise UserError(f"{lock} was left by a build that was killed, DeepSpeed would wait for it for ever: rm {lock}")


def build() -> None:
    """Compiles and loads every operator this machine can have; what is built already takes a second or two.

    Raises: UserError when a lock is stale; RuntimeError when a compilation fails.
    """
    set_environment()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("MAX_JOBS", str(os.cpu_count() or 1))
    folder().mkdir(parents=True, exist_ok=True)
    refuse_stale_locks()
    ask_the_processor_once()
    from deepspeed.ops.op_builder.cpu import AsyncIOBuilder, CPUAdamBuilder, PinMemoryBuilder, ShareMemCommBuilder

    builders = (CPUAdamBuilder, ShareMemCommBuilder, PinMemoryBuilder, AsyncIOBuilder)
    for name, builder in zip(OPERATORS, builders, strict=True):
        start = time.monotonic()
        if not builder().is_compatible(verbose=False):
            hint = "; apt-get install libaio-dev, then make install" if name == "async_io" else ""
            print(f"{name}: not possible on this machine{hint}", flush=True)
            continue
        builder().load(verbose=False)
        print(f"{name}: ready after {time.monotonic() - start:.0f} s in {folder() / name}", flush=True)


@exit_on_user_error
def main() -> None:
    build()


if __name__ == "__main__":
    sys.exit(main())
