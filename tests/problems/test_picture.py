"""The preview of a large field, evaluated in strips, against the field at its points."""

import pytest
import torch

from cpikan_hr.fields import Field
from cpikan_hr.problems import base
from cpikan_hr.recipe import FieldOptions

SHAPE = 301, 437


@pytest.fixture(scope="module")
def field():
    levels = [
        {"grid": [1, 1], "network": {"kind": "cpikan", "hidden": [4], "degree": 3}},
        {"tile": 8, "overlap": 0.5, "network": {"kind": "chebyshev2d", "degree": 3}},
    ]
    field = Field.build(FieldOptions(levels=levels, precision="double"), SHAPE, 2, seed=0)
    torch.manual_seed(0)
    for parameter in field.parameters():
        torch.nn.init.normal_(parameter)
    return field


class Seen:
    shape = SHAPE


@pytest.mark.parametrize(("side", "stride", "seen"), [(50, 16, 1), (50, 16, 2**22), (200, 4, 20_000), (1000, 1, 2**16)])
def test_strips_of_a_preview_are_the_field_at_its_points(side, stride, seen, field, monkeypatch):
    monkeypatch.setattr(base, "SEEN", seen)
    picture = base.PixelProblem.picture(Seen, field, side)
    ys, xs = (torch.arange(0, n, stride, dtype=torch.float64) + 0.5 for n in SHAPE)
    points = torch.stack(torch.meshgrid(ys, xs, indexing="ij"), dim=-1).reshape(-1, 2)
    expected = field(points).value.detach()
    assert picture.shape == (len(ys), len(xs), 2) and max(picture.shape) <= side
    torch.testing.assert_close(torch.from_numpy(picture).reshape(-1, 2).double(), expected, rtol=1e-6, atol=1e-6)
