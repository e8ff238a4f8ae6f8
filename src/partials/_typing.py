"""Names of types, and the index letters that the whole library uses.

n sample, c output (flattened), t position at which a parameter is shared (token, pixel, time step), i input feature,
o output feature, p parameter entry, k column of a matrix that is multiplied.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch

Tensor: TypeAlias = torch.Tensor
Function: TypeAlias = Callable[..., Any]
"""What is differentiated: a module or a callable, written for a batch."""
Shape: TypeAlias = tuple[int, ...]
Named: TypeAlias = Mapping[str, Tensor]
"""Tensors by parameter or input name."""
ByName: TypeAlias = dict[str, Tensor]
"""A dict of tensors by name: for classes that have a method called `dict`."""
