"""What is asked: `"xx"`, `("x", "t")`, `{"x": 2}`, `(2, 0)` or `"r.rt"`, read into words over the names of the coordinates.

A word says which coordinates are differentiated, as written, and which vector blocks are contracted with themselves (`r.r`, a Laplacian).
A term is the same thing in numbers: each coordinate is one component, or D of them for a vector block of D features.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import pairwise, product
from typing import NamedTuple, TypeAlias

from .._errors import InputError, listed, near
from .._typing import Shape

Spec: TypeAlias = str | Iterable[str] | Iterable[int] | Mapping[str, int]
Components: TypeAlias = tuple[int, ...]


class Term(NamedTuple):
    """One partial derivative: Laplacians over blocks of components first, then the components of `along`; both sorted."""

    laplacians: tuple[Components, ...]
    along: Components

    @property
    def order(self) -> int:
        return 2 * len(self.laplacians) + len(self.along)

    @property
    def components(self) -> frozenset[int]:
        return frozenset(self.along).union(*self.laplacians)


VALUE = Term((), ())


class Word(NamedTuple):
    """A derivative by name."""

    free: tuple[str, ...]
    contracted: tuple[str, ...] = ()

    @property
    def order(self) -> int:
        return len(self.free) + 2 * len(self.contracted)


@dataclass(frozen=True)
class Alphabet:
    """The names of the coordinates, the components of each, and which of them are vector blocks."""

    components: Mapping[str, Components]
    vectors: frozenset[str] = frozenset()
    others: frozenset[str] = frozenset()
    """Arguments that are no tensors, for messages."""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.components)

    def word(self, spec: Spec) -> Word:
        """The word that `spec` means, of any order; InputError where it means none, or several."""
        if isinstance(spec, str):
            return self._from_text(spec)
        if isinstance(spec, Mapping):
            return self._from_orders(spec, spec)
        if not isinstance(spec, Iterable):
            raise _unreadable(spec, self)
        letters = tuple(spec)
        if letters and all(isinstance(order, int) and not isinstance(order, bool) for order in letters):
            return self._from_counts(tuple(order for order in letters if isinstance(order, int)))
        if not all(isinstance(letter, str) for letter in letters):
            raise _unreadable(spec, self)
        return self._from_text(" ".join(str(letter) for letter in letters))

    def canonical(self, word: Word) -> Word:
        """The same derivative with its coordinates in the order of the names: `tx` and `xt` become one."""
        place = self.names.index
        return Word(tuple(sorted(word.free, key=place)), tuple(sorted(word.contracted, key=place)))

    def terms(self, word: Word) -> tuple[list[Term], Shape]:
        """The terms of a word in C order over the axes of its free vector blocks, and the sizes of those axes."""
        blocks = tuple(sorted(self.components[name] for name in word.contracted))
        index = [self.components[name] for name in word.free]
        sizes = tuple(len(self.components[name]) for name in word.free if name in self.vectors)
        return [Term(blocks, tuple(sorted(choice))) for choice in product(*index)], sizes

    def axes(self, word: Word) -> tuple[int, ...]:
        """Where each vector axis of `word`, as written, lies in its canonical form."""
        written = [name for name in word.free if name in self.vectors]
        return tuple(_inverse(sorted(range(len(written)), key=lambda axis: self.names.index(written[axis]))))

    def spell(self, word: Word) -> str:
        """The word as text, for messages: `xxt`, or `theta theta` where a name is long; `r.rt`."""
        gap = "" if all(len(name) == 1 for name in self.names) else " "
        return gap.join([*(f"{name}.{name}" for name in word.contracted), *word.free])

    def unknown(self, spec: object, name: str) -> InputError:
        """The error for a spec that names something which is not a coordinate."""
        close = near(name, self.names)
        packed = 'coords="xt" to name the features of a packed input'
        return InputError(
            f"the derivative {spec} names no coordinate with {name!r}",
            got=f"{name!r}, which is no tensor in this call" if name in self.others else repr(name),
            expected=f"coordinates: {listed(self.names)}",
            hint=f"{name} as a tensor" if name in self.others else close if close.startswith("did") else packed,
        )

    def _from_counts(self, counts: tuple[int, ...]) -> Word:
        if len(counts) != len(self.names):
            raise InputError(
                f"the derivative {counts} has another number of orders than there are coordinates",
                got=f"{len(counts)} orders",
                expected=f"{len(self.names)}, one for each of {listed(self.names)}",
                hint='names, such as "xx", or coords= to name the features of a packed input',
            )
        return self._from_orders(dict(zip(self.names, counts, strict=True)), counts)

    def _from_orders(self, orders: Mapping[str, int], spec: object) -> Word:
        for name, order in orders.items():
            if name not in self.components:
                raise self.unknown(spec, str(name))
            if not isinstance(order, int) or isinstance(order, bool) or order < 0:
                raise InputError(
                    f"the derivative {spec} has an order that is not a count", got=f"{order!r} for {name}", expected="0, 1, 2, ..."
                )
        return Word(tuple(name for name in self.names for _ in range(orders.get(name, 0))))

    def _from_text(self, text: str) -> Word:
        if text.strip() in self.components:
            return Word((text.strip(),))
        free: list[str] = []
        contracted: list[str] = []
        for chunk in re.sub(r"\s*\.\s*", ".", text).replace(",", " ").split():
            pieces = [self._letters(piece, text) for piece in chunk.split(".")]
            for left, right in pairwise(pieces):
                contracted.append(self._contracted(left, right, text))
            free.extend(name for piece in pieces for name in piece)
        return Word(tuple(free), tuple(contracted))

    def _contracted(self, left: list[str], right: list[str], text: str) -> str:
        """Take the names on both sides of a dot, which must be one vector block."""
        if not left or not right or left[-1] != right[0] or left[-1] not in self.vectors:
            got = " . ".join(side[0] if side else "nothing" for side in (left[-1:], right[:1]))
            raise InputError(
                f"the derivative {text!r} has a dot that does not join a vector block with itself",
                got=got,
                expected=f"a block named in `vectors` on both sides ({listed(sorted(self.vectors))})",
                hint='"r.r" with vectors=("r",), or "xx" for a scalar coordinate',
            )
        right.pop(0)
        return left.pop()

    def _letters(self, piece: str, text: str) -> list[str]:
        """Cut a piece such as `xxt` or `thetatheta` into names, in the one way there is."""
        if piece in self.components or not piece:
            return [piece] if piece else []
        ways = _cuts(piece, tuple(sorted(self.names)))
        if not ways:
            raise self.unknown(repr(text), _rest(piece, self.names))
        if len({tuple(sorted(way)) for way in ways}) > 1:
            raise InputError(
                f"the derivative {text!r} can be read in more than one way",
                got=" or ".join(repr(" ".join(way)) for way in ways[:3]),
                expected="one reading",
                hint="names separated by spaces, or a tuple of names",
            )
        return list(ways[0])


def name_list(given: str | Iterable[str], known: Collection[str], what: str) -> tuple[str, ...]:
    """The names in `"xyt"`, `"x, y, t"` or `("x", "y", "t")`; a string that is a known name is that one name."""
    if isinstance(given, str):
        text = given.strip()
        parts = re.split(r"[\s,]+", text) if re.search(r"[\s,]", text) else list(text)
        names = (text,) if text in known else tuple(parts)
    else:
        names = tuple(given)
    for name in names:
        if name not in known and not (isinstance(name, str) and name.isidentifier()):
            raise InputError(
                f"`{what}` holds something that is not a name", got=repr(name), expected='names, such as "xyt" or ("x", "theta")'
            )
        if names.count(name) > 1:
            raise InputError(f"`{what}` names {name!r} twice", got=listed(names), expected="each name once")
    return names


@cache
def _cuts(piece: str, names: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    """Every way to write `piece` as names put one after another."""
    if not piece:
        return ((),)
    return tuple((name, *rest) for name in names if piece.startswith(name) for rest in _cuts(piece[len(name) :], names))


def _rest(piece: str, names: Iterable[str]) -> str:
    """The part of an unreadable piece that is to blame: its unknown letters, or all of it where names are long."""
    known = set(names)
    return "".join(letter for letter in piece if letter not in known) if all(len(name) == 1 for name in known) else piece


def _inverse(order: list[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)


def _unreadable(spec: object, alphabet: Alphabet) -> InputError:
    return InputError(
        "a derivative is given in a form that cannot be read",
        got=repr(spec),
        expected=f'"xx", ("x", "x"), {{"x": 2}} or orders by coordinate; coordinates: {listed(alphabet.names)}',
    )
