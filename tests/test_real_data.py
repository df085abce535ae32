"""Shipped recipes on real measurements, held against more frames of the same scene than they were given."""

from pathlib import Path

import numpy as np
import pytest

from cpikan_hr.cli import main as cli
from cpikan_hr.data.stack import open_stack
from cpikan_hr.problems.calibration import calibrate
from cpikan_hr.problems.decode import StackDecoder, decode_window
from cpikan_hr.problems.interferometry import Interferometry
from cpikan_hr.problems.steps import Shared
from cpikan_hr.recipe import load_recipe
from cpikan_hr.train import main as train

ROOT = Path(__file__).parents[1]
DATA = ROOT / ".." / "shared" / "data"
FEWER = ["--start.shifts", "2"]  # quadtrees than the recipes average: what they add is in docs/benchmarks.md
NM_PER_RAD = 654 / (4 * np.pi)


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def needs(folder):
    if not (DATA / folder).is_dir():
        pytest.skip(f"the measurements are not in ../shared/data/{folder}")


def field_of(tmp_path, recipe, *options):
    run, out = tmp_path / "run", tmp_path / "map.npy"
    out.unlink(missing_ok=True)
    assert train(["--config", f"recipes/{recipe}.yaml", "--output", str(run), "--resume", "never", *options]) == 0
    assert cli(["render", str(run), "--out", str(out)]) == 0
    return np.load(out).squeeze().astype(np.float64), load_recipe(run / "recipe.yaml").problem


def level(height, inside):
    """The pixels inside, less piston and tilt."""
    y, x = np.nonzero(inside)
    plane = np.linalg.qr(np.stack([np.ones(len(y)), y, x], axis=1))[0]
    return height[inside] - plane @ (plane.T @ height[inside])


def ripple(difference, phase):
    """Amplitudes of 1, 2 and 3 waves per fringe."""
    waves = [f(n * phase) for n in (1, 2, 3) for f in (np.cos, np.sin)]
    found = np.linalg.lstsq(np.stack([np.ones_like(phase), *waves], axis=1), difference, rcond=None)[0]
    return np.hypot(found[1::2], found[2::2])


def test_four_frames_of_the_mirror_come_twice_as_close_to_twelve_as_their_decode(tmp_path):
    needs("zernike_psi_12frame")
    twelve, _ = field_of(tmp_path, "mirror", *FEWER)
    words = ["--problem.stack", "recipes/mirror/first4.yaml", "--problem.steps", "nominal"]
    four, _ = field_of(tmp_path, "mirror", *FEWER, *words)
    steps = open_stack("recipes/mirror").phase_steps_rad[:, :4]
    plain = StackDecoder(open_stack("recipes/mirror/first4.yaml"), Shared(steps)).decode(0, 600, 0, 800).height_nm
    inside = np.isfinite(twelve)
    assert np.array_equal(np.isfinite(four), inside)
    theirs, ours = (level(each - twelve, inside) for each in (plain, four))
    assert ours.std() < 0.5 * theirs.std()
    before, after = (ripple(each, twelve[inside] / NM_PER_RAD) for each in (theirs, ours))
    assert before[0] > 5 and (after[[0, 2]] < 0.3 * before[[0, 2]]).all()


def test_steps_written_for_four_frames_are_those_of_all_twelve():
    needs("zernike_psi_12frame")
    found = calibrate(open_stack("recipes/mirror"), "refine", harmonic=True)
    np.testing.assert_allclose(open_stack("recipes/mirror/first4.yaml").phase_steps_rad, found.steps[:, :4], atol=2e-4)
    assert abs(found.harmonic[0]) == pytest.approx(0.18, abs=0.01)


@pytest.mark.parametrize("scene", ["plate", "cloak"])
def test_nine_frames_of_projected_fringes_see_what_thirty_six_see_and_invent_no_shadow(scene, tmp_path):
    needs("cfpe_multifreq_psp")
    folder = "recipes/fringe_projection"
    stack = open_stack(f"{folder}/{scene}_12.yaml")
    window = 0, 480, 0, 640
    all_steps = decode_window(stack.read(*window), stack.wavelengths_um, stack.phase_steps_rad, stack.height_range_um)
    modulation = all_steps.modulation.min(axis=0)
    field, problem = field_of(tmp_path, "fringe_projection", *FEWER, "--problem.stack", f"{folder}/{scene}.yaml")
    known = Interferometry(problem).target(*window).weight > 0
    lit, shadow = modulation > 10, modulation < 5
    assert known[lit].mean() > 0.98 and known[shadow].mean() < 0.03
    error = np.abs(field - all_steps.height_nm)[lit & known] / 1000  # projector px
    right = error <= 20
    assert 1 - right.mean() < 0.02
    assert np.sqrt(np.mean(error[right] ** 2)) < LARGEST[scene]


LARGEST = {"plate": 0.35, "cloak": 0.35}  # px rms


@pytest.mark.parametrize("noise", [5])
def test_a_measured_surface_is_found_again_from_noisy_frames(noise, tmp_path):
    needs("height_maps")
    topographies = pytest.importorskip("SurfaceTopography")
    surface = topographies.open_topography(str(DATA / "height_maps" / "x3p-2.x3p")).topography().to_unit("nm")
    np.save(tmp_path / "in.npy", np.ma.filled(np.ma.asarray(surface.heights(), float), np.nan))
    stack = tmp_path / "stack"
    words = ["--height", str(tmp_path / "in.npy"), "--size", "400x300", "--noise", str(noise)]
    assert cli(["synth", str(stack), *words]) == 0
    field, _ = field_of(tmp_path, "surface", "--problem.stack", str(stack), "--problem.noise", str(noise))
    assert cli(["decode", str(stack), "--out", str(tmp_path / "decoded.npy")]) == 0
    truth, decoded = (np.load(path).squeeze() for path in (stack / "height_true.npy", tmp_path / "decoded.npy"))
    rms = [np.sqrt(np.mean((each - truth) ** 2)) for each in (field, decoded)]
    assert rms[0] < 0.55 * rms[1]
