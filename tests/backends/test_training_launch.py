"""Sweeps, settling, joining levels and checkpoints by the clock, launched as two processes."""

import sys

import pytest
from harness import ROOT
from programs import REFUSED, SETTLED_RESUMED

sys.path.append(str(ROOT / "tests" / "training"))
from test_loop import losses  # noqa: E402
from test_settling import same, state, tiles  # noqa: E402

SHARING = ("ddp_cpu", "zero2", "zero3", "zero3_offload", "fsdp2")


@pytest.mark.parametrize("config", SHARING)
def test_sweeps_between_steps_lower_the_loss_alike(config, launched):
    alone, two = (launched(which).run("swept") for which in ("alone", config))
    one = losses(alone)
    assert len(one) == 20 and losses(two) == pytest.approx(one, rel=1e-5)
    assert one[10] < 0.99 * one[9]
    assert abs(one[9] / one[0] - 1) < 1e-3  # the steps themselves do next to nothing


def test_weights_on_nvme_are_swept_and_settle_alike(launched):
    """The run was resumed from its fourth update, after which tiles settled."""
    alone, two = launched("alone").run("swept_wide"), launched("zero3_nvme").run("swept_wide", 0, 0)
    assert list(two.glob("nvme/zero_stage_3/optimizer/rank*/exp_avg*.swp"))  # there was something to swap
    one = losses(alone)
    assert len(one) == 6 and losses(two) == pytest.approx(one, rel=1e-5)
    assert one[3] < 0.99 * one[2]
    assert tiles(two) == tiles(alone) and tiles(alone)[-1] < tiles(alone)[0]


@pytest.mark.parametrize(
    ("config", "name"), [*((c, "settled") for c in SHARING), *((c, "settled_averaged") for c in SHARING[:2])]
)
def test_the_same_tiles_settle(config, name, launched):
    alone, two = (launched(which).run(name) for which in ("alone", config))
    assert tiles(two) == tiles(alone) and tiles(alone)[-1] < 24
    assert losses(two) == pytest.approx(losses(alone), rel=1e-4)
    assert same(state(two), state(alone), 1e-3)


@pytest.mark.parametrize("config", SETTLED_RESUMED)
def test_a_run_whose_tiles_have_settled_is_resumed_exactly(config, launched):
    run, whole = launched(config).run("settled_resumed", 2, 0), launched(config).run("settled")
    assert tiles(run) == tiles(whole) and losses(run) == pytest.approx(losses(whole), rel=1e-6)
    assert same(state(run), state(whole), 1e-6)


@pytest.mark.parametrize("config", ["ddp_cpu", "zero3"])
def test_levels_that_join_one_after_another_train_alike(config, launched):
    alone, two = losses(launched("alone").run("joining")), losses(launched(config).run("joining"))
    assert len(two) == 6 and two == pytest.approx(alone, rel=1e-4)


def test_checkpoints_by_the_clock_are_agreed_on(launched):
    """The run was resumed from its second step."""
    alone, two = launched("alone").run("clock"), launched("ddp_cpu").run("clock", 0, 0)
    made = sorted(path.name for path in (two / "checkpoints").iterdir())
    assert made == [f"step_{k:08d}" for k in range(1, 5)]
    assert len(losses(two)) == 4
    assert losses(two) == pytest.approx(losses(alone), rel=1e-6)


def test_what_needs_whole_weights_is_refused_before_the_start(launched):
    zero3 = launched("zero3")
    for number, message in enumerate(REFUSED):
        run = zero3.run(f"refused_{number}", 2)
        errors = [line for line in zero3.output.splitlines() if line.startswith(f"error: {message}")]
        assert errors and not run.exists()
        assert message.startswith("training.ema") or all("launch with cpu, single_gpu or ddp" in e for e in errors)
        assert "per px" not in zero3.said(f"refused_{number}")  # the table of what a start has solved
