"""No command replaces or removes what it did not write, and no two write to one place."""

import fcntl
import json
import os
from pathlib import Path

import bad_input
import numpy as np
import pytest
from bad_input import refused, train_words
from own_process import own_process
from PIL import Image

from cpikan_hr.cli import main as cli
from cpikan_hr.data.writers import MapWriter
from cpikan_hr.demo import main as demo
from cpikan_hr.errors import UserError
from cpikan_hr.files import whole_file
from cpikan_hr.owned import refuse_foreign
from cpikan_hr.train import main as train
from cpikan_hr.training.run_folder import LOCK


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch):
    monkeypatch.chdir(bad_input.ROOT)


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    return bad_input.make_stack(tmp_path_factory.mktemp("stack") / "wafer")


@pytest.fixture(scope="module")
def run(stack, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(bad_input.ROOT)
        return bad_input.make_run(stack, tmp_path_factory.mktemp("trained") / "run")


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("name", ["decode", "render", "report", "export"])
def test_a_file_of_somebody_else_is_not_replaced(name, stack, run, tmp_path, capfd):
    main, words = bad_input.command(name, stack, run, tmp_path / "out")
    path = Path(words[-1])
    path.write_text("a year of work with cpikan_hr")
    line = refused(main, words, tmp_path, capfd)
    assert f"{path}: exists and was not written here; name another file, or remove that one" in line


@pytest.mark.parametrize("suffix", ["tif", "ome.tif", "png"])
def test_a_map_of_this_program_is_replaced(suffix, run, tmp_path):
    path = tmp_path / f"map.{suffix}"
    assert cli(["render", str(run), "--out", str(path), "--scale", "0.5"]) == 0
    assert cli(["render", str(run), "--out", str(path)]) == 0
    if suffix == "png":
        assert Image.open(path).size == (96, 64)


@pytest.mark.parametrize("name", ["report", "export", "decode"])
def test_what_a_command_wrote_it_writes_again(name, stack, run, tmp_path):
    main, words = bad_input.command(name, stack, run, tmp_path / "out")
    assert main(words) == 0 and main(words) == 0


def test_a_packed_field_is_written_again(run, tmp_path):
    words = ["export", str(run), "--bits", "12", "--out", str(tmp_path / "packed.safetensors")]
    assert cli(words) == 0 and cli(words) == 0


def test_a_npy_says_who_wrote_it_where_the_file_system_can(tmp_path):
    mine, other = tmp_path / "mine.npy", tmp_path / "other.npy"
    with MapWriter(mine, (2, 3), np.float32) as writer:
        writer.finish()
    np.save(other, np.load(mine))
    with pytest.raises(UserError, match="does not say that this program wrote it"):
        refuse_foreign(other)
    try:
        os.setxattr(other, "user.probe", b"")
    except OSError:
        pytest.skip("this file system has no attributes of users")
    refuse_foreign(mine)


def test_two_writers_of_one_file(tmp_path):
    with whole_file(tmp_path / "text") as part:
        part.write_text("first")
        with pytest.raises(UserError, match="another process is writing it"), whole_file(tmp_path / "text"):
            pass
        assert part.read_text() == "first"
    assert (tmp_path / "text").read_text() == "first" and os.listdir(tmp_path) == ["text"]


def test_two_writers_of_one_map(tmp_path):
    with MapWriter(tmp_path / "map.npy", (2, 3), np.float32) as first:
        with pytest.raises(UserError, match="another process is writing it"):
            MapWriter(tmp_path / "map.npy", (5, 5), np.float32)
        first.write(0, 0, np.ones((2, 3), np.float32))
        first.finish()
    assert (np.load(tmp_path / "map.npy") == 1).all() and os.listdir(tmp_path) == ["map.npy"]


# ---------------------------------------------------------------- folders


def test_a_stack_that_somebody_has_added_to_is_not_replaced(stack, tmp_path, capfd):
    mine = bad_input.damaged_copy(stack, tmp_path / "wafer", lambda folder: (folder / "mask.png").write_text("drawn"))
    line = refused(cli, ["synth", str(mine), "--size", "96x64"], tmp_path, capfd)
    assert "synth replaces the folder, but did not write mask.png; move it elsewhere" in line


def test_a_folder_named_like_what_synth_writes_to_is_kept(tmp_path, capfd):
    (tmp_path / "wafer.part").mkdir()
    (tmp_path / "wafer.part" / "thesis.tex").write_text("a year of work")
    os.close(os.open(tmp_path / "wafer.part" / "lock", os.O_CREAT))
    line = refused(cli, ["synth", str(tmp_path / "wafer"), "--size", "9x9"], tmp_path, capfd)
    assert "did not write thesis.tex" in line


@pytest.mark.parametrize("name", ["thesis.tex", "checkpoints/step_1/weights", "recipe.yaml", "metrics.jsonl"])
def test_a_folder_without_an_earlier_run_is_not_trained_in(name, stack, tmp_path, capfd):
    kept = tmp_path / "folder" / name
    kept.parent.mkdir(parents=True)
    kept.write_text("a year of work")
    words = [*train_words(stack, tmp_path / "folder"), "--resume", "never"]
    assert "holds files, but no earlier run; give another --output" in refused(train, words, tmp_path, capfd)


def test_a_run_begun_anew_keeps_what_somebody_put_beside_it(stack, tmp_path):
    run = bad_input.make_run(stack, tmp_path / "run")
    notes = [run / "notes.txt", run / "checkpoints" / "why.txt"]
    for path in notes:
        path.write_text("worth keeping")
    assert train([*train_words(stack, run, steps=1), "--resume", "never"]) == 0
    assert all(path.read_text() == "worth keeping" for path in notes)
    assert not (run / "checkpoints" / "step_00000002").exists()


@pytest.mark.parametrize("name", ["thesis.tex", "height.tif", "run/field.safetensors", "stack/bucket_00.bmp"])
def test_the_demo_removes_nothing_of_somebody_else(name, tmp_path, capfd):
    kept = tmp_path / "folder" / name
    kept.parent.mkdir(parents=True)
    kept.write_text("a year of work")
    refused(demo, ["--size", "96x64", "--out", str(tmp_path / "folder")], tmp_path, capfd)


# ---------------------------------------------------------------- two runs in one folder


def test_a_second_training_in_the_same_folder_is_refused(stack, tmp_path, capfd):
    run = bad_input.make_run(stack, tmp_path / "run")
    with open(run / LOCK) as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        line = refused(train, train_words(stack, run, steps=4), run, capfd)
        assert "run.lock: a training is at work here (process " in line and "wait for it" in line
    assert train(train_words(stack, run, steps=4)) == 0  # who held it has ended
    steps = [json.loads(text)["step"] for text in (run / "metrics.jsonl").read_text().splitlines() if '"loss"' in text]
    assert steps == [1, 2, 3, 4]


KILLED_AT_THE_START = """
import os, signal
from cpikan_hr.training import loop
loop.begin_field = lambda *given: os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_training_leaves_no_lock(stack, tmp_path):
    words = train_words(stack, tmp_path / "run")
    assert own_process(train, words, KILLED_AT_THE_START)[0] == -9
    assert train(words) == 0
