"""Fixtures for all tests; that this file is here also lets tests in folders import their neighbours above."""

import math
import os

import torch
from browsing import browser, opened

from cpikan_hr import progress

progress.PAUSE = math.inf  # what a command says does not depend on how busy the machine is
if torch.cuda.is_available():  # what is compared bit by bit runs on the CPU; `test_gpu.py` runs on a GPU
    os.environ["ACCELERATE_USE_CPU"] = "true"

__all__ = ["browser", "opened"]
