"""Every error of the library: a sentence, then what was got, what was expected, and what to try.

PartialsError
├── InputError          (ValueError)    the call: arguments, parameters, names, sizes
├── OutputError         (ValueError)    what the function returned
├── MixingError         (RuntimeError)  a sample's output depends on other samples
├── RandomnessError     (RuntimeError)  random numbers without a stated policy
├── MethodError         (RuntimeError)  a method cannot do what was asked
├── MemoryBudgetError   (RuntimeError)  the answer does not fit in the given bytes
├── CheckError          (RuntimeError)  a result failed its check; carries the report
├── StoreError          (RuntimeError)  a store on disk is not what it should be
└── StaleError          (RuntimeError)  a Jacobian is asked again after what it reads has changed
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any


class PartialsError(Exception):
    """The base of all errors that this library raises on purpose: `.what` happened, what was `.got`, `.expected`, and a `.hint` to try.

    >>> import torch, partials as pt
    >>> try:
    ...     pt.jacobian(torch.nn.Linear(3, 2), torch.randn(5, 3), method="vamp")
    ... except pt.PartialsError as error:
    ...     print(error)
    method='vamp' is unknown
      got       'vamp'
      expected  one of: auto, capture, vmap, forward, jacobian, grad, backward, loop
      try       did you mean 'vmap'?
    """

    def __init__(self, what: str, *, got: str = "", expected: str = "", hint: str = "") -> None:
        self.what, self.got, self.expected, self.hint = what, got, expected, hint
        parts = (("got", got), ("expected", expected), ("try", hint))
        super().__init__("\n".join([what, *(f"  {word:<10}{text}" for word, text in parts if text)]))

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.what, self.got, self.expected, self.hint, self.__dict__)


class InputError(PartialsError, ValueError):
    """The call itself is not one that has an answer: arguments, names, sizes, dtypes. Also a ValueError."""


class OutputError(PartialsError, ValueError):
    """The function returned something that has no per-sample Jacobian: several outputs, integers, one number. Also a ValueError."""


class MixingError(PartialsError, RuntimeError):
    """The output of one sample depends on another sample; `.culprit` is the operation that mixes, where it was found."""

    culprit: Any = None


class RandomnessError(PartialsError, RuntimeError):
    """The function draws random numbers and no policy for them was given: `randomness=` says what to do. Also a RuntimeError."""


class MethodError(PartialsError, RuntimeError):
    """The method that was named cannot compute what was asked, or none can; with the reason of each. Also a RuntimeError."""


class MemoryBudgetError(PartialsError, RuntimeError):
    """The answer does not fit within `max_memory`, or into what is free: bytes needed and bytes there. Also a RuntimeError."""


class CheckError(PartialsError, RuntimeError):
    """A result disagrees with an independent computation; `.report` says where and by how much."""

    report: Any = None


class StoreError(PartialsError, RuntimeError):
    """A store on disk is damaged, belongs to another run, or cannot be written."""


class StaleError(PartialsError, RuntimeError):
    """A Jacobian's factors alias a tensor that has been changed since. Also a RuntimeError."""


def _rebuild(kind: type[PartialsError], what: str, got: str, expected: str, hint: str, state: dict[str, Any]) -> Any:
    error = kind(what, got=got, expected=expected, hint=hint)
    error.__dict__.update(state)
    return error


def listed(names: Iterable[object], limit: int = 8) -> str:
    """`a, b, c and 5 more`: a list for a message, never a page of it."""
    words = [str(name) for name in names]
    if len(words) > limit:
        return f"{', '.join(words[:limit])} and {len(words) - limit} more"
    return ", ".join(words) if words else "none"


def near(name: str, known: Iterable[str]) -> str:
    """`did you mean 'fc1.weight'?` for a name that is not known, or the known names."""
    names = list(known)
    close = get_close_matches(name, names, n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(repr(n) for n in close)}?"
    return f"one of: {listed(names)}"
