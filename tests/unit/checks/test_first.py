"""When checks run: policies, what counts as new, and what is remembered."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

import partials as pt
from partials.checks import first
from partials.checks.first import ENOUGH, PASSED, Passed, key_of
from partials.checks.report import Report


class Counted(nn.Module):
    """A layer that counts how often it is called."""

    def __init__(self, rows=3):
        super().__init__()
        self.layer, self.calls = nn.Linear(rows, 2), [0]

    def forward(self, x):
        self.calls[0] += 1
        return self.layer(x).tanh()


@pytest.fixture
def inspected(monkeypatch):
    """How often a check ran."""
    counts = [0]
    inspect = first.inspect

    def counting(*args):
        counts[0] += 1
        return inspect(*args)

    monkeypatch.setattr(first, "inspect", counting)
    return counts


def test_first_checks_once_and_always_checks_always(inspected):
    net, x = Counted(), torch.randn(4, 3)
    for policy, expected in (("never", 0), ("first", 1), ("first", 1), ("always", 2), ("always", 3), ("first", 3)):
        pt.jacobian(net, x, check=policy)
        assert inspected[0] == expected


def test_a_passed_check_costs_no_call_of_f():
    net, x = Counted(), torch.randn(4, 3)

    def calls(**options):
        net.calls[0] = 0
        pt.jacobian(net, x, method="grad", **options)
        return net.calls[0]

    never = calls(check="never")
    assert calls() > never
    assert calls() == never
    assert calls(check="always") > never


def test_unknown_policies_are_refused():
    with pytest.raises(pt.InputError, match="check='sometimes' is unknown"):
        pt.jacobian(Counted(), torch.randn(4, 3), check="sometimes")
    with pytest.raises(pt.InputError, match="level='thorough' is unknown"):
        pt.check(Counted(), torch.randn(4, 3), level="thorough")


def test_a_fresh_lambda_of_the_same_code_is_not_new(inspected):
    for k in range(1, 6):
        a = torch.randn(3, requires_grad=True)
        pt.jacobian(lambda x, a: k * a * x, torch.randn(4, 3), a)  # noqa: B023 - the lambda is used at once
    assert inspected[0] == 1


def test_sizes_of_samples_and_inputs_are_not_new(inspected):
    a = torch.randn((), requires_grad=True)
    for shape in ((4, 3), (7, 3), (7, 5), (2, 5)):
        pt.jacobian(lambda x, a: (a * x).sum(1), torch.randn(shape), a)
    assert inspected[0] == 1


def new(inspected, call):
    """Whether a call is checked."""
    before = inspected[0]
    call()
    return inspected[0] > before


def test_what_is_new(inspected):
    x, a = torch.randn(4, 3), torch.randn(3, requires_grad=True)
    shift = [0]

    def f(x, a):
        return a * x + shift[0]

    assert new(inspected, lambda: pt.jacobian(f, x, a))
    assert not new(inspected, lambda: pt.jacobian(f, x, a))
    assert new(inspected, lambda: pt.jacobian(f, x, a, method="loop"))
    assert new(inspected, lambda: pt.jacobian(f, x.double(), a.detach().double().requires_grad_()))
    assert new(inspected, lambda: pt.jacobian(lambda x, a: a * x - 1, x, a))
    assert new(inspected, lambda: pt.jacobian(f, x, a, wrt="x", in_dims={"x": 0}))
    assert new(inspected, lambda: pt.jacobian(f, x, torch.randn(1, requires_grad=True)))
    assert new(inspected, lambda: pt.jacobian(f, x, a, create_graph=True))
    assert new(inspected, lambda: pt.jacobian(f, x[:1], a))  # one sample tells nothing of mixing
    assert not new(inspected, lambda: pt.jacobian(f, x[:2], a))


def test_modules_are_told_apart_by_structure_settings_and_training(inspected):
    x = torch.randn(4, 1, 5, 5)

    def net(mode="zeros", *more):
        return nn.Sequential(nn.Conv2d(1, 2, 3, padding=1, padding_mode=mode), *more, nn.Flatten())

    one = net()
    assert new(inspected, lambda: pt.jacobian(one, x))
    assert not new(inspected, lambda: pt.jacobian(net(), x))
    assert new(inspected, lambda: pt.jacobian(net("circular"), x))
    assert new(inspected, lambda: pt.jacobian(net("zeros", nn.Tanh()), x))
    assert new(inspected, lambda: pt.jacobian(one.eval(), x))


def test_the_code_behind_a_name_counts(inspected):
    x, a = torch.randn(4, 3), torch.randn(3, requires_grad=True)

    def made(activation):
        return lambda x, a: activation(a * x)

    def tanh(x):
        return x.tanh()

    def sine(x):
        return x.sin()

    assert new(inspected, lambda: pt.jacobian(made(tanh), x, a))
    assert not new(inspected, lambda: pt.jacobian(made(tanh), x, a))
    assert new(inspected, lambda: pt.jacobian(made(sine), x, a))
    net = nn.Linear(3, 2)
    assert new(inspected, lambda: pt.jacobian(lambda x: net(x), x, params=net))


def test_rows_of_zeros_alone_are_looked_at_again(inspected):
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    nn.init.zeros_(net[2].weight)
    x = torch.randn(4, 3)
    pt.jacobian(net, x)
    with torch.no_grad():
        net[2].weight.normal_()
    assert new(inspected, lambda: pt.jacobian(net, x))
    assert not new(inspected, lambda: pt.jacobian(net, x))


def test_rows_that_stay_zero_are_looked_at_a_few_times_only(inspected):
    a, b = torch.randn(3, requires_grad=True), torch.zeros((), requires_grad=True)
    for _ in range(6):
        pt.jacobian(lambda x, a, b: x * a * b, torch.randn(4, 3), a, b)
    assert inspected[0] == ENOUGH


def test_no_samples_are_not_remembered(inspected):
    a = torch.randn(3, requires_grad=True)
    for samples in (0, 0, 4):
        pt.jacobian(lambda x, a: a * x, torch.randn(samples, 3), a)
    assert inspected[0] == 1


def test_the_memory_is_bounded():
    passed, report = Passed(size=3), Report("f", "vmap", "quick", 1, (), "float32", 0)
    for key in "abcd":
        passed.add(key, report)
    assert "a" not in passed and all(key in passed for key in "bcd")
    passed.clear()
    assert "d" not in passed


def test_threads_share_the_memory():
    net, x, wrong = Counted(), torch.randn(4, 3), []

    def work():
        try:
            for _ in range(5):
                pt.jacobian(net, x, check="first")
        except BaseException as error:  # what a thread raises is lost otherwise
            wrong.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(PASSED.counts) == 1


def test_keys_are_hashable_for_all_kinds_of_callables():
    import functools

    from partials._api import _problem

    class Callable:
        def __call__(self, x, a):
            return a * x

        def method(self, x, a):
            return a * x

    x, a = torch.randn(4, 3), torch.randn(3, requires_grad=True)
    one_sample = torch.vmap(torch.mul, in_dims=(0, None))
    callables = [Callable(), Callable().method, functools.partial(lambda x, a, k: k * a * x, k=2), torch.mul, one_sample]
    keys = [key_of(_problem(f, (x, a), {}), "grad", x.dtype) for f in callables]
    assert len({hash(key) for key in keys}) == len(callables)
