"""What a store holds of awkward functions: half precision, outputs without entries, one sample, shapes that change."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import partials as pt
from partials.distribute import job as jobs
from partials.distribute.ranks import Place
from partials.store.data import of_arrays
from partials.store.verify import verify
from tests.unit.store.making import job, problem

WHAT = ["jacobian", "norms", "sum", "diagonal", "gram", "sketch:6", "sketch:6:kronecker"]


def quantity(J, what):
    name, *how = what.split(":")
    if name == "sketch":
        return J.sketch(int(how[0]), *how[1:])
    return {"jacobian": J.dense, "norms": J.norms, "sum": J.sum, "diagonal": J.diagonal, "gram": J.gram}[name]()


def stored(path, what, f, *inputs, block=4, together=None, **options):
    """(the store, the Jacobian of all samples)."""

    def rows(given):
        return pt.jacobian(f, *given[0], **options)

    one = jobs.job(path, what, rows, of_arrays(inputs, {}), None, {}, {}, block=block)
    one.together = together or one.together
    jobs.local(one, Place(), resume=False)
    assert all(error <= tolerance for _, error, tolerance in jobs.recompute(one, 4))
    assert verify(path).passed
    return pt.open(path), rows((inputs, {}))


def result(store):
    return store.result() if store.main.name == "parts" else store.dense()


@pytest.mark.parametrize("what", WHAT)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(tmp_path, what, dtype):
    """Norms, sums and products of large entries are no infinity, and what adds up over many parts still counts."""
    torch.manual_seed(0)
    model, x = nn.Linear(6, 2).to(dtype), torch.randn(12, 6).clamp(-1, 1).mul(3e4).to(dtype)
    store, J = stored(tmp_path / "store", what, model, x, together=2)
    expected = quantity(J, what).double()
    found = result(store)
    assert found.dtype == (dtype if what == "jacobian" and dtype == torch.float16 else torch.float32)
    if what != "sum":  # (of which J rounds each part to its dtype)
        assert expected.isfinite().all()
        assert torch.allclose(found.double(), expected, rtol=1e-2 if what == "diagonal" else 1e-4)
    if what == "sum":
        assert (found[0, :6].double() - x.double().sum(0)).abs().max() < 0.01 * x.double().abs().sum(0).max()


def test_norms_of_rows_in_half_precision(tmp_path):
    store, J = stored(tmp_path / "store", "jacobian", nn.Linear(6, 2).half(), torch.full((9, 6), 4e4, dtype=torch.float16))
    assert torch.allclose(store.norms(), J.norms()) and store.norms().isfinite().all()
    assert store.gram().isfinite().all() and (store @ torch.ones(14)).isfinite().all()


class Wide(nn.Module):
    """Rows in float64, values in float32."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(3, 2).double()

    def forward(self, x):
        return self.net(x.double()).float()


@pytest.mark.parametrize("what", WHAT)
def test_rows_and_values_of_different_types(tmp_path, what):
    store, J = stored(tmp_path / "store", what, Wide(), torch.randn(9, 3))
    assert store.dtype == torch.float64 and store.values.dtype == torch.float32
    assert torch.allclose(result(store), quantity(J, what).double(), rtol=1e-6)
    assert torch.equal(store.values, J.values)


@pytest.mark.parametrize("what", WHAT)
@pytest.mark.parametrize(
    ("f", "samples", "block"),
    [(lambda model: model, 1, 4), (lambda model: lambda x: model(x)[:, :0], 5, 2), (lambda model: lambda x: model(x).sum(1), 7, 7)],
    ids=["one sample", "no outputs", "one block"],
)
def test_edges(tmp_path, what, f, samples, block):
    model = problem()[0]
    store, J = stored(tmp_path / "store", what, f(model), torch.randn(samples, 3).double(), block=block, params=model)
    expected = quantity(J, what)
    found = result(store)
    assert found.shape == expected.shape and torch.allclose(found, expected) and store.values.shape == J.values.shape
    zarr = pytest.importorskip("zarr")
    assert zarr.open_group(str(store.path), mode="r")["values"].shape == (samples, store.values_width)


def test_no_sample_and_no_parameter(tmp_path):
    with pytest.raises(pt.InputError, match="no sample"):
        job(tmp_path / "store", x=torch.randn(0, 3).double())
    with pytest.raises(pt.InputError):
        job(tmp_path / "store", model=nn.Tanh())
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("what", ["jacobian", "norms", "sum"])
def test_outputs_that_change_their_shape_are_refused(tmp_path, files, what):
    """Nothing is stretched: a row of another width is an error before it is written."""
    model = problem()[0]

    def f(x):
        return model(x)[:, : 1 + int(len(x) == 4)]

    one = jobs.job(
        tmp_path / "store",
        what,
        lambda given: pt.jacobian(f, *given[0], params=model, check="never"),
        of_arrays([torch.randn(9, 3).double()], {}),
        None,
        {},
        {},
        block=4,
    )
    with pytest.raises((pt.StoreError, pt.InputError), match="shape"):
        jobs.local(one, Place(), resume=False)
    assert verify(tmp_path / "store").passed


def shared_first(a, x):
    return (x * a).sum(1, keepdim=True)


@pytest.mark.parametrize("length", [10, 4, 1])
def test_what_holds_no_samples_is_passed_whole(tmp_path, length):
    """A tensor of as many entries as there are samples is not cut where it holds none."""
    x, a = torch.randn(10, length).double(), torch.randn(length, dtype=torch.float64, requires_grad=True)

    def dims(args, kwargs):
        return [None, 0]

    def rows(given):
        return pt.jacobian(shared_first, *given[0])

    one = jobs.job(tmp_path / "store", "jacobian", rows, of_arrays([a, x], {}, dims=dims), None, {}, {}, block=4)
    jobs.local(one, Place(), resume=False)
    assert torch.allclose(pt.open(one.path).dense(), x[:, None]) and len(one.data.take(2, 4)[0][0]) == length


def test_samples_along_another_dimension(tmp_path):
    x = torch.randn(3, 10).double()
    data = of_arrays([x.numpy()], {}, dims=lambda args, kwargs: [1])
    assert data.length == 10 and torch.equal(data.take(2, 5)[0][0], x[:, 2:5])
    nested = of_arrays([[x, x.numpy()], 3.0], {"more": {"x": x}}, dims=lambda args, kwargs: [1, 1, 1])
    (pair, number), more = nested.take(0, 4)
    assert torch.equal(pair[1], x[:, :4]) and number == 3.0 and torch.equal(more["more"]["x"], pair[0])
    with pytest.raises(pt.InputError, match="no common number"):
        of_arrays([x, x[:2]], {})


def test_rows_that_cancel_are_judged_beside_the_others(tmp_path):
    """A sample whose gradient is rounding alone comes out otherwise when it is computed alone, and is no fault of the run."""
    torch.manual_seed(0)
    model, x = nn.Linear(20, 2), torch.randn(64, 20)
    x[7] *= 1e-9

    def f(x):
        return nn.functional.softmax(model(x) * 30, 1).log().sum(1)

    stored(tmp_path / "store", "jacobian", f, x, params=model, block=64)


def test_autocast_is_judged_by_its_precision(tmp_path):
    class Auto(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 2))

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return self.net(x)

    one = jobs.job(tmp_path / "s", "norms", lambda i: pt.jacobian(Auto(), *i[0]), of_arrays([torch.randn(9, 64)], {}), None, {}, {})
    assert one.dtype == torch.bfloat16
