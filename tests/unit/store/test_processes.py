"""Runs as processes: killed at any point, interrupted, under torchrun, with Ray; the files are always those of an undisturbed run."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

import partials as pt
from partials.store.verify import verify
from tests.unit.store.making import PATIENCE

pytest.importorskip("typer")
SLOWLY = {"model": "model.py:slowly", "block": 3}


def lines(store):
    return sum(path.read_bytes().count(b"\n") for path in Path(store, "journal").glob("*.jsonl")) if Path(store, "journal").is_dir() else 0


def wait_for(store, count, process):
    """Until so many blocks are committed."""
    while lines(store) < count and process.poll() is None:
        time.sleep(0.002)


def caught(start, store, count, act):
    """Start a run and do something to it when `count` of its 30 blocks are committed: again, and slower, where it had ended by then."""
    for attempt in range(6):
        process = start(out=store, PAUSE=str(0.02 * 4**attempt), **SLOWLY)
        wait_for(store, count, process)
        act(process)
        _, err = process.communicate(timeout=PATIENCE)
        if process.returncode:
            return process.returncode, err
        shutil.rmtree(store)
    raise AssertionError("the run always ends before it is caught")


def kill(process, after):
    time.sleep(after)
    process.kill()


def killed_and_resumed(start, run, files, points):
    code, _, err = run(out="whole", **SLOWLY)
    assert code == 0, err
    whole = files("whole")
    for point in points:
        store = f"killed{point}"
        code, err = caught(start, store, point, partial(kill, after=random.Random(point).random() * 0.03))
        before = lines(store)
        assert code == -signal.SIGKILL, err
        assert point <= before <= 30
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
    code, err = caught(start, "store", 2, lambda process: process.send_signal(number))
    assert code == 130, err
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
    first, second = ranks(start, 2, out="store", PAUSE="0.3", **SLOWLY)
    wait_for("store", 8, first)
    second.kill()
    second.communicate()
    _, err = first.communicate(timeout=PATIENCE)
    assert first.returncode == 0, err
    assert not pt.open("store").complete
    for process in ranks(start, 3, out="store", **SLOWLY):
        _, err = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, err
    assert files("store") == files("whole") and lines("store") == 30


@pytest.mark.slow
def test_torchrun(folder, environment, run, files):
    code, _, err = run("--what", "sum", out="whole")
    assert code == 0, err
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "partials", "run"]
    words = ["model.py:net", "--data", "model.py:x", "--what", "sum", "--out", "store", "--block", "8"]
    done = subprocess.run([*torchrun, *words], env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert files("store") == files("whole")
    assert pt.open("store").result().equal(pt.open("whole").result())


@pytest.mark.slow
def test_ray_with_a_killed_worker(start, run, files):
    pytest.importorskip("ray")
    psutil = pytest.importorskip("psutil")
    code, _, err = run(out="whole", **SLOWLY)
    assert code == 0, err
    process = start("--engine", "ray", out="store", PAUSE="0.2", **SLOWLY)
    wait_for("store", 1, process)
    killed = False
    while not killed and process.poll() is None:
        for child in psutil.Process(process.pid).children(recursive=True):
            with suppress(psutil.Error):  # (processes come and go)
                if not killed and "ray::_block" in " ".join(child.cmdline()):
                    child.kill()
                    killed = True
    assert killed, "no worker was found at work"
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    assert files("store") == files("whole") and lines("store") == 30
    threads = {entry.info["threads"] for entry in pt.open("store").entries.values()}
    assert threads == {1}
