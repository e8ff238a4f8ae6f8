"""Checks draw from fixed seeds here, and nothing that has passed before is remembered."""

from __future__ import annotations

import itertools

import pytest

from partials.checks import draws
from partials.checks.first import PASSED


@pytest.fixture(autouse=True)
def fixed_seeds(monkeypatch):
    seeds = itertools.count(1)
    monkeypatch.setattr(draws, "fresh_seed", lambda: next(seeds))


@pytest.fixture(autouse=True)
def nothing_passed():
    PASSED.clear()
    yield
    PASSED.clear()
