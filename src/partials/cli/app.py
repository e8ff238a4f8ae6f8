"""The commands: each reads its options, prepares the problem, calls the library and prints."""

from __future__ import annotations

import json as json_module
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import partials
from partials._errors import InputError, near

from .console import progress, say
from .faults import CHECK_FAILED, INTERRUPTED, REFUSED, guarded
from .options import Asked, Json, Method, asking
from .storing import info, verify
from .storing import run as run_command

if TYPE_CHECKING:
    from partials._compare import Comparison

Html = Annotated[Path | None, typer.Option("--html", help="Write a self-contained page to this file: tables, pictures, plan, machine.")]
LEVELS = ("quick", "full", "deep")
EPILOG = (
    "Exit codes: 0 well, 1 a check failed, 2 usage, 3 refused, 130 interrupted. "
    "A model or data given as FILE.py:NAME or MODULE:NAME is code, and is run."
)

app = typer.Typer(
    name="partials",
    help="Every partial derivative of a PyTorch function or module, for each sample of a batch.",
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def run(arguments: list[str] | None = None) -> int:
    """Run a command line and return its exit code."""
    try:
        app(arguments)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 2
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def _version(asked: bool) -> None:
    if asked:
        print(f"partials {partials.__version__}, torch {metadata.version('torch')}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", help="Print the versions of partials and torch.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for the picture.")] = Path("partials-demo"),
    quick: Annotated[bool, typer.Option("--quick", help="The table only, without the handwritten digits.")] = False,
    json: Json = False,
) -> None:
    """Solve every row of the notebook's table, then take per-sample gradients of real handwritten digits."""
    with guarded():
        from .demo import demonstrate

        if not demonstrate(out, quick=quick, json=json):
            raise typer.Exit(CHECK_FAILED)


@app.command()
@asking
def compare(
    asked: Asked,
    methods: Annotated[list[str] | None, typer.Option("--methods", help="Names of methods, separated by commas; all by default.")] = None,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Timed runs of each method; slow methods get fewer.")] = 7,
    markdown: Annotated[Path | None, typer.Option("--markdown", help="Write the table as Markdown to this file.")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Write a picture of the times to this file.")] = None,
    html: Html = None,
) -> None:
    """Time every method on MODEL and DATA, beside its worst error and peak memory."""
    if plot is not None:
        _demand_matplotlib()
    from partials._compare import compare_methods

    from .prepare import problem_of

    problem = problem_of(asked)
    names = [name for group in methods for name in group.split(",") if name] if methods else None
    with progress() as report:
        comparison = compare_methods(problem, names, repeats=repeats, progress=report)
    print(comparison.to_json() if asked.json else comparison)
    _write(comparison, markdown, plot)
    _write_html(comparison, html)
    if comparison.fastest is None:
        say("no method could compute this")
        raise typer.Exit(REFUSED)


@app.command()
@asking
def check(
    asked: Asked,
    level: Annotated[str, typer.Option("--level", help="quick, full (every method against the float64 loop) or deep.")] = "quick",
    method: Method = "auto",
    html: Html = None,
) -> None:
    """Compute the Jacobian and compare it with independent computations; exit code 1 where they disagree."""
    if level not in LEVELS:
        raise InputError(f"level {level!r} is unknown", got=level, expected=f"one of: {', '.join(LEVELS)}", hint=near(level, LEVELS))
    from partials._api import inspected

    from .prepare import problem_of

    problem = problem_of(asked)
    with progress() as report:
        report(f"checking ({level})")
        found = inspected(problem, method, level)
    _print(found, asked.json)
    _write_html(found, html)
    if not found.passed:
        raise typer.Exit(CHECK_FAILED)


@app.command()
@asking
def explain(asked: Asked, method: Method = "auto") -> None:
    """Print the plan without computing: which method would run, why, at what cost, and why the others lost."""
    from partials._run import plan

    from .prepare import problem_of

    _print(plan(problem_of(asked), method)[0], asked.json)


app.command(name="run")(asking(run_command))
app.command()(info)
app.command()(verify)


def _print(found: Any, json: bool) -> None:
    print(json_module.dumps(found.to_dict(), indent=2) if json else found)


def _write(comparison: Comparison, markdown: Path | None, plot: Path | None) -> None:
    if markdown is not None:
        markdown.parent.mkdir(parents=True, exist_ok=True)
        markdown.write_text(comparison.to_markdown(), encoding="utf-8")
        say(f"table written to {markdown}")
    if plot is not None:
        comparison.plot(plot)
        say(f"picture written to {plot}")


def _write_html(found: Any, path: Path | None) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(found.to_html(), encoding="utf-8")
        say(f"page written to {path}")


def _demand_matplotlib() -> None:
    """A plot that cannot be drawn is refused before the measurements, not after them."""
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise InputError("a plot needs matplotlib", got="no module named 'matplotlib'", hint="pip install 'partials[plot]'")
