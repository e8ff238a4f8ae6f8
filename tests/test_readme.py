"""The README is true: its example prints what it shows, its commands and methods exist."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
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


def shell_lines(start):
    return [line.partition("  #")[0].strip() for line in re.findall(r"^    (\S.*)$", TEXT, re.MULTILINE) if line.startswith(start)]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A newcomer's folder: mine.py in it, and the tree importable."""
    (tmp_path / "mine.py").write_text(
        "import torch\nfrom torch import nn\n\nnet = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))\n"
        "x, y = torch.randn(12, 6), torch.randint(3, (12,))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")])))
    return tmp_path


def test_the_commands_for_a_model_of_ones_own(place):
    pytest.importorskip("typer")
    checked, ran = (shlex.split(line) for line in shell_lines("partials "))
    for words in (checked, ran):
        done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert "full check passed" in (place / "check.html").read_text(encoding="utf-8")
    import partials

    assert partials.open(place / "mine.store").complete


def test_the_clipped_step(place, monkeypatch):
    monkeypatch.syspath_prepend(str(place))
    code = "import torch.nn.functional as F\nimport partials as pt\nfrom mine import net, x, y\n"
    start = TEXT.index("    G = pt.gradient")
    code += "\n".join(line[4:] for line in TEXT[start:].split("\n\n")[0].splitlines())
    namespace = {}
    exec(compile(code, "README.md", "exec"), namespace)
    sys.modules.pop("mine")
    norm = sum(p.grad.square().sum() for p in namespace["net"].parameters()).sqrt()
    assert 0 < norm <= 1


@pytest.mark.slow
def test_the_example_that_is_named(place):
    pytest.importorskip("sklearn"), pytest.importorskip("matplotlib")
    (line,) = shell_lines("python ")
    _, program, folder = shlex.split(line)
    done = subprocess.run([sys.executable, str(ROOT / program), folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (place / folder / "found.png").exists() and (place / folder / "train.store").exists()


def test_links_lead_somewhere():
    assert all((ROOT / target).exists() for target in re.findall(r"\]\(([^):#]+)", TEXT))


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
