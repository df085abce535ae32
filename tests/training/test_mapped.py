"""Fields in files: written as safetensors reads them, mapped without a copy, and only what is looked at is resident."""

import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cpikan_hr.data.source import open_source
from cpikan_hr.errors import UserError
from cpikan_hr.fields import Field, field, lattice
from cpikan_hr.mapped import SpooledVector, in_memory, release
from cpikan_hr.recipe import parse_recipe
from cpikan_hr.render import render
from cpikan_hr.training.tensors import DTYPES, load_tensors, map_tensors, save_tensors
from cpikan_hr.training.weights import load_field, save_field

SIDE, TERMS = 2048, 150
ABOUT = {"shape": [SIDE, SIDE], "channels": 1, "unit": "grey levels", "dtype": "uint8", "pixel_pitch_um": None,
         "params": 0, "train_seconds": 1.0, "peak_rss_mb": 1.0, "gpu_peak_mb": 0.0, "steps": 0}  # fmt: skip


def resident(path: Path) -> int:
    """Bytes of the file `path` that are resident in this process through its maps."""
    maps = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)
    mine = [text for text in maps if text.split("\n")[0].endswith(str(path))]
    return 1024 * sum(int(re.search(r"^Rss: +(\d+) kB", text, re.MULTILINE)[1]) for text in mine)


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """A field of 128 x 128 tiles with 150 terms each: 15 MB."""
    network = {"kind": "chebyshev2d", "degree": None, "sparse": True}
    tree = {"output": "unused", "problem": {"kind": "image", "path": "unused"}, "training": {"steps": 0}}
    recipe = parse_recipe(tree | {"field": {"levels": [{"tile": 16, "overlap": 0.125, "network": network}]}}, "test")
    whole = Field.build(recipe.field, (SIDE, SIDE), 1)
    tiles, generator = whole.levels[0].network.tiles, torch.Generator().manual_seed(0)
    values = torch.randn(tiles * TERMS, generator=generator)
    whole.levels[0].network.set_terms(torch.full((tiles,), TERMS), torch.arange(TERMS).repeat(tiles), values)
    path = tmp_path_factory.mktemp("mapped") / "field.safetensors"
    save_field(path, whole.state_dict(), recipe, dict(ABOUT))
    return path


def some_tensors() -> dict[str, torch.Tensor]:
    """One of every type, of odd sizes, a scalar, an empty one, one that is not contiguous."""
    found = {str(dtype): (torch.arange(15).reshape(3, 5) % 2).to(dtype) for dtype in DTYPES.values()}
    return found | {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3), "turned": torch.rand(4, 7).T}


@pytest.mark.parametrize("read", [load_file, load_tensors, lambda path: map_tensors(path)[0]])
def test_what_is_written_is_read(read, tmp_path):
    save_tensors(tmp_path / "a.safetensors", some_tensors(), {"key": "value"})
    found = read(tmp_path / "a.safetensors")
    assert found.keys() == some_tensors().keys()
    for name, value in some_tensors().items():
        if name != "turned":
            assert found[name].dtype == value.dtype and torch.equal(found[name], value)
    assert map_tensors(tmp_path / "a.safetensors")[1] == {"key": "value"}


def test_a_tensor_that_is_not_contiguous_and_one_larger_than_a_chunk_are_written(tmp_path):
    tensors = {"turned": torch.rand(700, 900).T, "large": torch.rand(3_000_000)}
    save_tensors(tmp_path / "a.safetensors", tensors)
    assert all(torch.equal(value, tensors[name]) for name, value in load_file(tmp_path / "a.safetensors").items())


def test_pages_are_resident_once_read_until_they_are_released(tmp_path):
    save_tensors(tmp_path / "a.safetensors", {"a": torch.ones(2**20)})
    tensor = map_tensors(tmp_path / "a.safetensors")[0]["a"]
    assert resident(tmp_path / "a.safetensors") < 2**20
    assert tensor.sum() == 2**20 and resident(tmp_path / "a.safetensors") >= 2**22
    release()
    assert resident(tmp_path / "a.safetensors") == 0
    assert tensor.sum() == 2**20


def test_a_mapped_field_is_not_in_memory(large):
    trained = load_field(large, mapped=True)
    assert trained.about["params"] == 128 * 128 * TERMS
    assert resident(large) < 2**20


@pytest.mark.parametrize("region", ["0:20,0:20", "1000:1032,700:760", "2030:2048,2030:2048"])
def test_a_region_is_rendered_from_its_tiles_alone(region, large, tmp_path, monkeypatch):
    render(load_field(large, mapped=True), tmp_path / "whole.npy")
    y0, y1, x0, x1 = (int(number) for number in re.findall(r"\d+", region))
    expected = np.load(tmp_path / "whole.npy")[y0:y1, x0:x1]
    for module in (field, lattice):
        monkeypatch.setattr(module, "release", lambda: None)
    trained = load_field(large, mapped=True)
    before = resident(large)
    render(trained, tmp_path / "part.npy", region=region)
    touched = resident(large) - before
    assert 0 < touched < 0.3 * large.stat().st_size
    assert np.abs(np.load(tmp_path / "part.npy").astype(int) - expected).max() <= 1
    render(trained, tmp_path / "again.npy")
    assert resident(large) > 0.9 * large.stat().st_size


def test_pages_are_handed_back_while_a_field_is_rendered(large, tmp_path):
    trained = load_field(large, mapped=True)
    render(trained, tmp_path / "whole.npy")
    assert resident(large) < 0.1 * large.stat().st_size


def test_a_spool_holds_what_was_added_and_what_is_written_to_it(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    spool = SpooledVector(torch.int16)
    assert spool.tensor().shape == (0,) and spool.tensor().dtype == torch.int16
    for values in (np.arange(5), np.arange(0), np.arange(5, 9000)):
        spool.add(values)
    tensor = spool.tensor()
    assert torch.equal(tensor, torch.arange(9000, dtype=torch.int16))
    tensor[7] = -1
    release()
    assert tensor[7] == -1 and spool.tensor()[7] == -1
    assert list(tmp_path.iterdir()) == []


def test_no_room_for_a_spool_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with pytest.raises(UserError, match="missing: cannot be written"):
        SpooledVector(torch.float32)


def test_a_field_that_is_not_mapped_keeps_what_is_written_to_it(large):
    loaded = load_field(large).field.levels[0].network
    with torch.no_grad():
        loaded.coefficients[::1000] = 3
    release()
    assert (loaded.coefficients[::1000] == 3).all()


def test_a_field_in_memory_is_trained_without_its_file(large):
    trained = load_field(large, mapped=True)
    in_memory(trained.field)
    with torch.no_grad():
        trained.field.levels[0].network.coefficients.fill_(3)
    release()
    assert (trained.field.levels[0].network.coefficients == 3).all()
    assert not (load_field(large, mapped=True).field.levels[0].network.coefficients == 3).any()


def test_a_name_with_brackets_is_a_name(tmp_path):
    from PIL import Image

    pixels = np.arange(200, dtype=np.uint8).reshape(10, 20)
    Image.fromarray(pixels).save(tmp_path / "frame[1].png")
    assert np.array_equal(open_source(tmp_path / "frame[1].png").read(0, 10, 0, 20)[..., 0], pixels)
