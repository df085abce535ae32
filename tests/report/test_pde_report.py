"""Reports of equations in a real browser: maps, profiles, slices, animation, points, coefficients, curves."""

import json
import re

import numpy as np
import pytest
from browsing import wait
from small_runs import BURGERS, INVERSE

from cpikan_hr.cli import main as cli
from cpikan_hr.evaluate_pde import evaluate_equation
from cpikan_hr.problems import build_problem
from cpikan_hr.train import main as train
from cpikan_hr.training.weights import load_field

FINER = ["--problem.resolution", "41", "--solve.iterations", "8"]


def reported(folder, text, *words):
    folder.mkdir()
    (folder / "recipe.yaml").write_text(text)
    assert not train(["--config", str(folder / "recipe.yaml"), "--output", str(folder / "run"), *words])
    assert not cli(["report", str(folder / "run")])
    return folder / "run"


@pytest.fixture(scope="module")
def burgers(tmp_path_factory):
    return reported(tmp_path_factory.mktemp("reports") / "burgers", BURGERS, *FINER)


@pytest.fixture(scope="module")
def inverse(tmp_path_factory):
    return reported(tmp_path_factory.mktemp("reports") / "inverse", INVERSE)


def solved(run, shape):
    """The field's values and the answer on the lattice, [h, w]."""
    field, recipe, _ = load_field(run)
    problem = build_problem(recipe)
    points = problem.lattice_points(shape)
    return problem.values(field, points).reshape(shape).numpy(), problem.truth(points).reshape(shape).numpy()


def curves(page, name):
    """Heights of the lines of a plot, in px of the page, downwards."""
    paths = page.locator(f"#{name} path").all()
    points = [re.findall(r"-?[\d.]+", path.get_attribute("d")) for path in paths]
    return [np.array([float(n) for n in numbers]).reshape(-1, 2)[:, 1] for numbers in points]


def assert_drawn(drawn, values):
    """Both lines are those of the values, in one scale, every point of them."""
    given, seen = np.concatenate(values), np.concatenate(drawn)
    assert len(seen) == len(given)
    slope, shift = np.polyfit(given, seen, 1)
    assert slope < 0 and np.abs(slope * given + shift - seen).max() < 0.5


def test_the_maps_are_drawn_and_count_in_the_equations_axes(burgers, opened):
    page = opened(burgers / "report.html")
    assert page.locator("figure.view").evaluate_all("all => all.map(f => f.dataset.layer)") == [
        "field", "reference", "error", "residual",
    ]  # fmt: skip
    colours = """all => all.map(c => new Set(new Uint32Array(
        c.getContext('2d').getImageData(0, 0, c.width, c.height).data.buffer)).size)"""
    assert min(page.locator("canvas.map").evaluate_all(colours)) > 20
    field, _ = solved(burgers, (41, 41))
    canvas = page.locator("canvas.map").first
    box = canvas.bounding_box()
    canvas.hover(position={"x": (30 + 0.5) * box["width"] / 41, "y": (10 + 0.5) * box["height"] / 41})
    wait(page, "document.querySelector('figure.view output').textContent.startsWith('x = \u22120.5, t = 0.75: ')")
    said = page.locator("figure.view output").first.inner_text().replace("\u2212", "-")
    assert float(said.rsplit(": ", 1)[1]) == pytest.approx(field[10, 30], abs=2e-4)
    rules = page.locator("#map .rule")
    assert rules.nth(0).inner_text().split() == ["x", "\u22121.0", "\u22120.5", "0.0", "0.5", "1.0"]
    assert rules.nth(1).inner_text().split() == ["t", "0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]


def test_profiles_go_through_the_chosen_point_with_the_reference(burgers, opened):
    page = opened(burgers / "report.html")
    field, truth = solved(burgers, (41, 41))
    assert page.locator("#profile-x-title").inner_text() == "Along t at x = 0"
    assert_drawn(curves(page, "profile-x"), [field[20], truth[20]])
    assert page.locator("#profile-x path.dashed").count() == 1
    page.locator("form.point input[name=x]").fill("0.25")  # the viewer's x is time
    page.locator("form.point input[name=y]").fill("-0.5")
    page.locator("form.point button").click()
    wait(page, "document.querySelector('#profile-y-title').textContent === 'Along x at t = 0.25'")
    assert page.locator("#profile-x-title").inner_text() == "Along t at x = \u22120.5"
    assert_drawn(curves(page, "profile-x"), [field[10], truth[10]])
    assert_drawn(curves(page, "profile-y"), [field[:, 10], truth[:, 10]])


def test_slices_and_the_animation_show_the_columns(burgers, opened):
    page = opened(burgers / "report.html")
    field, truth = solved(burgers, (41, 41))
    wait(page, "document.querySelector('#slice-5 path.dashed') && document.querySelector('#animation path.dashed')")
    titles = page.locator("#times .many figcaption").all_inner_texts()
    assert titles == ["t = 0", "t = 0.2", "t = 0.4", "t = 0.6", "t = 0.8", "t = 1"]
    assert_drawn(curves(page, "slice-3"), [field[:, 24], truth[:, 24]])
    assert_drawn(curves(page, "animation"), [field[:, 0], truth[:, 0]])
    slider = page.locator("#time")
    slider.focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    wait(page, "document.querySelector('#time-said').textContent === 't = 0.075'")
    assert slider.get_attribute("aria-valuetext") == "t = 0.075"
    wait(page, "document.querySelector('#animation path')")
    assert_drawn(curves(page, "animation"), [field[:, 3], truth[:, 3]])
    page.locator("#play").focus()
    page.keyboard.press("Enter")
    assert page.locator("#play").get_attribute("aria-pressed") == "true"
    wait(page, "Number(document.querySelector('#time').value) > 5")
    page.keyboard.press("Enter")
    assert page.locator("#play").inner_text() == "Play"


def test_points_and_tables_are_those_of_the_run(burgers, opened):
    page = opened(burgers / "report.html")
    choice = page.locator("#points-set")
    assert choice.locator("option").all_inner_texts() == [
        f"drawn by the residual before update {step}, 40 points" for step in (2, 4)
    ]
    second = page.locator("#points-plot path.dots").get_attribute("d")
    assert second.count("M") == 40
    choice.select_option("0")
    assert page.locator("#points-plot path.dots").get_attribute("d") != second
    table = evaluate_equation(load_field(burgers), None, (burgers / "field.safetensors").stat().st_size)
    for key in ("rel_l2", "linf", "rmse", "residual", "params"):
        shown = page.locator(f"tr[data-key={key}] .number").get_attribute("data-value")
        assert float(shown) == pytest.approx(table[key], rel=1e-12), key
    for name, error in table["conditions"].items():
        cells = page.locator(f"tr[data-name={name}] .number").evaluate_all("all => all.map(c => c.dataset.value)")
        assert [float(v) for v in cells] == pytest.approx([error["rms"], error["max"]], rel=1e-12)


def test_every_column_of_the_log_is_a_curve(burgers, opened):
    page = opened(burgers / "report.html")
    plots = page.locator("#training .plot").evaluate_all("all => all.map(p => p.id)")
    names = ["loss", "residual", "lr", "grad_norm", "rel_l2", "evaluations"]
    names[5:5] = [f"rms_{condition}" for condition in ("initial", "x_low", "x_high")]
    assert plots == [f"curve-{name}" for name in names]
    lines = [json.loads(line) for line in (burgers / "metrics.jsonl").read_text().splitlines()]
    loss = np.log10([line["loss"] for line in lines])
    assert_drawn(curves(page, "curve-loss"), [loss])
    assert page.locator("#curve-loss .mark").count() == 1  # where the second-order solver begins


def test_a_line_and_its_unknown_coefficient(inverse, opened):
    page = opened(inverse / "report.html")
    assert page.locator("canvas.map").count() == 0 and page.locator("#times").count() == 0
    field, truth = (line[0] for line in solved(inverse, (1, 31)))
    assert_drawn(curves(page, "line-field"), [field, truth])
    assert_drawn(curves(page, "line-error"), [field - truth])
    cells = page.locator("tr[data-name=reaction] .number").evaluate_all("all => all.map(c => Number(c.dataset.value))")
    lines = [json.loads(line) for line in (inverse / "metrics.jsonl").read_text().splitlines()]
    assert cells[:2] == [lines[-1]["coefficient_reaction"], 0.7]
    steps = [line["coefficient_reaction"] for line in lines]
    assert_drawn(curves(page, "curve-coefficient_reaction"), [steps, [0.7] * 3])
    assert page.locator("#points-set option").all_inner_texts()[1] == "measurements, 20 points"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_it_is_readable_on_a_phone_and_in_the_dark(burgers, opened, width, scheme):
    page = opened(burgers / "report.html", width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for control in page.locator("button, input, select, canvas.map").all():
        name = control.evaluate("c => c.ariaLabel || c.labels?.[0]?.textContent || c.textContent")
        assert name.strip() and control.evaluate("c => c.tabIndex") == 0


def test_a_bare_field_and_a_reference_of_ones_own(burgers, tmp_path, opened, capsys):
    (tmp_path / "alone.safetensors").write_bytes((burgers / "field.safetensors").read_bytes())
    field, _ = solved(burgers, (41, 41))
    np.save(tmp_path / "half.npy", (field - 0.5).astype(np.float32))
    words = ["report", str(tmp_path / "alone.safetensors"), "--reference", str(tmp_path / "half.npy")]
    assert not cli([*words, "--out", str(tmp_path / "alone.html")])
    page = opened(tmp_path / "alone.html")
    rmse = page.locator("tr[data-key=rmse] .number").get_attribute("data-value")
    assert float(rmse) == pytest.approx(0.5, abs=1e-6)
    assert page.locator("#points").count() == 0 and "Nothing was logged" in page.locator("#training").inner_text()
    assert cli(["report", str(burgers), "--reference", str(tmp_path / "none.npy")]) == 2
    assert "no such file" in capsys.readouterr().err
