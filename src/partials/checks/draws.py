"""The random numbers of the checks: from a generator of their own, so that the user's random state is never read or moved."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import torch

from .._typing import Tensor

TALL = 4096
"""Rows from which a matrix is tall."""


def fresh_seed() -> int:
    return secrets.randbits(32)


class Draws:
    """Gaussian vectors and random choices from one seed."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.generator = torch.Generator("cpu").manual_seed(seed)

    def gaussian(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """Gaussian numbers, each pushed away from zero by 1/2, so that no row is weighted by almost nothing.

        Signs and unequal magnitudes both matter: without the first, errors of opposite sign hide each other's absence;
        without the second, a swap does.
        """
        numbers = self.normal(shape, like)
        return numbers + numbers.sign() / 2

    def spread(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """A product of one vector for each dimension, of numbers of random sign between 1/2 and 3/2: cheap where there are millions.

        A tall table is a view of Gaussian numbers, each row one of them further on: no two of its rows, or columns, are alike.
        """
        if len(shape) == 2 and shape[0] >= TALL:
            return self.gaussian((shape[0] + shape[1] - 1,), like).as_strided(tuple(shape), (1, 1))
        found = like.new_ones(())
        for dim, length in enumerate(shape or (1,)):
            vector = (self._uniform(length, like) + 0.5) * self.normal((length,), like).sign()
            found = found * vector.view(-1, *(1,) * (len(shape) - 1 - dim))
        return found.view(tuple(shape))

    def normal(self, shape: Sequence[int], like: Tensor) -> Tensor:
        wide = torch.float64 if like.dtype is torch.float64 else torch.float32
        return torch.randn(tuple(shape), generator=self.generator, dtype=wide, device="cpu").to(like.device, like.dtype)

    def weights(self, count: int, like: Tensor) -> Tensor:
        """Different numbers between 1 and 2."""
        return 1 + self._uniform(count, like)

    def choice(self, among: Sequence[int], count: int) -> list[int]:
        order = torch.randperm(len(among), generator=self.generator, device="cpu").tolist()
        return sorted(among[i] for i in order[:count])

    def permutation(self, count: int) -> Tensor:
        return torch.randperm(count, generator=self.generator, device="cpu")

    def _uniform(self, count: int, like: Tensor) -> Tensor:
        return torch.rand(count, generator=self.generator, dtype=torch.float64, device="cpu").to(like.device, like.dtype)
