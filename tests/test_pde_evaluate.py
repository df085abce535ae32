"""What evaluate and render say of an equation's field, against numbers computed directly."""

import json
import math

import numpy as np
import pytest
import tifffile
import torch
from small_runs import BURGERS, INVERSE

from cpikan_hr.cli import main as cli
from cpikan_hr.problems import build_problem
from cpikan_hr.quantities_pde import lattice_coordinates
from cpikan_hr.train import main as train
from cpikan_hr.training.tensors import load_tensors
from cpikan_hr.training.weights import load_field

UNKNOWN = '''
from dataclasses import dataclass

from cpikan_hr.problems.equations.base import Equation, dirichlet


@dataclass(frozen=True)
class Advection(Equation):
    """A first-order equation of two functions without a known answer."""

    channels = 2

    def domain(self):
        return {"x": (0.0, 1.0), "t": (0.0, 2.0)}

    def residual(self, u, x, t):
        return u.t + u.x

    def conditions(self):
        return dirichlet("x", lambda x, t: [0.0, 0.0])
'''


def trained_run(folder, name, text):
    (folder / f"{name}.yaml").write_text(text)
    assert not train(["--config", str(folder / f"{name}.yaml"), "--output", str(folder / name)])
    return folder / name


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("equations")


@pytest.fixture(scope="module")
def burgers(folder):
    return trained_run(folder, "burgers", BURGERS)


@pytest.fixture(scope="module")
def inverse(folder):
    return trained_run(folder, "inverse", INVERSE)


@pytest.fixture(scope="module")
def advection(folder):
    (folder / "advection.py").write_text(UNKNOWN)
    text = BURGERS.replace("equation: burgers", f"equation: {folder / 'advection.py'}")
    text = text.replace("  parameters: {nu: 0.1}\n", "").replace("solve: {method", "solve: {iterations: 0, method")
    return trained_run(folder, "advection", text.replace(", iterations: 2", ""))


def said(run, capsys, *words):
    capsys.readouterr()
    assert not cli(["evaluate", str(run), *words])
    return json.loads(capsys.readouterr().out)


def rendered(run, tmp_path, *words):
    (tmp_path / "map.npy").unlink(missing_ok=True)
    assert not cli(["render", str(run), "--out", str(tmp_path / "map.npy"), *words])
    return np.load(tmp_path / "map.npy")


def loaded(run):
    field, recipe, _ = load_field(run)
    return field, build_problem(recipe)


def derivatives(field, points, step=1e-4):
    """u, u_x, u_t and u_xx by central differences, off by about step^2."""
    x, t = torch.eye(2, dtype=torch.float64) * step

    def u(at):
        return field(at).value[:, 0].detach()

    here, left, right = u(points), u(points - x), u(points + x)
    slopes = (right - left) / (2 * step), (u(points + t) - u(points - t)) / (2 * step)
    return here, *slopes, (right - 2 * here + left) / step**2


def test_errors_are_those_on_the_lattice(burgers, capsys):
    table = said(burgers, capsys)
    field, problem = loaded(burgers)
    x, t = (torch.linspace(*ends, 21, dtype=torch.float64) for ends in ((-1, 1), (0, 1)))
    points = torch.cartesian_prod(x, t)
    truth = problem.equation.solution(x=points[:, :1], t=points[:, 1:])
    error = field(points).value[:, :1].detach() - truth  # soft conditions: the field is u
    assert table["rmse"] == pytest.approx(float(error.square().mean().sqrt()), rel=1e-12)
    assert table["linf"] == pytest.approx(float(error.abs().max()), rel=1e-12)
    assert table["rel_l2"] == pytest.approx(float(error.norm() / truth.norm()), rel=1e-12)
    assert table["params"] == sum(p.numel() for p in field.parameters())
    assert table["bytes"] == (burgers / "field.safetensors").stat().st_size
    assert "params_per_px" not in table and "coefficients" not in table and table["train_seconds"] > 0


def test_conditions_on_their_faces_and_the_residual(burgers, capsys):
    table = said(burgers, capsys)
    field, _ = loaded(burgers)
    line, low = torch.linspace(-1, 1, 21, dtype=torch.float64), torch.zeros(21, dtype=torch.float64)
    error = field(torch.stack([line, low], 1)).value[:, 0].detach() + torch.sin(math.pi * line)
    assert set(table["conditions"]) == {"initial", "x_low", "x_high"}
    found = table["conditions"]["initial"]
    assert found["max"] == pytest.approx(float(error.abs().max()), rel=1e-12)
    assert found["rms"] == pytest.approx(float(error.square().mean().sqrt()), rel=1e-12)
    # The same mean over a lattice of cell centres; the field is smooth, so both agree.
    axis = (torch.arange(60, dtype=torch.float64) + 0.5) / 60
    u, u_x, u_t, u_xx = derivatives(field, torch.cartesian_prod(2 * axis - 1, axis))
    residual = u_t + u * u_x - 0.1 * u_xx
    assert table["residual"] == pytest.approx(float(residual.square().mean().sqrt()), rel=0.05)


def test_unknown_coefficients_and_their_curve(inverse, capsys):
    table = said(inverse, capsys)["coefficients"]["reaction"]
    value = float(load_tensors(inverse / "field.safetensors")["constants.values"])
    assert value != 0.3 and table["value"] == value and table["true"] == 0.7
    assert table["relative_error"] == pytest.approx(abs(value - 0.7) / 0.7, rel=1e-12)
    lines = [json.loads(line) for line in (inverse / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3] and lines[-1]["coefficient_reaction"] == value


def test_a_reference_of_ones_own(burgers, tmp_path, capsys):
    shown = rendered(burgers, tmp_path)
    reference = shown + np.float32(0.5)
    reference[3, 4] = np.nan
    np.save(tmp_path / "reference.npy", reference)
    table = said(burgers, capsys, "--reference", str(tmp_path / "reference.npy"))
    assert table["rmse"] == pytest.approx(0.5, abs=1e-6) and table["linf"] == pytest.approx(0.5, abs=1e-6)
    np.save(tmp_path / "small.npy", reference[:-1])
    assert cli(["evaluate", str(burgers), "--reference", str(tmp_path / "small.npy")]) == 2
    assert "(20, 21, 1) is not the map's (21, 21, 1)" in capsys.readouterr().err


def test_without_an_answer_there_is_no_error(advection, tmp_path, capsys):
    table = said(advection, capsys)
    assert not {"rmse", "rel_l2", "linf"} & set(table) and table["residual"] > 0
    assert None not in table.values()
    assert rendered(advection, tmp_path, "--quantity", "gradient").shape == (21, 21, 4)
    assert rendered(advection, tmp_path, "--quantity", "residual").shape == (21, 21, 2)
    for quantity, why in (
        ("error", "Advection has no known answer"),
        ("laplacian", "Advection has no second derivatives"),
        ("sigma", "an equation has value, gradient, laplacian, residual, error"),
    ):
        assert cli(["render", str(advection), "--out", str(tmp_path / "no.npy"), "--quantity", quantity]) == 2
        assert why in capsys.readouterr().err


def test_map_pixels_are_lattice_points(burgers, inverse, tmp_path):
    for run, shape in ((burgers, (21, 21)), (inverse, (1, 31))):
        field, problem = loaded(run)
        values = problem.values(field, problem.lattice_points(shape)).reshape(shape).float().numpy()
        assert np.array_equal(rendered(run, tmp_path), values)
    corner = field(torch.tensor([[0.7]], dtype=torch.float64)).value[0, 0].detach()
    assert values[0, -1] == np.float32(float(corner))


def test_a_finer_map_reaches_from_end_to_end_and_holds_its_regions(burgers, tmp_path):
    field, problem = loaded(burgers)
    fine = rendered(burgers, tmp_path, "--scale", "2")
    expected = problem.values(field, problem.lattice_points((42, 42))).reshape(42, 42).numpy()
    np.testing.assert_allclose(fine, expected, atol=1e-6)
    part = rendered(burgers, tmp_path, "--scale", "2", "--region", "2:7,10:21")
    np.testing.assert_allclose(part, fine[4:14, 20:42], atol=1e-6)
    assert np.array_equal(lattice_coordinates(0, 21, 21, 1.0).numpy(), np.arange(21.0))


def test_derivatives_and_errors_as_maps(burgers, tmp_path):
    field, problem = loaded(burgers)
    points = problem.lattice_points((21, 21)).reshape(21, 21, 2)[1:-1, 1:-1].reshape(-1, 2)
    u, u_x, u_t, u_xx = derivatives(field, points)

    def inner(quantity):
        shown = rendered(burgers, tmp_path, "--quantity", quantity)
        return shown.reshape(21, 21, -1)[1:-1, 1:-1].reshape(len(points), -1).squeeze()

    close = dict(rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(inner("gradient"), torch.stack([u_x, u_t], 1), **close)
    np.testing.assert_allclose(inner("laplacian"), u_xx, **close)  # of space alone
    np.testing.assert_allclose(inner("residual"), u_t + u * u_x - 0.1 * u_xx, **close)
    np.testing.assert_allclose(inner("error"), u - problem.truth(points)[:, 0], **close)


def test_a_tiff_says_what_its_axes_are(burgers, tmp_path):
    assert not cli(["render", str(burgers), "--out", str(tmp_path / "map.tif"), "--quantity", "gradient"])
    about = json.loads(tifffile.TiffFile(tmp_path / "map.tif").pages[0].description)
    assert about["unit"] == "1 / x, 1 / t"
    assert about["description"] == "Burgers, gradient; rows, then columns: x from -1 to 1, t from 0 to 1"


def test_the_log_says_how_large_each_condition_is(burgers):
    field, problem = loaded(burgers)
    placed = problem.collocation.placed(0)[1][0]
    error = field(placed.points).value[:, :1].detach() - placed.values
    last = json.loads((burgers / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["rms_initial"] == pytest.approx(float(error.square().mean().sqrt()), rel=1e-9)
    points = problem.lattice_points((21, 21))
    error, truth = problem.values(field, points) - problem.truth(points), problem.truth(points)
    assert last["rel_l2"] == pytest.approx(float(error.norm() / truth.norm()), rel=1e-9)
    assert last["step"] == 7 and {"rms_x_low", "rms_x_high"} < set(last)


def test_a_run_keeps_its_points(burgers, inverse):
    kept = load_tensors(burgers / "points.safetensors")
    assert kept["drawn_at"].tolist() == [2, 4] and kept["drawn"].shape == (2, 40, 2)
    assert torch.equal(kept["interior"], kept["drawn"][1]) and not torch.equal(*kept["drawn"])
    _, problem = loaded(inverse)
    kept = load_tensors(inverse / "points.safetensors")
    assert torch.equal(kept["interior"], problem.collocation.placed(0)[0][0].points) and "drawn" not in kept
