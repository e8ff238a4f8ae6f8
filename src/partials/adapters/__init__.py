"""Adapters to other packages, one file for each host: they translate between its interface and this library's, and compute nothing.

`partials.adapters.NAME` needs its host, which `pip install 'partials[NAME]'` brings; `import partials` imports none of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def host(package: str, extra: str) -> Iterator[None]:
    """Imports inside are of `package`: where it is missing, the error says how to get it."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"partials.adapters.{extra} needs {package} ({error}): pip install 'partials[{extra}]'", name=error.name
        ) from error
