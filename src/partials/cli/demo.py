"""`partials demo`: the notebook's table solved, then the gradients of real handwritten digits, and a picture of them."""

from __future__ import annotations

import json as json_module
import time
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.console import Console
from rich.text import Text

import partials
from partials import _machine
from partials._errors import InputError
from partials._plan import human_time

from . import digits, notebook
from .console import progress


def demonstrate(out: Path, *, quick: bool = False, json: bool = False) -> bool:
    """Run the demonstration, print it, write the picture; whether everything came out right."""
    if not quick:
        _demand("sklearn", "matplotlib")
    console = Console(highlight=False, soft_wrap=True, quiet=json)
    machine = _machine.describe(torch.device("cpu"))
    start = time.perf_counter()
    console.print(f"partials {partials.__version__}: {_machine.sentence(machine)}\n")
    outcomes = _table(console)
    studied = None if quick else _digits(console, out / "digits.png")
    right = all(outcome.right for outcome in outcomes) and (studied is None or studied.report.passed)
    if json:
        found = {"partials": partials.__version__, "machine": machine, "passed": right, "rows": [asdict(outcome) for outcome in outcomes]}
        if studied is not None:
            found |= {"digits": studied.to_dict(), "picture": str(out / "digits.png")}
        print(json_module.dumps(found, indent=2))
    solved = sum(outcome.right for outcome in outcomes)
    console.print(f"\n{solved} of {len(outcomes)} rows right, {human_time(time.perf_counter() - start)} in all")
    if studied is not None:
        console.print(f"picture: {out / 'digits.png'}")
    return right


def _table(console: Console) -> list[notebook.Outcome]:
    console.print("The notebook's table: f(x; a, b) = a x + b, then nn.Linear, by the library")
    outcomes = []
    for row in notebook.ROWS:
        outcome = notebook.outcome(row)
        line = Text(str(outcome))
        line.highlight_words([" ok "], "green")
        line.highlight_words(["NOT OK", "NOT ALL EXACT"], "bold red")
        console.print(line)
        outcomes.append(outcome)
    return outcomes


def _digits(console: Console, path: Path) -> digits.Studied:
    console.print("\nHandwritten digits: the gradient of the loss for each of them")
    with progress() as say:
        studied = digits.study(digits.load(), say)
        say("drawing")
        digits.picture(studied, path)
    console.print(
        f"  {len(studied.digits)} gradients of {studied.parameters} parameters in {human_time(studied.seconds)}, by {studied.method}"
    )
    console.print(f"  {100 * studied.accuracy:.1f} % of the digits that were not trained on are read right")
    console.print(f"  check {'passed' if studied.report.passed else 'FAILED'}")
    console.print(
        "  the largest: " + ", ".join(f"a {studied.digits.labels[n]} read as {studied.predicted[n]}" for n in studied.largest[:5])
    )
    console.print(f"\n{studied.comparison}")
    return studied


def _demand(*names: str) -> None:
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise InputError(
            "the demonstration needs scikit-learn's digits and matplotlib",
            got=f"no module named {missing[0]!r}",
            hint="pip install 'partials[demo]', or --quick",
        )
