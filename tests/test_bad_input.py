"""Bad input is one line on stderr and exit code 2, and nothing half-written; through the program's own commands."""

import json
import struct
import zlib

import bad_input
import numpy as np
import pytest
import tifffile
import yaml
from bad_input import damaged_copy, refused, train_words
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from cpikan_hr.cli import main as cli
from cpikan_hr.train import main as train

BOMB = 200_000  # px on a side


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    return bad_input.make_stack(tmp_path_factory.mktemp("stack") / "wafer")


@pytest.fixture(scope="module")
def run(stack, tmp_path_factory, request):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(request.config.rootpath)
        return bad_input.make_run(stack, tmp_path_factory.mktemp("run") / "run")


# ---------------------------------------------------------------- stacks


def rewrite(folder, **changes):
    path = folder / "stack.yaml"
    keys = yaml.safe_load(path.read_text()) | changes
    path.write_text(yaml.safe_dump({key: value for key, value in keys.items() if value is not None}))


def truncate(path, keep=0.6):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])


def as_floats(folder, value):
    frames = np.stack([np.asarray(Image.open(path), np.float32) for path in sorted(folder.glob("bucket_*.bmp"))])
    frames[7, 20, 30] = value
    np.save(folder / "frames.npy", frames)
    rewrite(folder, frames="frames.npy")


def as_truncated_png(folder):
    """Its header is whole, so that only decoding its pixels finds the damage."""
    for path in folder.glob("bucket_*.bmp"):
        Image.open(path).save(path.with_suffix(".png"))
    truncate(folder / "bucket_05.png")
    rewrite(folder, frames="bucket_*.png")


def as_truncated_pages(folder):
    """One file of sixteen pages that ends in the tenth, or where the directory of the next should be."""
    with tifffile.TiffWriter(folder / "frames.tif") as tif:
        for path in sorted(folder.glob("bucket_*.bmp")):
            tif.write(np.asarray(Image.open(path)), photometric="minisblack", metadata=None, contiguous=False)
    truncate(folder / "frames.tif")
    rewrite(folder, frames="frames.tif")


def png_chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_bomb(path):
    header = struct.pack(">IIBBBBB", BOMB, BOMB, 8, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", pixels))


def bmp_bomb(path):
    head = bytearray(path.read_bytes())
    head[18:26] = struct.pack("<ii", BOMB, BOMB)
    path.write_bytes(head)


def complex_numbers(path):
    with open(path, "wb") as file:
        np.save(file, np.zeros((4, 4), np.complex64))


def frame(folder):
    return folder / "bucket_05.bmp"


STACKS = {  # what is done to a good stack, and what the one line says
    "unknown key": (lambda f: rewrite(f, wavelength_um=[5.0]), "unknown key 'wavelength_um'; did you mean"),
    "wrong type": (lambda f: rewrite(f, pixel_pitch_um="wide"), "pixel_pitch_um"),
    "missing frame": (lambda f: frame(f).unlink(), "15 frames found"),
    "missing listed frame": (lambda f: rewrite(f, frames=["bucket_99.bmp"]), "bucket_99.bmp: no such frame"),
    "truncated frame": (lambda f: truncate(frame(f)), "bucket_05.bmp: truncated"),
    "truncated pages": (as_truncated_pages, "frames.tif: truncated"),
    "empty frame": (lambda f: frame(f).write_bytes(b""), "bucket_05.bmp: truncated"),
    "frames of different sizes": (lambda f: Image.new("L", (9, 7)).save(frame(f)), "bucket_05.bmp: "),
    "no image": (lambda f: frame(f).write_text("no image at all"), "bucket_05.bmp: not an image"),
    "too few phase steps": (lambda f: rewrite(f, phase_steps_rad=[0.0, 1.5]), "too few phase steps"),
    "unsupported bit depth": (lambda f: rewrite(f, bit_depth=24), "unsupported bit depth 24"),
    "unsupported bits of a frame": (lambda f: Image.new("1", (96, 64)).save(frame(f)), "unsupported bit depth"),
    "image bomb": (lambda f: bmp_bomb(frame(f)), "above the limit"),
    "mask is missing": (lambda f: rewrite(f, mask="mask.png"), "mask.png: no such file"),
}
PIXELS = {  # found only where the pixels are read
    "truncated png": (as_truncated_png, "bucket_05.png: truncated or damaged"),
    "NaN": (lambda f: as_floats(f, np.nan), "pixel (20, 30) is nan"),
    "Inf": (lambda f: as_floats(f, np.inf), "pixel (20, 30) is inf"),
}


@pytest.mark.parametrize("case", STACKS | PIXELS)
def test_decode_of_a_bad_stack(case, stack, tmp_path, capfd):
    damage, message = (STACKS | PIXELS)[case]
    bad = damaged_copy(stack, tmp_path / "stack", damage)
    (tmp_path / "earlier.tif").write_text("earlier, written by cpikan_hr")
    for name in ("new.tif", "earlier.tif"):
        words = ["decode", str(bad), "--out", str(tmp_path / name), "--quality", str(tmp_path / "quality.npy")]
        assert message in refused(cli, words, tmp_path, capfd)


@pytest.mark.parametrize("case", STACKS | PIXELS)
def test_train_on_a_bad_stack(case, stack, run, tmp_path, capfd):
    damage, message = (STACKS | PIXELS)[case]
    bad = damaged_copy(stack, tmp_path / "stack", damage)
    assert message in refused(train, train_words(bad, tmp_path / "not" / "yet" / "there"), tmp_path, capfd)
    earlier = damaged_copy(run, tmp_path / "earlier", lambda folder: None)
    assert message in refused(train, [*train_words(bad, earlier), "--resume", "never"], tmp_path, capfd)


@pytest.mark.parametrize("command", ["render", "evaluate", "report"])
@pytest.mark.parametrize("case", STACKS)
def test_render_and_evaluate_of_a_run_whose_stack_went_bad(case, command, stack, tmp_path, capfd):
    damage, message = STACKS[case]
    data = damaged_copy(stack, tmp_path / "stack", lambda folder: None)
    made = bad_input.make_run(data, tmp_path / "run", steps=0)
    damage(data)
    words = {"render": ["--out", str(tmp_path / "map.tif")]}.get(command, [])
    assert message in refused(cli, [command, str(made), *words], tmp_path, capfd)


# ---------------------------------------------------------------- pictures and references


def floats(path, value=0.0, shape=(64, 96)):
    pixels = np.random.default_rng(0).random(shape).astype(np.float32)
    pixels[20, 30] = value
    with open(path, "wb") as file:
        np.save(file, pixels)


def truncated_tiff(path):
    with open(path, "wb") as file:
        tifffile.imwrite(file, np.zeros((64, 96), np.uint8))
    truncate(path)


def truncated_npy(path):
    floats(path)
    truncate(path)


PICTURES = {
    "missing": (lambda path: None, "no such file"),
    "truncated npy": (truncated_npy, "truncated"),
    "truncated tiff": (truncated_tiff, "truncated"),
    "no image": (lambda path: path.write_text("no image at all"), "not an image"),
    "image bomb": (png_bomb, "above the limit"),
    "unsupported bit depth": (complex_numbers, "unsupported bit depth: pixels are complex64"),
}


@pytest.mark.parametrize("case", [*PICTURES, "nothing known"])
def test_train_on_a_bad_picture(case, tmp_path, capfd):
    write, message = (PICTURES | {"nothing known": (unknown, "no pixel holds data")})[case]
    path = tmp_path / "picture"
    write(path)
    words = ["--config", "recipes/image.yaml", "--problem.path", str(path), "--output", str(tmp_path / "run")]
    assert message in refused(train, words, tmp_path, capfd)
    assert message in refused(train, [*words, "--start.enabled", "false"], tmp_path, capfd)


def unknown(path):
    with open(path, "wb") as file:
        np.save(file, np.full((64, 96), np.nan, np.float32))


@pytest.mark.parametrize("case", [*PICTURES, "another size", "nothing known"])
def test_evaluate_against_a_bad_reference(case, run, tmp_path, capfd):
    other = {
        "another size": (lambda path: floats(path, shape=(40, 40)), "is not the field's"),
        "nothing known": (unknown, "no finite pixel"),
    }
    write, message = (PICTURES | other)[case]
    path = tmp_path / "reference"
    write(path)
    for command in (["evaluate", str(run)], ["report", str(run), "--out", str(tmp_path / "report.html")]):
        assert message in refused(cli, [*command, "--reference", str(path)], tmp_path, capfd)


# ---------------------------------------------------------------- recipes and command lines


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--training.step", "3"], "unknown key 'training.step'; did you mean 'steps'?"),
        (["--field.levels.0.network.degre", "3"], "did you mean 'degree'?"),
        (["--training.steps", "many"], "'training.steps'"),
        (["--batch.size", "[1, 2]"], "'batch.size'"),
        (["--training.lr", ".nan"], "'training.lr'"),
        (["--problem.kind", "sound"], "'problem.kind'"),
        (["--resume", "elsewhere"], "elsewhere is not a checkpoint"),
        (["--batch.blocks", "1", "--training.accumulate", "2"], "batch.blocks is 1"),
        (["loose"], "'loose' is not an option"),
        (["--field.levels.1.network.degree", "15"], "give `degree: null`"),
        (["--field.levels.0.network", "{kind: siren, hidden: []}"], "at least one hidden layer"),
        (["--field.levels.0.network", "{kind: cpikan, hidden: [-1]}"], "a layer has from 1"),
        (["--field.levels.0.network", "{kind: cpikan, hidden: [0]}"], "a layer has from 1"),
        (["--field.levels.0.network", "{kind: cpikan, hidden: [6], degree: [4]}"], "each of the 2 layers"),
        (["--field.levels.0.network", "{kind: cpikan, hidden: [6], degree: [4, 2, 3]}"], "each of the 2 layers"),
        (["--field.levels.0.network", "{kind: cpikan, hidden: [6], degree: [4, 65]}"], "a degree is from 1 to 64"),
        (["--start.sweeps", "1"], "sweeps are over tiles that Gauss-Newton solves"),
        (["--training.sweep_every", "3"], "sweeps are over tiles that Gauss-Newton solves"),
        (["--target.psnr", "40"], "give target.rmse in nm"),
    ],
)
def test_a_mistake_in_the_recipe(change, message, stack, tmp_path, capfd):
    assert message in refused(train, [*train_words(stack, tmp_path / "run"), *change], tmp_path, capfd)


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "cannot read the recipe"), ("output: [", "not valid YAML"), ("words", "mapping"), ("{}", "is missing")],
)
def test_a_file_that_is_no_recipe(text, message, tmp_path, capfd):
    path = tmp_path / "recipe.yaml"
    if text is not None:
        path.write_text(text)
    assert message in refused(train, ["--config", str(path), "--output", str(tmp_path / "run")], tmp_path, capfd)
    assert message in refused(cli, ["train", "--config", str(path)], tmp_path, capfd)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--frames", "4x2"], "too few phase steps"),
        (["--bits", "24"], "invalid choice: 24"),
        (["--bits", "16", "--format", "bmp"], "bmp holds 8 bits"),
        (["--size", "99999999x99999999"], "free some space"),
        (["--noise", "nan"], "noise"),
        (["--wavelengths", "inf", "5", "6", "7"], "wavelengths"),
        (["--sise", "4x4"], "unrecognized arguments"),
        (["--step-error", "-0.1"], "step_error: -0.1"),
        (["--step-error", "much"], "invalid float"),
        (["--missing", "2"], "at least 3 of each wavelength"),
        (["--missing", "-1"], "missing: -1"),
        (["--saturated", "1.5"], "from 0 to 0.5"),
        (["--gain", "inf"], "gain: inf"),
        (["--height", "nowhere.npy"], "nowhere.npy: no such file"),
        (["--height", "README.md"], "README.md"),
        (["--scale", "2"], "give --height FILE too"),
    ],
)
def test_synth_of_what_cannot_be(words, message, tmp_path, capfd):
    assert message in refused(cli, ["synth", str(tmp_path / "new" / "wafer"), *words], tmp_path, capfd)


def test_synth_into_a_folder_of_somebody_else(tmp_path, capfd):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    assert "choose another folder" in refused(cli, ["synth", str(tmp_path / "thesis")], tmp_path, capfd)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--scale", "0"], "positive"),
        (["--scale", "1e9"], "pixels on a side"),
        (["--scale", "x"], "invalid float"),
        (["--region", "0:9,90:99"], "not inside"),
        (["--quantity", "value", "--out", "map.jpeg"], "unknown format"),
        (["--out", "map.bmp"], "holds uint8"),
    ],
)
def test_render_of_what_cannot_be(words, message, run, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    words = words if "--out" in words else [*words, "--out", "map.tif"]
    assert message in refused(cli, ["render", str(run), *words], tmp_path, capfd)


def test_decode_of_what_cannot_be(stack, tmp_path, capfd):
    out = str(tmp_path / "h.tif")
    for words in (["--out", out, "--threads", "-1"], ["--out", out, "--quality", out], ["--out", str(tmp_path)]):
        refused(cli, ["decode", str(stack), *words], tmp_path, capfd)
    for noise in ("0", "-2", "inf", "much"):
        message = refused(cli, ["decode", str(stack), "--out", out, "--repair", noise], tmp_path, capfd)
        assert "--repair" in message and "not a positive number" in message


def test_nothing_that_is_read_is_written_over(stack, run, tmp_path, capfd):
    kept = {path: path.read_bytes() for path in stack.iterdir()}
    assert any(path.suffix == ".bmp" for path in kept)
    for path in sorted(kept):
        of_run = [[name, run, "--out", path] for name in ("render", "report", "export")]
        for words in (["decode", stack, "--out", path], *of_run, ["export", run, "--bits", "12", "--out", path]):
            refused(cli, [*map(str, words)], tmp_path, capfd)
    frame = next(path for path in kept if path.suffix == ".bmp")
    words = ["decode", str(stack), "--out", str(tmp_path / "h.npy"), "--quality", str(frame)]
    message = refused(cli, words, tmp_path, capfd)
    assert "belongs to the stack" in message
    assert kept == {path: path.read_bytes() for path in stack.iterdir()}


# ---------------------------------------------------------------- trained fields


def described(path, **changes):
    """The field file with other metadata."""
    with safe_open(path, "pt") as file:
        metadata, state = file.metadata() | changes, {name: file.get_tensor(name) for name in file.keys()}
    save_file(state, path, metadata={key: value for key, value in metadata.items() if value is not None})


def other_weights(path):
    with safe_open(path, "pt") as file:
        metadata, state = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    name = next(name for name in sorted(state) if len(state[name]) > 1)
    state[name] = state[name][:1].contiguous()
    save_file(state, path, metadata=metadata)


def fewer_weights(path):
    with safe_open(path, "pt") as file:
        metadata, state = file.metadata(), {name: file.get_tensor(name) for name in list(file.keys())[1:]}
    save_file(state, path, metadata=metadata)


FIELDS = {
    "missing": (lambda path: path.unlink(), "no trained field"),
    "cut short": (truncate, "cut short"),
    "empty": (lambda path: path.write_bytes(b""), "cut short"),
    "no safetensors": (lambda path: path.write_text("no field at all, but some text"), "not a field"),
    "no description": (lambda path: described(path, about=None), "not a field"),
    "broken JSON": (lambda path: described(path, about='{"shape": [64,'), "not a field"),
    "JSON of something else": (lambda path: described(path, about="[1, 2]"), "lacks shape"),
    "no shape": (lambda path: described(path, about=json.dumps(dict.fromkeys(bad_input.ABOUT, "x"))), "shape"),
    "broken recipe": (lambda path: described(path, recipe="output: ["), "not a field"),
    "no recipe": (lambda path: described(path, recipe="words"), "not a field"),
    "recipe of another program": (lambda path: described(path, recipe="{output: x, modell: y}"), "unknown key"),
    "weights of another shape": (other_weights, "do not fit"),
    "weights missing": (fewer_weights, "do not fit"),
}


@pytest.mark.parametrize("case", FIELDS)
def test_render_and_evaluate_of_a_bad_field(case, run, tmp_path, capfd):
    damage, message = FIELDS[case]
    bad = damaged_copy(run, tmp_path / "run", lambda folder: damage(folder / "field.safetensors"))
    line = refused(cli, ["render", str(bad), "--out", str(tmp_path / "map.tif")], tmp_path, capfd)
    assert message in line and "field.safetensors" in line
    assert message in refused(cli, ["evaluate", str(bad)], tmp_path, capfd)
    assert message in refused(cli, ["report", str(bad)], tmp_path, capfd)
    if (bad / "field.safetensors").exists():
        assert message in refused(cli, ["evaluate", str(bad / "field.safetensors")], tmp_path, capfd)


CHECKPOINT = "checkpoints/step_00000002/model.safetensors"
EXPORTS = {
    "no checkpoint": (lambda run: (run / CHECKPOINT).parent.rename(run / "elsewhere"), "no checkpoint to export"),
    "no shards": (lambda run: (run / CHECKPOINT).unlink(), "can only be joined by resuming"),
    "truncated shard": (lambda run: truncate(run / CHECKPOINT), "model.safetensors: cannot be read"),
    "no start": (lambda run: (run / "start.safetensors").unlink(), "start.safetensors: cannot be read"),
    "no description": (lambda run: (run / "about.json").unlink(), "about.json: cannot be read"),
    "broken description": (lambda run: truncate(run / "about.json"), "about.json: cannot be read"),
    "broken recipe": (lambda run: (run / "recipe.yaml").write_text("output: ["), "recipe.yaml: not valid YAML"),
    "DeepSpeed shards": (lambda run: (run / CHECKPOINT).rename(run / CHECKPOINT[:26] / "latest"), "cannot be joined"),
}


@pytest.mark.parametrize("case", EXPORTS)
def test_export_of_a_bad_run(case, run, tmp_path, capfd):
    damage, message = EXPORTS[case]
    bad = damaged_copy(run, tmp_path / "run", damage)
    (bad / "field.safetensors").unlink()  # which is a better state than that of the checkpoint
    for out in ([], ["--out", str(tmp_path / "new.safetensors")]):
        assert message in refused(cli, ["export", str(bad), *out], tmp_path, capfd)


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.bin"])
def test_resuming_from_a_damaged_checkpoint(file, stack, run, tmp_path, capfd):
    bad = damaged_copy(run, tmp_path / "run", lambda folder: truncate(folder / CHECKPOINT[:26] / file))
    words = [*train_words(stack, bad), "--training.steps", "4"]
    assert "step_00000002: cannot be resumed from" in refused(train, words, tmp_path, capfd)


def test_a_run_of_another_recipe_is_not_resumed(stack, run, tmp_path, capfd):
    earlier = damaged_copy(run, tmp_path / "run", lambda folder: None)
    words = [*train_words(stack, earlier), "--start.threshold", "4"]
    assert "another field, problem" in refused(train, words, tmp_path, capfd)


# ---------------------------------------------------------------- places that cannot be written


@pytest.mark.parametrize("command", ["synth", "decode", "render", "report", "export", "train"])
def test_output_below_a_file(command, stack, run, tmp_path, capfd):
    (tmp_path / "file").write_text("no folder")
    main, words = bad_input.command(command, stack, run, tmp_path / "file" / "below")
    assert str(tmp_path / "file") in refused(main, words, tmp_path, capfd)
