"""Derivatives by the inputs of a function: by name, and the operators of vector calculus."""

from __future__ import annotations

from ._bundle import Derivatives
from .named import derivatives, partial
from .operators import biharmonic, curl, directional, divergence, hessian, laplacian

__all__ = ["Derivatives", "biharmonic", "curl", "derivatives", "directional", "divergence", "hessian", "laplacian", "partial"]
