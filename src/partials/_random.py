"""Random numbers by name and number: entry e and column j of a projection are a hash of (seed, parameter name, e, j) and of nothing else.

Whatever the batch, the chunk, the process or the device, the same entry meets the same number, so that sketches made apart can be compared.
The generator is SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators", figure 17): its i-th word is a
function of the key and i alone. The words are integers, and numbers are looked up by their bits: no function is evaluated that rounds
differently from one machine to another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from hashlib import blake2b

import torch

from ._typing import Tensor

GAMMA, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
LEVELS = 2**16
"""Values of the Gaussian's table: one for each 16 bits."""


def key_of(seed: int, name: str) -> int:
    """64 bits for a seed and a name."""
    return int.from_bytes(blake2b(f"{seed}\0{name}".encode(), digest_size=8).digest(), "little")


def words(key: int, counters: Tensor) -> Tensor:
    """The words of the stream `key` at the places `counters` (int64): int64 of 64 random bits each."""
    z = torch.empty(counters.shape, dtype=torch.int64, device=counters.device)  # (its bits are read as smaller integers: no odd strides)
    torch.mul(counters, _signed(GAMMA), out=z).add_(_signed(key + GAMMA))  # int64 wraps around, as the generator asks
    z = _mixed_down(z, 30).mul_(_signed(FIRST))
    z = _mixed_down(z, 27).mul_(_signed(SECOND))
    return _mixed_down(z, 31)


def _mixed_down(z: Tensor, shift: int) -> Tensor:
    """z ^ (z >>> shift), without the sign."""
    return z.bitwise_xor_((z >> shift).bitwise_and_(2 ** (64 - shift) - 1))


def _signed(bits: int) -> int:
    return (bits + 2**63) % 2**64 - 2**63


@dataclass(frozen=True)
class Projection:
    """The matrix (entries of a parameter, k) of one seed and parameter name, any part of which can be asked for.

    Entries have mean 0 and variance 1/k.
    """

    key: int
    k: int
    kind: str
    """"gaussian" or "rademacher"."""
    places: Tensor | None = None
    """The parameter's entries that the rows stand for, in order; all of them where None."""

    @property
    def step(self) -> int:
        """Numbers in one word: parts are cut at multiples of it."""
        return 64 if self.kind == "rademacher" else 4

    def at(self, places: Tensor) -> Projection:
        """The rows at `places`, which count in the rows of this one."""
        return replace(self, places=places if self.places is None else self.places[places])

    def rows(self, entries: Tensor, columns: slice, dtype: torch.dtype) -> Tensor:
        """The rows of `entries` (int64, (E,)): (E, columns); `columns` starts at a multiple of `step`."""
        entries = entries if self.places is None else self.places[entries]
        each = -(-self.k // self.step)
        first, last = columns.start // self.step, -(-columns.stop // self.step)
        counters = entries[:, None] * each + torch.arange(first, last, device=entries.device)
        numbers = NUMBERS[self.kind](words(self.key, counters), dtype).view(len(entries), (last - first) * self.step)
        return numbers[:, : columns.stop - columns.start] * self.k**-0.5


def matrix(seed: int, name: str, rows: int, k: int, like: Tensor) -> Tensor:
    """A whole projection of signs (rows, k), variance 1/k, for a side of a two-sided sketch."""
    return Projection(key_of(seed, name), k, "rademacher").rows(torch.arange(rows, device=like.device), slice(0, k), like.dtype)


def _gaussian(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """4 numbers for each word."""
    places = bits.view(torch.int16).to(torch.int32).add_(LEVELS // 2)
    return _normal_table(dtype, bits.device).index_select(0, places.flatten())


def _signs(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """64 signs for each word."""
    return torch.nn.functional.embedding(bits.view(torch.uint8).to(torch.int32), _sign_table(dtype, bits.device))


NUMBERS: dict[str, Callable[[Tensor, torch.dtype], Tensor]] = {"gaussian": _gaussian, "rademacher": _signs}


@cache
def _normal_table(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The means of 2^16 equally likely parts of the normal distribution, scaled to variance 1 (fourth moment 2.9998)."""
    with torch.inference_mode(False), torch.no_grad():
        edges = torch.special.ndtri(torch.linspace(0, 1, LEVELS + 1, dtype=torch.float64, device="cpu"))
        density = (-edges.square() / 2).exp()  # (at the infinite edges: 0)
        means = density[:-1] - density[1:]
        means = means - means.flip(0)
        return (means / means.square().mean().sqrt()).to(device, dtype)


@cache
def _sign_table(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The 8 signs of each byte: (256, 8)."""
    with torch.inference_mode(False), torch.no_grad():
        places = torch.arange(256, device="cpu")
        bits = (places[:, None] >> places[:8]) & 1
        return (2 * bits - 1).to(device, dtype)
