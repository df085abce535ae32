"""Packed fields: how far they are from the exact one, how many bytes they take, and what becomes of damaged files."""

import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cpikan_hr.cli import main as cli
from cpikan_hr.fields import Field
from cpikan_hr.recipe import load_recipe
from cpikan_hr.train import main as train
from cpikan_hr.training import codec
from cpikan_hr.training.export import export
from cpikan_hr.training.weights import load_field, save_field

SHAPE = (120, 152)
ABOUT = {"shape": list(SHAPE), "channels": 3, "unit": "grey levels", "dtype": "uint8", "pixel_pitch_um": None,
         "params": 0, "train_seconds": 1.0, "peak_rss_mb": 1.0, "gpu_peak_mb": 0.0, "steps": 0}  # fmt: skip


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)


@pytest.fixture(scope="module")
def picture():
    """Shading, edges and texture, uint8 [H, W, 3]."""
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]].astype(float)
    disc = 90.0 * ((y - 50) ** 2 + (x - 70) ** 2 < 900)
    texture = np.random.default_rng(0).normal(0, 12, SHAPE) * (x > 100)
    grey = 60 + 0.4 * y + disc + texture
    return np.clip(np.stack([grey, 0.7 * grey + 0.2 * x, 255 - grey], -1), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def run(picture, tmp_path_factory, request):
    folder = tmp_path_factory.mktemp("codec")
    Image.fromarray(picture).save(folder / "in.png")
    recipe = request.config.rootpath / "recipes" / "image.yaml"
    words = ["--config", str(recipe), "--problem.path", str(folder / "in.png"), "--output", str(folder / "run")]
    assert train([*words, "--target.psnr", "40"]) == 0
    return folder / "run"


def rendered(path) -> np.ndarray:
    """float32 [H, W, C] on the pixel centres."""
    centres = (torch.arange(n, dtype=torch.float64) + 0.5 for n in SHAPE)
    return load_field(path).field.lattice(*centres)[0].permute(1, 2, 0).numpy()


def psnr(path, picture) -> float:
    return float(10 * np.log10(255**2 / np.mean((rendered(path) - picture) ** 2)))


def amplitudes(field: Field) -> dict[str, torch.Tensor]:
    """Per sparse level all terms [all tiles, C, M + 1, N + 1] in the data's unit, from the field's own basis.

    The root of the energy that a term has on its tile's pixels, times core over support.
    """
    found = {}
    for number, level in enumerate(field.levels):
        grid, network = level.tile_grid, level.network
        if network is None:
            continue
        centres = (torch.arange(network.shape[0], dtype=torch.float64) + 0.5) / network.shape[0] * 2 - 1
        energy = network.basis(centres[None], 0, "value")[0, 0].square().sum(0).sqrt()
        share = grid.axes[0].stride / (2 * grid.axes[0].half)
        dense = network.dense().detach().double() * level.scale.double()[:, :, None, None]
        whole = torch.zeros(grid.tiles, *dense.shape[1:], dtype=torch.float64)
        whole[level.active_tiles] = dense * (energy[:, None] * energy) * share**2
        found[f"levels.{number}."] = whole
    return found


def refused(words: list[str], capfd) -> str:
    capfd.readouterr()
    assert cli(words) == 2
    captured = capfd.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1 and not captured.out, captured
    return lines[0]


# ------------------------------------------------------------------------------------------------------- how exact


@pytest.mark.parametrize("options", [{"bits": 8}, {"bits": 12}, {"step": 2.5}, {"step": 60.0}, {"step": 1e5}], ids=str)
def test_every_amplitude_is_at_most_half_a_step_off(options, run, tmp_path):
    exact, packed = load_field(run), load_field(export(run, tmp_path / "packed.safetensors", **options))
    steps = json.loads(metadata_of(tmp_path / "packed.safetensors")["steps"])
    before, after = amplitudes(exact.field), amplitudes(packed.field)
    assert len(before) > 1 and set(steps) == set(before)
    for name, truth in before.items():
        error = (after.get(name, torch.zeros_like(truth)) - truth).abs().max()
        assert float(error) <= steps[name] / 2 * (1 + 1e-5)
        if "step" in options:
            assert steps[name] == options["step"]
    assert packed.about["params"] == packed.field.count_parameters() <= exact.about["params"]


def test_the_error_of_the_picture_is_the_quantisation_noise_of_its_terms(run, tmp_path):
    exact = rendered(run)
    for step in (1.0, 4.0, 16.0):
        packed = export(run, tmp_path / "packed.safetensors", step=step)
        terms = load_field(packed).about["params"]
        noise = step / np.sqrt(12) * np.sqrt(terms / exact.size)
        assert np.sqrt(np.mean((rendered(packed) - exact) ** 2)) == pytest.approx(noise, rel=0.15)


def test_more_bits_are_more_bytes_and_a_better_picture(run, picture, tmp_path):
    files = [export(run, tmp_path / f"{bits}.safetensors", bits=bits) for bits in (8, 10, 12, 16)]
    sizes, figures = [path.stat().st_size for path in files], [psnr(path, picture) for path in files]
    exact = psnr(run, picture)
    assert sizes == sorted(set(sizes)) and figures == sorted(set(figures))
    assert abs(figures[-1] - exact) < 0.01
    assert sizes[-1] < 0.33 * (run / "field.safetensors").stat().st_size


@pytest.mark.parametrize("network", ["cpikan", "siren", "fourier_mlp", "chebyshev2d"])
def test_other_networks_are_quantised_tensor_by_tensor(network, tmp_path):
    levels = f"[{{tile: 40, network: {{kind: {network}}}}}]"
    recipe = load_recipe("recipes/image.yaml", ["--field.levels", levels])
    field = Field.build(recipe.field, SHAPE, 3)
    with torch.no_grad():
        for number, parameter in enumerate(field.parameters()):
            parameter.normal_(generator=torch.Generator().manual_seed(number))
        field.levels[0].mean.normal_()
    save_field(tmp_path / "field.safetensors", field.state_dict(), recipe, ABOUT)
    exact = dict(field.named_parameters())
    sizes = []
    for bits in (8, 12, 16):
        path = export(tmp_path / "field.safetensors", tmp_path / f"{bits}.safetensors", bits=bits)
        for name, value in load_field(path).field.state_dict().items():
            if name in exact:
                largest = float(exact[name].detach().abs().max())
                step, rounding = largest / (2 ** (bits - 1) - 1), largest * 2**-23
                assert float((value - exact[name]).detach().abs().max()) <= step / 2 + rounding
            else:
                assert torch.equal(value, field.state_dict()[name])
        sizes.append(path.stat().st_size)
    assert sizes == sorted(set(sizes)) and sizes[-1] < (tmp_path / "field.safetensors").stat().st_size
    assert not list(tmp_path.glob("*.part"))
    with pytest.raises(ValueError, match="--step is for sparse"):
        export(tmp_path / "field.safetensors", tmp_path / "new.safetensors", step=1.0)


def test_a_step_above_every_term_leaves_an_empty_field(run, tmp_path):
    packed = export(run, tmp_path / "packed.safetensors", step=1e5)
    assert np.ptp(rendered(packed), axis=(0, 1)).max() == 0 and load_field(packed).about["params"] == 0


@settings(max_examples=100, deadline=None)
@given(st.lists(st.one_of(st.integers(0, 3), st.integers(0, 2**40))), st.integers(0, 2))
def test_integers_come_back(values, least):
    streams = codec.Writer()
    codec.pack_integers(streams, np.array(values, np.int64), least)
    reader = codec.Reader(b"".join(streams.parts), [len(part) for part in streams.parts])
    assert codec.unpack_integers(reader, len(values), least).tolist() == values


# ------------------------------------------------------------------------------------------- commands and sources


def test_commands_read_a_packed_file_as_any_other(run, picture, tmp_path, capfd):
    packed = tmp_path / "packed.safetensors"
    assert cli(["export", str(run), "--out", str(packed), "--step", "4"]) == 0
    assert capfd.readouterr().out.strip() == str(packed)
    assert cli(["evaluate", str(packed), "--reference", str(run.parent / "in.png")]) == 0
    figures = json.loads(capfd.readouterr().out)
    assert figures["bytes"] == packed.stat().st_size
    assert figures["psnr"] == pytest.approx(psnr(packed, picture), abs=1e-3)
    assert cli(["render", str(packed), "--out", str(tmp_path / "packed.png")]) == 0
    assert cli(["render", str(run), "--out", str(tmp_path / "exact.png")]) == 0
    difference = np.asarray(Image.open(tmp_path / "packed.png"), int) - np.asarray(Image.open(tmp_path / "exact.png"))
    assert 0 < np.abs(difference).mean() < 1.5


def test_a_run_or_its_file_are_packed_beside_it_and_unpacked_again(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    of_run = export(tmp_path / "run", bits=12)
    of_file = export(tmp_path / "run" / "field.safetensors", tmp_path / "other.safetensors", bits=12)
    assert of_run == tmp_path / "run" / "field.packed.safetensors"
    tensors = load_file(of_file)
    assert all(torch.equal(value, tensors[name]) for name, value in load_file(of_run).items())
    plain = export(of_run, tmp_path / "plain.safetensors")
    assert "levels.0.mean" in load_file(plain) and np.array_equal(rendered(plain), rendered(of_run))


def test_a_checkpoint_is_packed_where_the_run_went_on_after_its_field(picture, tmp_path):
    Image.fromarray(picture).save(tmp_path / "in.png")
    run = tmp_path / "run"
    words = ["--config", "recipes/image.yaml", "--problem.path", str(tmp_path / "in.png"), "--output", str(run)]
    options = ["--target.psnr", "30", "--batch.blocks", "2", "--training.checkpoint_steps", "2"]
    assert train([*words, *options, "--training.steps", "2"]) == 0
    earlier = (run / "field.safetensors").read_bytes()
    assert train([*words, *options, "--training.steps", "5"]) == 0

    def steps() -> int:
        return load_field(export(run, tmp_path / "packed.safetensors", bits=16)).about["steps"]

    assert steps() == 5  # the field, not the checkpoint of step 4
    (run / "field.safetensors").write_bytes(earlier)
    assert steps() == 4
    (run / "field.safetensors").unlink()
    assert steps() == 4


# ------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("words", ["--bits 7", "--bits 17", "--bits x", "--bits 8.5", "--step 0", "--step nan"])
def test_bits_and_steps_that_are_none(words, run, tmp_path, capfd):
    line = refused(["export", str(run), "--out", str(tmp_path / "x"), *words.split()], capfd)
    assert all(word in line for word in words.split()) and not list(tmp_path.iterdir())


def metadata_of(path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def test_files_of_a_later_format_and_files_that_are_quantised_already(run, tmp_path, capfd):
    packed, later = export(run, tmp_path / "packed.safetensors", bits=12), tmp_path / "later.safetensors"
    save_file(load_file(packed), later, metadata_of(packed) | {"version": "2"})
    assert "format 2 is newer" in refused(["render", str(later), "--out", str(tmp_path / "x.png")], capfd)
    assert "quantised already" in refused(["export", str(packed), "--out", str(tmp_path / "x"), "--bits", "8"], capfd)
    assert "--out" in refused(["export", str(packed)], capfd)
    nowhere = str(tmp_path / "no.safetensors")
    assert "no trained field" in refused(["export", nowhere, "--bits", "8", "--out", str(tmp_path / "x")], capfd)


def test_weights_that_are_not_finite(run, tmp_path):
    field, recipe, about = load_field(run)
    next(field.parameters()).data[0] = torch.nan
    save_field(tmp_path / "field.safetensors", field.state_dict(), recipe, about)
    with pytest.raises(ValueError, match="not finite"):
        export(tmp_path / "field.safetensors", bits=12)
    assert [path.name for path in tmp_path.iterdir()] == ["field.safetensors"]


def test_a_damaged_packed_file_is_refused_or_the_same(run, tmp_path):
    """Cut anywhere, or with any byte changed; only what merely informs may be wrong and stay unnoticed."""
    packed = export(run, tmp_path / "packed.safetensors", step=30.0)
    whole, bad = packed.read_bytes(), tmp_path / "bad.safetensors"
    exact = load_field(packed).field.state_dict()
    header = 8 + int.from_bytes(whole[:8], "little")
    places = [*range(0, header, 3), *range(header, len(whole), len(whole) // 60)]
    copies = [whole[:place] for place in places[::4]]
    copies += [whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :] for place in places]
    accepted = 0
    for copy in copies:
        bad.write_bytes(copy)
        try:
            state = load_field(bad).field.state_dict()
        except ValueError as error:
            assert str(bad) in str(error) and len(str(error).splitlines()) == 1
            continue
        accepted += 1
        assert all(torch.equal(state[name], value) for name, value in exact.items())
    assert accepted < len(copies) / 5


def test_a_foreign_file_with_the_right_name_is_refused(run, tmp_path, capfd):
    packed = export(run, tmp_path / "packed.safetensors", bits=12)
    for tensors in ({}, {"head": torch.zeros(5)}, load_file(packed) | {"streams": torch.zeros(3, dtype=torch.uint8)}):
        for crc in (metadata_of(packed)["crc32"], codec.checksum(tensors)):
            foreign = tmp_path / "foreign.safetensors"
            save_file(tensors, foreign, metadata_of(packed) | {"crc32": crc})
            assert "damaged" in refused(["evaluate", str(foreign)], capfd)


def test_pack_and_unpack_are_inverse_up_to_the_step(run):
    """Pure functions: the state goes through tensors and metadata alone."""
    trained = load_field(run)
    state, names = trained.field.state_dict(), {name for name, _ in trained.field.named_parameters()}
    tensors, metadata = codec.pack(state, names, codec.sparse_shapes(trained.field), 16, 1e-3, {"about": "words"})
    assert {value.dtype for value in tensors.values()} == {torch.uint8}
    again, description = codec.unpack(tensors, metadata)
    assert description == {"about": "words"} and set(again) == set(state)
    for name, value in state.items():
        close = torch.equal if value.dtype != torch.float32 else lambda a, b: torch.allclose(a, b, atol=1e-3)
        assert again[name].dtype == value.dtype and close(again[name], value), name
