"""The identities: sum u J == vjp(u), and u.(J v) == <vjp(u), v>, for each parameter, against one ordinary backward of f."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from .._typing import Shape, Tensor
from .call import Call
from .gaps import Gap, Key, Sides, in_dtype, pushed, ratio, weighted, weighted_each
from .independence import descend
from .report import Where
from .tolerance import Tolerance, apart, distance


@dataclass
class Identities:
    """Both sides of the identities for the samples of one call, and the search for the samples that break them."""

    sides: Sides
    call: Call
    u: Tensor
    """(M, C): the weights of the call's M samples."""
    kept: list[int] | None = None
    """The Jacobian's samples that the call's are; None where they are all."""

    def gaps(
        self, names: Sequence[str] | None = None, mask: Tensor | None = None, own: Mapping[str, Tensor] | None = None
    ) -> dict[Key, Gap]:
        """Gaps by (check, parameter), with u multiplied by `mask` (M, C) if there is one; `own` if it is known already."""
        if mask is None:
            return self.sides.gaps(self.call.gradients(self.u, names) if own is None else own, self.u, self.kept, names)
        here = mask.any(1).nonzero().flatten().tolist()
        own = self.call.gradients(self.u * mask, names)
        inputs = {t.name for t in self.call.problem.inputs}
        own = {name: g[here] if name in inputs else g for name, g in own.items()}
        found = self.sides.gaps(own, (self.u * mask)[here], [self.sample(n) for n in here], names)
        return {key: replace(gap, sample=None if gap.sample is None else here[gap.sample]) for key, gap in found.items()}

    def sample(self, n: int) -> int:
        """The Jacobian's sample that is the call's n-th."""
        return n if self.kept is None else self.kept[n]

    def mask(self, samples: Sequence[int], outputs: Sequence[int] | None = None) -> Tensor:
        """(M, C): ones at the chosen samples, and there at the chosen outputs."""
        mask = torch.zeros_like(self.u)
        row = torch.ones_like(self.u[0]) if outputs is None else torch.zeros_like(self.u[0])
        row[outputs or ()] = 1
        mask[samples] = row
        return mask

    def locate(self, key: Key, n: int) -> Where:
        """The output and the entry where the identity of `key` breaks most at the call's sample n."""
        check, name = key
        outputs = list(range(self.u.shape[1]))
        c = descend(lambda some: self.gaps([name], self.mask([n], some))[key].error, outputs)
        place = Where(self.sample(n), unravel(c, self.sides.subject.report.outputs))
        if check != "backward":
            return place
        one = torch.zeros_like(self.u)
        one[n, c] = 1
        own = self.call.gradients(one, [name])[name]
        group = self.sides.group(name, [self.sample(n)])
        if name in {t.name for t in self.call.problem.inputs}:
            own, mine = own[n], weighted_each(group, one[n : n + 1]).reshape(own[n].shape)
        else:
            mine = weighted(group, one[n : n + 1])
        if not own.numel():
            return place
        p = int(apart(mine, own).abs().flatten().argmax())
        return Where(place.sample, place.output, unravel(p, tuple(own.shape)), float(mine.flatten()[p]), float(own.flatten()[p]))


@dataclass
class Search:
    """Iterates over the samples at which identities break, the worst first: best-first search by halves.

    It ends where every part of the batch that is left keeps to the tolerance by itself.
    """

    identities: Identities
    keys: set[Key]
    """Which identities; those that need no more search are taken out meanwhile."""
    tolerance: Tolerance
    parts: list[tuple[float, list[int]]] = field(default_factory=list)
    """The parts of the batch that were not looked at further, each with minus its error in units of what is allowed."""
    found: list[int] = field(default_factory=list)

    def __iter__(self) -> Iterator[int]:
        self.parts = [(-torch.inf, list(range(len(self.identities.u))))]
        while self.parts and self.parts[0][0] < -1 and self.keys:
            _, samples = heapq.heappop(self.parts)
            if len(samples) == 1:
                self.found.append(samples[0])
                yield samples[0]
                continue
            names = list({name for _, name in self.keys})
            for half in (samples[: len(samples) // 2], samples[len(samples) // 2 :]):
                gaps = self.identities.gaps(names, self.identities.mask(half))
                heapq.heappush(self.parts, (-max(gaps[key].over(self.tolerance) for key in self.keys), half))

    def adds_up(self, key: Key) -> bool:
        """Whether the Jacobian's own side of an identity is the sum of those of the parts.

        Where uses of one parameter cancel it is so in higher precision only, or is off by no more eps than in a lower one.
        """
        if key[1] in {t.name for t in self.identities.sides.subject.problem.inputs}:
            return True  # (an input's samples are compared one by one)
        u = self.identities.u
        wide = u.dtype is torch.float64
        error, allowed = self._excess(key, u.dtype), self.tolerance.summing(u.numel()).value
        if error <= allowed:
            return True
        other = self._excess(key, torch.float32 if wide else torch.float64)
        return error <= CANCEL * other / torch.finfo(torch.float32).eps * self.tolerance.eps if wide else other <= allowed

    def _excess(self, key: Key, dtype: torch.dtype) -> float:
        """How far the Jacobian's side is from the sum of those of the parts, computed in `dtype`."""
        sides, u, (check, name) = self.identities.sides, self.identities.u.to(dtype), key

        def side(samples: list[int] | None) -> Tensor:
            kept = self.identities.kept if samples is None else [self.identities.sample(n) for n in samples]
            group, weights = sides.group(name, kept), u if samples is None else u[samples]
            group = group if dtype is self.identities.u.dtype else tuple(in_dtype(block, dtype) for block in group)
            return (pushed(group, weights, sides.v(name).to(dtype)) if check == "product" else weighted(group, weights)).double()

        parts = [*(samples for _, samples in self.parts), *([n] for n in self.found)]
        error = distance(side(None), sum((side(samples) for samples in parts[1:]), side(parts[0])))
        return ratio(error, sides.scale(name, u, self.identities.kept))


CANCEL = 8
"""How many times as many eps as in a lower precision a sum that cancels may be off."""


def unravel(index: int, shape: Shape) -> Shape:
    """The index into `shape` of an entry of the flattened tensor."""
    found = []
    for length in reversed(shape):
        index, at = divmod(index, length)
        found.append(at)
    return tuple(reversed(found))
