"""Regularisers on jets against closed forms in float64."""

import numpy as np
import pytest
import torch

from cpikan_hr.jets import Jet
from cpikan_hr.problems.base import SMOOTH, Prior
from cpikan_hr.problems.image import Image
from cpikan_hr.recipe import ImageProblem


def jet_of(xx: float, xy: float, yy: float) -> Jet:
    """A jet of order hessian at two points, one channel."""
    rows = torch.tensor([1.0, 0.5, -0.5, xx, xy, yy], dtype=torch.float64)
    return Jet(rows[:, None, None].expand(6, 2, 1), "hessian", 2)


def test_nothing_is_asked_for_without_weights():
    assert Prior().order == "value" and Prior().penalty(None) == 0.0
    assert Prior(laplacian=1).order == "laplacian" and Prior(laplacian=1, variation=1).order == "hessian"


@pytest.mark.parametrize("xx,xy,yy", [(3.0, -1.0, 2.0), (0.0, 0.0, 0.0), (1e-6, 0.0, 0.0)])
def test_both_terms_are_their_formulas(xx, xy, yy):
    found = Prior(laplacian=0.5, variation=2.0).penalty(jet_of(xx, xy, yy), unit=10.0)
    norm = np.sqrt((xx**2 + 2 * xy**2 + yy**2) / 100 + SMOOTH**2) - SMOOTH
    assert found.numpy() == pytest.approx([0.5 * ((xx + yy) / 10) ** 2 + 2.0 * norm] * 2, rel=1e-12)


def test_the_variation_does_not_depend_on_the_direction_of_an_edge():
    angles = [0.0, 0.3, 1.1]
    jets = [jet_of(np.cos(a) ** 2, np.cos(a) * np.sin(a), np.sin(a) ** 2) for a in angles]
    found = [float(Prior(variation=1.0).penalty(jet)[0]) for jet in jets]
    assert found == pytest.approx([found[0]] * 3, rel=1e-12)


def test_a_sharp_kink_costs_what_a_spread_one_costs():
    """The square would prefer to spread a change of slope over many pixels; the variation does not care."""
    sharp = Prior(laplacian=1.0, variation=1.0)
    one, spread = jet_of(1.0, 0.0, 0.0), jet_of(0.1, 0.0, 0.0)
    variation = [float(Prior(variation=1.0).penalty(jet)[0]) for jet in (one, spread)]
    square = [float(Prior(laplacian=1.0).penalty(jet)[0]) for jet in (one, spread)]
    assert variation[0] == pytest.approx(10 * variation[1], rel=0.01) and square[0] == pytest.approx(100 * square[1])
    assert float(sharp.penalty(one)[0]) == pytest.approx(variation[0] + square[0])


def test_a_picture_s_loss_has_it(tmp_path):
    np.save(tmp_path / "p.npy", np.zeros((8, 8), np.float32))
    problem = Image(ImageProblem(path=str(tmp_path / "p.npy"), variation=3.0))
    assert problem.order == "hessian"
    jet = jet_of(2.0, 0.0, 0.0)
    loss, error = problem.loss(jet, {"values": torch.ones(2, 1, dtype=torch.float64), "known": torch.ones(2)})
    assert (loss - error).numpy() == pytest.approx(3.0 * (np.sqrt(4 + SMOOTH**2) - SMOOTH), rel=1e-12)
