"""The conformance suite: built-in rules, blocks, methods pass it, and every kind of error is found by it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import partials as pt
from partials._blocks import Dense
from partials._conv import Conv
from partials._factors import Outer
from partials._gather import Gather
from partials._run import NAMES
from partials.rules import RULES, OuterPart, SumPart
from partials.testing import CASES, check_block, check_call, check_jacobian, check_method, check_rule

pytestmark = [
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
    pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),
]


def data(*shape):
    return torch.randn(shape, dtype=torch.float64)


def parameter(*shape):
    return data(*shape).requires_grad_()


def index(high, *shape):
    return torch.randint(high, shape)


N = 4
BUILT_IN = {
    "linear": (F.linear, lambda: ((data(N, 3), parameter(2, 3), parameter(2)), {})),
    "linear on tokens": (F.linear, lambda: ((data(N, 5, 3), parameter(2, 3)), {})),
    "linear, time first": (F.linear, lambda: ((data(5, N, 3), parameter(2, 3), parameter(2)), {"dims": {0: 1}, "out_dim": 1})),
    "linear, as many steps as samples": (F.linear, lambda: ((data(N, N, 3), parameter(2, 3)), {"dims": {0: 1}, "out_dim": 1})),
    "linear by keyword": (F.linear, lambda: ((data(N, 3),), {"weight": parameter(2, 3), "bias": parameter(2)})),
    "matmul": (torch.matmul, lambda: ((data(N, 5, 3), parameter(3, 2)), {})),
    "matmul from the left": (torch.matmul, lambda: ((parameter(2, 5), data(N, 5, 3)), {})),
    "mm, columns": (torch.mm, lambda: ((parameter(2, 3), data(3, N)), {"dims": {1: 1}, "out_dim": 1})),
    "mv": (torch.mv, lambda: ((data(N, 3), parameter(3)), {})),
    "bmm": (torch.bmm, lambda: ((data(5, N, 3), parameter(5, 3, 2)), {"dims": {0: 1}, "out_dim": 1})),
    "addmm": (torch.addmm, lambda: ((parameter(2), data(N, 3), parameter(3, 2)), {"beta": 2.0, "alpha": 0.5})),
    "conv1d": (torch.conv1d, lambda: ((data(N, 4, 9), parameter(6, 2, 3), parameter(6), 2, 1, 2, 2), {})),
    "conv2d": (torch.conv2d, lambda: ((data(N, 2, 6, 5), parameter(3, 2, 2, 3), parameter(3)), {"stride": (2, 1)})),
    "conv2d, same": (torch.conv2d, lambda: ((data(N, 2, 6, 5), parameter(3, 2, 2, 3)), {"padding": "same"})),
    "conv3d": (torch.conv3d, lambda: ((data(N, 2, 4, 4, 4), parameter(4, 1, 2, 2, 2)), {"groups": 2})),
    "embedding": (F.embedding, lambda: ((index(6, N, 3), parameter(6, 2)), {"padding_idx": 1})),
    "rows by index": (torch.Tensor.__getitem__, lambda: ((parameter(6, 2), index(6, N, 3)), {})),
    "layer norm": (F.layer_norm, lambda: ((data(N, 5, 3), (3,), parameter(3), parameter(3)), {})),
    "rms norm": (F.rms_norm, lambda: ((data(N, 5, 3), (3,), parameter(3)), {})),
    "group norm": (F.group_norm, lambda: ((data(N, 4, 3), 2, parameter(4), parameter(4)), {})),
    "instance norm": (F.instance_norm, lambda: ((data(N, 4, 3),), {"weight": parameter(4), "bias": parameter(4)})),
    "batch norm": (
        F.batch_norm,
        lambda: ((data(N, 4, 3), data(4), data(4).exp(), parameter(4), parameter(4)), {"dims": {1: None, 2: None}}),
    ),
    "prelu": (F.prelu, lambda: ((data(N, 4, 3), parameter(4)), {})),
    "mul": (torch.mul, lambda: ((data(N, 4, 3), parameter(3)), {})),
    "where": (torch.where, lambda: ((data(N, 3) > 0, data(N, 3), parameter(3)), {})),
}


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_rule(name):
    operation, arguments = BUILT_IN[name]
    args, kwargs = arguments()
    assert check_rule(operation, *args, **kwargs).passed


@pytest.mark.parametrize("method", NAMES)
def test_method(method):
    found = check_method(method)
    assert set(found) >= {name for name, case in CASES.items() if method not in case.refuses}


def conv(groups=1, frames=1, dilation=1):
    a, w = data(3, frames, 2 * groups, 7, 6), data(4 * groups, 2, 3, 2)
    z = F.conv2d(a.flatten(0, 1), w, stride=(2, 1), padding=1, dilation=dilation, groups=groups)
    g = data(3, 2, frames, *z.shape[1:])
    return Conv(a, g, tuple(w.shape), (2, 1), ((1, 1), (1, 1)), (dilation, dilation), groups)


BLOCKS = {
    "dense": lambda: Dense(data(3, 2, 4, 5)),
    "outer": lambda: Outer(data(3, 1, 1, 5), data(3, 2, 1, 1, 4), (4, 5)),
    "outer, positions": lambda: Outer(data(3, 6, 1, 5), data(3, 2, 6, 1, 4), (4, 5)),
    "outer, many positions": lambda: Outer(data(3, 40, 1, 5), data(3, 1, 40, 1, 4), (4, 5)),
    "outer, groups": lambda: Outer(data(3, 6, 2, 5), data(3, 2, 6, 2, 4), (2, 5, 4), "io"),
    "gather": lambda: Gather(index(6, 3, 5) - 1, data(3, 2, 5, 4), (5, 4)),
    "conv": conv,
    "conv, groups": lambda: conv(groups=3),
    "conv, frames, dilated": lambda: conv(frames=2, dilation=2),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_block(name):
    assert check_block(BLOCKS[name]()).passed


# --- what is wrong is found --------------------------------------------------------------------------------------


def product(x, w, b):
    return x @ w.T + b


PRODUCT = torch.overrides.wrap_torch_function(lambda x, w, b: (x, w, b))(product)

WRONG = {
    "a factor": lambda x, w, b: [OuterPart(w, x, scale=1.0001), SumPart(b)],
    "a sign": lambda x, w, b: [OuterPart(w, x), SumPart(b, scale=-1.0)],
    "samples in another order": lambda x, w, b: [OuterPart(w, x.flip(0)), SumPart(b)],
    "features in another order": lambda x, w, b: [OuterPart(w, x.flip(-1)), SumPart(b)],
    "half precision": lambda x, w, b: [OuterPart(w, x.half()), SumPart(b)],
    "a factor for each sample": lambda x, w, b: [OuterPart(w, x), SumPart(b, lambda x: 1 + 1e-3 * (x @ x.new_ones(3, 2)), (x,))],
}


@pytest.fixture
def rule_for_product():
    yield pt.rule(PRODUCT)
    del RULES[PRODUCT]


@pytest.mark.parametrize("name", WRONG)
def test_wrong_rule_is_found(name, rule_for_product):
    rule_for_product(WRONG[name])
    with pytest.raises(pt.CheckError, match="the rule of product breaks a law") as caught:
        check_rule(PRODUCT, data(N, 3), parameter(2, 3), parameter(2))
    report = caught.value.report
    assert not report.passed and "BROKEN" in str(report) and not report.to_dict()["passed"]


def test_right_rule_passes(rule_for_product):
    rule_for_product(lambda x, w, b: [OuterPart(w, x), SumPart(b)])
    report = check_rule(PRODUCT, data(N, 3), parameter(2, 3), parameter(2))
    assert report.passed and "all hold" in str(report)


def test_operation_without_a_rule():
    with pytest.raises(pt.InputError, match="cross was not captured by a rule"):
        check_rule(torch.linalg.cross, data(N, 3), parameter(1, 3))


def test_nothing_to_differentiate():
    with pytest.raises(pt.InputError, match="nothing to hold a rule to"):
        check_rule(F.linear, data(N, 3), data(2, 3))


class _Off:
    """A method of a block that is off by a part in a million."""

    def __init__(self, name):
        self.name = name

    def __call__(self, plain):
        return lambda block, *rest, **options: scaled(plain(block, *rest, **options))


def scaled(found):
    return found * (1 + 1e-6) if isinstance(found, torch.Tensor) else found.scaled(found.dense().new_full(found.rows, 1 + 1e-6))


@pytest.mark.parametrize(
    "quantity",
    ["matmul", "rmatmul", "squared_norms", "inner", "gram", "own_gram", "weighted_sum", "products", "scatter", "scaled", "mixed", "select"],
)
def test_wrong_algebra_is_found(quantity, monkeypatch):
    block = BLOCKS["outer, positions"]()
    monkeypatch.setattr(Outer, quantity, _Off(quantity)(getattr(Outer, quantity)))
    if quantity in ("scaled", "select", "mixed"):
        monkeypatch.setattr("tests.unit.testing.test_suite.scaled", lambda found: replace(found, g=found.g * (1 + 1e-6)))
    with pytest.raises(pt.CheckError, match="the block Outer breaks a law"):
        check_block(block)


@pytest.mark.parametrize("quantity", ["gram", "norms", "sum", "diagonal", "variance", "gram_blocks"])
def test_wrong_quantity_is_found(quantity, monkeypatch):
    J = CASES["mlp"].make().jacobian()
    plain = getattr(type(J), quantity)
    monkeypatch.setattr(type(J), quantity, lambda self, *rest: plain(self, *rest) * (1 + 1e-6))
    with pytest.raises(pt.CheckError):
        check_jacobian(J)


def test_samples_that_mix_are_found():
    call = CASES["scalar_output"].make()
    mixed = replace(call, f=lambda x, w, b: call.f(x - x.mean(0, keepdim=True), w, b))
    with pytest.raises(pt.PartialsError):
        check_call(mixed, "backward")
