"""Threads share one module; nothing is swapped in, nothing is hung on it."""

import os
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

import partials as pt

THREADS = 8


class Net(nn.Module):
    """Tied weights, a parametrization, a buffer, in-place operations, attention."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 4, padding_idx=0)
        self.mix = parametrizations.weight_norm(nn.Linear(4, 4))
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 3)
        self.register_buffer("scale", torch.rand(4))

    def forward(self, tokens):
        h = self.table(tokens)
        h = F.scaled_dot_product_attention(self.mix(h), h, h * self.scale).relu_()
        return self.head(self.norm(h @ self.table.weight.T @ self.table.weight).sum(1))


def state(model):
    return {name: (id(t), t._version, t.tolist()) for name, t in (*model.named_parameters(), *model.named_buffers())}


def hammer(work, calls):
    """`work(thread, call)` on every thread at the same time; the first error is raised here."""
    errors = []
    barrier = threading.Barrier(THREADS)

    def run(i):
        try:
            barrier.wait()
            for call in range(calls // THREADS):
                work(i, call)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("calls", [80, pytest.param(2000, marks=pytest.mark.slow)])
def test_eight_threads_on_one_module(calls):
    model = Net()
    batches = [torch.randint(7, (3 + i, 5)) for i in range(THREADS)]
    expected = [pt.jacobian(model, batch, method="loop", check="never").dense() for batch in batches]
    before = state(model)

    def work(i, call):
        method = ("auto", "auto", "auto", "vmap", "loop")[call % 5]
        J = pt.jacobian(model, batches[i], method=method, check="never" if call % 2 else "first")
        dense = J.dense()
        assert (dense - expected[i]).norm() <= 1e-11 * expected[i].norm(), (i, call, method)
        assert (J.norms() - expected[i].norm(dim=-1)).abs().max() <= 1e-11 * expected[i].norm()

    hammer(work, calls)
    assert state(model) == before
    assert torch.is_grad_enabled() and all(p.grad is None for p in model.parameters())


def test_threads_that_fail_leave_the_others_right():
    model = Net()
    tokens = torch.randint(7, (4, 5))
    expected = pt.jacobian(model, tokens, check="never").dense()

    class Broken(Exception):
        pass

    def broken(tokens):
        model(tokens)
        raise Broken

    def work(i, call):
        if i % 2:
            with pytest.raises(Broken):
                pt.jacobian(broken, tokens, params=model)
        else:
            assert torch.equal(pt.jacobian(model, tokens, check="never").dense(), expected)

    hammer(work, 80)


def test_compiled_and_plain_modules_in_threads():
    """The switch that runs compiled code uncompiled is torch's, for all threads: it is back when the last call ends."""
    from torch._dynamo import eval_frame

    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(5, 4)
    expected = pt.jacobian(model, x, check="never").dense()
    before = eval_frame._stance.stance

    def work(i, call):
        assert torch.allclose(pt.jacobian(compiled if i % 2 else model, x, check="never").dense(), expected, rtol=1e-12)

    hammer(work, 80)
    assert eval_frame._stance.stance == before == "default"


def test_a_call_within_a_call():
    """f itself asks for a Jacobian of a part of it."""
    inner, outer = nn.Linear(4, 3), nn.Linear(3, 2)

    def f(x):
        J = pt.jacobian(inner, x.detach(), check="never")
        return outer(inner(x)) + J.norms().sum(1, keepdim=True)

    x = torch.randn(5, 4)
    J = pt.jacobian(f, x, params=nn.ModuleList([inner, outer]))
    plain = pt.jacobian(lambda x: outer(inner(x)), x, params=nn.ModuleList([inner, outer]))
    assert torch.allclose(J.dense(), plain.dense(), rtol=1e-12)


def test_a_forked_process():
    if not hasattr(os, "fork"):
        pytest.skip("no fork here")
    model, x = nn.Linear(4, 2), torch.randn(5, 4)
    expected = pt.jacobian(model, x).dense()
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        same = torch.equal(pt.jacobian(model, x).dense(), expected)
        os.write(writer, b"1" if same else b"0")
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reader, 1) == b"1"
