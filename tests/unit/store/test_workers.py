"""Several workers, clocks that differ, disks that fill up: one store, each block once, or a sentence."""

from __future__ import annotations

import json
import os
import resource
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch

import partials as pt
from partials.distribute import job as jobs
from partials.distribute.ranks import Place
from partials.store import durable, journal
from partials.store.lock import Locks
from partials.store.produce import Progress, Stopped, finish, produce
from partials.store.verify import forget, verify
from tests.unit.store.making import BLOCK, N, job, made, problem

SHARD = "jacobian/c/1/0/0"


def together(*calls):
    """All of them at once: what each returned or raised."""
    gate, found = threading.Barrier(len(calls)), [None] * len(calls)

    def one(i, call):
        gate.wait()
        try:
            found[i] = call()
        except pt.PartialsError as error:
            found[i] = error

    threads = [threading.Thread(target=one, args=pair) for pair in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("attempt", range(5))
def test_two_workers_make_one_store_at_once(tmp_path, files, attempt):
    both = [job(tmp_path / "store") for _ in range(2)]  # made here: threads that draw from torch's one generator would draw other weights
    writers = together(*[lambda rank=rank: both[rank].writer(Place(rank, 2), True) for rank in (0, 1)])
    for writer in writers:
        assert not isinstance(writer, Exception), writer
        writer.close()
    ended = together(*[lambda rank=rank: jobs.local(both[rank], Place(rank, 2), resume=True) for rank in (0, 1)])
    assert not [error for error in ended if isinstance(error, Exception)]
    jobs.local(job(tmp_path / "whole"), Place(), resume=False)
    assert files(tmp_path / "store") == files(tmp_path / "whole")


@pytest.mark.parametrize("attempt", range(5))
def test_two_workers_of_different_models_never_share_a_store(tmp_path, attempt):
    """A model whose weights are drawn without a seed is another in every process."""
    both = [job(tmp_path / "store", model=problem(seed=seed)[0]) for seed in (0, 1)]
    found = together(*[lambda rank=rank: both[rank].writer(Place(rank, 2), True) for rank in (0, 1)])
    refused = [error for error in found if isinstance(error, Exception)]
    assert len(refused) == 1 and "belongs to another run: its parameters differ" in str(refused[0])


@pytest.mark.parametrize("attempt", range(5))
def test_two_worlds_never_write_at_once(tmp_path, attempt):
    one = job(tmp_path / "store")
    one.writer(Place(), False).close()
    found = together(*[lambda world=world: one.writer(Place(0, world), True) for world in (2, 3, 4)])
    assert sum(not isinstance(writer, Exception) for writer in found) == 1
    assert all("another run is writing" in str(error) for error in found if isinstance(error, Exception))


def test_a_run_of_another_size_while_one_goes_on(tmp_path):
    one = job(tmp_path / "store")
    writer = one.writer(Place(1, 2), True)
    with pytest.raises(pt.StoreError, match="held by a run of 2 workers"):
        jobs.local(one, Place(0, 3), resume=True)
    with pytest.raises(pt.StoreError, match="another run is writing"):
        forget(replace(verify(one.path), findings=[]))
    writer.close()


def test_two_workers_put_a_result_together_at_once(tmp_path):
    store, _ = made(tmp_path / "store", "sum")
    one = job(tmp_path / "store", "sum")
    for _ in range(5):
        writers = [one.writer(Place(rank, 2), True) for rank in (0, 1)]
        assert together(*[lambda writer=writer: finish(writer) for writer in writers]) == [None, None]
        for writer in writers:
            writer.close()
        assert verify(store.path).passed


def test_a_gate_that_is_held_is_not_waited_for_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr("partials.store.lock.PATIENCE", 0.05)
    locks = Locks(tmp_path, 0, 2)
    with locks.alone(), pytest.raises(pt.StoreError, match="held by somebody"):
        Locks(tmp_path, 1, 2)
    locks.release()


def test_file_systems_without_locks(tmp_path, monkeypatch):
    import errno
    import fcntl

    def no_locks(*_):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    writer = job(tmp_path / "store").writer(Place(), False)
    assert writer.remarks == ["this file system has no locks: runs into one store are not kept apart here"]
    writer.close()


@pytest.mark.parametrize("clock", [lambda: 0.0, lambda: -1e9, lambda: 1e12])
def test_clocks_do_not_decide_which_line_counts(tmp_path, files, monkeypatch, clock):
    """A block is committed, forgotten and committed again by workers whose clocks tell another order."""
    store, _ = made(tmp_path / "store")
    before = files(store.path)
    for _ in range(2):
        (store.path / SHARD).write_bytes(b"")
        assert forget(verify(store.path)) == 1
        with monkeypatch.context() as patch:
            patch.setattr(time, "time", clock)
            jobs.local(job(store.path), Place(1, 3), resume=True)
        assert pt.open(store.path).complete and verify(store.path).passed
    assert files(store.path) == before


def test_lines_do_not_depend_on_the_host(tmp_path, monkeypatch, files):
    monkeypatch.setattr(os, "uname", lambda: (_ for _ in ()).throw(OSError))
    monkeypatch.setattr("socket.gethostname", lambda: "../..\0/host")
    made(tmp_path / "store")
    assert pt.open(tmp_path / "store").complete


def limited(bytes_):
    """Files may have so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_, hard))
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_in_the_journal(tmp_path, files):
    """Lines of the journal add up to more than a small shard: what was begun of a line is taken off again."""
    one = job(tmp_path / "store", "norms", block=1)
    one.writer(Place(), False).close()
    free = limited(2000)
    try:
        with pytest.raises(pt.StoreError, match=r"journal/worker-0-of-1.jsonl cannot be written: the file is larger"):
            jobs.local(one, Place(), resume=True)
    finally:
        free()
    found = pt.open(one.path)
    assert 0 < len(found.entries) < N and not found.remarks
    jobs.local(one, Place(), resume=True)
    assert pt.open(one.path).complete and verify(one.path).passed
    assert not list(one.path.rglob("*.partial"))


@pytest.mark.parametrize("place", ["jacobian/c/2/0/0", "values/c/2/0", "journal/worker-0-of-1.jsonl"])
def test_a_full_disk_in_the_middle(tmp_path, files, monkeypatch, place):
    import errno

    write, full = os.write, [True]

    def out_of_space(descriptor, data):
        if full[0] and place in os.readlink(f"/proc/self/fd/{descriptor}") and len(pt.open(tmp_path / "store").entries) == 2:
            write(descriptor, bytes(data)[:7])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", out_of_space)
    with pytest.raises(pt.StoreError, match="the disk is full"):
        jobs.local(job(tmp_path / "store"), Place(), resume=False)
    assert len(pt.open(tmp_path / "store").entries) == 2 and verify(tmp_path / "store").passed
    full[0] = False
    jobs.local(job(tmp_path / "store"), Place(), resume=True)
    jobs.local(job(tmp_path / "whole"), Place(), resume=False)
    assert files(tmp_path / "store") == files(tmp_path / "whole")


def test_a_full_disk_in_the_final_reduction(tmp_path, monkeypatch):
    import errno

    write, full = os.write, [True]

    def out_of_space(descriptor, data):
        if full[0] and "/sum/" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", out_of_space)
    with pytest.raises(pt.StoreError, match="the disk is full"):
        jobs.local(job(tmp_path / "store", "sum"), Place(), resume=False)
    assert pt.open(tmp_path / "store").complete and not (tmp_path / "store/sum/zarr.json").exists()
    full[0] = False
    jobs.local(job(tmp_path / "store", "sum"), Place(), resume=True)
    assert verify(tmp_path / "store").passed and (tmp_path / "store/sum/zarr.json").exists()


def test_a_result_that_is_not_the_sum_of_its_parts(tmp_path):
    store, _ = made(tmp_path / "store", "sum")
    shard = next((store.path / "sum/c").rglob("0"))
    shard = shard if shard.is_file() else shard / "0"
    raw = bytearray(shard.read_bytes())
    raw[3] ^= 1
    shard.write_bytes(raw)
    found = verify(store.path)
    assert "not the sum of its parts" in str(found) and not found.passed
    jobs.local(job(store.path, "sum"), Place(), resume=True)
    assert verify(store.path).passed


def left_aside(one, block=1):
    """What a process leaves that is killed while it writes a block."""
    left = one.path / f"jacobian/c/{block}/0/0.0123456789ab.partial"
    left.parent.mkdir(parents=True, exist_ok=True)
    left.write_bytes(b"half")
    return left


def test_what_killed_processes_left_aside_goes_when_a_run_begins(tmp_path):
    one = job(tmp_path / "store")
    one.writer(Place(), False).close()
    left, kept = left_aside(one), one.path / "mine.partial"
    kept.write_bytes(b"somebody's")
    assert "was left by a run" in str(verify(one.path))
    one.writer(Place(), True).close()
    assert not left.exists() and kept.exists()


def test_what_a_worker_beside_writes_aside_stays_until_all_is_committed(tmp_path):
    """A worker that comes later, or again, removes nothing while another is at work; the last to end does."""
    one = job(tmp_path / "store")
    first = one.writer(Place(0, 2), False)
    left = left_aside(one)
    jobs.local(one, Place(1, 2), resume=True)
    assert left.exists()
    first.close()
    jobs.local(one, Place(0, 2), resume=True)
    assert not left.exists() and verify(one.path).remarks == []


def test_nothing_is_removed_where_no_locks_tell_who_is_at_work(tmp_path, monkeypatch):
    import errno
    import fcntl

    def none(descriptor, how):
        raise OSError(errno.ENOLCK, "No locks available")

    one = job(tmp_path / "store")
    one.writer(Place(), False).close()
    left = left_aside(one)
    monkeypatch.setattr(fcntl, "flock", none)
    jobs.local(one, Place(), resume=True)
    assert left.exists() and "was left by a run" in str(verify(one.path))


def test_a_writer_that_has_been_given_up_changes_nothing(tmp_path, files):
    """As where a cluster thinks a worker dead that is not: what it wrote aside goes with the end of the run, and it is told so."""
    one = job(tmp_path / "store")

    def pieces():
        yield b"of a worker "
        jobs.local(one, Place(), resume=False)
        yield b"that was given up"

    place = one.path / "jacobian/c/1/0/0"
    with pytest.raises(pt.StoreError, match="what was written aside is gone"):
        durable.write(place, pieces())
    assert verify(one.path).passed and not verify(one.path).remarks


def test_every_new_folder_is_synced(tmp_path, monkeypatch):
    """After a power cut the names on the way to a shard are there: of each new folder, the one above it is synced."""
    synced = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd))[1])
    durable.write(tmp_path / "a/b/c/d", [b"x"])
    assert {str(tmp_path / p) for p in ("", "a", "a/b", "a/b/c")} <= set(synced) and any(p.endswith(".partial") for p in synced)


def test_a_function_of_other_code_is_found_before_it_goes_on(tmp_path, files):
    """The parameters are the same, so the fingerprint is: what is computed is not."""
    model = problem()[0]
    other = torch.nn.Sequential(model[0], torch.nn.ReLU(), model[2])
    writer = job(tmp_path / "store").writer(Place(), False)
    one = job(tmp_path / "store")
    writer.write(0, one.rows(0), *one.work.compute(one.inputs(0)))
    writer.close()
    before = files(tmp_path / "store")
    with pytest.raises(pt.StoreError, match="belongs to another function: sample 0 has other values"):
        jobs.local(job(tmp_path / "store", model=other), Place(), resume=True)
    assert files(tmp_path / "store") == before
    jobs.local(one, Place(), resume=True)


def test_a_stop_in_the_middle_of_a_block_drops_it(tmp_path):
    one = job(tmp_path / "store", block=5)
    one.together = 2
    writer, seen = one.writer(Place(), False), []
    progress = Progress(2, N)
    with pytest.raises(Stopped):
        produce(
            writer,
            one.work,
            ((n, one.rows(n), one.inputs(n)) for n in range(2)),
            progress,
            lambda state: seen.append(str(state)),
            lambda: progress.begun >= 7,
        )
    writer.close()
    assert list(pt.open(one.path).entries) == [0] and progress.done == 1
    assert any("2 of 10 samples" in line and "s left" in line for line in seen)  # (within the first block)
    jobs.local(one, Place(), resume=True)
    assert pt.open(one.path).complete


def test_a_store_is_read_while_it_is_written(tmp_path):
    """A stream of unknown length: arrays grow, and what is committed is there for every reader."""
    model, x = problem()
    seen = []

    def batches():
        for number, part in enumerate(x.split(BLOCK)):
            if number:
                end = time.monotonic() + 20
                while len(pt.open(tmp_path / "store").entries) < number - 1 and time.monotonic() < end:
                    time.sleep(0.01)
                store = pt.open(tmp_path / "store")
                assert len(store) >= len(store.entries) * BLOCK or store.complete
                seen.append(len(store.entries))
            yield part

    store = pt.stream(model, batches(), to=tmp_path / "store")
    assert seen and torch.allclose(store.dense(), pt.jacobian(model, x).dense())
    record = json.loads((tmp_path / "store/jacobian/zarr.json").read_text())
    record["shape"][0] += 100  # (one array has grown, the other not yet)
    (tmp_path / "store/jacobian/zarr.json").write_text(json.dumps(record))
    assert pt.open(tmp_path / "store").shape == store.shape


def test_a_store_that_has_moved(tmp_path, files):
    store, J = made(tmp_path / "store")
    moved = tmp_path / "elsewhere" / "deep" / "named"
    moved.parent.mkdir(parents=True)
    store.path.rename(moved)
    assert torch.allclose(pt.open(moved).dense(), J.dense()) and verify(moved).passed
    (moved / SHARD).unlink()
    forget(verify(moved))
    jobs.local(job(moved), Place(), resume=True)
    assert torch.allclose(pt.open(moved).dense(), J.dense())


def test_one_row_of_very_many_is_had_without_counting_them(tmp_path):
    store, J = made(tmp_path / "store")
    for key in (3, -1, slice(7, 2, -2), [True] * N, torch.tensor([[1, 2], [3, -4]]), numpy.array([5]), [], slice(4, 4)):
        index = key if isinstance(key, slice) else torch.as_tensor(key)
        index = index.long() if not isinstance(key, slice) and not index.numel() else index
        expected = J.dense()[list(range(N))[key]] if isinstance(key, slice) else J.dense()[index]
        assert torch.allclose(store[key], expected)
    for key in (N, -N - 1, 1.5, "nothing", None, [True]):
        with pytest.raises(pt.InputError):
            store[key]


def test_shards_that_are_mapped_do_not_pile_up(tmp_path, monkeypatch):
    monkeypatch.setattr("partials.store.reader.MAPPED", 2)
    store, J = made(tmp_path / "store", block=1)
    assert torch.allclose(store.norms(), J.norms()) and len(store._maps) == 2


def test_journals_name_each_line(tmp_path):
    store, _ = made(tmp_path / "store")
    assert len({entry.id for entry in store.entries.values()}) == len(store.entries)
    assert not journal.read(Path(store.path))[1]
