"""What is remembered of a function serves only a run of the same course: whatever changed behind its back, the rows are right."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import partials as pt
from partials.capture.known import LAYOUTS

N = 6
FLAG = False


def draw(*shape, grad=False):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=grad)


def agrees(f, *inputs, **options):
    """Capture without a check against the loop: nothing but the course stands between a stale layout and a wrong answer."""
    J, R = (pt.jacobian(f, *inputs, method=method, check="never", **options) for method in ("capture", "loop"))
    assert J.names == R.names
    torch.testing.assert_close(J.dense(), R.dense(), rtol=1e-11, atol=1e-13)
    return J


class Sided(nn.Module):
    """Applies its layer to (N, T, I), or with the first two dimensions swapped: sizes do not tell which where T = N."""

    def __init__(self, swapped=False):
        super().__init__()
        self.layer, self.swapped = nn.Linear(4, 3).double(), swapped

    def forward(self, x, swapped=None):
        swapped = self.swapped if swapped is None else swapped
        return sided(x, self.layer.weight, self.layer.bias, swapped)


def sided(x, w, b, swapped):
    h = F.linear(x.transpose(0, 1) if swapped else x, w, b).sin()
    return (h.transpose(0, 1) if swapped else h).sum((1, 2))


def both_ways(call):
    """`call` with each of two ways, there and back, and there again."""
    for swapped in (False, True, False, True):
        call(swapped)


def test_an_attribute_of_the_module():
    model, x = Sided(), draw(N, N, 4)

    def call(swapped):
        model.swapped = swapped
        agrees(model, x)

    both_ways(call)


def test_a_global_a_closure_and_a_keyword():
    layer, x = nn.Linear(4, 3).double(), draw(N, N, 4)

    def by_global(x):
        return sided(x, layer.weight, layer.bias, FLAG)

    def call(swapped):
        global FLAG
        FLAG = swapped
        agrees(by_global, x, params=layer)
        agrees(lambda x: sided(x, layer.weight, layer.bias, swapped), x, params=layer)
        agrees(Sided(), x, swapped=swapped)

    both_ways(call)


def test_default_arguments_and_other_code():
    w, b, x = draw(3, 4, grad=True), draw(3, grad=True), draw(N, N, 4)

    def f(x, w, b, swapped=False):
        return sided(x, w, b, swapped)

    def call(swapped):
        f.__defaults__ = (swapped,)
        agrees(f, x, w, b)

    both_ways(call)
    f.__code__ = (lambda x, w, b, swapped=False: F.linear(x.transpose(0, 1), w, b).sin().transpose(0, 1).sum((1, 2))).__code__
    agrees(f, x, w, b)


def test_a_branch_on_data():
    layer = nn.Linear(4, 3).double()

    def f(x):
        return sided(x, layer.weight, layer.bias, bool(x.sum() > 0))

    x = draw(N, N, 4).abs()
    both_ways(lambda swapped: agrees(f, x if swapped else -x, params=layer))


def test_which_of_two_tensors_an_operation_took():
    """The same operations in the same order: only the flow of data differs."""
    layer, x = nn.Linear(4, 3).double(), draw(N, N, 4)

    def f(x, swapped):
        turned, plain = x.transpose(0, 1), x.clone()
        h = layer(turned if swapped else plain).sin()
        turned, plain = h.transpose(0, 1), h.clone()
        return (turned if swapped else plain).sum((1, 2))

    both_ways(lambda swapped: agrees(f, x, params=layer, swapped=swapped))


def test_dimensions_in_a_list_a_slice_and_a_string():
    layer, x = nn.Linear(4, 3).double(), draw(N, N, 4)

    def permuted(x, swapped):
        order = (1, 0, 2) if swapped else (0, 1, 2)
        return layer(x.permute(*order)).sin().permute(*order).sum((1, 2))

    def by_letters(x, swapped):
        h = layer(torch.einsum("nti->tni" if swapped else "nti->nti", x)).sin()
        return torch.einsum("tno->n" if swapped else "nto->n", h)

    for f in (permuted, by_letters):
        both_ways(lambda swapped, f=f: agrees(f, x, params=layer, swapped=swapped))


def test_other_sizes_and_other_folds():
    torch.manual_seed(0)
    layer = nn.Linear(4, 3).double()

    def folded(x, swapped):
        n, t = x.shape[:2]
        flat = (x.transpose(0, 1) if swapped else x).reshape(n * t, 4)
        h = layer(flat).sin()
        return (h.view(t, n, 3).transpose(0, 1) if swapped else h.view(n, t, 3)).sum((1, 2))

    for n, t in ((4, 4), (5, 3), (3, 5), (4, 8), (8, 4), (2, 4), (1, 3), (6, 1)):
        for swapped in (False, True):
            agrees(folded, draw(n, t, 4), params=layer, swapped=swapped)


def test_requires_grad_train_flags_dtype_and_replaced_parameters():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double().eval()
    x = draw(N, 4)
    agrees(net, x)
    net[0].weight.requires_grad_(False)
    assert "0.weight" not in agrees(net, x).names
    net[0].weight.requires_grad_(True)
    net[3].weight = nn.Parameter(draw(3, 5))
    agrees(net, x)
    net[3] = nn.Linear(5, 2).double()
    assert agrees(net, x).out == (2,)
    net.train()
    with pytest.raises(pt.PartialsError):  # (batch statistics mix the samples)
        pt.jacobian(net, x, check="always")
    net.eval().float()
    assert pt.jacobian(net, x.float(), check="always").dtype == torch.float32
    net.double()
    agrees(net, x)


def test_values_are_no_part_of_a_course():
    layer, x = nn.Linear(4, 3).double(), draw(N, N, 4)
    LAYOUTS.clear()
    for temperature in (1.0, 2.0, 3):
        agrees(lambda x, t=temperature: (layer(x) * t).sin().sum((1, 2)) / t, x, params=layer)
    assert len(LAYOUTS.entries) == 1


def test_what_is_remembered_is_used_again(monkeypatch):
    from partials.capture import engine

    measured = []
    real = engine._measure
    monkeypatch.setattr(engine, "_measure", lambda *args: measured.append(1) or real(*args))
    LAYOUTS.clear()
    model = Sided()
    for n, t in ((5, 3), (7, 3), (5, 4), (6, 4)):
        agrees(model, draw(n, t, 4))
    assert len(measured) == 1


def test_a_vmap_of_the_users_over_what_is_no_sample():
    w = draw(3, 4, grad=True)
    for t in (5, N):
        agrees(lambda x, w: torch.vmap(lambda xt: F.linear(xt, w).sin(), in_dims=1, out_dims=1)(x).sum((1, 2)), draw(N, t, 4), w)
        agrees(lambda x, w: torch.vmap(lambda xn: F.linear(xn, w).sin())(x).sum((1, 2)), draw(N, t, 4), w)
        agrees(
            lambda x, w: torch.vmap(lambda xk: (xk * w).sin().sum((0, 2)))(x).sum(0),
            draw(3, N, N, 4),
            draw(4, grad=True),
            in_dims=(2, None),
        )


def test_threads_take_different_courses():
    model, x = nn.Linear(4, 3).double(), draw(N, N, 4)
    right = {s: agrees(lambda x, s=s: sided(x, model.weight, model.bias, s), x, params=model).dense() for s in (False, True)}
    wrong = []

    def work(swapped):
        for _ in range(20):
            J = pt.jacobian(lambda x: sided(x, model.weight, model.bias, swapped), x, params=model, check="never")
            wrong.extend([] if torch.allclose(J.dense(), right[swapped], rtol=1e-11) else [swapped])

    workers = [threading.Thread(target=work, args=(i % 2 == 0,)) for i in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_nothing_is_left_on_the_users_tensors():
    layer, x = nn.Linear(4, 3).double(), draw(N, 4)
    agrees(lambda x: layer(x.contiguous().to(x.dtype)), x, params=layer)
    assert not vars(x)
    assert not vars(layer.weight)
