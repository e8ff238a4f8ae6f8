"""`python -m benchmarks [--quick] [--case WORDS ...] [--json PATH] [--write]`: correctness first, then times as ratios in one run."""

from __future__ import annotations

import argparse
import json
from importlib import metadata
from pathlib import Path

import torch

from benchmarks.cases import CASES
from benchmarks.measure import LINE, OVERHEAD, measure, memory
from benchmarks.report import page, printed, table
from partials._machine import describe, sentence

ROOT = Path(__file__).parents[1]
NAMES = [LINE, OVERHEAD, *CASES]
PACKAGES = ("torch", "opacus", "backpack-for-pytorch", "torchjd", "curvlinops-for-pytorch")


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer turns, no memory: under three minutes")
    parser.add_argument("--case", nargs="+", default=[""], help="only the cases whose names have one of these words")
    parser.add_argument("--only", choices=["times", "memory"], help="a half of the work; memory is added to the times in the file")
    parser.add_argument("--json", type=Path, default=ROOT / "build" / "benchmarks.json", help="figures; this run's cases are added")
    parser.add_argument("--write", action="store_true", help="write docs/benchmarks.md from all figures in the file")
    options = parser.parse_args()
    torch.set_num_threads(min(2, torch.get_num_threads()))
    machine = sentence(describe(torch.device("cpu")))
    print(machine)
    figures = json.loads(options.json.read_text()) if options.json.exists() and not options.quick else {}
    for name in NAMES:
        if any(word in name for word in options.case):
            if options.only != "memory":
                figures[name] = measure(name, quick=options.quick)
            if name in CASES and CASES[name].dense and options.only != "times" and not options.quick:
                figures[name]["memory"] = memory(name, figures[name]["times"].get("rows", {}))
            print(printed(name, figures[name]), flush=True)
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(figures))
    figures = {name: figures[name] for name in NAMES if name in figures}
    print(f"\n{table(figures)}")
    if options.write:
        (ROOT / "docs" / "benchmarks.md").write_text(page(figures, machine, versions()))


def versions() -> str:
    """The peers that are installed."""
    return "; ".join(f"{name} {found}" for name in PACKAGES if (found := _version(name))) + "."


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


if __name__ == "__main__":
    main()
