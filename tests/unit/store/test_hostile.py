"""A store that somebody has tampered with: a sentence, before anything is allocated, followed or overwritten."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zlib

import pytest
import torch

import partials as pt
from partials.distribute import job as jobs
from partials.distribute.ranks import Place
from partials.store import journal
from partials.store.data import of_arrays
from partials.store.verify import verify
from tests.unit.store.conftest import SRC
from tests.unit.store.making import job, made


@pytest.fixture
def store(tmp_path):
    return made(tmp_path / "store")[0].path


def edited(path, change):
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def attributes(**new):
    return lambda store: edited(store / "jacobian/zarr.json", lambda record: record["attributes"].update(new))


def shape(name, **new):
    def change(store):
        edited(store / name / "zarr.json", lambda record: record.update(new))

    return change


def config(**new):
    return lambda store: edited(store / "run.json", lambda record: record.update(new))


def text(name, words):
    return lambda store: (store / name).write_text(words)


COLUMNS = {"0.weight": {"offset": 0, "shape": [4, 3]}, "rest": {"offset": 12, "shape": [14]}}
OVERLAPPING = {**COLUMNS, "rest": {"offset": 11, "shape": [14]}}
TAMPERED = {
    "a huge shape": shape("jacobian", shape=[10, 2**30, 2**30]),
    "a negative shape": shape("values", shape=[-10, 2]),
    "another width": shape("values", shape=[10, 3]),
    "a true shape": shape("values", shape=[True, 2]),
    "overlapping columns": attributes(columns=OVERLAPPING),
    "a negative offset": attributes(columns={**COLUMNS, "0.weight": {"offset": -1, "shape": [4, 3]}}),
    "a negative column": attributes(columns={**COLUMNS, "0.weight": {"offset": 0, "shape": [-4, -3]}}),
    "columns of another width": attributes(columns={**COLUMNS, "more": {"offset": 26, "shape": [2**40]}}),
    "columns that are a list": attributes(columns=["0.weight"]),
    "an alias of nothing": attributes(aliases={"a": "nowhere"}),
    "another quantity": attributes(what="norms"),
    "a quantity of its own": attributes(what="__import__('os')"),
    "another output": attributes(out=[2**62, 4]),
    "an output that is no list": attributes(out="2"),
    "no arrays": config(arrays=[]),
    "arrays elsewhere": config(arrays=["../store/jacobian", "values"]),
    "an array that is a number": config(arrays=[1]),
    "no quantity among the arrays": config(arrays=["values"]),
    "another version": config(version=99),
    "a list": text("run.json", "[]"),
    "NaN": text("run.json", '{"version": 1, "fingerprint": {}, "arrays": ["jacobian", "values"], "config": {"x": NaN}}'),
    "infinity": text("values/zarr.json", '{"shape": [Infinity, 2]}'),
    "deep nesting": text("run.json", "[" * 100_000),
    "deep nesting of metadata": text("values/zarr.json", '{"a":' * 100_000),
    "deep nesting of a journal": text("journal/worker-0-of-1.jsonl", "[" * 100_000 + "\n"),
    "a number beyond all bounds": text("values/zarr.json", '{"shape": [1e999]}'),
    "no text": lambda store: (store / "run.json").write_bytes(b"\xff\xfe\x00"),
    "metadata that are no text": lambda store: (store / "values/zarr.json").write_bytes(b"\xff\xfe\x00"),
    "a giant text": lambda store: os.truncate(store / "run.json", 2**30),
    "a journal without an end": text("journal/worker-0-of-1.jsonl", "x" * (2**20 + 5)),
    "a journal that is a device": lambda store: (store / "journal/x.jsonl").symlink_to("/dev/zero"),
    "arrays that are a link": lambda store: linked(store / "values"),
    "shards that are a link": lambda store: linked(store / "jacobian" / "c"),
}


def linked(folder):
    """The folder moved away, and a link to it in its place."""
    moved = folder.parent.parent / f"moved-{folder.name}"
    shutil.move(folder, moved)
    folder.symlink_to(moved)


@pytest.mark.parametrize("how", TAMPERED)
def test_what_a_store_says_is_checked_before_it_is_believed(store, how):
    TAMPERED[how](store)
    for use in (pt.open, verify, lambda path: jobs.local(job(path), Place(), resume=True)):
        with pytest.raises(pt.StoreError):
            use(store)


def lines_of(store):
    (path,) = (store / "journal").glob("*.jsonl")
    return path, [json.loads(line)["entry"] for line in path.read_text().splitlines()]


def written(path, entries):
    dumped = [json.dumps(entry, sort_keys=True, separators=(",", ":")) for entry in entries]
    path.write_text("".join(f'{{"crc32": {zlib.crc32(text.encode())}, "entry": {text}}}\n' for text in dumped))


JOURNALS = {
    "files elsewhere": {"files": {"../../etc/passwd": [1, "crc32c", 0], "values/c/1/0": [1, "crc32c", 0]}},
    "files of another block": {"files": {"jacobian/c/0/0/0": [1, "crc32c", 0], "values/c/0/0": [1, "crc32c", 0]}},
    "no files": {"files": {}},
    "a block that is not there": {"block": 2**40},
    "a negative block": {"block": -1},
    "an infinite block": {"block": float("inf")},
    "other rows": {"rows": [0, 10]},
    "backward rows": {"rows": [8, 4]},
    "three rows": {"rows": [4, 8, 9]},
    "a list of files": {"files": ["values/c/1/0"]},
    "words about itself": {"info": "all well"},
    "a number as its name": {"id": 7},
}


@pytest.mark.parametrize("how", JOURNALS)
def test_what_a_journal_says_is_checked(store, files, how):
    before = files(store)
    path, entries = lines_of(store)
    entries[1].update(JOURNALS[how])
    written(path, entries)
    for use in (pt.open, verify, lambda path: jobs.local(job(path), Place(), resume=True)):
        with pytest.raises(pt.StoreError):
            use(store)
    assert files(store) == before


def test_a_line_twice(store):
    path, entries = lines_of(store)
    written(path, [*entries, entries[0]])
    with pytest.raises(pt.StoreError, match=r"committed twice(.|\n)*remove one of the two lines"):
        pt.open(store)


@pytest.mark.parametrize("key", ["jacobian/c/1/0/0", "jacobian/c/1"])
def test_shards_that_are_links_are_not_followed(store, tmp_path, key):
    target = tmp_path / "elsewhere"
    shutil.move(store / key, target)
    (store / key).symlink_to(target)
    with pytest.raises(pt.StoreError, match="a link"):
        pt.open(store)[4]
    with pytest.raises(pt.StoreError, match="a link"):
        verify(store)
    with pytest.raises(pt.StoreError, match="a link"):
        jobs.local(job(store), Place(), resume=True)


def test_a_claim_of_many_rows_takes_no_memory(store):
    """A store may have rows that are missing; as many as it likes to claim are not made up in memory."""
    many = 2**40
    for name in ("jacobian", "values"):
        edited(store / name / "zarr.json", lambda record: record["shape"].__setitem__(0, many))
    path, entries = lines_of(store)
    written(path, entries[:2])  # (the last block was short)
    found = pt.open(store)
    assert len(found) == many and found.missing == [(8, many)] and "missing" in repr(found)
    assert found[5].isfinite().all() and found[-1].isnan().all() and found[4:8].isfinite().all()
    for rows in (found.dense, lambda: found["0.weight"], lambda: found[:], lambda: found.values):
        with pytest.raises(pt.MemoryBudgetError, match="do not fit"):
            rows()


QUIET = """
import sys
import torch, partials as pt
from partials.store.verify import verify
def refused(*args, **kwargs):
    raise SystemExit("pickle was asked")
import pickle
pickle.load = pickle.loads = pickle.Unpickler = torch.load = refused
before = set(sys.modules)
store = pt.open(sys.argv[1])
store[0], store.norms(), store.gram(), store.values, verify(sys.argv[1])
print(sorted(name for name in set(sys.modules) - before if not name.startswith(("partials", "google_crc32c", "numpy", "torch"))))
"""


def test_opening_a_store_imports_and_unpickles_nothing(store):
    edited(store / "run.json", lambda record: record["config"].update(model="evil.py:net", loss="evil:loss", data=["evil.py:x"]))
    (store.parent / "evil.py").write_text("raise SystemExit('imported')")
    done = subprocess.run(
        [sys.executable, "-c", QUIET, store], cwd=store.parent, env={**os.environ, "PYTHONPATH": str(SRC)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "evil" not in done.stdout


def test_no_pickle_in_what_reads_stores_and_weights():
    for place in ("store", "distribute", "cli"):
        for path in (SRC / "partials" / place).rglob("*.py"):
            words = path.read_text()
            assert "import pickle" not in words and "torch.load(" not in words and "allow_pickle=True" not in words, path


@pytest.mark.parametrize("name", ["../up", "/root", "a/b", "x\0y", "ü", "..", "n" * 5000, "", "\ud800", "\x1b[31mred"])
def test_names_of_parameters_are_only_words(tmp_path, name):
    theta = {name: torch.randn(3, 2, dtype=torch.float64, requires_grad=True)}
    x = torch.randn(10, 3, dtype=torch.float64)

    def rows(inputs):
        return pt.jacobian(lambda x: x @ theta[name], *inputs[0], params=theta)

    one = jobs.job(tmp_path / "store", "jacobian", rows, of_arrays([x], {}), theta, {}, {}, block=4)
    jobs.local(one, Place(), resume=False)
    store = pt.open(tmp_path / "store")
    assert store.names == (name,) and torch.allclose(store[name], rows(((x,), {})).dict()[name]) and verify(store.path).passed
    assert [p.name for p in tmp_path.iterdir()] == ["store"]
    assert {p.name for p in store.path.rglob("*")} <= {*"01234", "c", *SPELLED}


SPELLED = ("jacobian", "values", "journal", "locks", "zarr.json", "run.json", "gate", "world-1", "worker-0-of-1", "worker-0-of-1.jsonl")


def test_names_of_workers_are_escaped(store):
    record = journal.Journal(store, "../../up\0")
    assert record.path.parent == store / "journal"
