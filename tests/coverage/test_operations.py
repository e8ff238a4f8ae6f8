"""Every operation of torch's database that takes a parameter: exact, or refused, none wrong. By default a share, all if slow."""

from __future__ import annotations

import zlib
from dataclasses import replace
from pathlib import Path

import pytest

from tests.coverage import operations
from tests.coverage.judge import EXACT, judge

KNOWN = Path(__file__).with_name("operations.txt").read_text().split()
"""The names in the database when this was last looked at."""
SHARE = {name for name in KNOWN if zlib.crc32(name.encode()) % 4 == 0} | {
    *("einsum", "tensordot", "inner", "outer", "addmv", "matmul", "linalg.multi_dot", "index_select", "__getitem__"),
    *("nn.functional.linear", "nn.functional.bilinear", "nn.functional.embedding", "nn.functional.embedding_bag"),
    *(f"nn.functional.conv{kind}{d}d" for kind in ("", "_transpose") for d in (1, 2, 3)),
}
"""The operations of the default run."""
CASES = 4
"""Cases of each in the default run; in the whole run, `MANY` of them, always the same ones."""
MANY = 60

REFUSED = {
    "nn.functional.embedding_bag": (
        "InputError: embedding",
        "max_norm writes to the weight, and counts over the batch are no derivative of one sample",
    ),
}
"""The refusals of functions that treat samples apart, with the reason why each is right."""
LOOSE = {
    "native_batch_norm": 1e-9,
    "_native_batch_norm_legit": 1e-9,
    "nn.functional.layer_norm": 1e-9,
    "native_layer_norm": 1e-9,
}
"""Where x - mean(x) of one number is normalised, all digits cancel: the reference is no better than this."""

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own, about its database


@pytest.fixture(scope="module")
def database():
    """The operations by name. Private to torch: skipped where it cannot be imported."""
    pytest.importorskip("expecttest", reason="torch's database of operations needs expecttest")
    try:
        return {operations.name_of(op): op for op in operations.database()}
    except ImportError as error:
        pytest.skip(f"this torch has no database of operations where it was ({error})")


def test_the_database_has_not_shrunk(database):
    assert set(KNOWN) <= set(database)


def faults(op, count):
    """What is wrong among `count` cases of an operation, how many of them had samples, and how those were done."""
    found, ran, hows = [], 0, set()
    samples = operations.samples(op)
    cases = sorted(operations.cases(op, len(samples)), key=lambda case: zlib.crc32(str(case).encode()))
    for case in cases[: 12 * count]:
        call = operations.made(op, samples[case.index], case) if ran < count else None
        apart = None if call is None else operations.runs(call)
        if apart is None:
            continue
        ran += 1
        if apart:
            verdict = judge(call, check="never")
            hows.add(verdict.how)
            says, _ = REFUSED.get(case.operation, ("", ""))
            if verdict.how == "refused" and not (says and verdict.refusal.startswith(says)):
                found.append(f"{case}: a refusal that is not in the list: {verdict.refusal}")
            if verdict.how != "refused" and not verdict.error <= LOOSE.get(case.operation, EXACT):
                found.append(f"{case}: WRONG by {verdict.error:.1e}, by {verdict.how}")
        else:  # what a sample gives depends on the others, or on its place: refused, or the derivative of the batch as it is
            verdict = judge(call)
            if verdict.how != "refused" and not judge(replace(call, whole=True)).error <= EXACT:
                found.append(f"{case}: mixes samples and is not refused, by {verdict.how}")
    return found, ran, hows


@pytest.mark.parametrize("name", sorted(SHARE))
def test_a_share_of_the_operation_is_exact(database, name):
    found, _, _ = faults(database[name], CASES)
    assert not found, "\n".join(found)


@pytest.mark.slow
@pytest.mark.parametrize("name", KNOWN)
def test_all_of_the_operation_is_exact(database, name):
    found, _, hows = faults(database[name], MANY)
    assert not found, "\n".join(found)
    assert name not in REFUSED or "refused" in hows, "a refusal that fell"


def test_most_operations_have_cases(database):
    """The four ways to ask reach what they are meant to reach."""
    names = sorted(SHARE)[::4]
    assert sum(faults(database[name], 1)[1] > 0 for name in names) >= 0.8 * len(names)
