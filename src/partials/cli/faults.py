"""From an exception to a sentence and an exit code; the user's own code is told apart from this library."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer

from partials._errors import CheckError, InputError, MemoryBudgetError, MethodError, MixingError, PartialsError, RandomnessError, StoreError

from .console import say

CHECK_FAILED, USAGE, REFUSED, INTERNAL, INTERRUPTED = 1, 2, 3, 70, 130
REFUSALS = (MethodError, MixingError, RandomnessError, MemoryBudgetError, StoreError)
PACKAGE = str(Path(__file__).parents[1])
LINES = 6
"""Frames of the user's traceback that are shown."""
PLUMBING = ("_wrapped_call_impl", "_call_impl")
"""Functions of torch that only pass a call on."""


class ForeignError(Exception):
    """Code that is not ours failed: `doing` says what was asked of it, `__cause__` is its own error."""

    def __init__(self, doing: str, cause: BaseException) -> None:
        super().__init__(doing)
        self.doing, self.cause = doing, cause

    def __str__(self) -> str:
        return told(self.doing, self.cause)


@contextmanager
def guarded() -> Iterator[None]:
    """The body of a command: what goes wrong in it becomes a sentence on stderr and an exit code."""
    try:
        yield
    except PartialsError as error:
        say(f"{error}{_in_options(error)}")
        raise typer.Exit(code_of(error)) from None
    except ForeignError as error:
        say(str(error))
        raise typer.Exit(USAGE) from None
    except KeyboardInterrupt:
        say("interrupted")
        raise typer.Exit(INTERRUPTED) from None
    except (typer.Exit, typer.BadParameter, BrokenPipeError):
        raise
    except Exception as error:
        if is_theirs(error):
            say(told("running the model", error))
            raise typer.Exit(USAGE) from None
        traceback.print_exc()
        say("this is a fault of partials itself, not of the model; please report it with the lines above")
        raise typer.Exit(INTERNAL) from None


def code_of(error: PartialsError) -> int:
    if isinstance(error, CheckError):
        return CHECK_FAILED
    return REFUSED if isinstance(error, REFUSALS) else USAGE


def is_theirs(error: BaseException) -> bool:
    """Whether an exception came out of the user's own code (a hook, a backward) while this library was running it."""
    inner = [frame for frame in _frames(error) if not _is_installed(frame)]
    return bool(inner) and not _is_ours(inner[-1])


def told(doing: str, error: BaseException) -> str:
    """Whose file, which line, the import that failed, and the last lines of their own traceback."""
    frames = [frame for frame in _frames(error) if not _is_ours(frame) and frame.name not in PLUMBING]
    written = [i for i, frame in enumerate(frames) if not _is_installed(frame)]
    frames = frames[written[0] :][-LINES:] if written else frames[-1:]
    place = next((frame for frame in reversed(frames) if not _is_installed(frame)), frames[-1] if frames else None)
    lines = [f"{type(error).__name__} while {doing}; the error is in the code that was given, not in partials"]
    if isinstance(error, SyntaxError) and error.filename:
        lines.append(f"  {'where':<10}{shown(error.filename)}, line {error.lineno}")
    elif place is not None:
        lines.append(f"  {'where':<10}{shown(place.filename)}, line {place.lineno}: {place.line}")
    if isinstance(error, ModuleNotFoundError) and error.name:
        lines.append(f"  {'import':<10}{error.name!r} is not installed here, or is not where Python looks")
    lines.append("  their traceback ends with")
    last = [*traceback.format_list(frames), *traceback.format_exception_only(error)]
    lines += [f"    {line}" for part in last for line in part.rstrip().splitlines()]
    return "\n".join(lines)


def shown(path: str | Path) -> str:
    """A path as the user would write it: from the working directory if it lies below, from the package if it is installed."""
    if "site-packages" in str(path):
        return str(path).rpartition("site-packages")[2].lstrip("/\\")
    try:
        return str(Path(path).resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _frames(error: BaseException) -> list[traceback.FrameSummary]:
    return list(traceback.extract_tb(error.__traceback__))


def _is_ours(frame: traceback.FrameSummary) -> bool:
    return frame.filename.startswith(PACKAGE)


def _is_installed(frame: traceback.FrameSummary) -> bool:
    """A frame of an installed package or of Python itself: neither the user's code nor ours."""
    return not _is_ours(frame) and ("site-packages" in frame.filename or frame.filename.startswith((sys.base_prefix, "<")))


def _in_options(error: PartialsError) -> str:
    """The remedy in the words of the command line, where the library's own names Python."""
    if isinstance(error, RandomnessError | MixingError) and "module.eval()" in error.hint:
        return "\n  here      --eval" + (", or --randomness model" if isinstance(error, RandomnessError) else "")
    if isinstance(error, InputError) and "wrt=" in error.hint:
        return "\n  here      --wrt NAME"
    return ""
