"""Fixtures for all tests; that this file is here also lets tests in folders import their neighbours above."""

import os

import torch
from browsing import browser, opened

if torch.cuda.is_available():  # what is compared bit by bit runs on the CPU; `test_gpu.py` runs on a GPU
    os.environ["ACCELERATE_USE_CPU"] = "true"

__all__ = ["browser", "opened"]
