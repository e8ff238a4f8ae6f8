"""Writes docs/coverage.md from the whole run (some minutes): python -m tests.coverage.page"""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil, log10
from pathlib import Path

from tests.coverage.refusals import REASONS
from tests.coverage.survey import Line, lines

PAGE = Path(__file__).parents[2] / "docs" / "coverage.md"
HEAD = """# Which modules of PyTorch are exact

Every module in torch's own database of modules (`torch.testing._internal.common_modules.module_db`, torch {torch}), with all its inputs,
in evaluation and in training, with inputs that require grad and that do not, in a batch and, where the module takes one, as a single
sample without a batch dimension; below, what that database lacks. *Exact* means that the largest error of J, norms and Gram against a
loop over batches of one is at most 1e-11 of the row's norm in float64. Each case is exact, or refused for a reason below.

*how*: `rule` (in factors), `expansion` (the parameter repeated for each sample), or the name of another method, where some input of
the module needs it. *worst*: the largest error seen, rounded up to a power of ten. This page is made by `python -m tests.coverage.page`
and compared with the run by the tests.

"""

NO_CASES = (
    "nn.CTCLoss with the targets of all samples one after the other in one vector: no dimension of it holds samples, so that it is refused"
    " as an input with samples (a number of them that the other inputs do not have), and exact where it is shared, `in_dims={...: None}`",
)
"""Inputs of the database that cannot be cut into samples; each has a test of its own."""


def written(found: Iterable[Line], version: str) -> str:
    found = list(found)
    with_parameters = [line for line in found if line.parameters]
    ruled = sum(line.by_rules for line in with_parameters)
    text = HEAD.format(torch=version)
    text += (
        f"Of {len(with_parameters)} modules with parameters, {ruled} are done by rules alone ({100 * ruled // len(with_parameters)} %); "
    )
    text += f"{sum(line.cases for line in found)} cases in all.\n\n## Modules with parameters\n\n" + table(with_parameters)
    text += "\n## Modules without parameters\n\nRun behind a learnt scale of their input; losses by `pt.gradient(loss=)`.\n\n"
    text += table([line for line in found if not line.parameters])
    text += "\n## What is refused\n\n" + "".join(f"- {reason.why}.\n" for reason in REASONS)
    return text + "\n## What is no case of the run\n\n" + "".join(f"- {words}.\n" for words in NO_CASES)


def table(found: list[Line]) -> str:
    rows = ["| module | how | worst | refused |", "| --- | --- | --- | --- |"]
    rows += [f"| {line.module} | {line.said()} | {bound(line.worst)} | {'; '.join(sorted(line.refused))} |" for line in found]
    return "\n".join(rows) + "\n"


def bound(error: float) -> str:
    """The least power of ten that is not below the error."""
    return "0" if error == 0 else f"1e{ceil(log10(error))}"


def read() -> dict[str, tuple[str, float]]:
    """{module: (how, worst)} of the page as it stands."""
    rows = [line.split("|") for line in PAGE.read_text().splitlines() if line.startswith("| ") and not line.startswith("| -")]
    return {row[1].strip(): (row[2].strip(), float(row[3])) for row in rows if row[1].strip() != "module"}


if __name__ == "__main__":
    import torch

    every = []
    for line in lines(whole=True):
        every.append(line)
        print(
            f"{line.module}: {line.cases} cases, {line.said()}, {line.worst:.1e}, {len(line.alarms)} alarms", *line.faults[:5], sep="\n    "
        )
    if not any(line.faults for line in every):
        PAGE.write_text(written(every, torch.__version__.partition("+")[0]))
