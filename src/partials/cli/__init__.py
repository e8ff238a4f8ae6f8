"""The command line `partials`. Neither importing it nor `--help` imports torch."""

from __future__ import annotations

import sys
from importlib import import_module


def main() -> int:
    """Run the command in `sys.argv` and return its exit code."""
    try:
        for name in ("typer", "rich"):
            import_module(name)
        from .app import run
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("typer", "rich"):
            raise
        print(f"partials: the command line needs {error.name}: pip install 'partials[cli]'", file=sys.stderr)
        return 2
    return run()
