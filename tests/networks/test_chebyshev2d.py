"""The tensor-product Chebyshev expansion: grid evaluation and the choice of terms."""

import numpy as np
import pytest
import torch
from network_reference import relative_error

from cpikan_hr import jets
from cpikan_hr.errors import UserError
from cpikan_hr.networks import Chebyshev2D


def filled(**options) -> Chebyshev2D:
    network = Chebyshev2D(3, 2, 2, **options)
    torch.nn.init.normal_(network.coefficients, generator=torch.Generator().manual_seed(0))
    return network


@pytest.mark.parametrize("order", jets.ORDERS)
@pytest.mark.parametrize("options", [{"degree": (3, 6)}, {"degree": 5, "terms": 9}, {"degree": (0, 2)}])
def test_grid_equals_forward_at_the_same_points(options, order):
    network = filled(**options)
    tiles = torch.tensor([2, 0])
    y, x = torch.rand(2, 4) * 2 - 1, torch.rand(2, 5) * 2 - 1
    scale = torch.tensor([[0.5, 2.0], [1.5, 0.3]])
    points = torch.stack([y[:, :, None].expand(2, 4, 5), x[:, None, :].expand(2, 4, 5)], dim=-1).flatten(1, 2)
    expected = network(jets.seed(points, order, scale), tiles).rows
    assert relative_error(network.grid(y, x, order, scale, tiles).rows, expected) < 1e-12


def test_identity_map_equals_numpy_chebval2d():
    network = filled(degree=(4, 3), input_map="identity")
    y, x = torch.linspace(-1, 1, 6), torch.linspace(-1, 1, 7)
    grid = network.grid(y.expand(3, -1), x.expand(3, -1)).value
    for tile in range(3):
        for channel in range(2):
            coefficients = network.dense()[tile, channel].detach().numpy()
            expected = np.polynomial.chebyshev.chebgrid2d(y.numpy(), x.numpy(), coefficients)
            np.testing.assert_allclose(grid[tile, :, channel].detach().numpy(), expected.ravel(), atol=1e-12)


def test_terms_keep_the_largest_coefficients():
    network = Chebyshev2D(2, degree=3, terms=5)
    dense = torch.randn(2, 1, 4, 4)
    network.set_coefficients(None, dense)
    kept = network.dense()
    assert (kept != 0).flatten(1).sum(1).tolist() == [5, 5]
    assert torch.equal(kept[kept != 0], dense[kept != 0])
    for tile in range(2):
        threshold = dense[tile].abs().flatten().sort(descending=True).values[4]
        assert torch.equal(kept[tile] != 0, dense[tile].abs() >= threshold)


def test_significance_and_keep_decide_which_terms_stay():
    network = Chebyshev2D(1, degree=1, terms=2)
    dense = torch.tensor([4.0, 3.0, 2.0, 1.0]).view(1, 1, 2, 2)
    network.set_coefficients(None, dense, significance=torch.tensor([[1.0, 1.0], [10.0, 10.0]]))
    assert network.dense().flatten().tolist() == [0, 0, 2, 1]
    network.set_coefficients(None, dense, keep=torch.tensor([[True, False], [False, False]]))
    assert network.dense().flatten().tolist() == [4, 0, 0, 0]
    assert network.count_terms() == 1


def test_unused_terms_stay_zero_and_get_no_gradient():
    network = Chebyshev2D(1, degree=2, terms=4)
    network.set_coefficients(None, torch.tensor([[[[5.0, 0, 0], [0, 2.0, 0], [0, 0, 0]]]]))
    assert (network.index < 0).sum() == 2
    network(jets.seed(torch.rand(1, 8, 2), "value")).value.sum().backward()
    unused = network.index < 0
    assert not network.coefficients.grad[unused].any() and network.coefficients.grad[~unused].all()


def test_terms_survive_saving_and_loading():
    network = Chebyshev2D(2, degree=4, terms=3)
    network.set_coefficients(None, torch.randn(2, 1, 5, 5))
    other = Chebyshev2D(2, degree=4, terms=3)
    other.load_state_dict(network.state_dict())
    assert torch.equal(other.dense(), network.dense()) and other.index.dtype == torch.int32


def test_count_terms_of_the_full_expansion():
    assert Chebyshev2D(3, 2, 2, degree=(3, 1)).count_terms() == 3 * 2 * 8


def test_impossible_settings_are_named():
    with pytest.raises(UserError, match="works in 2 coordinates, not 3"):
        Chebyshev2D(1, 3, 1)
    with pytest.raises(UserError, match="give 1 to 16"):
        Chebyshev2D(1, degree=3, terms=17)
    with pytest.raises(UserError, match="at most 32768"):
        Chebyshev2D(1, degree=200)
