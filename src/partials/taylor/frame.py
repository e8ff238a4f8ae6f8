"""Which derivatives a jet carries, and how those of a product come from those of its factors.

The wanted derivatives are differential operators with constant coefficients. By Leibniz' rule each of them takes a product apart,

    D(f g) = f Dg + g Df + sum of w * (D'f) (D''g),        e.g.  lap(f g) = f lap g + g lap f + 2 sum_i f_i g_i,

and the operators D' and D'' of lower order are taken apart in the same way. The slots of a frame are the operators that this needs and no
others: a mixed derivative brings the multi-indices below it; a Laplacian brings D first derivatives (not D squares: the top order is
collapsed), and the Laplacian of a Laplacian 2 + 2 D + D (D + 1) / 2 slots.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

from .specs import VALUE, Term


class Pair(NamedTuple):
    """Adds `weight * f[left] * g[right]` to a slot of the product f g; slots are counted without the value: 0 is the first derivative."""

    left: int
    right: int
    weight: float


Table = tuple[tuple[int, tuple[Pair, ...]], ...]
"""For each slot that has any: the pairs of lower slots, none of them the value."""


@dataclass(frozen=True, eq=False)
class Frame:
    """The slots of a jet, the value first, then by order; and the tables of products."""

    slots: tuple[Term, ...]
    table: Table
    square: Table
    """Pairs for f g where g is f: each unordered pair once."""
    powers: tuple[Table, ...]
    """powers[k]: pairs for v * v^(k+1) where v has no value: those with a right slot of order k + 1 or more."""

    @property
    def order(self) -> int:
        return self.slots[-1].order

    @property
    def rest(self) -> int:
        """The number of slots beside the value."""
        return len(self.slots) - 1

    @cached_property
    def firsts(self) -> int:
        """The number of slots of order one; they come first."""
        return sum(term.order == 1 for term in self.slots)

    def place(self, term: Term) -> int:
        """Where a derivative is among the slots beside the value."""
        return self.slots.index(term) - 1

    @classmethod
    def of(cls, wanted: Iterable[Term]) -> Frame:
        return _frame(frozenset(wanted) - {VALUE})


@lru_cache(maxsize=256)
def _frame(wanted: frozenset[Term]) -> Frame:
    """The closure of the wanted operators under Leibniz' rule.

    >>> [len(Frame.of([Term(((0, 1, 2),), ())]).slots), len(Frame.of([Term((), (0, 0)), Term((), (1,))]).slots)]
    [5, 4]
    """
    products: dict[Term, Counter[tuple[Term, Term]]] = {}
    waiting = list(wanted)
    while waiting:
        term = waiting.pop()
        if term in products:
            continue
        products[term] = split(term)
        waiting += {left for left, _ in products[term]} - products.keys() - {VALUE}
    slots = (VALUE, *sorted(products, key=lambda term: (term.order, len(term.laplacians), term)))
    place = {term: number - 1 for number, term in enumerate(slots)}
    rows = []
    for term in slots[1:]:
        pairs = [
            Pair(place[left], place[right], float(weight)) for (left, right), weight in products[term].items() if VALUE not in (left, right)
        ]
        if pairs:
            rows.append((place[term], tuple(sorted(pairs))))
    table = tuple(rows)
    orders = [term.order for term in slots[1:]]
    top = max(orders, default=0)
    powers = tuple(_kept(table, [order >= k for order in orders]) for k in range(1, top))
    return Frame(slots, table, _halved(table), powers)


def split(term: Term) -> Counter[tuple[Term, Term]]:
    """The pairs (D', D'') into which an operator takes a product apart, with their weights; (1, D) and (D, 1) among them."""
    found: Counter[tuple[Term, Term]] = Counter({(VALUE, VALUE): 1})
    for component in term.along:
        d = Term((), (component,))
        found = _times(found, {(d, VALUE): 1, (VALUE, d): 1})
    for block in term.laplacians:
        d = Term((block,), ())
        first = {(Term((), (i,)), Term((), (i,))): 2 for i in block}
        found = _times(found, {(d, VALUE): 1, (VALUE, d): 1, **first})
    return found


def _times(found: Counter[tuple[Term, Term]], factor: dict[tuple[Term, Term], int]) -> Counter[tuple[Term, Term]]:
    product: Counter[tuple[Term, Term]] = Counter()
    for (left, right), weight in found.items():
        for (more_left, more_right), factor_weight in factor.items():
            product[_after(left, more_left), _after(right, more_right)] += weight * factor_weight
    return product


def _after(one: Term, other: Term) -> Term:
    """One operator after the other: they commute."""
    return Term(tuple(sorted(one.laplacians + other.laplacians)), tuple(sorted(one.along + other.along)))


def _kept(table: Table, allowed: list[bool]) -> Table:
    rows = ((slot, tuple(pair for pair in pairs if allowed[pair.right])) for slot, pairs in table)
    return tuple((slot, pairs) for slot, pairs in rows if pairs)


def _halved(table: Table) -> Table:
    rows = []
    for slot, pairs in table:
        weights: defaultdict[tuple[int, int], float] = defaultdict(float)
        for left, right, weight in pairs:
            weights[min(left, right), max(left, right)] += weight
        rows.append((slot, tuple(Pair(left, right, weight) for (left, right), weight in sorted(weights.items()))))
    return tuple(rows)
