"""What is loaded of an equation with hard conditions is u, or says why it cannot be."""

import pytest
import torch
from small_pdes import make, random_points

from cpikan_hr.errors import UserError
from cpikan_hr.training.export import export
from cpikan_hr.training.weights import load_field, save_field

HEAT = '''
from dataclasses import dataclass

import torch

from cpikan_hr.problems.equations.base import Equation, dirichlet, initial


@dataclass(frozen=True)
class Heat(Equation):
    def domain(self):
        return {"x": (-1.0, 1.0), "t": (0.0, 1.0)}

    def residual(self, u, x, t):
        return u.t - u.xx

    def conditions(self):
        return [*initial(lambda x, t: torch.cos(x)), *dirichlet("x", lambda x, t: torch.cos(x))]
'''
COSTS = ("params", "train_seconds", "peak_rss_mb", "gpu_peak_mb")


def saved(folder, equation, grid, **options):
    recipe, problem, field = make(equation, [grid], level={"overlap": 0.5}, **options)
    about = {"shape": list(problem.shape), "channels": problem.channels, "unit": "1", "pixel_pitch_um": None}
    about |= dict.fromkeys(COSTS, 0) | problem.about()
    save_field(folder / "field.safetensors", field.state_dict(), recipe, about)
    return problem, field


@pytest.mark.parametrize(
    ("equation", "grid", "options"),
    [
        ("helmholtz", [2, 2], {"constraints": "values"}),
        ("wave", [2, 2], {"constraints": "hard"}),
        ("allen_cahn", [1, 2], {"constraints": "hard"}),
        ("diffusion", [2, 2], {"constraints": "soft"}),
        ("reaction_diffusion", [2], {
            "constraints": "hard", "unknown": {"reaction": 0.3}, "measurements": {"points": 4},
            "weights": {"measurements": 2.0},
        }),
    ],
)  # fmt: skip
def test_a_loaded_field_is_u_and_so_are_its_jets_and_its_derivatives_by_torch(tmp_path, equation, grid, options):
    problem, field = saved(tmp_path, equation, grid, **options)
    loaded = load_field(tmp_path).field
    points = random_points(problem, 12)
    expected = problem.evaluate(field, points, "hessian")
    assert torch.equal(loaded(points, "hessian").rows, expected.rows)
    assert torch.equal(problem.evaluate(loaded, points, "hessian").rows, expected.rows)  # not applied twice
    at = points.clone().requires_grad_()
    (first,) = torch.autograd.grad(loaded(at).value[:, 0].sum(), at, create_graph=True)
    (second,) = torch.autograd.grad(first[:, -1].sum(), at)
    wanted = expected.gradient[..., 0].T
    assert (first - wanted).norm() <= 1e-11 * wanted.norm()
    wanted = expected.hessian[-1, :, 0]
    assert (second[:, -1] - wanted).norm() <= 1e-9 * wanted.norm()
    by_vmap = torch.func.vmap(torch.func.grad(lambda p: loaded(p[None]).value[0, 0]))(points)
    assert (by_vmap - first).norm() <= 1e-11 * first.norm()


def test_jets_and_torch_at_once_are_refused_where_conditions_are_hard(tmp_path):
    problem, _ = saved(tmp_path, "helmholtz", [2, 2], constraints="values")
    with pytest.raises(ValueError, match=r"^a jet of order 'gradient' at points that torch .* points\.detach\(\)"):
        load_field(tmp_path).field(random_points(problem, 3).requires_grad_(), "gradient")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (None, "there is no such file"),
        (("torch.cos(x)", "torch.sin(x)"), "other hard conditions than when this field was trained"),
        (("(-1.0, 1.0)", "(-1.0, 2.0)"), "another box"),
    ],
)
def test_an_equation_that_is_gone_or_changed_is_refused_where_its_field_is_called(tmp_path, change, told):
    path = tmp_path / "heat.py"
    path.write_text(HEAT)
    problem, field = saved(tmp_path, path, [2, 2], constraints="values")
    points = random_points(problem, 4)
    assert torch.equal(load_field(tmp_path).field(points).rows, problem.evaluate(field, points).rows)
    path.write_text(HEAT.replace("u.t - u.xx", "u.t - 2 * u.xx"))  # nothing to the conditions
    assert torch.equal(load_field(tmp_path).field(points).rows, problem.evaluate(field, points).rows)
    path.write_text(HEAT.replace(*change)) if change else path.unlink()
    trained = load_field(tmp_path)
    with pytest.raises(UserError, match=told) as raised:
        trained.field(points)
    assert "\n" not in str(raised.value) and str(raised.value).startswith(str(tmp_path / "field.safetensors"))
    packed = export(tmp_path / "field.safetensors", tmp_path / "packed.safetensors", bits=16)  # needs no equation
    assert packed.is_file()
