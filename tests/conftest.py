"""What all tests share: device and dtype from the environment, fixed seeds, slow and cuda tests, hypothesis profiles.

`DEVICE=cuda pytest` makes the tests' tensors on that device, also those of tests that name none; `DEVICE=pretend pytest` does so on any
machine with a C++ compiler, on a device that is the CPU's memory with an accelerator's rules (tests/device).
"""

from __future__ import annotations

import os
import time

import hypothesis
import pytest
import torch

from tests.device import pretend


class _TorchRandom:
    """Torch's generator in the form that hypothesis resets before each example, so that what failed fails again."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


class _Generator(torch.Generator):
    """One of the device that tensors are made on, where none is named."""

    def __new__(cls, device: torch.device | str | None = None) -> _Generator:
        return super().__new__(cls, torch.get_default_device() if device is None else device)


_RANDOM = _TorchRandom()  # hypothesis holds it by a weak reference only
hypothesis.register_random(_RANDOM)
hypothesis.settings.register_profile("ci", derandomize=True, deadline=None, max_examples=20)
hypothesis.settings.register_profile("all", deadline=None, max_examples=300, print_blob=True)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-slow", action="store_true", help="run the slow tests too, and more examples of each property")
    parser.addoption("--seeds", type=int, default=40, help="seeds of each healthy network in the slow tests: other ones every day")
    parser.addoption("--positions", type=int, default=150, help="places of an exception in each of the slow tests: other ones every day")


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("DEVICE", "").partition(":")[0] == pretend.NAME:
        if (lacking := pretend.why_not()) is not None:
            pytest.exit(lacking, 1)
        pretend.load()
    if "DEVICE" in os.environ:
        torch.set_default_device(os.environ["DEVICE"])
        torch.Generator = _Generator
    if not config.getoption("--hypothesis-profile"):
        hypothesis.settings.load_profile("all" if config.getoption("--run-slow") else "ci")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    skips = {}
    if not config.getoption("--run-slow"):
        skips["slow"] = pytest.mark.skip(reason="slow: runs with --run-slow")
    if not torch.cuda.is_available():
        skips["cuda"] = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        for name, skip in skips.items():
            if item.get_closest_marker(name):
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def turn() -> int:
    """What slow tests draw from in turn: the variable TURN, else the number of the day."""
    return int(os.environ.get("TURN", time.time() // 86400))


@pytest.fixture
def device() -> torch.device:
    """Where tensors live: the variable DEVICE, else the CPU."""
    return torch.device(os.environ.get("DEVICE", "cpu"))


@pytest.fixture
def dtype() -> torch.dtype:
    """The floating-point type: the variable DTYPE, else float64."""
    return getattr(torch, os.environ.get("DTYPE", "float64"))
