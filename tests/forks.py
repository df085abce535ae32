"""Processes forked from a server that has imported the program once: importing it takes most of a short run's time.

The server runs whatever `python` would (a script, `-m module` or `-c code`) with the arguments, the environment, the
folder and the standard streams of who asks. `accelerate launch ... tests/forked.py PROGRAM...` makes each process of a
launch such a fork, in the environment that the launcher gave it.
"""

import atexit
import gc
import json
import math
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
ADDRESS = "CPIKAN_HR_TEST_FORKS"  # the variable of the environment that says where the server listens
GRACE_SECONDS = 20.0  # in which a launcher that is to end ends its processes
IMPORTED = (
    "accelerate.commands.launch", "deepspeed", "deepspeed.runtime.engine", "matplotlib.backends.backend_agg",
    "matplotlib.figure", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.nn.functional",
    "torch.distributed.run", "transformers", "cpikan_hr.cli", "cpikan_hr.evaluate", "cpikan_hr.render",
    "cpikan_hr.report.page", "cpikan_hr.training.loop",
)  # fmt: skip


def environment(gpu: bool = False) -> dict[str, str]:
    """Of a test's processes: one thread each; no GPU, unless one is asked for."""
    where = {"ACCELERATE_USE_CPU": "false"} if gpu else {"CUDA_VISIBLE_DEVICES": ""}
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | where


# ---------------------------------------------------------------- who asks


def ensure_server() -> None:
    """Starts this process's server where there is none; it ends with this process."""
    if ADDRESS in os.environ:
        return
    folder = tempfile.mkdtemp(prefix="forks-")
    address = f"{folder}/socket"
    server = subprocess.Popen(
        [sys.executable, __file__, address], env=environment(), cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert any(line == "ready\n" for line in server.stdout), "the server of forks has ended"
    os.environ[ADDRESS] = address
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    atexit.register(server.kill)


def run(
    words: list[str],
    streams: tuple[int, int, int],
    environment: dict[str, str],
    folder: str,
    seconds: float | None = None,
    began: Callable | None = None,
) -> int:
    """Runs a program in a fork to its end; its exit code. `began(pid)` is called when it has begun.

    Raises TimeoutError where it takes more than `seconds`; the program is ended then.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.connect(os.environ[ADDRESS])
        asked = {"words": words, "environment": environment, "folder": folder}
        socket.send_fds(connection, [json.dumps(asked).encode()], streams)
        child = int(connection.recv(64))
        if began:
            began(child)
        connection.settimeout(seconds)
        return int(connection.recv(64))


# ---------------------------------------------------------------- the server


def serve(address: str) -> None:
    """Forks for every connection, until who has started the server is gone."""
    for name in IMPORTED:
        __import__(name)
    sys.modules["cpikan_hr.progress"].PAUSE = math.inf  # what a program says does not depend on how busy the machine is
    gc.freeze()  # or every fork's first collection would copy all of this
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for supervisors
    parent = os.getppid()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.bind(address)
        server.listen()
        server.settimeout(1.0)
        print("ready", flush=True)
        while os.getppid() == parent:
            try:
                connection, _ = server.accept()
            except TimeoutError:
                continue
            if os.fork() == 0:
                supervise(connection)
            connection.close()


def supervise(connection: socket.socket) -> None:
    """In a fork: forks the program and tells its number and its exit code, or ends it when nobody waits any more."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    connection.settimeout(None)
    asked, streams, _, _ = socket.recv_fds(connection, 1 << 20, 3)
    child = os.fork()
    if child == 0:
        connection.close()
        leave(become(json.loads(asked), streams))
    connection.send(str(child).encode())
    ended = os.pidfd_open(child)
    if ended not in select.select([ended, connection], [], [])[0]:  # who asked is gone
        os.kill(child, signal.SIGTERM)
        if not select.select([ended], [], [], GRACE_SECONDS)[0]:
            os.kill(child, signal.SIGKILL)
        os._exit(1)
    _, status = os.waitpid(child, 0)
    connection.send(str(os.waitstatus_to_exitcode(status)).encode())
    os._exit(0)


def become(asked: dict, streams: list[int]) -> int:
    """In the fork of a fork: is the program that was asked for; its exit code."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background inherit that it is ignored
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(asked["environment"])
    os.chdir(asked["folder"])
    first, *words = asked["words"]
    try:
        if first == "-m":
            sys.path.insert(0, "")
            sys.argv = words
            runpy.run_module(words[0], run_name="__main__", alter_sys=True)
        elif first == "-c":
            sys.argv = ["-c", *words[1:]]
            exec(words[0], {"__name__": "__main__"})
        else:
            sys.path.insert(0, str(Path(first).parent))
            sys.argv = [first, *words]
            runpy.run_path(first, run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


def leave(code: int) -> None:
    """Ends as an interpreter does, except that it takes nothing apart: that takes seconds where so much is imported."""
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


if __name__ == "__main__":
    serve(sys.argv[1])
