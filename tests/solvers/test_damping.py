"""Nielsen's rule for the damping, of one system and of a batch."""

import pytest
import torch

from cpikan_hr.solvers.damping import Damping


def learned(damping: Damping, gain: list, predicted: list, accepted: list) -> list[float]:
    damping.learn(*(torch.tensor(values, dtype=torch.float64) for values in (gain, predicted)), torch.tensor(accepted))
    return damping.scale.tolist()


def test_what_the_model_predicted_decides():
    damping = Damping.of(torch.full((5,), 6.0, dtype=torch.float64))
    found = learned(damping, [2.0, 1.0, 0.5, 40.0, -1.0], [2.0] * 5, [True, True, True, True, False])
    assert found == pytest.approx([2, 6, 6 * (1 + 0.5**3), 2, 12])


def test_refusals_raise_it_ever_faster_until_a_step_is_taken():
    damping, scales = Damping.of(torch.tensor(1.0, dtype=torch.float64)), []
    for accepted in (False, False, False, True, False):
        scales.append(learned(damping, 1.0, 2.0, accepted))
    assert scales == pytest.approx([2, 8, 64, 64, 128])


def test_it_keeps_above_the_least_and_each_of_a_batch_keeps_its_own():
    damping = Damping.of(torch.tensor([1.0, 3.0], dtype=torch.float64), least=0.9)
    assert learned(damping, [1.0, -1.0], [1.0, 1.0], [True, False]) == pytest.approx([0.9, 6])
    one = damping.pick(torch.tensor([1]))
    assert learned(one, [float("nan")], [1.0], [False]) == pytest.approx([24])


def test_a_step_of_infinite_loss_or_none_predicted_leaves_no_nan():
    damping = Damping.of(torch.tensor([1.0, 1.0], dtype=torch.float64))
    assert learned(damping, [-float("inf"), 1e-320], [0.0, 0.0], [False, True])[0] == 2
    assert damping.scale.isfinite().all()
