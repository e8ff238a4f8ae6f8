"""The derivatives of one call, by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias, final

import torch

from .._errors import InputError, near
from .._typing import Tensor
from .choice import InputPlan
from .specs import VALUE, Alphabet, Spec, Term, Word

ByName: TypeAlias = dict[str, Tensor]
_VALUE_NAMES = ("", "value", "u")


class UnknownDerivativeError(InputError, KeyError, AttributeError):
    """A derivative that was not asked for."""

    def __str__(self) -> str:
        return Exception.__str__(self)


@final
class Derivatives:
    """The value and the derivatives of a function at its points.

    `d.value` (also `d.u`), `d.x`, `d["xt"]`: any way to spell a derivative that was asked for, or found on the way to one. Each has the
    shape of the value, and a dimension for each free vector block at its end, in the order in which the blocks are written.
    """

    def __init__(self, alphabet: Alphabet, found: Mapping[Term, Tensor], asked: Sequence[Word], plan: InputPlan) -> None:
        self._alphabet, self._found, self._plan = alphabet, found, plan
        self._asked = {alphabet.spell(word): word for word in asked}
        self._made: dict[Word, Tensor] = {}

    @property
    def value(self) -> Tensor:
        """The output of the function itself."""
        return self._found[VALUE]

    @property
    def plan(self) -> InputPlan:
        """How the derivatives were computed, and why: `print(d.plan)`."""
        return self._plan

    def dict(self) -> ByName:
        """The derivatives that were asked for, by name and in that order."""
        return {name: self._at(word) for name, word in self._asked.items()}

    def __getitem__(self, spec: Spec) -> Tensor:
        try:
            word = self._alphabet.word(spec)
        except InputError as error:
            if isinstance(spec, str) and spec in _VALUE_NAMES:
                return self.value
            raise self._unknown(spec, error.what) from None
        if not word.order:
            return self.value
        if not set(self._alphabet.terms(word)[0]) <= self._found.keys():
            raise self._unknown(spec, f"the derivative {self._alphabet.spell(word)!r} was not asked for")
        return self._at(word)

    def __getattr__(self, name: str) -> Tensor:
        if name.startswith("_"):
            raise AttributeError(name)
        return self[name]

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *(name for name in self._asked if name.isidentifier())]

    def __repr__(self) -> str:
        return f"Derivatives(value {tuple(self.value.shape)}; {', '.join(self._asked)})"

    def _at(self, word: Word) -> Tensor:
        canonical = self._alphabet.canonical(word)
        if canonical not in self._made:
            self._made[canonical] = self._put_together(canonical)
        whole, axes = self._made[canonical], self._alphabet.axes(word)
        if list(axes) == sorted(axes):
            return whole
        leading = self.value.dim()
        return whole.permute(*range(leading), *(leading + axis for axis in axes))

    def _put_together(self, word: Word) -> Tensor:
        terms, sizes = self._alphabet.terms(word)
        if not sizes:
            return self._found[terms[0]]
        return torch.stack([self._found[term] for term in terms], -1).reshape(*self.value.shape, *sizes)

    def _unknown(self, spec: Spec, what: str) -> UnknownDerivativeError:
        names = list(self._asked)
        return UnknownDerivativeError(what, got=repr(spec), expected=f"one of: {', '.join(names)}, value", hint=near(str(spec), names))
