"""Rules over random shapes, and the door by which users add their own."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import partials as pt
from partials.rules import ELEMENTWISE, RULES, OuterPart, SumPart

SIZES = st.integers(1, 4)


def agrees(f, *inputs, **options):
    J = pt.jacobian(f, *inputs, method="capture", check="never", **options)
    R = pt.jacobian(f, *inputs, method="loop", check="never", **options)
    scale = R.norms().max() + 1e-300
    assert (J.dense() - R.dense()).abs().max() <= 1e-11 * scale
    assert (J.norms() - R.norms()).abs().max() <= 1e-11 * scale
    assert (J.gram() - R.gram()).abs().max() <= 1e-11 * scale**2
    return J


def draw(*shape, grad=False):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=grad)


@given(n=st.integers(1, 5), lead=st.lists(SIZES, max_size=2), i=SIZES, o=SIZES, bias=st.booleans())
def test_linear(n, lead, i, o, bias):
    agrees(lambda x, w, b=None: F.linear(x, w, b).sin(), draw(n, *lead, i), draw(o, i, grad=True), *([draw(o, grad=True)] if bias else []))


@given(
    n=st.integers(1, 4),
    groups=SIZES,
    i=SIZES,
    o=SIZES,
    k=SIZES,
    stride=SIZES,
    padding=st.integers(0, 2),
    dilation=st.integers(1, 2),
    dims=st.integers(1, 3),
)
def test_conv(n, groups, i, o, k, stride, padding, dilation, dims):
    size = dilation * (k - 1) + 1 + stride
    f = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[dims]
    weight = draw(groups * o, i, *(k,) * dims, grad=True)
    agrees(
        lambda x, w, b: f(x, w, b, stride, padding, dilation, groups).flatten(1).sin().sum(1),
        draw(n, groups * i, *(size,) * dims),
        weight,
        draw(groups * o, grad=True),
    )


@given(n=st.integers(1, 5), t=SIZES, v=st.integers(1, 6), e=SIZES, padding=st.booleans(), data=st.data())
def test_embedding(n, t, v, e, padding, data):
    index = torch.tensor(data.draw(st.lists(st.lists(st.integers(0, v - 1), min_size=t, max_size=t), min_size=n, max_size=n)))
    agrees(lambda i, w: F.embedding(i, w, padding_idx=0 if padding else None).sin().sum((1, 2)), index, draw(v, e, grad=True))


@given(n=st.integers(1, 4), t=SIZES, f=st.integers(2, 5))
def test_norms(n, t, f):
    w, b = draw(f, grad=True), draw(f, grad=True)
    agrees(lambda x, w, b: F.layer_norm(x, (f,), w, b).sin().sum(1), draw(n, t, f), w, b)
    agrees(lambda x, w: F.rms_norm(x, (f,), w).sin().sum(1), draw(n, t, f), w)
    agrees(lambda x, w, b: F.group_norm(x, f, w, b).sin().sum((1, 2)), draw(n, f, t + 1), w, b)


@given(n=st.integers(1, 4), b=SIZES, t=SIZES, i=SIZES, o=SIZES)
def test_products(n, b, t, i, o):
    agrees(lambda x, w: (x @ w).sin().sum(1), draw(n, t, i), draw(i, o, grad=True))
    agrees(lambda x, w: (w @ x).sin().sum(1), draw(n, i, t), draw(o, i, grad=True))
    agrees(lambda x, w: (x @ w).sin().sum((1, 2)), draw(n, b, t, i), draw(b, i, o, grad=True))
    agrees(lambda x, w: (w @ x).sin().sum((1, 2)), draw(n, b, i, t), draw(b, o, i, grad=True))
    agrees(lambda x, w: x @ w, draw(n, t, i), draw(i, grad=True))


@given(n=st.integers(1, 4), shape=st.lists(SIZES, min_size=1, max_size=3), cut=st.integers(0, 3), ones=st.integers(0, 7))
def test_entry_by_entry(n, shape, cut, ones):
    kept = shape[min(cut, len(shape)) :]
    theta = torch.randn([1 if ones >> d & 1 else size for d, size in enumerate(kept)], dtype=torch.float64, requires_grad=True)
    agrees(lambda x, p: (x * p + p.sin() / (2 + x.sin()) - torch.where(x > 0, p, x)).flatten(1).sum(1), draw(n, *shape), theta)


def test_users_extend_by_the_same_door():
    def doubled(x, w):
        return 2 * torch.nn.functional.linear(x, w)

    wrapped = torch.overrides.wrap_torch_function(lambda x, w: (x, w))(doubled)
    pt.rule(wrapped)(lambda x, w: iter([OuterPart(w, x, scale=2.0)]))
    try:
        J = agrees(lambda x, w: wrapped(x, w).sin(), draw(5, 3), draw(2, 3, grad=True))
        assert "doubled" in J.plan.uses[0].operation
    finally:
        del RULES[wrapped]


def test_a_wrong_rule_is_found_by_the_check():
    def scaled(x, w):
        return torch.nn.functional.linear(x, w)

    wrapped = torch.overrides.wrap_torch_function(lambda x, w: (x, w))(scaled)
    pt.rule(wrapped)(lambda x, w: iter([OuterPart(w, x, scale=1.001)]))
    try:
        with pytest.raises(pt.CheckError):
            pt.jacobian(lambda x, w: wrapped(x, w).sin(), draw(5, 3), draw(2, 3, grad=True), check="always")
    finally:
        del RULES[wrapped]


def test_a_second_rule_needs_override():
    with pytest.raises(pt.InputError, match="has a rule already") as caught:
        pt.rule(F.linear)(lambda x, w: iter(()))
    assert "override=True" in str(caught.value)
    kept = RULES[F.linear]
    pt.rule(F.linear, override=True)(kept)
    assert RULES[F.linear] is kept


def test_what_is_no_operation_is_refused():
    with pytest.raises(pt.InputError, match="a rule belongs to an operation"):
        pt.rule("linear")


def test_the_tables_do_not_overlap():
    assert not ELEMENTWISE & set(RULES)
    assert SumPart is not OuterPart
