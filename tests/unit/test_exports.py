"""The public names: sorted, present, documented, and listed by `dir`."""

from __future__ import annotations

from pathlib import Path

import pytest

import partials


def test_the_list_is_sorted_and_without_duplicates():
    assert list(partials.__all__) == sorted(set(partials.__all__))


@pytest.mark.parametrize("name", partials.__all__)
def test_a_public_name_resolves_and_has_a_docstring(name):
    value = getattr(partials, name)
    if not isinstance(value, str | int | float | tuple):  # a constant, such as the version, has the docstring of its type
        assert (value.__doc__ or "").strip(), f"partials.{name} has no docstring"


def test_dir_lists_the_public_names():
    assert set(partials.__all__) <= set(dir(partials))


def test_no_module_has_a_public_name():
    """Importing the module `partials.x` would put it in the place of the function `partials.x`."""
    package = Path(partials.__file__).parent
    assert not {path.stem for path in package.iterdir()} & set(partials.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        partials.no_such_name  # noqa: B018 - the access is the test
