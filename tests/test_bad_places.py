"""A full disk, a forbidden place, Ctrl-C and a failing rank: real processes, and nothing half-written."""

import subprocess
import sys
import tempfile
from pathlib import Path

import bad_input
import forks
import numpy as np
import pytest
from bad_input import refused, snapshot, train_words
from own_process import own_process
from PIL import Image

from cpikan_hr.cli import main as cli
from cpikan_hr.train import main as train

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    return bad_input.make_stack(tmp_path_factory.mktemp("stack") / "wafer")


@pytest.fixture(scope="module")
def trained(stack, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return bad_input.make_run(stack, tmp_path_factory.mktemp("trained") / "run")


@pytest.fixture
def run(trained, tmp_path):
    return bad_input.damaged_copy(trained, tmp_path / "run")


class Prepared:
    """The command in a process of its own, after some lines of Python; called like `main`."""

    def __init__(self, main, prepare: str):
        self.main, self.prepare = main, prepare

    def __call__(self, words: list[str]) -> int:
        """stdout and stderr are handed on, so that they are captured as those of `main` are."""
        code, out, err = own_process(self.main, words, self.prepare)
        print(out, end="")
        print(err, end="", file=sys.stderr)
        return code


def limited(main, file_bytes: int) -> Prepared:
    """No file can grow beyond so many bytes: writes fail in the middle, as on a full disk."""
    return Prepared(main, f"import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, ({file_bytes}, {file_bytes}))")


# ---------------------------------------------------------------- a full disk


@pytest.mark.parametrize("format", ["bmp", "png", "tiff", "npy", "zarr"])
@pytest.mark.parametrize("file_bytes", [200, 5000, 20_000])  # less than stack.yaml, than a frame, than the heights
def test_synth_on_a_full_disk(file_bytes, format, tmp_path, capfd):
    words = ["synth", str(tmp_path / "new" / "wafer"), "--size", "96x64", "--format", format]
    assert "wafer" in refused(limited(cli, file_bytes), words, tmp_path, capfd)


def test_synth_keeps_the_stack_it_could_not_replace(tmp_path, capfd):
    earlier = bad_input.make_stack(tmp_path / "wafer")
    words = ["synth", str(earlier), "--size", "200x99"]
    assert "free some space" in refused(limited(cli, 5000), words, tmp_path, capfd)


# A map of 64 x 96 px: 24 kB as it is written, one tile of 1 MB in a TIFF, a second file for PNG.
@pytest.mark.parametrize("name", ["map.tif", "map.npy"])
@pytest.mark.parametrize("file_bytes", [5000, 30_000])
def test_decode_on_a_full_disk(name, file_bytes, stack, tmp_path, capfd):
    (tmp_path / "quality.tif").write_text("earlier, written by cpikan_hr")
    words = ["decode", str(stack), "--out", str(tmp_path / name), "--quality", str(tmp_path / "quality.tif")]
    assert "free some space" in refused(limited(cli, file_bytes), words, tmp_path, capfd)


@pytest.mark.parametrize(
    ("name", "file_bytes"), [("map.tif", 5000), ("map.tif", 30_000), ("map.npy", 5000), ("map.png", 5000)]
)
def test_render_on_a_full_disk(name, file_bytes, run, tmp_path, capfd):
    words = ["render", str(run), "--out", str(tmp_path / name)]
    assert "free some space" in refused(limited(cli, file_bytes), words, tmp_path, capfd)


def test_a_png_that_does_not_shrink_fails_in_its_second_file(run, tmp_path, capfd):
    noise = np.random.default_rng(0).integers(0, 256, (64, 96), dtype=np.uint8)
    np.save(tmp_path / "noise.npy", noise)
    words = ["--config", "recipes/image.yaml", "--problem.path", str(tmp_path / "noise.npy")]
    assert train([*words, "--output", str(tmp_path / "picture"), "--training.steps", "0"]) == 0
    words = ["render", str(tmp_path / "picture"), "--out", str(tmp_path / "map.png"), "--scale", "0.5"]
    assert cli(words) == 0
    whole = (tmp_path / "map.png").stat().st_size
    assert whole > 32 * 48  # more than its scratch file
    assert "map.png: cannot be written" in refused(limited(cli, whole - 10), words, tmp_path, capfd)


def losses(run: Path) -> list[str]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [line.split('"lr"')[0] for line in lines if '"loss"' in line]


@pytest.mark.parametrize("broken", ["model.safetensors", "optimizer.bin", "metrics"])
def test_a_checkpoint_on_a_full_disk(broken, stack, run, tmp_path, capfd):
    whole = run / "checkpoints" / "step_00000002"
    sizes = {path.name: path.stat().st_size for path in whole.iterdir()}
    assert sizes["model.safetensors"] < sizes["optimizer.bin"]
    limit = {
        "model.safetensors": sizes["model.safetensors"] - 100,
        "optimizer.bin": (sizes["model.safetensors"] + sizes["optimizer.bin"]) // 2,
        "metrics": (run / "recipe.yaml").stat().st_size + len(str(run)),  # it is written anew, with this name
    }[broken]
    before = snapshot(whole)
    capfd.readouterr()
    words = [*train_words(stack, run, steps=12), "--training.checkpoint_steps", "12"]
    assert limited(train, limit)(words) == 2
    said = capfd.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and "free some space" in said
    # Metrics go to metrics.jsonl and to TensorBoard's file, whose thread meets the limit first.
    names = ("metrics.jsonl", "tensorboard") if broken == "metrics" else ("step_00000012",)
    assert any(name in said for name in names)
    assert snapshot(whole) == before and not list(run.rglob("*.part"))
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_00000002"]
    assert train(words) == 0
    other = tmp_path / "other"
    assert train([*train_words(stack, other, steps=12), "--training.checkpoint_steps", "2"]) == 0
    assert len(losses(run)) == 12 and losses(run)[-1].split(",")[0] == losses(other)[-1].split(",")[0]


def test_a_new_run_on_a_full_disk_is_taken_away(stack, tmp_path, capfd):
    line = refused(limited(train, 4000), train_words(stack, tmp_path / "new" / "run"), tmp_path, capfd)
    assert "start.safetensors: cannot be written" in line


def test_a_start_whose_terms_find_no_room(stack, tmp_path, capfd):
    line = refused(limited(train, 500), train_words(stack, tmp_path / "new" / "run"), tmp_path, capfd)
    assert f"{tempfile.gettempdir()}: cannot be written" in line and "free some space" in line


def test_the_field_at_the_end_on_a_full_disk(stack, run, capfd):
    earlier = (run / "field.safetensors").read_bytes()
    limit = (run / "field.safetensors").stat().st_size - 100
    words = [*train_words(stack, run, steps=3), "--training.checkpoint_steps", "99"]
    capfd.readouterr()
    assert limited(train, limit)(words) == 2
    said = capfd.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    # The last state, kept beside a better one in its place, or the field itself
    assert any(f"{name}: cannot be written" in said for name in ("step_00000003", "field.safetensors"))
    assert "free some space" in said
    assert (run / "field.safetensors").read_bytes() == earlier and not list(run.rglob("*.part"))
    assert train(words) == 0 and len(losses(run)) == 3


@pytest.mark.parametrize("file_bytes", [2000, 10_000, 40_000])  # less than the head, the decoded map, the page
def test_report_on_a_full_disk(file_bytes, run, tmp_path, capfd):
    (tmp_path / "report.html").write_text("earlier, written by cpikan_hr")
    words = ["report", str(run), "--out", str(tmp_path / "report.html")]
    assert "free some space" in refused(limited(cli, file_bytes), words, tmp_path, capfd)


def test_export_on_a_full_disk(run, tmp_path, capfd):
    for out in ([], ["--out", str(tmp_path / "new.safetensors")]):
        assert "free some space" in refused(limited(cli, 5000), ["export", str(run), *out], tmp_path, capfd)


# ---------------------------------------------------------------- no permission


# Root without its capabilities obeys the mode of files like everybody else; for others nothing happens.
COMMON = """
import ctypes, os
header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
assert os.getuid() or ctypes.CDLL(None, use_errno=True).capset(header, none) == 0, os.strerror(ctypes.get_errno())
"""


@pytest.fixture
def closed(tmp_path):
    """A folder that the test closes; open again afterwards, so that pytest can remove it."""
    folder = tmp_path / "closed"
    folder.mkdir()
    yield folder
    folder.chmod(0o755)


@pytest.mark.parametrize("name", ["synth", "decode", "render", "report", "export", "train"])
def test_a_place_without_permission(name, stack, trained, closed, capfd):
    data = bad_input.damaged_copy(stack, closed / "stack")
    made = bad_input.damaged_copy(trained, closed / "run")
    main, words = bad_input.command(name, data, made, closed / "out")
    closed.chmod(0o555)
    line = refused(Prepared(main, COMMON), words, closed, capfd)
    assert f"{closed}/out" in line and "ermission denied" in line


@pytest.mark.parametrize("name", ["decode", "train"])
def test_a_frame_that_may_not_be_read(name, stack, closed, capfd):
    data = bad_input.damaged_copy(stack, closed / "stack")
    main, words = bad_input.command(name, data, closed, closed / "out")
    before = snapshot(closed)
    (data / "bucket_03.bmp").chmod(0)
    capfd.readouterr()
    assert Prepared(main, COMMON)(words) == 2
    said = capfd.readouterr().err
    (data / "bucket_03.bmp").chmod(0o644)
    assert said.count("\n") == 1 and "ermission denied" in said and "bucket_03.bmp" in said
    assert snapshot(closed) == before


# ---------------------------------------------------------------- Ctrl-C


# Where a command would give its file its name, and where a training begins inside its folder.
AT_THE_RENAME = """
import os, signal
rename = os.replace
def interrupt(*names):
    os.kill(os.getpid(), signal.SIGINT)
    rename(*names)
os.replace = interrupt
"""
AT_THE_START = """
import os, signal
from cpikan_hr.training import loop
begin = loop.begin_field
def interrupt(*given):
    os.kill(os.getpid(), signal.SIGINT)
    return begin(*given)
loop.begin_field = interrupt
"""
AT_THE_FIFTEENTH_STEP = """
import os, signal
rename = os.rename
def interrupt(old, new):
    rename(old, new)
    if str(new).endswith("step_00000015"):
        os.kill(os.getpid(), signal.SIGINT)
os.rename = interrupt
"""


@pytest.mark.parametrize("name", ["synth", "decode", "render", "report", "export", "train"])
def test_an_interrupt_leaves_nothing(name, stack, run, tmp_path):
    main, words = bad_input.command(name, stack, run, tmp_path / "out")
    before = snapshot(tmp_path)
    done = own_process(main, words, AT_THE_START if name == "train" else AT_THE_RENAME)
    assert done == (130, "", "error: interrupted\n")
    assert snapshot(tmp_path) == before


def test_an_interrupted_training_keeps_its_checkpoints(stack, run):
    words = [*train_words(stack, run, steps=100_000), "--training.checkpoint_steps", "5"]
    code, _, err = own_process(train, words, AT_THE_FIFTEENTH_STEP)
    assert code == 130 and err.count("\n") == 1
    assert err.startswith(f"error: interrupted: {run} holds the field so far; render it, or resume it")
    assert not list(run.rglob("*.part")) and (run / "checkpoints").is_dir()
    newest = sorted((run / "checkpoints").iterdir())[-1]
    assert train(train_words(stack, run, steps=int(newest.name[5:]) + 1)) == 0


@pytest.mark.parametrize("name", ["evaluate.evaluate", "training.export.export"])
def test_an_interrupt_while_it_computes(name, run, tmp_path, monkeypatch, capfd):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"cpikan_hr.{name}", interrupt)
    before = snapshot(tmp_path)
    capfd.readouterr()
    assert cli([name.split(".")[-1], str(run)]) == 130
    assert capfd.readouterr().err == "error: interrupted\n" and snapshot(tmp_path) == before


# ---------------------------------------------------------------- several processes


def launch(*words: str) -> tuple[int, str, str]:
    forks.ensure_server()
    accelerate = [str(Path(sys.executable).parent / "accelerate"), "launch"]
    command = [sys.executable, "tests/forked.py", *accelerate, "--config_file", "accelerate_configs/ddp_cpu.yaml"]
    command += ["tests/forked.py", *words]
    done = subprocess.run(command, env=forks.environment(), cwd=ROOT, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("suffix", ["tif", "png"])
def test_two_processes_render_the_file_of_one(suffix, run, tmp_path):
    one, two = tmp_path / f"one.{suffix}", tmp_path / f"two.{suffix}"
    large = ["--scale", "14"]  # two strips
    assert Prepared(cli, "")(["render", str(run), "--out", str(one), *large]) == 0
    code, out, err = launch("-m", "cpikan_hr", "render", str(run), "--out", str(two), *large)
    assert (code, out.splitlines()) == (0, [str(two)]), err
    assert one.read_bytes() == two.read_bytes() and not list(tmp_path.glob("*.part"))


AFTERWARDS = """
import sys
from pathlib import Path
from cpikan_hr.processes import launched
from cpikan_hr.training.weights import load_field
with launched() as processes:
    load_field(sys.argv[1], mapped=True)
    processes.gather(0)
print(sorted(name for name in (path.read_text() for path in Path("/proc/self/task").glob("*/comm")) if "gloo" in name))
"""


def test_no_thread_of_a_launch_is_left_when_it_ends(run, tmp_path):
    """One that is left and waits for the interpreter aborts the process now and then."""
    (tmp_path / "afterwards.py").write_text(AFTERWARDS)
    code, out, err = launch(str(tmp_path / "afterwards.py"), str(run))
    assert (code, "".join(out.split())) == (0, "[][]"), err  # two processes may share a line


def ends(err: str) -> list[int]:
    """Exit codes of the ranks, from the launcher's report."""
    return [int(line.split(":")[1].split("(")[0]) for line in err.splitlines() if line.strip().startswith("exitcode")]


@pytest.mark.parametrize("failure", ["unwritable", "no field", "full disk of the second rank"])
def test_both_processes_end_when_one_cannot_render(failure, run, tmp_path):
    out = tmp_path / "map.tif"
    program = ["-m", "cpikan_hr"]
    if failure == "unwritable":
        out.mkdir()
    elif failure == "no field":
        (run / "field.safetensors").unlink()
    else:
        program = ["tests/second_rank_is_full.py"]
    before = snapshot(tmp_path)
    code, said, err = launch(*program, "render", str(run), "--out", str(out), "--scale", "14")
    assert code != 0 and ends(err) == [2, 2] and said == ""
    assert len([line for line in err.splitlines() if line.startswith("error: ")]) == 1, err
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("main", ["train", "render"])
def test_both_processes_end_when_they_refuse_before_they_have_joined(main, tmp_path):
    words = {
        "train": ["-m", "cpikan_hr.train", "--config", "recipes/wafer.yaml", "--training.steps", "many"],
        "render": ["-m", "cpikan_hr", "render", "nowhere", "--out", str(tmp_path / "map.tif"), "--scale", "large"],
    }[main]
    code, said, err = launch(*words)
    assert code != 0 and ends(err) == [2, 2] and said == ""
    assert len([line for line in err.splitlines() if line.startswith("error: ")]) == 1, err


def test_both_processes_end_when_the_frames_of_one_are_damaged(stack, tmp_path):
    """The closed-form start shares rows of tiles: a NaN is met by one process while the other waits for its sums."""
    frames = np.stack([np.asarray(Image.open(path), np.float32) for path in sorted(stack.glob("bucket_*.bmp"))])
    frames[7, 20, 30] = np.nan
    bad = bad_input.damaged_copy(stack, tmp_path / "stack", lambda folder: np.save(folder / "frames.npy", frames))
    described = (bad / "stack.yaml").read_text()
    (bad / "stack.yaml").write_text(described.replace("bucket_*.bmp", "frames.npy"))
    before = snapshot(tmp_path)
    code, said, err = launch("-m", "cpikan_hr.train", *train_words(bad, tmp_path / "new" / "run"))
    assert code != 0 and ends(err) == [2, 2] and said == ""
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "pixel (20, 30) is nan" in lines[0], err
    assert snapshot(tmp_path) == before
