"""Specs: every way to write a derivative means one word, and what cannot be read is refused in words."""

from __future__ import annotations

import pytest

from partials._errors import InputError
from partials.taylor.specs import Alphabet, Term, Word

XT = Alphabet({"x": (0,), "t": (1,)})
LONG = Alphabet({"theta": (0,), "phi": (1,)})
RT = Alphabet({"r": (0, 1, 2), "t": (3,)}, frozenset("r"))


@pytest.mark.parametrize("spec", ["xxt", "x x t", ("x", "x", "t"), ["x", "x", "t"], {"x": 2, "t": 1}, (2, 1), "x,x,t", ("xx", "t")])
def test_every_form_means_the_same(spec: object) -> None:
    assert XT.canonical(XT.word(spec)) == Word(("x", "x", "t"))  # type: ignore[arg-type]


def test_order_of_letters_does_not_matter() -> None:
    assert XT.canonical(XT.word("txx")) == XT.canonical(XT.word("xxt"))


@pytest.mark.parametrize("spec", ["theta theta", ("theta", "theta"), "thetatheta", {"theta": 2}, (2, 0)])
def test_long_names(spec: object) -> None:
    assert LONG.word(spec) == Word(("theta", "theta"))  # type: ignore[arg-type]


def test_a_string_that_is_a_name_means_that_name() -> None:
    assert Alphabet({"x": (0,), "xx": (1,)}).word("xx") == Word(("xx",))


def test_a_string_with_two_readings_is_refused() -> None:
    with pytest.raises(InputError, match="more than one way") as error:
        Alphabet({"x": (0,), "xx": (1,)}).word("xxx")
    assert "got       'x x x' or 'x xx'" in str(error.value)


def test_two_cuts_with_one_meaning_are_no_ambiguity() -> None:
    assert sorted(Alphabet({"a": (0,), "ab": (1,), "ba": (2,)}).word("aab").free) == ["a", "ab"]


@pytest.mark.parametrize(
    ("spec", "free", "contracted"),
    [
        ("r", "r", ""),
        ("rr", "rr", ""),
        ("r.r", "", "r"),
        ("r.rt", "t", "r"),
        ("tr.r", "t", "r"),
        ("r . r t", "t", "r"),
        ("r.rr.r", "", "rr"),
        ("r.rr", "r", "r"),
    ],
)
def test_vector_words(spec: str, free: str, contracted: str) -> None:
    assert RT.word(spec) == Word(tuple(free), tuple(contracted))


@pytest.mark.parametrize("spec", ["t.t", "r.t", "r.", ".r", "r.r.r", "."])
def test_a_dot_joins_a_block_with_itself(spec: str) -> None:
    with pytest.raises(InputError, match="dot that does not join"):
        RT.word(spec)


def test_terms_of_words() -> None:
    assert RT.terms(RT.word("r.rt")) == ([Term(((0, 1, 2),), (3,))], ())
    terms, sizes = RT.terms(RT.word("tr"))
    assert terms == [Term((), (0, 3)), Term((), (1, 3)), Term((), (2, 3))] and sizes == (3,)


def test_axes_follow_the_way_it_is_written() -> None:
    blocks = Alphabet({"r": (0, 1), "s": (2, 3, 4)}, frozenset("rs"))
    assert blocks.axes(blocks.word("rs")) == (0, 1)
    assert blocks.axes(blocks.word("sr")) == (1, 0)
    assert blocks.axes(blocks.word("rsr")) == (0, 2, 1)
    assert blocks.axes(blocks.word("srr")) == (2, 0, 1)


@pytest.mark.parametrize("spec", [3, None, 1.5, ("x", 1), (1.0, 2.0), (True, False)])
def test_unreadable(spec: object) -> None:
    with pytest.raises(InputError, match="form that cannot be read"):
        XT.word(spec)  # type: ignore[arg-type]
