"""A field that is read from its file is laid out by shapes alone first, for every kind of network."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_field import NETWORKS, random_active

from cpikan_hr.fields import Field
from cpikan_hr.recipe import FieldOptions

SHAPE = 40, 30
INITS = [{"kind": "cpikan", "hidden": [4], "init": init} for init in ("xavier_normal", "chebykan", "moments")]
GROWN = {"kind": "cpikan", "hidden": [3], "degree": [3, 3], "input_map": "sine", "first_input_map": "sine"}
LEVELS = [
    *({"tile": 12, "overlap": 0.5, "network": network} for network in (*NETWORKS, *INITS)),
    {"tile": [16, 8, 4], "overlap": 0.5, "network": NETWORKS[-1]},
    {"tile": [16, 8], "overlap": 0.5, "grow": True, "network": GROWN},
]


def fields() -> list[tuple[FieldOptions, Field]]:
    found = []
    for level in LEVELS:
        options = FieldOptions(levels=[level])
        active = random_active(SHAPE) if level["tile"] == [16, 8, 4] else None
        found.append((options, Field.build(options, SHAPE, 2, seed=1, active=active)))
    return found


@pytest.mark.parametrize("number", range(len(LEVELS)))
def test_a_field_comes_back_from_its_state(number):
    options, field = fields()[number]
    state = field.state_dict()
    again = Field.from_state(options, SHAPE, 2, state)
    assert again.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())
    points = torch.rand(50, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * torch.tensor(SHAPE)
    with torch.no_grad():
        assert torch.equal(again(points).rows, field(points).rows)


def test_that_imports_no_computer_algebra():
    """Some operators on shapes alone do, which takes a second of every start."""
    code = (
        "import sys; from test_shapes_alone import *; made = fields(); assert 'sympy' not in sys.modules\n"
        "for options, field in made: Field.from_state(options, SHAPE, 2, field.state_dict())\n"
        "print('sympy' in sys.modules)"
    )
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[2])])
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("False\n", 0), done.stderr
