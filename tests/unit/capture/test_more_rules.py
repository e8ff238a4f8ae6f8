"""Rules over random shapes: transposed convolutions, bilinear forms, bags of embeddings, contractions; and what they decline."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st

import partials as pt
from tests.unit.capture.test_rules import SIZES, agrees, draw

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def by_rules(J, *rules):
    """Every use in the native run, by the rules named."""
    assert {use.rule for use in J.plan.uses} == set(rules), J.plan
    assert not any(use.layout == "vmapped" for use in J.plan.uses)


@st.composite
def transposed(draw_):
    d = {key: draw_(st.integers(1, 3)) for key in ("dims", "n", "groups", "i", "o", "stride", "dilation", "k", "size")}
    d["padding"], d["extra"] = draw_(st.integers(0, 2)), draw_(st.integers(0, max(d["stride"], d["dilation"]) - 1))
    assume((d["size"] - 1) * d["stride"] - 2 * d["padding"] + d["dilation"] * (d["k"] - 1) + d["extra"] + 1 > 0)
    return d


@given(d=transposed(), single=st.booleans())
def test_conv_transpose(d, single):
    x = draw(d["n"], d["groups"] * d["i"], *(d["size"],) * d["dims"])
    w, b = draw(d["groups"] * d["i"], d["o"], *(d["k"],) * d["dims"], grad=True), draw(d["groups"] * d["o"], grad=True)

    def f(x, w, b):
        z = TRANSPOSED[d["dims"]](x, w, b, d["stride"], d["padding"], d["extra"], d["groups"], d["dilation"])
        return (z.flatten() if single else z.flatten(1)).sin()[..., :4] * z.cos().sum()

    def apart(x, w, b):
        z = TRANSPOSED[d["dims"]](x, w, b, d["stride"], d["padding"], d["extra"], d["groups"], d["dilation"]).flatten(1)
        return z.sin()[:, :4] * z.cos().sum(1, keepdim=True)

    J = agrees(f, x[0], w, b, batched=False) if single else agrees(apart, x, w, b)
    by_rules(J, "conv", "sum")


@pytest.mark.parametrize("op", [F.conv_transpose2d, F.conv2d])
def test_products_of_convolutions(op):
    x, w = draw(4, 2, 4, 4), draw(2, 2, 3, 3, grad=True)

    def f(x, w):
        return op(x, w, None, 2, 1).flatten(1).sin() @ torch.ones(op(x, w, None, 2, 1)[0].numel(), 2, dtype=x.dtype).cumsum(0).cos()

    J, R = (pt.jacobian(f, x, w, method=m, check="never") for m in ("capture", "loop"))
    v, u, weights = draw(J.shape[-1], 2), draw(*J.values.shape, 2), draw(4)
    for got, want in (
        (J @ v, R @ v),
        (J.T @ u, R.T @ u),
        (J.sum(weights), R.sum(weights)),
        (J.variance(), R.variance()),
        (J.diagonal(), R.diagonal()),
        (J.gram_blocks(), R.gram_blocks()),
        (J[1:3].dense(), R[1:3].dense()),
    ):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


@given(n=st.integers(1, 4), dims=st.integers(1, 3), groups=SIZES, k=st.integers(1, 3))
def test_one_image_without_a_batch_dimension(n, dims, groups, k):
    x, w, b = draw(n, groups * 2, *(4,) * dims), draw(groups, 2, *(k,) * dims, grad=True), draw(groups, grad=True)

    def one(x, w, b):
        return CONV[dims](x, w, b, groups=groups).flatten().sin()[:5]

    by_rules(agrees(one, x[0], w, b, batched=False), "conv", "sum")
    J = agrees(torch.vmap(one, in_dims=(0, None, None)), x, w, b)
    assert {use.rule for use in J.plan.uses} == {"conv", "sum"}


@given(n=st.integers(1, 4), lead=st.lists(SIZES, max_size=2), i=SIZES, j=SIZES, o=SIZES)
def test_bilinear(n, lead, i, j, o):
    w, b = draw(o, i, j, grad=True), draw(o, grad=True)
    by_rules(agrees(lambda x, y, w, b: F.bilinear(x, y, w, b).sin(), draw(n, *lead, i), draw(n, *lead, j), w, b), "outer", "sum")


@given(n=st.integers(1, 4), i=SIZES)
def test_linear_with_a_vector(n, i):
    by_rules(agrees(lambda x, w: F.linear(x, w).sin(), draw(n, i), draw(i, grad=True)), "outer")


@given(n=st.integers(1, 5), t=SIZES, v=st.integers(1, 6), mode=st.sampled_from(["sum", "mean", "max"]), options=st.data())
def test_bags(n, t, v, mode, options):
    index = torch.tensor(options.draw(st.lists(st.lists(st.integers(0, v - 1), min_size=t, max_size=t), min_size=n, max_size=n)))
    padding = options.draw(st.sampled_from([None, 0, -1]))
    weights = draw(n, t) if mode == "sum" and options.draw(st.booleans()) else None

    def f(index, table, weights=None):
        return F.embedding_bag(index, table, mode=mode, padding_idx=padding, per_sample_weights=weights).sin()

    by_rules(agrees(f, index, draw(v, 3, grad=True), *([] if weights is None else [weights])), "gather")


@given(n=st.integers(1, 4), mode=st.sampled_from(["sum", "mean", "max"]), last=st.booleans(), data=st.data())
def test_bags_by_offsets(n, mode, last, data):
    """Samples of different lengths, packed within f: bags of other sizes, empty ones among them."""
    lengths = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=n, max_size=n)))
    index = torch.randint(0, 5, (n, 3))

    def f(index, lengths, table):
        inside = torch.arange(3) < lengths[:, None]
        ends = lengths.cumsum(0)
        offsets = torch.cat([ends.new_zeros(1), ends])
        packed = index[inside]
        return F.embedding_bag(packed, table, offsets if last else offsets[:-1], mode=mode, include_last_offset=last).sin()

    agrees(f, index, lengths, draw(5, 2, grad=True))


EQUATIONS = {
    "ni,io->no": ((3,), (3, 2)),
    "ni,oi->no": ((3,), (2, 3)),
    "nti,io->nto": ((2, 3), (3, 2)),
    "nti,ijk->ntjk": ((2, 3), (3, 2, 2)),
    "nijk,jki->n": ((2, 3, 4), (3, 4, 2)),
    "nthi,hio->ntho": ((2, 3, 4), (3, 4, 2)),
    "nhi,hio->nho": ((3, 4), (3, 4, 2)),
    "nhti,hoi->ntho": ((3, 2, 4), (3, 2, 4)),
    "n...i,io->n...o": ((2, 3), (3, 2)),
    "...i,io": ((3,), (3, 2)),
    "ni,i->ni": ((3,), (3,)),
    "ni,j->nij": ((3,), (2,)),
    "ni,ij->n": ((3,), (3, 2)),
    "nij,i->n": ((3, 2), (3,)),
    "io,ni->on": ((3,), (3, 2)),
    "tni,io->nto": None,
}


@pytest.mark.parametrize("equation", EQUATIONS)
def test_einsum(equation):
    if EQUATIONS[equation] is None:
        x, w, options = draw(2, 5, 3), draw(3, 2, grad=True), {"in_dims": {"x": 1}}
        f = lambda x, w: torch.einsum(equation, x, w).sin()  # noqa: E731
    else:
        a, b = EQUATIONS[equation]
        x, w, options = draw(5, *a), draw(*b, grad=True), {}
        swapped = equation == "io,ni->on"
        f = lambda x, w: (torch.einsum(equation, w, x).T if swapped else torch.einsum(equation, x, w)).sin().flatten(1)  # noqa: E731
        if equation.endswith("->n"):
            f = lambda x, w: torch.einsum(equation, x, w).sin()  # noqa: E731
    J = agrees(f, x, w, **options)
    assert J.plan.method == "capture" and not any(use.layout == "vmapped" for use in J.plan.uses)


def test_einsum_of_several_and_its_kin():
    x, y, w, v = draw(5, 3), draw(5, 3), draw(3, 2, grad=True), draw(2, 3, grad=True)
    for f in (
        lambda x, y, w, v: torch.einsum("ni,io,oj,nj->n", x, w, v, y).sin(),
        lambda x, y, w, v: torch.einsum("ni,nj,io,oj->no", x, y, w, v).sin(),
        lambda x, y, w, v: torch.einsum(x, [0, 1], w, [1, 2], [0, 2]).sin() + (y @ w),
        lambda x, y, w, v: torch.tensordot(x, w, 1).sin() * torch.tensordot(v, y, ([1], [1])).T,
        lambda x, y, w, v: torch.inner(x, v).sin() + torch.inner(v, y).T,
        lambda x, y, w, v: torch.outer(x[:, 0], w[0]) + torch.addmv(x[:, 0], y, w[:, 0], beta=2, alpha=3)[:, None],
        lambda x, y, w, v: torch.linalg.multi_dot([x, w, v, w]).sin(),
        lambda x, y, w, v: torch.einsum("ni,ij->nj", x, w @ v.cos()).sin(),
        lambda x, y, w, v: x.inner(v).sin() + x.index_select(1, torch.tensor([0, 1])) * w.index_select(0, x[:, 0].long().abs() % 3),
    ):
        J = agrees(f, x, y, w, v, in_dims={"x": 0, "y": 0})
        assert not any(use.layout == "vmapped" for use in J.plan.uses), J.plan


@pytest.mark.parametrize("equation", ["nii,io->no", "n1,io->no"])
def test_what_a_contraction_declines_is_done_otherwise(equation):
    x = draw(5, 3, 3) if equation == "nii,io->no" else draw(5, 1)
    agrees_otherwise(lambda x, w: torch.einsum(equation.replace("1", "i"), x, w).sin(), x, draw(3, 2, grad=True))


def agrees_otherwise(f, *inputs):
    J, R = pt.jacobian(f, *inputs), pt.jacobian(f, *inputs, method="loop")
    torch.testing.assert_close(J.dense(), R.dense(), rtol=1e-11, atol=1e-12)
    return J


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_chunked_linear_cross_entropy(reduction):
    options = pytest.importorskip("torch.nn.modules.linear_cross_entropy_options").LinearCrossEntropyOptions(
        batch_chunk_size=2, allow_retain_graph=True
    )

    def f(x, t, w):
        if reduction == "none":
            return F.linear_cross_entropy(x, w, t, reduction="none", options=options)
        return torch.stack([F.linear_cross_entropy(x[n : n + 1], w, t[n : n + 1], reduction="sum", options=options) for n in range(len(x))])

    agrees_otherwise(f, draw(5, 3), torch.randint(0, 4, (5,)), draw(4, 3, grad=True))


@pytest.mark.parametrize("steps", [4, 5])
def test_where_a_users_vmap_puts_samples_is_measured(steps):
    """vmap over tokens, as many as samples: the dimension in front is not the samples'."""
    x, w = draw(4, steps, 3), draw(2, 3, grad=True)
    by_rules(agrees(lambda x, w: torch.vmap(lambda t: F.linear(t, w).sin(), in_dims=1, out_dims=1)(x).sum(1), x, w), "outer")
    agrees(lambda x, w: torch.vmap(lambda n: torch.vmap(lambda t: F.linear(t, w).sin())(n))(x).sum(1), x, w)
    k = draw(2, 1, 2, grad=True)
    agrees(lambda x, k: torch.vmap(lambda t: F.conv1d(t[:, None], k).sin(), in_dims=1, out_dims=1)(x).flatten(1), x, k)
