"""Figures of merit at their limits."""

from types import SimpleNamespace

import numpy as np
import pytest
from skimage.metrics import structural_similarity

from cpikan_hr.data.once import Once
from cpikan_hr.data.source import open_source
from cpikan_hr.evaluate import evaluate, similarity, tell_doubts
from cpikan_hr.fields import Field
from cpikan_hr.recipe import FieldOptions, load_recipe
from cpikan_hr.training.weights import Trained


def constant(value: float, shape: tuple[int, int]) -> Once:
    def block(y0, y1, x0, x1):
        return np.full((y1 - y0, x1 - x0, 1), value, np.float32)

    return Once("a constant", block, (*shape, 1), (16, shape[1]))


@pytest.mark.parametrize("value", [0.0, 1.0, 37.25, 1e4 + 1 / 3, -3e6])
def test_a_perfect_map_has_a_similarity_of_one_and_never_more(value, tmp_path):
    value = float(np.float32(value))
    np.save(tmp_path / "map.npy", np.full((40, 50), value, np.float32))
    for full in (1e-30, 1e-3, 1.0, 255.0):
        ssim = similarity(constant(value, (40, 50)), open_source(tmp_path / "map.npy"), 0.0, full)
        assert ssim <= 1 + 1e-9
        if full >= 1:
            assert ssim > 0.99


def test_the_similarity_is_the_one_of_float64(tmp_path):
    rng = np.random.default_rng(0)
    truth = (5000 + rng.normal(0, 1, (60, 50))).astype(np.float32)
    truth[20:30, 10:20] = np.nan
    np.save(tmp_path / "map.npy", truth)
    known = np.isfinite(truth)
    value = np.where(known, 5000.5, 0)
    _, each = structural_similarity(np.where(known, truth, 0).astype(float), value, data_range=6.0, full=True)
    found = similarity(constant(5000.5, (60, 50)), open_source(tmp_path / "map.npy"), 0.0, 6.0)
    assert found == pytest.approx(each[known].mean(), abs=1e-9)


def test_a_field_is_rendered_once_for_all_figures(tmp_path, monkeypatch):
    shape = 90, 70
    options = FieldOptions(levels=[{"grid": [1, 1], "network": {"kind": "siren", "hidden": [2]}}])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"output: {tmp_path}\nproblem: {{kind: interferometry, stack: {tmp_path / 'gone'}, noise: 1.0}}\n"
        "field: {levels: [{grid: [1, 1], network: {kind: siren, hidden: [2]}}]}\n"
    )
    field = Field.build(options, shape, 1)
    field.levels[0].mean.fill_(3.0)
    about = {"shape": list(shape), "channels": 1, "unit": "nm", "params": 1, "train_seconds": 0.0, "peak_rss_mb": 0.0}
    trained = Trained(field, load_recipe(recipe), about | {"gpu_peak_mb": 0.0})
    np.save(tmp_path / "truth.npy", np.full(shape, 1.0, np.float32))
    seen, pixels = np.zeros(shape, int), Field.pixels

    def counted(self, y0, y1, x0, x1, *others, **options):
        seen[y0:y1, x0:x1] += 1
        return pixels(self, y0, y1, x0, x1, *others, **options)

    monkeypatch.setattr(Field, "pixels", counted)
    figures = evaluate(trained, open_source(tmp_path / "truth.npy"), 1)
    assert figures["rmse"] == pytest.approx(2.0) and figures["pv"] == pytest.approx(0.0, abs=1e-5)
    assert (seen == 1).all()


@pytest.mark.parametrize(
    ("heights", "line"),
    [
        (lambda h: 1000 * h + 5, "1e+03 times as large"),
        (lambda h: h / 1000, "0.001 times as large"),
        (lambda h: -h, "run against it (correlation -1.00)"),
        (lambda h: h + 5000, "lie 5000 nm above it"),
        (lambda h: h + 0.005, None),
        (lambda h: 1.2 * h, None),
        (lambda h: np.zeros_like(h), None),
    ],
)
def test_a_reference_in_another_unit_or_of_another_sign_is_said(heights, line, tmp_path, caplog):
    truth = np.random.default_rng(0).normal(100, 50, 10_000)
    error = heights(truth) + np.random.default_rng(1).normal(0, 1e-3, truth.shape) - truth
    recipe = SimpleNamespace(problem=SimpleNamespace(remove_offset=False))
    moments = [np.mean(each) for each in (error, error**2, truth**2, truth, error * truth)]
    tell_doubts("map.tif", np.array(moments), recipe)
    assert [str(line) in record.getMessage() for record in caplog.records] == [True] * (line is not None)
