"""A target that goes through a temporary file against the target itself."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from interferograms import full_turn, wafer, write_stack

from cpikan_hr.data import spool
from cpikan_hr.errors import UserError
from cpikan_hr.problems.interferometry import Interferometry
from cpikan_hr.problems.spooled import CELL, SpooledTarget
from cpikan_hr.recipe import InterferometryProblem

SHAPE = 300, 530  # two cells along each axis


class Counted:
    """A problem's target that counts how often every pixel is reckoned."""

    def __init__(self, problem):
        self.problem, self.counts = problem, np.zeros(problem.shape, int)

    def __call__(self, y0, y1, x0, x1, stride=1):
        self.counts[y0:y1:stride, x0:x1:stride] += 1
        return self.problem.target(y0, y1, x0, x1, stride)


@pytest.fixture(scope="module")
def problem(tmp_path_factory):
    """Of noisy frames with a corner that is always clipped, in which nothing is known."""
    folder = tmp_path_factory.mktemp("stack")
    _, frames = wafer(SHAPE, full_turn(4, 4), noise=2.0)
    frames[:, :, 250:, 500:] = 255
    write_stack(folder, frames, (5.0, 5.5, 6.05, 6.655), full_turn(4, 4), height_range_um=[-13.5, 13.5])
    return Interferometry(InterferometryProblem(kind="interferometry", stack=str(folder), noise=2.0, repair=True))


def alike(one, other) -> bool:
    return all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_windows_are_those_of_the_target_and_every_pixel_is_reckoned_once(problem):
    counted = Counted(problem)
    kept = SpooledTarget(counted, SHAPE)
    windows = [(0, 40, 0, 40), (200, 300, 450, 530), (0, 300, 0, 530), (3, 299, 1, 500), (250, 300, 500, 530)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda window: kept(*window), 3 * windows))
    assert all(alike(each, problem.target(*window)) for each, window in zip(found, 3 * windows, strict=True))
    assert (counted.counts == 1).all()
    assert not found[-1].weight.any() and found[2].weight.any()


def test_a_few_pixels_do_not_make_all_be_reckoned(problem):
    counted = Counted(problem)
    kept = SpooledTarget(counted, SHAPE)
    wanted = problem.target(0, *SHAPE[:1], 0, SHAPE[1], 7)
    assert alike(kept(0, SHAPE[0], 0, SHAPE[1], 7), wanted) and counted.counts.sum() == wanted.weight.size
    kept(0, SHAPE[0], 0, SHAPE[1])
    before = counted.counts.sum()
    assert alike(kept(0, SHAPE[0], 0, SHAPE[1], 7), wanted) and counted.counts.sum() == before


def test_without_room_everything_is_reckoned_anew(problem, monkeypatch):
    def full(*_):
        raise UserError("no room")

    monkeypatch.setattr(spool, "temporary_file", full)
    counted = Counted(problem)
    kept = SpooledTarget(counted, SHAPE)
    for _ in range(2):
        assert alike(kept(0, CELL[0], 0, 99), problem.target(0, CELL[0], 0, 99))
    assert counted.counts.max() == 2
