"""A store is standard: zarr-python and tensorstore read what `partials` wrote, bit for bit; missing rows are NaN, never zero."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy
import pytest
import torch

import partials as pt
from partials.distribute.job import local
from partials.distribute.ranks import Place
from partials.store import checksum, journal
from partials.store.format import array, group, parsed
from partials.store.work import Work
from tests.unit.store.making import BLOCK, N, job, made

WHAT = ["jacobian", "norms", "gram", "sum", "diagonal"]
each_quantity = pytest.mark.parametrize("what", WHAT)


def by_zarr(store, name):
    zarr = pytest.importorskip("zarr")
    return zarr.open_group(str(store.path), mode="r")[name][:]


def by_tensorstore(store, name):
    ts = pytest.importorskip("tensorstore")
    return ts.open({"driver": "zarr3", "kvstore": {"driver": "file", "path": str(store.path / name)}}).result().read().result()


@each_quantity
@pytest.mark.parametrize("reader", [by_zarr, by_tensorstore])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_readers_read_every_array(tmp_path, what, reader, dtype):
    store, _ = made(tmp_path / "store", what, dtype=dtype)
    for name, a in store.arrays.items():
        ours = store._all(a).numpy()
        theirs = numpy.asarray(reader(store, name))
        assert theirs.dtype == ours.dtype
        assert numpy.array_equal(theirs, ours)
    if what in ("sum", "diagonal"):
        assert numpy.array_equal(numpy.asarray(reader(store, what)), store.result().numpy())


@each_quantity
def test_a_store_holds_what_was_asked(tmp_path, what):
    store, J = made(tmp_path / "store", what)
    expected = {"jacobian": J.dense, "norms": J.norms, "gram": J.gram, "sum": J.sum, "diagonal": J.diagonal}[what]()
    assert store.what == what
    assert store.complete
    assert torch.allclose(store.result(), expected, rtol=1e-12, atol=1e-14)
    assert torch.allclose(store.values, J.values)


def test_quantities_straight_from_disk(tmp_path):
    store, J = made(tmp_path / "store")
    P, close = J.shape[-1], {"rtol": 1e-12, "atol": 1e-14}
    v, u = torch.randn(P, 3, dtype=torch.float64), torch.randn(N, 2, 3, dtype=torch.float64)
    assert store.shape == J.shape and store.names == J.names and len(store) == N
    assert torch.allclose(store @ v, J @ v, **close)
    assert torch.allclose(store @ J.unflatten(v[:, 0]), J @ v[:, 0], **close)
    assert torch.allclose(store.T @ u, J.T @ u, **close)
    assert torch.allclose(store.T @ u[..., 0], J.T @ u[..., 0], **close)
    assert torch.allclose(store.norms(), J.norms(), **close)
    assert torch.allclose(store.gram(), J.gram(), **close)
    for name in J.names:
        assert torch.allclose(store[name], J[name], **close)
    rows = J.dense()
    for key in (3, -1, slice(2, 9, 3), [1, 1, 7], torch.tensor([0, 9])):
        assert torch.allclose(store[key], rows[key], **close)
    assert sum(len(part) for _, part in store.blocks()) == N


def test_missing_rows_are_nan_and_quantities_refused(tmp_path):
    one = job(tmp_path / "store")
    writer = one.writer(Place(), False)
    writer.write(1, one.rows(1), *one.work.compute(one.inputs(1)))
    writer.close()
    store = pt.open(tmp_path / "store")
    assert store.missing == [(0, BLOCK), (2 * BLOCK, N)]
    assert store[0].isnan().all() and not store[BLOCK].isnan().any()
    assert numpy.isnan(by_zarr(store, "jacobian")[:BLOCK]).all()
    for quantity in (store.norms, store.gram, store.result, lambda: store.T @ torch.ones(N, 2)):
        with pytest.raises(pt.StoreError, match="have not been computed"):
            quantity()


@pytest.mark.parametrize("data", [b"", b"123456789", bytes(range(256)) * 3])
def test_crc32c(data):
    assert checksum.plain_crc32c(b"123456789") == 0xE3069283  # RFC 3720's check value
    assert checksum.crc32c(data) == checksum.plain_crc32c(data)


@pytest.mark.parametrize(("rows", "block", "inner"), [(10, 4, 4), (10, 7, 7), (1, 1, 1)])
def test_metadata_is_read_back(rows, block, inner):
    a = array("jacobian", (rows, 2, 3), "float32", block, {"out": [2]})
    assert a.inner == inner and parsed("jacobian", a.metadata()) == a
    assert json.loads(group({"x": 1}))["node_type"] == "group"


def test_inner_chunks_divide_a_block_of_large_rows():
    a = array("jacobian", (12, 1, 500_000), "float32", 6)
    assert a.inner == 2 and a.shard_bytes(6) == 6 * 2_000_000 + 3 * 16 + 4
    assert a.shard_bytes(3) == 4 * 2_000_000 + 3 * 16 + 4  # the last inner chunk is filled up


@pytest.mark.parametrize(
    "change", [{"shape": [-1, 2, 3]}, {"shape": [2**62, 2**62, 3]}, {"data_type": "object"}, {"codecs": []}, {"shape": "x"}]
)
def test_metadata_of_another_form_is_refused(change):
    text = json.dumps(json.loads(array("jacobian", (10, 2, 3), "float32", 5).metadata()) | change)
    with pytest.raises(pt.StoreError, match="metadata of 'jacobian' cannot be read"):
        parsed("jacobian", text)


@pytest.mark.parametrize("name", ["../up", "/root", "a/b", "nul\0", "c:d", "ü", ""])
def test_names_are_escaped(name):
    assert journal.escaped(name).isascii() and not set("/\\\0.:") & set(journal.escaped(name)) and journal.escaped(name)


@pytest.mark.parametrize("what", ["jacobian", "norms", "sketch:5", "sketch:6:kronecker", "sum", "diagonal"])
def test_a_block_is_computed_a_part_at_a_time(tmp_path, monkeypatch, what):
    monkeypatch.setattr("partials.store.work.BLOCK_BYTES", 1)
    monkeypatch.setattr("partials.store.work.TOGETHER", 3)
    seen = []
    one = job(tmp_path / "store", what, block=7)
    inner = one.work.jacobian
    one.work = replace(one.work, jacobian=lambda inputs: (seen.append(len(inputs[0][0])), inner(inputs))[1])
    local(one, Place(), resume=False)
    assert seen == [3, 3, 1, 3]
    found, (_, J) = pt.open(tmp_path / "store"), made(tmp_path / "whole", what)
    sketches = {"sketch:5": lambda: J.sketch(5), "sketch:6:kronecker": lambda: J.sketch(6, "kronecker")}
    expected = {"sum": J.sum, "diagonal": J.diagonal, "norms": J.norms, "jacobian": J.dense, **sketches}[what]()
    assert torch.allclose(found.result() if what in ("sum", "diagonal") else found[:], expected, rtol=1e-12, atol=1e-14)


def test_blocks_are_many_for_many_workers_and_of_reductions_few():
    J = pt.jacobian(torch.nn.Linear(50, 1), torch.randn(1, 50))

    def rows(what, samples, most=None):
        return Work(what, lambda _: J).block_rows(J, samples, 5000, most)

    assert rows("norms", 10**9) == -(-(10**9) // 4096) and rows("norms", 10**6) == 5000 and rows("norms", 10) == 10
    assert rows("sum", 10**9) == -(-(10**9) // 256) and rows("sum", 10**6) == 5000
    assert rows("jacobian", 10**6) == 5000 and rows("jacobian", 10**6, 51 * 4 * 100) == 100
