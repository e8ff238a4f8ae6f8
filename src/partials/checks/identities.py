"""The identities: sum u J == vjp(u), and u.(J v) == <vjp(u), v>, for each parameter, against one ordinary backward of f."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from .._typing import Shape, Tensor
from .call import Call
from .gaps import Gap, Key, Sides, weighted, weighted_each
from .independence import descend
from .report import Where
from .tolerance import Tolerance, apart


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
            return self.sides.gaps(self.call.gradients(self.u) if own is None else own, self.u, self.kept, names)
        here = mask.any(1).nonzero().flatten().tolist()
        own = self.call.gradients(self.u * mask)
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
        mask[samples] = 1 if outputs is None else torch.zeros(self.u.shape[1]).index_fill(0, torch.tensor(outputs), 1).to(mask)
        return mask

    def suspects(self, failing: Sequence[Key], tolerance: Tolerance, limit: int) -> list[int]:
        """Samples at which the failing identities break, the worst first: best-first search by halves, `limit` samples at most."""
        names = list({name for _, name in failing})

        def badness(samples: list[int]) -> float:
            gaps = self.gaps(names, self.mask(samples))
            return max(gaps[key].over(tolerance) for key in failing)

        everyone = list(range(len(self.u)))
        queue: list[tuple[float, list[int]]] = [(-torch.inf, everyone)]
        found: list[int] = []
        while queue and len(found) < limit:
            worst, samples = heapq.heappop(queue)
            if -worst <= 1 and found:
                break
            if len(samples) == 1:
                found.append(samples[0])
                continue
            for half in (samples[: len(samples) // 2], samples[len(samples) // 2 :]):
                heapq.heappush(queue, (-badness(half), half))
        return found

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
        own = self.call.gradients(one)[name]
        here = torch.tensor([self.sample(n)], device=self.u.device)
        group = tuple(block.select(here) for block in self.sides.subject.blocks[name])
        if name in {t.name for t in self.call.problem.inputs}:
            own, mine = own[n], weighted_each(group, one[n : n + 1]).reshape(own[n].shape)
        else:
            mine = weighted(group, one[n : n + 1])
        if not own.numel():
            return place
        p = int(apart(mine, own).abs().flatten().argmax())
        return Where(place.sample, place.output, unravel(p, tuple(own.shape)), float(mine.flatten()[p]), float(own.flatten()[p]))


def unravel(index: int, shape: Shape) -> Shape:
    """The index into `shape` of an entry of the flattened tensor."""
    found = []
    for length in reversed(shape):
        index, at = divmod(index, length)
        found.append(at)
    return tuple(reversed(found))
