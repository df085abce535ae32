"""JSON that any reader takes: what is not finite is null, wherever the program writes it."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from cpikan_hr import strict_json
from cpikan_hr.report.figures import metrics_of
from cpikan_hr.report.sections import figures, number, phase_steps, training
from cpikan_hr.training.log import Log
from cpikan_hr.training.trackers import Tracker

ROOT = Path(__file__).parent.parent


def test_what_is_not_finite_is_null_at_any_depth():
    data = {"a": math.nan, "b": [1.5, -math.inf, (math.inf,)], "c": {"d": np.float64("nan"), "e": None}, "f": "NaN"}
    expected = {"a": None, "b": [1.5, None, [None]], "c": {"d": None, "e": None}, "f": "NaN"}
    assert json.loads(strict_json.dumps(data)) == expected


def test_numbers_keep_all_their_digits():
    values = [0.1, 1e-300, math.pi, 2**53 - 1, True]
    assert json.loads(strict_json.dumps(values)) == values


def test_nothing_else_in_the_package_or_the_benchmarks_writes_json():
    files = [path for folder in ("cpikan_hr", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 100
    bare = re.compile(r"(?<!strict_)json\.dumps?\(|from json import")
    assert [path.name for path in files if bare.search(path.read_text())] == ["strict_json.py"]


def test_a_log_with_numbers_that_are_not_finite_is_written_read_and_shown(tmp_path):
    tracker = Tracker(tmp_path, 2, 0, True, Log(tmp_path, True))
    tracker.start([{"level": 0, "network": "x", "tiles": 1, "params": 2, "rmse": 0.0, "psnr_db": math.inf}])
    tracker.log(1, {"loss": math.nan, "rmse": math.inf})
    tracker.close()

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line, parse_constant=refuse).get("loss", 0) for line in lines] == [0, None]
    assert metrics_of(tmp_path)[1]["rmse"] is None
    again = Tracker(tmp_path, 2, 0, True, Log(tmp_path, True))  # drops the line of the step to come
    again.close()
    assert len(metrics_of(tmp_path)) == 1
    assert "\u2013" in training([{"level": 0, "network": "x", "tiles": 1, "params": 2, "rmse": None}], "nm")


@pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf])
def test_a_report_shows_a_dash_for_a_number_that_is_not_finite(value):
    assert number(value) == "\u2013"


def test_tables_of_a_report_take_null_and_nan():
    shown = figures({"rmse": math.nan, "unit": "nm", "params": 3}, "")
    assert 'data-key="rmse"' in shown and "\u2013" in shown
    steps = phase_steps([[0.0, 1.0, None]], [[0.0, 1.5, None]], [5.0])  # a frame that is not there
    assert "1.5000" in steps and "None" not in steps
