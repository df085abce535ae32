"""Start and decode work on one device: nothing that is computed there meets a tensor left on the CPU."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from cases import GROWN, GROWN_SIREN, SPARSE, field_of, natural, reader, recipe_of
from pretended import DEVICE, DeviceMix, Pretended, pretending

from cpikan_hr.data.camera import Imperfections
from cpikan_hr.data.stack import open_stack
from cpikan_hr.data.synth import synth
from cpikan_hr.problems.calibration import calibrate
from cpikan_hr.problems.decode import StackDecoder
from cpikan_hr.problems.noise import Noise
from cpikan_hr.processes import ALONE
from cpikan_hr.solvers import budget, grid_sweeps, growth, last_layer, spectral, start

LEVELS = {
    "sparse": [{"tile": [16, 8], "overlap": 0.25, "network": SPARSE}],
    "last_layers": [
        {"grid": [1, 1], "network": {"kind": "cpikan", "hidden": [4], "degree": 3}},
        {"tile": 12, "overlap": 0.5, "network": {"kind": "chebyshev2d", "degree": 3}},
        {"tile": [16, 8], "overlap": 0.25, "network": SPARSE},
    ],
    "grown_cpikan": [{"tile": [16, 8], "overlap": 0.5, "grow": True, "network": GROWN}],
    "grown_siren": [{"tile": [16, 8], "overlap": 0.5, "grow": True, "network": GROWN_SIREN}],
}
LEVELS["equal"] = [{"tile": 12, "overlap": 0.5, "network": {"kind": "cpikan", "hidden": [4, 3], "degree": 3}}]
CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"))


@pytest.fixture(autouse=True)
def _one_thread():
    """Sums by another number of threads round differently, and grown tiles follow the rounding."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def solve(levels: list[dict], noisy: bool, device) -> tuple[list[dict], torch.Tensor]:
    """Contributions of the levels on a picture, and jets of the field; `noisy`: pixels unknown and noise given."""
    picture = natural("coffee", 100, 200)[:48, :64]
    weight, noise = np.ones(picture.shape[:2], np.float32), np.full(picture.shape[:2], 2, np.float32)
    weight[5:9, 5:20] = 0
    torch.manual_seed(0)
    grows, equal = "grow" in levels[0], levels is LEVELS["equal"]
    iterated = {"sweeps": int(grows or equal), "iterations": 2 * equal}
    recipe = recipe_of(levels, target={} if noisy else {"psnr": 32}, start=iterated)
    read = reader(picture, weight, noise) if noisy else reader(picture)
    field = field_of(levels, picture).to(device)
    rows = start.fit_field(field, read, picture.shape[:2], recipe, 255.0, ALONE)
    points = torch.rand(99, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 48
    with torch.no_grad():
        value = field(points.to(device), "laplacian").rows
    assert value.device == torch.device(device) or device == "cuda"
    return rows, value.cpu()


CASES = [(name, noisy) for name in LEVELS for noisy in (False, True) if not (noisy and name.startswith("grown"))]


@pytest.mark.parametrize(("name", "noisy"), CASES)
@pytest.mark.parametrize("device", [CUDA, pytest.param(DEVICE, id="pretended")])
def test_a_device_solves_what_the_cpu_solves(device, name, noisy, monkeypatch):
    expected, value = solve(LEVELS[name], noisy, "cpu")
    if device == "cuda":
        found, there = solve(LEVELS[name], noisy, device)
    else:
        # threads would not know that they pretend
        for module in (budget, grid_sweeps, growth, last_layer, spectral, start):
            monkeypatch.setattr(module, "in_threads", lambda function, items, _: (function(item) for item in items))
        with pretending():
            found, there = solve(LEVELS[name], noisy, device)
    # Rounding moves terms across their threshold; a sweep over equal tiles turns 1e-7 of their weights into 3 %.
    tolerance = 1e-6 if device != "cuda" else 0.1 if name == "equal" else 0.02
    for row, other in zip(expected, found, strict=True):
        assert other["params"] == pytest.approx(row["params"], rel=tolerance)
        assert other["rmse"] == pytest.approx(row["rmse"], rel=tolerance)
    if device != "cuda":
        assert torch.allclose(there, value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", [CUDA, pytest.param(DEVICE, id="pretended")])
def test_a_device_decodes_what_the_cpu_decodes(device, tmp_path):
    flaws = Imperfections(saturated=0.02, gain=0.5)
    stack = open_stack(synth(tmp_path / "stack", size=(120, 150), noise=8.0, seed=1, flaws=flaws))
    shared = calibrate(stack)  # on the CPU whatever the device
    for noise, repair in ((None, False), (Noise(8.0, 0.5), True)):
        expected = StackDecoder(stack, shared, noise, repair).decode(0, 120, 0, 150)
        with pretending() if device == DEVICE else nullcontext():
            found = StackDecoder(stack, shared, noise, repair, device=device).decode(0, 120, 0, 150)
        assert np.array_equal(np.isfinite(found.height_nm), np.isfinite(expected.height_nm))
        for name in ("height_nm", "sigma_nm", "quality", "background", "modulation"):
            pair = getattr(found, name), getattr(expected, name)
            np.testing.assert_allclose(*pair, rtol=1e-3, atol=0.02, err_msg=name)


def test_the_pretended_device_refuses_what_cuda_refuses():
    with pretending():
        there, here = torch.arange(4, device=DEVICE), torch.arange(4)
        assert isinstance(there + 1, Pretended) and (there * torch.tensor(2)).tolist() == [0, 2, 4, 6]
        assert there[here].tolist() == here.tolist() == there.cpu().tolist()
        for mixed in (lambda: there + here, lambda: here[there], lambda: torch.searchsorted(there, here)):
            with pytest.raises(DeviceMix):
                mixed()
