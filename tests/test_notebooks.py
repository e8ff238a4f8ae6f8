"""The notebooks: every cell runs in order, and jupytext makes of each a notebook that Jupyter's own schema accepts."""

import contextlib
import io
from pathlib import Path

import pytest
import torch

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.py"))
SOURCES = {path: path.read_text(encoding="utf-8") for path in NOTEBOOKS}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path):
    if "sklearn" in SOURCES[path]:
        pytest.importorskip("sklearn")
    jupytext = pytest.importorskip("jupytext")
    notebook = jupytext.reads(SOURCES[path], "py:percent")
    namespace = {"__name__": path.stem}
    with torch.random.fork_rng(devices=[]), contextlib.redirect_stdout(io.StringIO()) as printed:
        for number, cell in enumerate(notebook.cells):
            if cell.cell_type == "code":
                exec(compile(cell.source, f"{path.name}, cell {number}", "exec"), namespace)
    assert printed.getvalue()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_one(path):
    jupytext, nbformat = pytest.importorskip("jupytext"), pytest.importorskip("nbformat")
    notebook = jupytext.reads(SOURCES[path], "py:percent")
    nbformat.validate(notebook)
    kinds = [cell.cell_type for cell in notebook.cells]
    assert kinds.count("markdown") >= 5 and kinds.count("code") >= 5
    assert jupytext.writes(notebook, "py:percent") == jupytext.writes(
        jupytext.reads(jupytext.writes(notebook, "ipynb"), "ipynb"), "py:percent"
    )
