"""Data behind `--data`: rows read from files as they are needed, what holds no samples, what is drawn; and data larger than memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

import partials as pt

pytest.importorskip("typer")
from partials.cli.options import Asked
from partials.cli.sources import FileRows, opened
from partials.cli.storing import elsewhere, job_of
from tests.unit.store.conftest import SRC

MODEL = """
import torch
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
dropping = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Dropout(), torch.nn.Linear(4, 2))
x, y, s = torch.randn(90, 3), torch.randint(2, (90,)), torch.randn(90)
a = torch.randn(90, requires_grad=True)
both = {"x": x, "shift": s}
with_a = (s, a)


def scaled(x, a):
    return a.sum() * x


def shifted(x, shift):
    return net(x) + shift[:, None]


def shared(x, table):
    return net(x) * table.sum()
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    from partials.cli import loading

    (tmp_path / "model.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(loading, "_LOADED", {})
    yield tmp_path
    sys.modules.pop("model", None)


@pytest.fixture
def run(folder):
    """Run a command line: (exit code, stdout, stderr)."""
    from typer.testing import CliRunner

    from partials.cli.app import app

    def ran(*words):
        done = CliRunner().invoke(app, [str(word) for word in words])
        return done.exit_code, done.stdout, done.stderr

    return ran


@pytest.fixture
def names(folder):
    namespace = {}
    with torch.random.fork_rng(devices=[]):
        exec((folder / "model.py").read_text(), namespace)
    return namespace


@pytest.mark.parametrize("dtype", ["float32", "float64", "int64", "uint8", "bool", "float16"])
def test_rows_of_a_file(tmp_path, dtype):
    x = (numpy.random.default_rng(0).standard_normal((50, 2, 3)) * 9).astype(dtype)
    numpy.save(tmp_path / "x.npy", x)
    rows = opened(str(tmp_path / "x.npy"))
    assert isinstance(rows, FileRows) and rows.shape == x.shape and len(rows) == 50
    for part in (slice(0, 50), slice(7, 9), slice(49, 80), slice(5, 5)):
        assert numpy.array_equal(rows[part].numpy(), x[part]) and rows[part].shape == x[part].shape
    safetensors = pytest.importorskip("safetensors.torch")
    tensors = {"x": torch.from_numpy(x), "b": torch.randn(4, 2).bfloat16(), "n": torch.tensor(3.0)}
    safetensors.save_file(tensors, tmp_path / "x.safetensors")
    found = opened(str(tmp_path / "x.safetensors"))
    assert torch.equal(found["x"][3:8], tensors["x"][3:8]) and torch.equal(found["b"][1:3], tensors["b"][1:3]) and found["n"] == 3


@pytest.mark.parametrize("order", ["F", "swapped", "empty", "no dimension"])
def test_arrays_of_another_order(tmp_path, order):
    x = numpy.arange(12.0).reshape(4, 3)
    saved = {"F": numpy.asfortranarray(x), "swapped": x.astype(">f8"), "empty": x[:, :0], "no dimension": x[0, 0]}[order]
    numpy.save(tmp_path / "x.npy", saved)
    found = opened(str(tmp_path / "x.npy"))
    if order == "empty":
        assert found[1:3].shape == (2, 0)
    else:
        assert numpy.array_equal(numpy.asarray(found), saved)


def test_files_that_are_cut_short(tmp_path):
    numpy.save(tmp_path / "x.npy", numpy.ones((50, 3)))
    os.truncate(tmp_path / "x.npy", 500)
    with pytest.raises(pt.InputError, match="is cut short"):
        opened(str(tmp_path / "x.npy"))
    for raw in (b"", b"\xff" * 8, b"\x10" + b"\0" * 7 + b"not json at all!", (2).to_bytes(8, "little") + b"[]"):
        (tmp_path / "x.safetensors").write_bytes(raw)
        with pytest.raises(pt.InputError, match="cannot be read"):
            opened(str(tmp_path / "x.safetensors"))
    header = json.dumps({"x": {"dtype": "F32", "shape": [2**40, 2], "data_offsets": [0, 2**43]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(pt.InputError, match="is cut short"):
        opened(str(tmp_path / "x.safetensors"))


def rows_of(run, *words):
    code, _, err = run("run", *words, "--out", "s", "--block", 8)
    assert code == 0, err
    return pt.open("s").dense()


def test_parameters_among_the_data_are_passed_whole(run, names):
    """`a` requires grad and has as many entries as there are samples: it is the function's parameter, not cut into blocks."""
    found = rows_of(run, "model.py:scaled", "--data", "model.py:with_a")
    assert torch.allclose(found, names["s"][:, None].expand(90, 90))


def test_in_dims_say_what_holds_no_samples(run, names):
    words = ("--data", "model.py:x", "--data", "model.py:s", "--in-dims", "0,none", "--params", "model.py:net")
    found = rows_of(run, "model.py:shared", *words)
    assert torch.allclose(found, pt.jacobian(names["net"], names["x"]).dense() * names["s"].sum(), rtol=1e-4, atol=1e-5)


def test_keywords_and_several_data_and_a_limit(run, names):
    expected = pt.jacobian(names["net"], names["x"][:20]).dense()
    assert torch.allclose(rows_of(run, "model.py:shifted", "--data", "model.py:both", "--params", "model.py:net", "--limit", 20), expected)
    code, _, err = run("run", "model.py:net", "--data", "model.py:x", "--wrt", "input", "--out", "w")
    assert code == 2 and "with respect to parameters" in err
    code, _, err = run("run", "model.py:shifted", "--data", "model.py:x", "--data", "model.py:y", "--params", "model.py:net", "--out", "t")
    assert code == 0, err
    code, _, err = run("run", "model.py:net", "--data", "model.py:x", "--single", "--out", "u")
    assert code == 2 and "many samples" in err


def test_what_is_drawn_depends_on_the_inputs_alone(run, files):
    """Masks are the same whoever computes a block, and a sample alone has others: it is not compared."""
    words = ("run", "model.py:dropping", "--data", "model.py:x", "--block", 8, "--randomness", "model", "--out")
    code, out, err = run(*words, "one")
    assert code == 0 and "0 rows computed again" in out, err
    for rank in (1, 0):
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
        try:
            torch.manual_seed(rank)
            code, _, err = run(*words, "two")
        finally:
            del os.environ["RANK"], os.environ["WORLD_SIZE"]
        assert code == 0, err
    assert files("one") == files("two")


def test_rows_of_nan_come_out_the_same(run, folder):
    numpy.save("x.npy", numpy.full((90, 3), numpy.nan, "float32"))
    code, out, err = run("run", "model.py:net", "--data", "x.npy", "--out", "s")
    assert code == 0 and "90 rows with NaN or infinity; 2 rows computed again, equal" in out, err
    code, out, err = run("verify", "s", "--recompute", 5, "--model", "model.py:net", "--data", "x.npy")
    assert code == 0 and "5 rows recomputed: all right" in out, err


def test_half_precision_comes_out_the_same(run, folder):
    for dtype in ("bfloat16", "float16"):
        code, out, err = run("run", "model.py:net", "--data", "model.py:x", "--dtype", dtype, "--out", dtype)
        assert code == 0 and "equal" in out, err


@pytest.mark.parametrize("name", ["w.pt2", "w.pt", "w.pth", "w.ckpt", "w.pkl", "w.bin"])
def test_pickles_are_refused_with_the_reason(run, folder, name):
    torch.save({"x": torch.ones(3)}, name)
    for words in (("--data", "model.py:x", "--weights", name), ("--data", name)):
        code, _, err = run("run", "model.py:net", *words, "--out", "s")
        assert code == 2 and "may hold code" in err and not Path("s").exists()


def test_a_worker_in_another_folder_finds_the_files(folder, tmp_path_factory, monkeypatch):
    asked = Asked("model.py:net", ["x.npy", "model.py:x"], target="model.py:y", loss="cross_entropy")
    numpy.save("x.npy", numpy.ones(3))
    whole = elsewhere(asked)
    assert whole.model == f"{folder}/model.py:net" and whole.data == [f"{folder}/x.npy", f"{folder}/model.py:x"]
    assert whole.loss == "cross_entropy" and whole.target == f"{folder}/model.py:y"
    monkeypatch.chdir(tmp_path_factory.mktemp("other"))
    made = job_of(elsewhere(Asked(whole.model, whole.data[1:])), "out", "norms", None, 8)
    assert made.data.length == 90 and made.blocks == 12


BIG_MODEL = """
import torch
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.AdaptiveAvgPool1d(64), torch.nn.Linear(64, 8))
"""
BIG = """
import os, resource, sys
import numpy, torch
sys.path.insert(0, os.getcwd())
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[1]), resource.RLIM_INFINITY))
from partials.cli.app import run
code = run(sys.argv[2:])
print(code, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize("what", ["jacobian", "norms", "sum", "diagonal", "gram", "sketch:64", "sketch:64:kronecker"])
def test_data_larger_than_memory(folder, what):
    """Four GB of samples, in a process that may have three of address space, and holds half of that."""
    width, samples = 2**20, 1000
    with open("x.npy", "wb") as file:  # (a file with holes: zeros that take no disk)
        numpy.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (samples, width)})
        file.truncate(file.tell() + 4 * width * samples)
    Path("big.py").write_text(BIG_MODEL)
    words = ["run", "big.py:net", "--data", "x.npy", "--what", what, "--out", "s"]
    words += ["--limit", "100"] * (what == "gram")  # (every block meets every other one: all data are read again for each)
    env = {**os.environ, "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", BIG, str(3 * 2**30), *words], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    code, peak = done.stdout.split()[-2:]
    assert code == "0", done.stderr
    assert int(peak) < 1.5 * 2**30
    assert pt.open("s").complete and len(pt.open("s")) == (100 if what == "gram" else samples)


SIZES = """
import torch
from torch import nn
torch.manual_seed(0)
mlp = nn.Sequential(nn.Linear(128, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
cnn = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
images, rows = torch.randn(300, 3, 32, 32), torch.randn(6000, 128)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("model", "data", "what"), [("mlp", "rows", "norms"), ("cnn", "images", "norms"), ("mlp", "rows", "sum")])
def test_the_outlook_says_how_much_memory_a_run_takes(folder, model, data, what):
    Path("sizes.py").write_text(SIZES)
    words = [
        sys.executable,
        "-m",
        "partials",
        "run",
        f"sizes.py:{model}",
        "--data",
        f"sizes.py:{data}",
        "--what",
        what,
        "--out",
        "s",
        "--json",
    ]
    env = {**os.environ, "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1"}
    outlook = json.loads(subprocess.run([*words, "--dry-run"], env=env, capture_output=True, text=True, check=True).stdout)
    process = subprocess.Popen(words, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    assert 0.5 < outlook["peak memory"] / (usage.ru_maxrss * 1024) < 2
