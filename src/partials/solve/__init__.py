"""Optimisers that use the per-sample Jacobian: least squares and natural gradients, each with a closure as in torch.optim."""

from __future__ import annotations

from .least_squares import GaussNewton, LevenbergMarquardt
from .natural import NaturalGradient, log_derivatives

__all__ = ["GaussNewton", "LevenbergMarquardt", "NaturalGradient", "log_derivatives"]
