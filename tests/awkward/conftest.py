"""Everything here computes in float64, unless a test says otherwise."""

import pytest
import torch


@pytest.fixture(autouse=True)
def float64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)
