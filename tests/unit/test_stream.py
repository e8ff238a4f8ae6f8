"""stream: the quantities of all batches together, whatever the batches; errors; stores; memory that does not grow."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import partials as pt
from partials.testing import modules

N = 22


@pytest.fixture
def model():
    return modules.mlp().double()


@pytest.fixture
def data():
    return torch.randn(N, 4).double(), torch.randint(3, (N,))


def loader(*tensors, size=5):
    return DataLoader(TensorDataset(*tensors) if len(tensors) > 1 else tensors[0], batch_size=size)


ITERATED = {"jacobian": lambda J: J.dense(), "norms": lambda J: J.norms()}
REDUCED = {"sum": lambda J: J.sum(), "diagonal": lambda J: J.diagonal(), "gram": lambda J: J.gram()}


@pytest.mark.parametrize("size", [1, 5, 22, 100])
@pytest.mark.parametrize("what", ITERATED)
def test_parts_are_those_of_the_whole(model, data, what, size):
    parts = list(pt.stream(model, loader(data[0], size=size), what))
    assert [len(part) for part in parts] == [len(part) for part in data[0].split(size)]
    torch.testing.assert_close(torch.cat(parts), ITERATED[what](pt.jacobian(model, data[0])))


@pytest.mark.parametrize("size", [1, 5, 100])
@pytest.mark.parametrize("what", REDUCED)
def test_reductions_are_those_of_the_whole(model, data, what, size):
    found = pt.stream(model, loader(data[0], size=size), what)
    torch.testing.assert_close(found, REDUCED[what](pt.jacobian(model, data[0])))


@pytest.mark.parametrize("memory", [None, "1GiB"])
def test_gradients_of_a_loss(model, data, memory):
    options = {"loss": F.cross_entropy, "max_memory": memory}
    G = pt.gradient(model, *data, loss=F.cross_entropy)
    torch.testing.assert_close(torch.cat(list(pt.stream(model, loader(*data), "norms", **options))), G.norms())
    torch.testing.assert_close(pt.stream(model, loader(*data), "clipped_sum:0.5", **options), G.clipped_sum(0.5))
    torch.testing.assert_close(pt.stream(model, loader(*data), "gram", **options), G.gram())


def test_keyword_batches_and_shared_inputs(data):
    a = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)

    def f(x, scale, a):
        return a * x * scale

    batches = [{"x": x} for x in data[0].split(7)]
    options = {"kwargs": {"scale": torch.tensor(3.0).double(), "a": a}, "in_dims": {"scale": None}}
    found = pt.stream(f, batches, "sum", **options)
    torch.testing.assert_close(found.squeeze(1), 3 * data[0].sum(0))


def test_batches_are_taken_when_they_are_asked_for(model, data):
    taken = []

    def batches():
        for x in data[0].split(5):
            taken.append(len(x))
            yield x

    results = pt.stream(model, batches(), "norms")
    assert not taken
    next(results)
    assert taken == [5]


@pytest.mark.parametrize(
    "what",
    [
        "norm",
        "sketch",
        "sketch:0",
        "sketch:many",
        "sketch:8:none",
        "sketch:8:",
        "sketch:8:kronecker:1",
        "sum:3",
        "clipped_sum",
        "clipped_sum:-1",
        "",
    ],
)
def test_unknown_quantities(model, what):
    with pytest.raises(pt.InputError, match="is unknown"):
        pt.stream(model, [], what)


def test_what_is_no_stream(model, data):
    with pytest.raises(pt.InputError, match="there is no batch"):
        pt.stream(model, [], "sum")
    with pytest.raises(pt.InputError, match="not iterable"):
        pt.stream(model, 3, "sum")
    with pytest.raises(pt.InputError, match="no input"):
        pt.stream(model, ["text"], "sum")
    with pytest.raises(pt.InputError, match="takes batches"):
        pt.stream(model, [data[0]], "sum", batched=False)
    with pytest.raises(pt.InputError, match="with respect to parameters"):
        pt.stream(model, [data[0]], "sum", wrt="input")


def test_progress(model, data, capsys):
    assert pt.stream(model, loader(data[0]), "sum", progress=True).shape == (3, 43)
    assert "5/5" in capsys.readouterr().err
    seen = []
    pt.stream(model, loader(data[0]), "sum", progress=lambda batches: (seen.append(len(batches)), batches)[1])
    assert seen == [5]


def test_a_store(model, data, tmp_path):
    store = pt.stream(model, loader(data[0]), "jacobian", to=tmp_path / "rows")
    J = pt.jacobian(model, data[0])
    torch.testing.assert_close(store.dense(), J.dense())
    torch.testing.assert_close(pt.open(tmp_path / "rows").norms(), J.norms())
    total = pt.stream(model, loader(*data), "sum", to=tmp_path / "sum", loss=F.cross_entropy)
    torch.testing.assert_close(total.result(), pt.gradient(model, *data, loss=F.cross_entropy).sum())
    again = pt.stream(model, loader(data[0]), "jacobian", to=tmp_path / "rows")  # all is there already
    assert torch.equal(again.dense(), store.dense())
    with torch.no_grad():
        model[0].weight.add_(1)
    with pytest.raises(pt.StoreError, match="belongs to another run"):
        pt.stream(model, loader(data[0]), "jacobian", to=tmp_path / "rows")
    with pytest.raises(pt.MethodError, match="cannot be stored"):
        pt.stream(model, loader(data[0]), "gram", to=tmp_path / "gram")


def test_batches_that_are_one_tensor(model, data):
    with pytest.raises(pt.InputError, match=r"one tensor(.|\n)*x.split"):
        pt.stream(model, data[0], "norms")


def test_results_of_several_shapes_are_not_stretched(data):
    w = torch.randn(4, dtype=torch.float64, requires_grad=True)
    outputs = iter([3, 1])

    def f(x, w):
        return (x * w).sum(1, keepdim=True).expand(-1, next(outputs))

    with pytest.raises(pt.InputError, match="several shapes"):
        pt.stream(f, [(x, w) for x in data[0].split(11)], "sum", check="never")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_long_sums_of_half_precision_do_not_stand_still(dtype):
    model, x = torch.nn.Linear(2, 1, bias=False).to(dtype), torch.ones(1, 2, dtype=dtype)
    found = pt.stream(model, [x] * 3000, "sum", check="never")
    assert found.dtype == torch.float32 and torch.equal(found, torch.full((1, 2), 3000.0))


def test_a_batch_that_is_filled_anew(model, data):
    """A loader may give the same memory each time: what is kept of a batch is a copy."""
    buffer = torch.empty(11, 4, dtype=torch.float64)

    def batches():
        for x in data[0].split(11):
            yield buffer.copy_(x)

    torch.testing.assert_close(pt.stream(model, batches(), "gram"), pt.jacobian(model, data[0]).gram())
    torch.testing.assert_close(torch.cat(list(pt.stream(model, batches(), "norms"))), pt.jacobian(model, data[0]).norms())


class Named(torch.utils.data.Dataset):
    def __init__(self, x):
        self.x = x

    def __len__(self):
        return len(self.x)

    def __getitem__(self, n):
        return {"input": self.x[n]}


@pytest.mark.parametrize("what", [*ITERATED, *REDUCED, "sketch:5", "sketch:6:kronecker"])
@pytest.mark.parametrize("kind", ["workers", "pinned", "named", "sizes", "once", "iterable"])
@pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning")
def test_every_kind_of_batches(model, data, what, kind):
    x = data[0]

    class Iterable(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(x)

    batches = {
        "workers": lambda: DataLoader(x, batch_size=5, num_workers=2 if what in ("norms", "sum") else 0),
        "pinned": lambda: DataLoader(x, batch_size=5, pin_memory=True),
        "named": lambda: DataLoader(Named(x), batch_size=5),
        "sizes": lambda: x.split([1, 7, 0, 3, 11]),
        "once": lambda: iter([(part,) for part in x.split(5)]),
        "iterable": lambda: DataLoader(Iterable(), batch_size=5),
    }[kind]()
    found = pt.stream(model, batches, what)
    J = pt.jacobian(model, x)
    name, *how = what.split(":")
    expected = J.sketch(int(how[0]), *how[1:]) if name == "sketch" else {**ITERATED, **REDUCED}[name](J)
    torch.testing.assert_close(found if isinstance(found, torch.Tensor) else torch.cat(list(found)), expected)


def test_a_stream_of_another_function_does_not_go_on(model, data, tmp_path):
    """The parameters and the batches are the same, the code is not."""
    store = pt.stream(model, data[0].split(6)[:2], "norms", to=tmp_path / "s")
    other = torch.nn.Sequential(model[0], torch.nn.ReLU(), *model[2:])
    with pytest.raises(pt.StoreError, match="belongs to another function: sample 0"):
        pt.stream(other, data[0].split(6), "norms", to=tmp_path / "s")
    assert len(pt.open(store.path)) == 12 and len(pt.stream(model, data[0].split(6), "norms", to=tmp_path / "s")) == N


def test_stores_of_batches_of_several_sizes(model, data, tmp_path):
    for sizes, words in (([5, 3, 14], "14 samples in batch|of one size"), ([5, 3, 5, 9], "3 samples in batch 1, and another after it")):
        with pytest.raises(pt.StoreError, match=words):
            pt.stream(model, data[0].split(sizes), "norms", to=tmp_path / str(len(sizes)))
        assert pt.open(tmp_path / str(len(sizes))).complete
    with pytest.raises(pt.InputError, match="no samples"):
        pt.stream(model, [data[0][:0]], "norms", to=tmp_path / "empty")
    assert len(pt.stream(model, data[0].split([11, 11, 0]), "norms", to=tmp_path / "ends")) == N


def test_a_store_of_batches_whose_first_input_holds_no_samples(data, tmp_path):
    w = torch.randn(4, dtype=torch.float64, requires_grad=True)
    store = pt.stream(lambda w, x: x @ w, [(w, x) for x in data[0].split(6)], "jacobian", to=tmp_path / "s", in_dims=(None, 0))
    torch.testing.assert_close(store.dense(), data[0])


GROWTH = """
import gc, torch, partials as pt
torch.set_num_threads(1)
model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10))
def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))
def batches(count):
    for _ in range(count):
        yield torch.randn(128, 64)
def all_of(count):
    for what in ("norms", "jacobian"):
        for part in pt.stream(model, batches(count), what):
            del part
    for what in ("sum", "diagonal"):
        pt.stream(model, batches(count), what)
all_of(5)
gc.collect(); open("/proc/self/clear_refs", "w").write("5")
before = status("VmHWM")
all_of(5)
few = status("VmHWM")
all_of(100)
print(few, status("VmHWM"), 128 * 10 * sum(p.numel() for p in model.parameters()) * 4)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from /proc")
def test_memory_does_not_grow_with_the_number_of_batches():
    env = {"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", GROWTH], env=env, capture_output=True, text=True, check=True)
    few, many, one_batch = map(int, run.stdout.split())
    assert many - few < one_batch / 2  # twenty times as many batches, not even the rows of half a batch more
