"""The real interferograms of a telescope mirror, where they are at hand."""

import os
from pathlib import Path

import numpy as np
import pytest
import yaml

from cpikan_hr.data.stack import open_stack

DATA = Path(os.environ.get("CPIKAN_HR_DATA", Path(__file__).parents[2] / ".." / "shared" / "data"))


@pytest.fixture(scope="session")
def mirror(tmp_path_factory):
    frames = DATA / "zernike_psi_12frame"
    if not frames.is_dir():
        pytest.skip(f"the mirror interferograms are not here: {frames}")
    folder = tmp_path_factory.mktemp("mirror")
    keys = {
        "frames": str(frames.resolve() / "Image*.jpg"),
        "wavelengths_um": [0.654],
        "phase_steps_rad": [-2 * np.pi * k / 6 for k in range(12)],
        "pixel_pitch_um": 266.0,  # 152.2 mm over about 572 px
        "mask": {"circle": [300, 390, 280]},  # row, column, radius of the pupil
        "channel": 0,
    }
    (folder / "stack.yaml").write_text(yaml.safe_dump(keys))
    return open_stack(folder)
