"""Sphinx: `./dev docs` builds the pages with warnings as errors; nothing is fetched from a network."""

import re
import sys
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))  # this tree, wherever it is installed from

project = "partials"
author = "the partials authors"
copyright = "the partials authors"
release = metadata.version("partials")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = "partials"
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_mock_imports = ["curvlinops", "laplace", "opacus", "trak", "transformers"]  # hosts of adapters: absent in many environments
napoleon_google_docstring = True
napoleon_use_rtype = False
exclude_patterns = ["build"]
suppress_warnings = ["misc.highlighting_failure"]  # printed plans are text, whatever the lexer thinks of them


def plain(app, what, name, obj, options, lines):
    """Docstrings are read in terminals first: outside of code, `(N, *out)` and `|J|` mean themselves, not markup."""
    for i, line in enumerate(lines):
        if not line.lstrip().startswith((">>>", "...", ".. ")):
            lines[i] = "".join(
                part if part.startswith("`") else re.sub(r"([*|])", r"\\\1", part) for part in re.split(r"(`+[^`]*`+)", line)
            )


def setup(app):
    app.connect("autodoc-process-docstring", plain, priority=400)  # before napoleon, which writes markup of its own
