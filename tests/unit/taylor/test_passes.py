"""The plan of reverse passes: what is shared, and how few passes there are."""

from __future__ import annotations

from itertools import combinations_with_replacement

import pytest

from partials.taylor.nested import passes
from partials.taylor.specs import VALUE, Term


def differentiated(*indices: tuple[int, ...]) -> list[list[tuple[int, ...]]]:
    return [[node.along for node in level] for level in passes(frozenset(Term((), index) for index in indices))]


def test_lower_orders_are_shared() -> None:
    assert differentiated((0,), (0, 0), (0, 1)) == [[()], [(0,)]]


def test_heat_equation_takes_two_passes() -> None:
    assert differentiated((1,), (0, 0)) == [[()], [(0,)]]


def test_mixed_fourth_order_is_one_pass_for_each_order() -> None:
    assert [len(level) for level in differentiated((0, 0, 1, 1))] == [1, 1, 1, 1]


@pytest.mark.parametrize("size", [1, 2, 5])
def test_hessian_takes_one_pass_for_each_coordinate(size: int) -> None:
    assert [len(level) for level in differentiated(*combinations_with_replacement(range(size), 2))] == [1, size]


def test_laplacian_is_summed_before_it_is_differentiated() -> None:
    block = (0, 1, 2)
    levels = passes(frozenset({Term((block,), (3,))}))
    assert [list(level) for level in levels] == [[VALUE], [Term((), (i,)) for i in block], [Term((block,), ())]]


def test_biharmonic_takes_two_passes_for_each_coordinate_and_two() -> None:
    block = tuple(range(4))
    assert [len(level) for level in passes(frozenset({Term((block, block), ())}))] == [1, 4, 1, 4]


def test_every_wanted_term_is_read() -> None:
    wanted = frozenset(Term((), index) for order in (1, 2, 3) for index in combinations_with_replacement(range(3), order))
    read = [term for level in passes(wanted) for edges in level.values() for _, term in edges]
    assert set(read) == wanted and len(read) == len(wanted)


def test_a_plan_for_many_coordinates_is_quick() -> None:
    wanted = frozenset(Term((), pair) for pair in combinations_with_replacement(range(150), 2))
    assert [len(level) for level in passes(wanted)] == [1, 150]
