"""Fixtures for all tests; that this file is here also lets tests in folders import their neighbours above."""

from browsing import browser, opened

__all__ = ["browser", "opened"]
