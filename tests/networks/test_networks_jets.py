"""Every network's jet, and the parameter gradients through it, equal nested autograd on the published formula."""

from threading import Thread

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from network_reference import nested_rows, random_terms, relative_error, value

from cpikan_hr import jets
from cpikan_hr.networks import build_network
from cpikan_hr.networks import chebyshev_kernels as kernels
from cpikan_hr.parallel import in_threads

VARIANTS = {
    "cpikan": ("cpikan", {"hidden": [4, 3], "degree": 3}),
    "cpikan-degree-1": ("cpikan", {"hidden": [3], "degree": 1}),
    "cpikan-identity-first": ("cpikan", {"hidden": [3], "degree": 5, "first_input_map": "identity"}),
    "cpikan-sine": ("cpikan", {"hidden": [3], "degree": 4, "input_map": "sine", "init": "moments"}),
    "cpikan-identity": ("cpikan", {"hidden": [2], "degree": 2, "input_map": "identity", "init": "chebykan"}),
    "cpikan-layer-norm": ("cpikan", {"hidden": [4, 4], "degree": 3, "layer_norm": True}),
    "cpikan-one-layer": ("cpikan", {"hidden": [], "degree": 6}),
    "cpikan-degrees": ("cpikan", {"hidden": [4, 2], "degree": [3, 1, 2]}),
    "cpikan-shared": ("cpikan", {"hidden": [4, 3], "degree": 3, "shared_constant": True}),
    "cpikan-shared-degrees": (
        "cpikan",
        {"hidden": [3, 3], "degree": [2, 4, 1], "shared_constant": True, "init": "moments", "layer_norm": True},
    ),
    "siren": ("siren", {"hidden": [5, 4], "first_omega": 6.0, "hidden_omega": 3.0}),
    "fourier-tanh": ("fourier_mlp", {"hidden": [5, 4], "bands": 2}),
    "fourier-silu": ("fourier_mlp", {"hidden": [4], "bands": 1, "activation": "silu"}),
    "fourier-gelu": ("fourier_mlp", {"hidden": [4], "bands": 1, "activation": "gelu"}),
    "chebyshev2d": ("chebyshev2d", {"degree": (3, 5)}),
    "chebyshev2d-tanh": ("chebyshev2d", {"degree": 3, "input_map": "tanh"}),
    "chebyshev2d-degree-0": ("chebyshev2d", {"degree": (0, 2)}),
    "chebyshev2d-sparse": ("chebyshev2d", {"degree": (4, 3), "sparse": True, "input_map": "identity"}),
    "chebyshev2d-sparse-sine": ("chebyshev2d", {"degree": (2, 5), "sparse": True}),
}


def build(name: str, tiles: int, dim: int, out: int, seed: int):
    kind, options = VARIANTS[name]
    network = build_network(kind, tiles, dim, out, generator=torch.Generator().manual_seed(seed), **options)
    if options.get("sparse"):
        random_terms(network, torch.Generator().manual_seed(seed))
    elif kind == "chebyshev2d" or options.get("layer_norm") or options.get("shared_constant"):
        with torch.no_grad():
            for parameter in network.parameters():
                parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
    return network


def assert_jet_equals_nested_autograd(name: str, tiles: int, dim: int, out: int, points: int, order: str, seed: int):
    generator = torch.Generator().manual_seed(seed)
    network = build(name, tiles, dim, out, seed)
    chosen = torch.randperm(tiles, generator=generator)[: max(1, tiles - 1)]
    xi = torch.rand(len(chosen), points, dim, generator=generator) * 1.9 - 0.95
    scale = torch.rand(len(chosen), dim, generator=generator) + 0.5
    jet = network(jets.seed(xi, order, scale), chosen)

    expected = torch.stack(
        [
            # x = xi / scale: the chain rule of the domain scaling is part of what is compared
            nested_rows(lambda x, t=t, k=k: value(network, t, x * scale[k]), xi[k] / scale[k], order)
            for k, t in enumerate(chosen.tolist())
        ]
    )
    assert jet.rows.shape == (len(chosen), jets.row_count(order, dim), points, out)
    for row in range(expected.shape[1]):
        assert relative_error(jet.rows[:, row], expected[:, row]) < 1e-10

    weights = torch.randn(expected.shape, generator=generator)
    parameters = list(network.parameters())
    actual = torch.autograd.grad((jet.rows * weights).square().sum(), parameters)
    wanted = torch.autograd.grad((expected * weights).square().sum(), parameters)
    for a, w in zip(actual, wanted, strict=True):
        assert relative_error(a, w) < 1e-10


@pytest.mark.parametrize("order", jets.ORDERS)
@pytest.mark.parametrize("name", VARIANTS)
def test_jet_and_parameter_gradients_equal_nested_autograd(name, order):
    assert_jet_equals_nested_autograd(name, tiles=3, dim=2, out=2, points=5, order=order, seed=1)


def test_the_sparse_variants_differ_in_their_terms_from_tile_to_tile():
    """What the test above relies on: several numbers of terms, one of them zero, and a tile with several."""
    for name in ("chebyshev2d-sparse", "chebyshev2d-sparse-sine"):
        counts = build(name, 3, 2, 2, seed=1).offset.diff()
        assert counts.min() == 0 and counts.max() > 1 and len(counts.unique()) == 3


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(sorted(VARIANTS)),
    order=st.sampled_from(jets.ORDERS),
    tiles=st.integers(1, 3),
    dim=st.integers(1, 3),
    out=st.integers(1, 3),
    points=st.integers(1, 6),
    seed=st.integers(0, 2**31),
)
def test_jet_equals_nested_autograd_for_random_shapes(name, order, tiles, dim, out, points, seed):
    dim = 2 if name.startswith("chebyshev2d") else dim
    assert_jet_equals_nested_autograd(name, tiles, dim, out, points, order, seed)


@pytest.mark.parametrize("order", jets.ORDERS)
@pytest.mark.parametrize("budget", [1, 60, 400])
def test_the_block_size_of_the_expansion_does_not_change_the_result(monkeypatch, budget, order):
    network = build("cpikan", 3, 2, 1, seed=2)
    points = torch.rand(3, 11, 2) - 0.5

    def run():
        rows = network(jets.seed(points, order)).rows
        return [rows, *torch.autograd.grad(rows.square().sum(), list(network.parameters()))]

    expected = run()
    monkeypatch.setattr(kernels, "BLOCK_ELEMENTS_CPU", budget)
    for a, e in zip(run(), expected, strict=True):
        assert relative_error(a, e) < 1e-13


@pytest.mark.parametrize("name", ["cpikan", "cpikan-sine", "cpikan-shared"])
def test_gradient_flows_to_the_input_jet(name):
    network = build(name, 1, 2, 2, seed=3)
    rows = torch.randn(1, 6, 4, 2, requires_grad=True)
    assert torch.autograd.gradcheck(lambda r: network(jets.Jet(r, "hessian", 2)).rows, (rows,), atol=1e-6, rtol=1e-6)
    rows = torch.randn(1, 4, 4, 2, requires_grad=True)
    assert torch.autograd.gradcheck(lambda r: network(jets.Jet(r, "laplacian", 2)).rows, (rows,), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    "kind, options", [("cpikan", {"hidden": [2], "degree": 2}), ("siren", {"hidden": [2], "first_omega": 3.0})]
)
def test_compiled_kernels_agree_with_eager_ones(kind, options):
    """Two point counts: the compiled graph serves both."""
    network = build_network(kind, 2, 2, 1, **options)

    def run(points):
        rows = network(jets.seed(points, "laplacian")).rows
        return [rows, *torch.autograd.grad(rows.square().sum(), list(network.parameters()))]

    samples = [torch.rand(2, count, 2) - 0.5 for count in (33, 50)]
    expected = [run(points) for points in samples]
    jets.compile_kernels(True)
    try:
        actual = [run(points) for points in samples]
    finally:
        jets.compile_kernels(False)
    for a, e in zip(actual, expected, strict=True):
        assert all(relative_error(x, y) < 1e-12 for x, y in zip(a, e, strict=True))


def test_every_thread_may_have_as_many_graphs():
    """torch keeps its settings per thread, and refuses a ninth shape of a function where the limit is its own."""
    network, points, threads, limits = build_network("siren", 2, 2, 1, hidden=[2]), torch.rand(2, 5, 2), 2, []

    def run():
        torch.set_num_threads(threads)
        network(jets.seed(points, "laplacian"))
        limits.append(torch._dynamo.config.recompile_limit)

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    jets.compile_kernels(True)
    try:
        thread = Thread(target=run)
        thread.start()
        thread.join()
    finally:
        jets.compile_kernels(False)
        torch.set_num_threads(before)
    assert limits == [jets.GRAPHS] and limits[0] > 8


def test_pieces_side_by_side_stay_eager():
    network, points = build_network("siren", 3, 2, 1, hidden=[3]), torch.rand(3, 7, 2)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    jets.compile_kernels(True)
    torch._dynamo.utils.counters.clear()
    try:
        found = list(in_threads(lambda _: network(jets.seed(points, "laplacian")).rows, range(3)))
        assert not torch._dynamo.utils.counters["stats"]["unique_graphs"]
    finally:
        jets.compile_kernels(False)
        torch.set_num_threads(before)
    expected = network(jets.seed(points, "laplacian")).rows
    assert all(torch.equal(rows, expected) for rows in found)
