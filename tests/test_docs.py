"""The documentation: every Python block runs, each page in its own namespace; every page is in the index; Sphinx does not complain."""

import doctest
import inspect
import re
import subprocess
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import partials
import partials.solve
import partials.testing

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(DOCS.glob("*.md"))
COMING = (DOCS / "coming-from.md").read_text(encoding="utf-8")
PEERS = {"backpack", "deepxde", "opacus"}


@pytest.mark.parametrize("page", [p for p in PAGES if "```python" in p.read_text(encoding="utf-8")], ids=lambda p: p.stem)
def test_examples_run(page):
    text = page.read_text(encoding="utf-8")
    for needed in re.findall(r"<!-- needs: (.*) -->", text):  # optional packages that are no part of the dev extra
        for package in needed.split(", "):
            pytest.importorskip(package)
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert blocks
    namespace = {"__name__": page.stem}
    with torch.random.fork_rng(devices=[]):
        for block in blocks:
            peers = PEERS & set(re.findall(r"^(?:import|from) (\w+)", block, re.MULTILINE))
            with warnings.catch_warnings():
                if peers:
                    warnings.simplefilter("default")  # theirs
                if all(find_spec(name) for name in peers):  # the extra `bench` has them
                    exec(compile(block, str(page), "exec"), namespace)


@pytest.mark.parametrize("name", sorted(PEERS))
def test_a_peer_is_compared_with(name):
    """A page does not lose its comparison, and who runs without the peer hears of it."""
    assert f"\nimport {name}\n" in COMING or f"\nfrom {name} import" in COMING
    if not find_spec(name):
        pytest.skip(f"{name} is not installed: the code that compares with it did not run")


def test_the_index_leads_to_every_page():
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    listed = {line for block in re.findall(r"```{toctree}\n(.*?)```", index, re.DOTALL) for line in block.splitlines()}
    assert {page.stem for page in PAGES} - {"index"} <= listed


def test_the_reference_has_every_public_name():
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"\.\. auto\w+:: (\w+)", text))
    assert set(partials.__all__) <= listed


ERRORS = {name for name in partials.__all__ if isinstance(getattr(partials, name), type) and issubclass(getattr(partials, name), Exception)}
SHOWN = [(partials, name) for name in partials.__all__ if name not in ERRORS - {"PartialsError"}]
SHOWN += [(partials.solve, name) for name in partials.solve.__all__]


@pytest.mark.parametrize(("module", "name"), SHOWN, ids=[name for _, name in SHOWN])
def test_a_public_name_shows_an_example_that_is_true(module, name):
    found = inspect.unwrap(getattr(module, name))
    names = {**vars(sys.modules[found.__module__]), "torch": torch, "pt": partials}
    examples = doctest.DocTestFinder(recurse=False).find(found, name, globs=names)
    assert sum(len(example.examples) for example in examples), f"{name} has no example"
    told: list[str] = []
    for example in examples:
        doctest.DocTestRunner(verbose=False).run(example, out=told.append)
    assert not told, "".join(told)


@pytest.mark.parametrize("name", sorted(ERRORS))
def test_an_error_says_which_ordinary_handler_catches_it(name):
    found = getattr(partials, name)
    kinds = [kind.__name__ for kind in (ValueError, RuntimeError) if issubclass(found, kind)]
    assert name == "PartialsError" or len(kinds) == 1
    assert len((found.__doc__ or "").split()) > 8


@pytest.mark.slow
def test_sphinx_builds_without_a_warning(tmp_path):
    pytest.importorskip("sphinx"), pytest.importorskip("furo"), pytest.importorskip("myst_parser")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", str(DOCS), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
