"""Mixing is found whatever does it, and the error names the operation and the line of the user's code."""

import inspect
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import partials as pt
from partials._mixing import first_difference
from partials.capture.known import LAYOUTS
from partials.checks.first import PASSED

N = 6
METHODS = ["auto", "capture", "vmap", "grad", "loop", "forward"]


@pytest.fixture(autouse=True)
def nothing_remembered():
    LAYOUTS.clear()
    PASSED.clear()


class Net(nn.Module):
    """A layer, then what mixes on a line of its own, then a layer."""

    def __init__(self, mix):
        super().__init__()
        self.first, self.mix, self.last = nn.Linear(4, 4), mix, nn.Linear(4, 2)

    def forward(self, x):
        return self.last(self.mix(self.first(x).tanh()))


def centred(h):
    return h - h.mean(0)


def standardised_by_detached_statistics(h):
    return (h - 1) / h.std(0).detach()


def centred_by_detached_statistics(h):
    return h - h.mean(0).detach()


def in_batch_softmax(h):
    return h.softmax(0)


def contrastive(h):
    z = F.normalize(h)
    return (z @ z.T).log_softmax(-1)[:, :4]


def attention_over_samples(h):
    return F.scaled_dot_product_attention(h[None], h[None], h[None])[0]


def rolled(h):
    return h.roll(1, 0)


def ordered(h):
    return h.sort(0).values


def summed_up(h):
    return h.cumsum(0)


def capacity(h):
    """As in a mixture of experts whose capacity is shared by the batch."""
    return h * (h.sum(1).argsort().argsort() < 3)[:, None]


def largest(h):
    return h / h.abs().amax()


def one_pair(h):
    return h + 1e-3 * h.flip(0)


def in_place(h):
    h = h.clone()
    h[1:] += h[:-1].detach() * 0.1
    return h


def folded(h):
    h = h.reshape(2, -1, 4).flip(0)
    return h.reshape(-1, 4)


MIXING = {
    centred: "mean",
    centred_by_detached_statistics: "mean",
    standardised_by_detached_statistics: "std",
    in_batch_softmax: "softmax",
    contrastive: "matmul",
    attention_over_samples: "scaled_dot_product_attention",
    rolled: "roll",
    ordered: "sort",
    summed_up: "cumsum",
    capacity: "argsort",
    largest: "amax",
    one_pair: "flip",
    in_place: "add_",
    folded: "reshape",
}


def line_of(function, operation):
    """The line of the function's body in which the operation is called."""
    lines, start = inspect.getsourcelines(function)
    code = {"matmul": "@", "add_": "+=", "__getitem__": "+="}.get(operation, f"{operation}(")
    return [start + i for i, line in enumerate(lines) if code in line]


@pytest.mark.parametrize("mix", MIXING, ids=lambda f: f.__name__)
@pytest.mark.parametrize("method", METHODS)
def test_the_operation_and_the_line_are_named(mix, method):
    model = Net(mix).double()
    try:
        pt.jacobian(model, torch.randn(N, 4, dtype=torch.float64), method=method, check="always")
        raise AssertionError("no error")
    except pt.MethodError:
        assert method != "auto"  # (some cannot run this function at all)
        return
    except pt.MixingError as error:
        culprit, words = error.culprit, str(error)
    # (for some samples a part that was cut off is already another's)
    assert MIXING[mix] in culprit.operation or (mix is in_place and culprit.operation == "Tensor.__getitem__")
    assert Path(culprit.file) == Path(__file__)
    assert culprit.line in line_of(mix, MIXING[mix])
    assert f"first in {culprit.operation} at {culprit.file}:{culprit.line}" in words


@pytest.mark.parametrize("kind", ["batch norm", "synchronised", "without running statistics"])
def test_batch_norm(kind):
    layer = nn.SyncBatchNorm(4) if kind == "synchronised" else nn.BatchNorm1d(4, track_running_stats=kind == "batch norm")
    model = Net(layer.train(kind != "without running statistics"))
    with pytest.raises(pt.MixingError, match=re.escape(f"in mix ({type(layer).__name__})")) as caught:
        pt.jacobian(model, torch.randn(N, 4))
    assert caught.value.culprit.operation == "F.batch_norm"
    assert "module.eval()" in caught.value.hint or not layer.training


def test_integer_inputs():
    class Tokens(Net):
        def __init__(self):
            super().__init__(centred)
            self.table = nn.Embedding(9, 4)

        def forward(self, tokens):
            return super().forward(self.table(tokens).sum(1))

    with pytest.raises(pt.MixingError, match=r"first in Tensor\.mean"):
        pt.jacobian(Tokens(), torch.randint(9, (N, 3)))


def test_time_first():
    class TimeFirst(Net):
        def forward(self, x):
            return super().forward(x.transpose(0, 1)).sum(0)

    def over_samples(h):
        return h - h.mean(1, keepdim=True)

    with pytest.raises(pt.MixingError) as caught:
        pt.jacobian(TimeFirst(over_samples), torch.randn(N, 3, 4))
    assert caught.value.culprit.line in line_of(over_samples, "mean")


def test_wrt_an_input():
    with pytest.raises(pt.MixingError) as caught:
        pt.jacobian(Net(centred), torch.randn(N, 4), wrt="x", method="grad", check="never")
    assert caught.value.culprit.operation == "Tensor.mean"


def test_a_number_that_only_decides_a_branch_is_not_blamed():
    def branching(h):
        if float(h.detach().mean()) < 1e9:
            return h.roll(1, 0)
        return h

    with pytest.raises(pt.MixingError) as caught:
        pt.jacobian(Net(branching), torch.randn(N, 4))
    assert caught.value.culprit.operation == "Tensor.roll"


def test_a_sum_over_positions_is_not_blamed():
    def both(h):
        h = h - h.mean(1, keepdim=True)
        return h.softmax(0)

    with pytest.raises(pt.MixingError) as caught:
        pt.jacobian(Net(both), torch.randn(4, 4))
    assert caught.value.culprit.operation == "Tensor.softmax"


@pytest.mark.parametrize("mix", [in_batch_softmax, contrastive, rolled, summed_up, largest, folded], ids=lambda f: f.__name__)
def test_a_layout_that_cannot_be_measured_is_looked_into_without_checks_too(mix):
    with pytest.raises(pt.MixingError):
        pt.jacobian(Net(mix), torch.randn(N, 4), check="never")


def test_batch_norm_without_checks():
    with pytest.raises(pt.MixingError, match="BatchNorm1d"):
        pt.jacobian(Net(nn.BatchNorm1d(4)), torch.randn(N, 4), check="never")


@pytest.mark.parametrize("mix", [centred_by_detached_statistics, standardised_by_detached_statistics], ids=lambda f: f.__name__)
def test_detached_statistics_without_checks_are_constants(mix):
    """As the documentation of check="never" says; the first check finds them."""
    model, x = Net(mix).double(), torch.randn(N, 4, dtype=torch.float64)
    J = pt.jacobian(model, x, check="never")
    out = model(x)
    for n in range(N):
        for c in range(2):
            row = torch.autograd.grad(out[n, c], list(model.parameters()), retain_graph=True)
            assert torch.allclose(J.dense()[n, c], torch.cat([g.flatten() for g in row]), rtol=1e-12, atol=1e-14)
    with pytest.raises(pt.MixingError):
        pt.jacobian(model, x)


def test_a_state_made_for_the_batch_is_no_mixing():
    """Zeros of the batch's dtype look as if they depended on samples: their layout cannot be measured, and nothing is mixed."""

    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.first = nn.Linear(4, 4), nn.Linear(3, 4)

        def forward(self, x):
            state = self.layer(x.new_zeros(4))
            return (self.first(x) + state).tanh()

    model = Recurrent()
    J = pt.jacobian(model, torch.randn(N, 3), check="never")
    assert torch.allclose(J.dense(), pt.jacobian(model, torch.randn(N, 3), method="loop").dense()) or J.plan.method
    assert pt.check(model, torch.randn(N, 3), level="full").passed


def test_points_of_derivatives():
    with pytest.raises(pt.MixingError, match="the value at one point depends on other points"):
        pt.derivatives(lambda x: (x - x.mean()) ** 3, "xx")(torch.linspace(0, 1, 7, dtype=torch.float64))


def test_the_trace_itself():
    x = torch.randn(N, 4)
    alike = x[2].expand(N, 4).clone()
    assert first_difference(lambda: x.sin() * 2, lambda: alike.sin() * 2, N, 2) is None
    assert first_difference(lambda: x.sin() - x.sum(0), lambda: alike.sin() - alike.sum(0), N, 2).operation == "Tensor.sum"
