"""`partials run`, `info` and `verify`, within this process: data of every kind, weights, refusals, and what is never run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy
import pytest
import torch

import partials as pt

pytest.importorskip("typer")
from typer.testing import CliRunner

from partials.cli.sources import opened


@pytest.fixture
def run(folder, monkeypatch):
    """Run a command line: (exit code, stdout, stderr)."""
    from partials.cli import loading
    from partials.cli.app import app

    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(loading, "_LOADED", {})

    def ran(*words, model="model.py:net", data="model.py:x", out="store", block=8):
        command = words if words[:1] in [("info",), ("verify",)] else ("run", model, "--data", data, "--out", out, "--block", block, *words)
        done = CliRunner().invoke(app, [str(word) for word in command])
        return done.exit_code, done.stdout, done.stderr

    yield ran
    sys.modules.pop("model", None)


@pytest.fixture
def x(folder):
    """What `x` of the folder's model is."""
    namespace = {}
    with torch.random.fork_rng(devices=[]):
        exec((folder / "model.py").read_text(), namespace)
    return namespace["x"]


def test_every_kind_of_data_gives_the_same(run, files, x):
    safetensors, pyarrow = pytest.importorskip("safetensors.torch"), pytest.importorskip("pyarrow")
    from pyarrow import feather, parquet

    numpy.save("x.npy", x.numpy())
    safetensors.save_file({"input": x}, "x.safetensors")
    table = pyarrow.table({"input": pyarrow.FixedSizeListArray.from_arrays(x.flatten().numpy(), 3)})
    parquet.write_table(table, "x.parquet")
    feather.write_feather(table, "x.arrow", compression="uncompressed")
    found = []
    for i, spec in enumerate(["model.py:x", "model.py:items", "x.npy", "x.safetensors:input", "x.parquet", "x.arrow"]):
        code, out, err = run(data=spec, out=f"s{i}", block=32)
        assert code == 0, err
        assert "90 samples in 3 blocks" in out and "2 rows computed again, equal" in out
        found.append(files(f"s{i}"))
    assert all(one == found[0] for one in found)


def test_parquet_is_read_by_row_groups(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    x = numpy.random.default_rng(0).standard_normal((500, 3))
    columns = {"lists": list(x), "fixed": pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(x.reshape(-1)), 3), "flat": x[:, 0]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "x.parquet", row_group_size=64)
    parquet.write_table(pyarrow.table({"lists": [[1.0], [1.0, 2.0, 3.0]]}), tmp_path / "ragged.parquet")
    found = opened(str(tmp_path / "x.parquet"))
    for name, expected in (("lists", x), ("fixed", x), ("flat", x[:, 0])):
        assert found[name].shape == expected.shape and found[name].dtype == expected.dtype
        for start, stop in ((0, 5), (60, 70), (0, 500), (128, 192), (450, 500), (5, 5)):
            assert numpy.array_equal(found[name][start:stop], expected[start:stop])
    with pytest.raises(pt.InputError, match="several lengths"):
        opened(str(tmp_path / "ragged.parquet"))[0:2]


def test_a_dry_run_says_what_a_run_writes(run):
    code, out, err = run("--dry-run", "--json")
    assert code == 0, err
    assert not Path("store").exists()
    outlook = json.loads(out)
    assert outlook["method"] == "capture" and outlook["blocks"] == 12
    assert run()[0] == 0
    assert sum(p.stat().st_size for p in Path("store").rglob("c/**/*") if p.is_file()) == outlook["bytes"]


def test_refusals(run, folder):
    assert run()[0] == 0
    code, _, err = run()
    assert code == 3 and "holds a store already" in err and "--resume" in err
    code, _, err = run("--resume", model="model.py:other")
    assert code == 3 and "belongs to another run: its parameters differ" in err
    code, _, err = run("--what", "everything", out="s2")
    assert code == 2 and "sketch:4096" in err
    code, _, err = run("--engine", "dask", out="s2")
    assert code == 2 and "one of: local, ray" in err
    for name in ("weights.pt", "weights.pt2", "weights.pkl"):
        (folder / name).write_bytes(b"")
        code, _, err = run("--weights", name, out="s3")
        assert code == 2 and "may hold code" in err


@pytest.mark.parametrize("command", ["info", "verify"])
def test_user_code_is_never_imported_by(run, folder, command):
    assert run()[0] == 0
    sys.modules.pop("model", None)
    (folder / "model.py").write_text("raise SystemExit('imported')")
    code, out, err = run(command, "store", "--json")
    assert code == 0, err
    assert json.loads(out)


def test_verify_recomputes_with_the_model_that_is_named(run, folder):
    assert run("--target", "model.py:y", "--loss", "cross_entropy", "--what", "norms")[0] == 0
    asked = ("--target", "model.py:y", "--loss", "cross_entropy")
    code, out, err = run("verify", "store", "--recompute", 5, "--model", "model.py:net", "--data", "model.py:x", *asked)
    assert code == 0, err
    assert "5 rows recomputed: all right" in out
    code, out, _ = run("verify", "store", "--recompute", 5, "--model", "model.py:other", "--data", "model.py:x", *asked)
    assert code == 1 and "comes out otherwise" in out
    code, _, err = run("verify", "store", "--recompute", 5)
    assert code == 2 and "--model and --data" in err


def test_info_tells_what_is_there(run):
    assert run("--limit", 20)[0] == 0
    code, out, _ = run("info", "store")
    assert code == 0 and "jacobian (20, 2, 26)" in out and "0.weight" in out and "complete" in out
    code, _, err = run("info", "elsewhere")
    assert code == 3 and "is no store" in err


def test_weights_are_loaded(run, x):
    safetensors = pytest.importorskip("safetensors.torch")
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    safetensors.save_file(net.state_dict(), "weights.safetensors")
    code, _, err = run("--weights", "weights.safetensors", "--what", "norms")
    assert code == 0, err
    assert torch.allclose(pt.open("store").norms(), pt.jacobian(net, x).norms(), rtol=1e-5)
    safetensors.save_file({"strange": torch.ones(1)}, "other.safetensors")
    code, _, err = run("--weights", "other.safetensors", out="s2")
    assert code == 2 and "does not fit the model" in err
