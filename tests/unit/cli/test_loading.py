"""Models and data by name: every form that is taken, and a sentence for each that is not."""

from __future__ import annotations

import sys

import numpy
import pytest
import torch
from torch import nn

from partials import InputError
from partials.cli import loading
from partials.cli.faults import ForeignError

pytestmark = pytest.mark.usefixtures("folder")


# --- models ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "kind"),
    [
        ("model.py:net", nn.Sequential),
        ("model:net", nn.Sequential),
        ("./model.py:space.inner", nn.Sequential),
        ("model.py:build", nn.Linear),
        ("model.py:Plain", nn.Module),
        ("torch.nn:Identity", nn.Identity),
    ],
)
def test_models(spec, kind):
    assert isinstance(loading.model(spec), kind)


def test_a_function_with_arguments_is_the_model_itself():
    assert loading.model("model.py:line").__name__ == "line"


def test_a_function_of_anything_is_not_called(folder):
    (folder / "any.py").write_text("def f(*inputs):\n    raise AssertionError\n")
    assert loading.model("any.py:f").__name__ == "f"


def test_a_file_is_run_once_and_its_neighbours_are_found(folder):
    (folder / "sub").mkdir()
    (folder / "sub" / "near.py").write_text("import sys\ncount = 0\n")
    (folder / "sub" / "user.py").write_text("import near\nnear.count += 1\nf = lambda x: x\ng = f\n")
    assert loading.model("sub/user.py:f") is loading.model(f"{folder}/sub/user.py:g")
    assert sys.modules["near"].count == 1


def test_a_file_with_the_name_of_a_loaded_module_hides_nothing(folder):
    (folder / "json.py").write_text("f = lambda x: x\n")
    import json

    assert callable(loading.model("json.py:f"))
    assert sys.modules["json"] is json


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("model.py", "model.py:model"),
        ("model", "does not say where to look"),
        ("model.py:", "does not say where to look"),
        ("modle.py:net", "did you mean 'model.py'"),
        ("nowhere/model.py:net", "there is no file nowhere/model.py"),
        ("modle:net", "could not import module 'modle'"),
        ("modle:net", "did you mean 'model'"),
        ("torch.nm:Linear", "could not import module 'torch.nm'"),
        ("model.py:nett", "did you mean 'net'"),
        ("model.py:space.iner", "model.py:space has no 'iner'"),
        ("model.py:number", "model.py:number is no model"),
        ("model.py:Wide", "a class that needs arguments"),
    ],
)
def test_what_is_no_model(spec, sentence):
    with pytest.raises(InputError) as raised:
        loading.model(spec)
    assert sentence in str(raised.value)


# --- data -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "shapes"),
    [
        ("x.npy", [(5, 3)]),
        ("one.npz", [(5, 3)]),
        ("both.npz:labels", [(5,)]),
        ("model.py:x", [(5, 3)]),
        ("model.py:array", [(5, 3)]),
        ("model.py:pair", [(5, 1), (5, 1)]),
        ("model.py:batch", [(4, 3)]),
    ],
)
def test_positional_inputs(spec, shapes):
    positional, keywords = loading.data(spec)
    assert [tuple(tensor.shape) for tensor in positional] == shapes
    assert all(isinstance(tensor, torch.Tensor) for tensor in positional)
    assert not keywords


@pytest.mark.parametrize(("spec", "names"), [("both.npz", {"images", "labels"}), ("model.py:named", {"input"})])
def test_inputs_by_name(spec, names):
    positional, keywords = loading.data(spec)
    assert not positional
    assert set(keywords) == names


def test_safetensors(folder):
    torch_io = pytest.importorskip("safetensors.torch")
    torch_io.save_file({"x": torch.ones(5, 3), "y": torch.zeros(5)}, folder / "data.safetensors")
    assert loading.data("data.safetensors")[1].keys() == {"x", "y"}
    assert torch.equal(loading.value("data.safetensors:y"), torch.zeros(5))
    (folder / "bad.safetensors").write_bytes(b"\xff" * 40)
    with pytest.raises(InputError, match=r"bad.safetensors cannot be read"):
        loading.data("bad.safetensors")


def test_safetensors_without_the_package(folder, monkeypatch):
    (folder / "data.safetensors").touch()
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(InputError, match=r"pip install 'partials\[safetensors\]'"):
        loading.data("data.safetensors")


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("y.npy", "did you mean 'x.npy'"),
        ("pickled.npy", "without pickled objects"),
        ("broken.npy", "broken.npy cannot be read"),
        ("text.npy", "text.npy cannot be read"),
        ("broken.npz", "broken.npz cannot be read"),
        ("both.npz:lables", "did you mean 'labels'"),
        ("weights.pt", "may hold code"),
        ("weights.pkl:x", "may hold code"),
        ("model.py:number", "model.py:number is no data"),
    ],
)
def test_what_is_no_data(folder, spec, sentence):
    (folder / "broken.npy").write_bytes(b"\x93NUMPY\x01\x00")
    (folder / "broken.npz").write_bytes(b"PK\x03\x04nothing")
    numpy.save(folder / "text.npy", numpy.array(["a", "b"]))
    with pytest.raises(InputError) as raised:
        loading.data(spec)
    assert sentence in str(raised.value)


def test_an_array_of_unreadable_objects_is_never_unpickled(folder):
    class Bomb:
        def __reduce__(self):
            return (sys.exit, (99,))

    numpy.save(folder / "bomb.npy", numpy.array([Bomb()], dtype=object))
    numpy.savez(folder / "bomb.npz", numpy.array([Bomb()], dtype=object))
    for name in ("bomb.npy", "bomb.npz"):
        with pytest.raises(InputError, match="cannot be read"):
            loading.data(name)


def test_a_function_that_ends_the_process_is_the_users_fault(folder):
    (folder / "leaving.py").write_text("def data():\n    raise SystemExit(4)\n")
    with pytest.raises(ForeignError, match=r"SystemExit while calling leaving\.py:data"):
        loading.data("leaving.py:data")
