"""What can go wrong on a disk: each is found, answered with a sentence, and nothing is overwritten."""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest
import torch

import partials as pt
from partials.distribute import job as jobs
from partials.distribute.ranks import Place
from partials.store.verify import forget, verify
from tests.unit.store.making import N, job, made, problem


@pytest.fixture
def store(tmp_path):
    return made(tmp_path / "store")[0]


def resumed(path, **options):
    one = job(path, **options)
    jobs.local(one, Place(), resume=True)
    return one


SHARD = "jacobian/c/1/0/0"


def truncate(path):
    os.truncate(path / SHARD, 100)


def delete(path):
    (path / SHARD).unlink()


def flip(path):
    raw = bytearray((path / SHARD).read_bytes())
    raw[40] ^= 1
    (path / SHARD).write_bytes(raw)


@pytest.mark.parametrize("damage", [truncate, delete])
def test_a_shard_of_another_size_is_found_by_everybody(store, files, damage):
    damage(store.path)
    before = files(store.path)
    with pytest.raises(pt.StoreError, match=r"block 1 .* is damaged: jacobian/c/1/0/0"):
        resumed(store.path)
    with pytest.raises(pt.StoreError, match="damaged"):
        pt.open(store.path)[4]
    assert not verify(store.path).passed
    assert files(store.path) == before


def test_a_flipped_bit_is_found_by_verify(store):
    assert verify(store.path).passed
    flip(store.path)
    found = verify(store.path)
    assert [finding.block for finding in found.findings] == [1]
    assert "has another checksum" in str(found)


@pytest.mark.parametrize("damage", [truncate, delete, flip])
def test_damaged_blocks_are_computed_again_when_told_to(store, files, damage):
    before = files(store.path)
    damage(store.path)
    assert forget(verify(store.path)) == 1
    assert pt.open(store.path).missing == [(4, 8)]
    resumed(store.path)
    assert files(store.path) == before
    assert verify(store.path).passed


def test_a_torn_line_is_an_uncommitted_block(store, files):
    before = files(store.path)
    (path,) = (store.path / "journal").glob("*.jsonl")
    path.write_bytes(path.read_bytes()[:-20])
    torn = pt.open(store.path)
    assert torn.missing == [(8, N)] and "torn line" in torn.remarks[0]
    resumed(store.path)
    assert files(store.path) == before
    assert pt.open(store.path).complete


def test_a_damaged_line_in_the_middle_is_an_error(store):
    (path,) = (store.path / "journal").glob("*.jsonl")
    path.write_bytes(path.read_bytes().replace(b'"rows":[0', b'"rows":[1', 1))
    with pytest.raises(pt.StoreError, match=r"line 1 of journal/.* is damaged"):
        pt.open(store.path)


def test_a_block_that_is_committed_twice_is_an_error(store):
    (path,) = (store.path / "journal").glob("*.jsonl")
    shutil.copy(path, path.with_name("worker-1-of-2.jsonl"))
    with pytest.raises(pt.StoreError, match="committed twice"):
        pt.open(store.path)


def test_a_full_disk(tmp_path, files):
    one = job(tmp_path / "store")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, hard))
    try:
        with pytest.raises(pt.StoreError, match="cannot be written: the file is larger than this process may write"):
            jobs.local(one, Place(), resume=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not files(tmp_path / "store") or all("partial" not in name for name in files(tmp_path / "store"))
    jobs.local(one, Place(), resume=True)
    assert pt.open(tmp_path / "store").complete


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_read_only_folder(tmp_path):
    """Root may write anywhere, so a child process becomes somebody else first, in a folder that everybody may enter."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder = Path(name)
        folder.chmod(0o555)
        one = job(folder / "store")
        child = os.fork()
        if child == 0:  # (only system calls and plain Python here: torch's threads are not in this process)
            code = 3
            with suppress(BaseException):
                if os.geteuid() == 0:
                    os.setuid(65534)
                try:
                    one.writer(Place(), False)
                except pt.StoreError as error:
                    code = 0 if "the folder may not be written to" in str(error) else 2
            os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        folder.chmod(0o755)


def test_two_runs_into_one_store(tmp_path):
    one = job(tmp_path / "store")
    writer = one.writer(Place(), False)
    for place in (Place(), Place(0, 2), Place(1, 3)):
        with pytest.raises(pt.StoreError, match="another run is writing"):
            one.writer(place, True)
    writer.close()
    both = [one.writer(Place(rank, 2), True) for rank in (0, 1)]
    with pytest.raises(pt.StoreError, match="another run is writing"):
        one.writer(Place(1, 2), True)
    with pytest.raises(pt.StoreError, match="another run is writing"):
        one.writer(Place(), True)
    for writer in both:
        writer.close()
    one.writer(Place(), True).close()


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"model": problem(seed=1)[0]}, "parameters"),
        ({"x": problem(seed=1)[1]}, "data"),
        ({"x": problem()[1][:9]}, "data, samples"),
        ({"block": 5}, "block size"),
        ({"what": "norms"}, "what"),
    ],
)
def test_the_store_of_another_run(store, files, options, word):
    before = files(store.path)
    with pytest.raises(pt.StoreError, match=f"belongs to another run: its {word} differ"):
        resumed(store.path, **options)
    assert files(store.path) == before


def test_a_new_run_into_an_old_store(store):
    with pytest.raises(pt.StoreError, match="holds a store already"):
        jobs.local(job(store.path), Place(), resume=False)


def test_a_folder_of_somebody_else(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(pt.StoreError, match="is not empty and no store"):
        jobs.local(job(tmp_path), Place(), resume=True)


@pytest.mark.parametrize("name", ["zarr.json", "run.json", "jacobian/zarr.json"])
def test_metadata_that_is_gone_or_a_link_or_huge(store, name, tmp_path):
    text = (store.path / name).read_text()
    (store.path / name).unlink()
    with pytest.raises(pt.StoreError):
        pt.open(store.path)
    (tmp_path / "elsewhere").write_text(text)
    (store.path / name).symlink_to(tmp_path / "elsewhere")
    if name != "zarr.json":
        with pytest.raises(pt.StoreError, match="a link"):
            pt.open(store.path)
        (store.path / name).unlink()
        with (store.path / name).open("w") as file:
            file.truncate(2**27)
        with pytest.raises(pt.StoreError, match="is too large"):
            pt.open(store.path)


def test_a_run_that_died_while_it_made_the_store(store, tmp_path):
    (store.path / "zarr.json").unlink()
    shutil.rmtree(store.path / "journal")
    resumed(store.path)
    assert pt.open(store.path).complete


def test_recomputed_rows_are_compared(tmp_path):
    one = job(tmp_path / "store")
    jobs.local(one, Place(), resume=False)
    assert all(error <= tolerance for _, error, tolerance in jobs.recompute(one, N))
    other = job(tmp_path / "store", model=problem(seed=1)[0])
    assert all(error > 1e-3 for _, error, _ in jobs.recompute(other, 3))


def test_rows_with_nan_are_counted_and_kept(tmp_path):
    x = problem()[1].clone()
    x[5] = torch.nan
    one = job(tmp_path / "store", x=x)
    done = jobs.local(one, Place(), resume=False)
    store = pt.open(tmp_path / "store")
    assert done.nonfinite == 1 and store.complete and store[5].isnan().any() and not store[4].isnan().any()


@pytest.mark.parametrize("what", ["jacobian", "sum"])
def test_ranks_give_what_one_worker_gives(tmp_path, files, what):
    """Worker 1 of 2 never came; a run of three workers, in another order, does what is missing."""
    jobs.local(job(tmp_path / "one", what), Place(), resume=False)
    several = job(tmp_path / "several", what)
    jobs.local(several, Place(0, 2), resume=True)
    assert not pt.open(tmp_path / "several").complete
    for rank in (2, 0, 1):
        jobs.local(several, Place(rank, 3), resume=True)
    assert files(tmp_path / "several") == files(tmp_path / "one")
    assert pt.open(tmp_path / "several").result().equal(pt.open(tmp_path / "one").result())
