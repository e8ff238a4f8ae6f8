"""Runs as processes: killed at any point, interrupted, under torchrun, with Ray; the files are always those of an undisturbed run."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import partials as pt
from partials.store.verify import verify

pytest.importorskip("typer")
SLOWLY = {"model": "model.py:slowly", "block": 3}


def lines(store):
    return sum(path.read_bytes().count(b"\n") for path in Path(store, "journal").glob("*.jsonl")) if Path(store, "journal").is_dir() else 0


def wait_for(store, count, process, seconds=60):
    """Until so many blocks are committed."""
    end = time.monotonic() + seconds
    while lines(store) < count and process.poll() is None and time.monotonic() < end:
        time.sleep(0.002)


def killed_and_resumed(start, run, files, points):
    code, _, err = run(out="whole", **SLOWLY)
    assert code == 0, err
    whole = files("whole")
    for point in points:
        store = f"killed{point}"
        process = start(out=store, **SLOWLY)
        wait_for(store, point, process)
        time.sleep(random.Random(point).random() * 0.03)
        process.kill()
        process.communicate()
        before = lines(store)
        assert process.returncode == -signal.SIGKILL and point <= before < 30
        kept = {path: Path(store, path).stat().st_mtime_ns for path in files(store)}
        committed = (
            {key for entry in pt.open(store).entries.values() for key in entry.files} if Path(store, "zarr.json").exists() else set()
        )
        code, _, err = run("--resume", out=store, **SLOWLY)
        assert code == 0, err
        assert files(store) == whole
        assert lines(store) == 30  # no block twice, none missing
        assert all(Path(store, path).stat().st_mtime_ns == kept[path] for path in committed)  # finished blocks are not computed again
        assert verify(store).passed and pt.open(store).complete


def test_kill_and_resume(start, run, files):
    killed_and_resumed(start, run, files, [0, 7])


@pytest.mark.slow
def test_kill_and_resume_at_twenty_points(start, run, files):
    killed_and_resumed(start, run, files, random.Random(0).sample(range(29), 20))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_between_blocks(start, run, number):
    process = start(out="store", **SLOWLY)
    wait_for("store", 2, process)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "finished blocks are kept; go on with" in err and "--resume" in err
    assert 2 <= lines("store") < 30 and verify("store").passed
    assert run("--resume", out="store", **SLOWLY)[0] == 0
    assert pt.open("store").complete


def ranks(start, world, **options):
    return [start("--resume", RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), **options) for rank in range(world)]


@pytest.mark.slow
def test_ranks_share_the_blocks_and_another_world_goes_on(start, run, files):
    code, _, err = run(out="whole", **SLOWLY)
    assert code == 0, err
    first, second = ranks(start, 2, out="store", **SLOWLY)
    wait_for("store", 8, first)
    second.kill()
    second.communicate()
    _, err = first.communicate(timeout=60)
    assert first.returncode == 0, err
    assert not pt.open("store").complete
    for process in ranks(start, 3, out="store", **SLOWLY):
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
    assert files("store") == files("whole") and lines("store") == 30


@pytest.mark.slow
def test_torchrun(folder, environment, run, files):
    code, _, err = run("--what", "sum", out="whole")
    assert code == 0, err
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29611", "-m", "partials", "run"]
    words = ["model.py:net", "--data", "model.py:x", "--what", "sum", "--out", "store", "--block", "8"]
    done = subprocess.run([*torchrun, *words], env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    assert files("store") == files("whole")
    assert pt.open("store").result().equal(pt.open("whole").result())


@pytest.mark.slow
def test_ray_with_a_killed_worker(start, run, files):
    pytest.importorskip("ray")
    psutil = pytest.importorskip("psutil")
    code, _, err = run(out="whole", **SLOWLY)
    assert code == 0, err
    process = start("--engine", "ray", out="store", **SLOWLY)
    wait_for("store", 1, process, seconds=120)
    workers = []
    while not workers and process.poll() is None:
        children = psutil.Process(process.pid).children(recursive=True)
        workers = [p for p in children if p.is_running() and "ray::_block" in " ".join(p.cmdline())]
    assert workers, "no worker was found at work"
    os.kill(workers[0].pid, signal.SIGKILL)
    _, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    assert files("store") == files("whole") and lines("store") == 30
    threads = {entry.info["threads"] for entry in pt.open("store").entries.values()}
    assert threads == {1}
