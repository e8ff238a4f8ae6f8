"""The README is true: its example prints what it shows, its commands and methods exist."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

from partials._run import NAMES

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def test_the_example_prints_what_is_shown():
    (code,), (shown,) = blocks("python"), blocks("text")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {})
    assert printed.getvalue() == shown
    assert len(code.splitlines()) == 5


def test_the_two_commands_exist():
    commands = re.findall(r"^    \./dev (\w+)", TEXT, re.MULTILINE)
    assert commands == ["demo", "test"]
    usage = (ROOT / "dev").read_text(encoding="utf-8")
    assert all(f"    {command} " in usage for command in commands)


def test_the_table_names_the_methods():
    named = re.findall(r"^\| `(\w+)` \|", TEXT, re.MULTILINE)
    assert set(named) == set(NAMES)


@pytest.mark.parametrize("name", sorted(set(re.findall(r"pt\.(\w+)", TEXT))))
def test_names_of_the_library_exist(name):
    import partials

    assert name in partials.__all__


def test_it_is_short_and_its_lines_fit():
    lines = TEXT.splitlines()
    assert len(lines) <= 100
    assert all(len(line) <= 140 for line in lines)
