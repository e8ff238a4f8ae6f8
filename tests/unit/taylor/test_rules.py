"""Every jet rule against nested reverse mode in float64: derivatives to the fourth order, and the parameter gradients of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from partials._errors import CheckError, MethodError
from partials.taylor import derivatives, engine, laplacian, series
from partials.taylor.nested import Slot, nested
from partials.taylor.specs import Term
from partials.taylor.table import JET_RULES

F64 = torch.float64
TERMS = (
    Term((), (0, 0, 1, 2)),
    Term((), (1, 1, 1, 1)),
    Term(((0, 1, 2), (0, 1, 2)), ()),
    Term(((0, 1),), (2,)),
    Term((), (0, 1)),
    Term((), (2,)),
    Term(((0, 1, 2),), ()),
)
SLOTS = (Slot(0, 0), Slot(0, 1), Slot(0, 2))
Function = Callable[[Tensor], Tensor]


def layers() -> tuple[nn.Module, nn.Module]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Linear(3, 4).double(), nn.Linear(4, 1).double()


FIRST, LAST = layers()
X = torch.randn(7, 3, dtype=F64, generator=torch.Generator().manual_seed(1))


def square(z: Tensor) -> Tensor:
    return z.view(7, 2, 2) + 2 * torch.eye(2, dtype=F64)


def written(z: Tensor) -> Tensor:
    y = z.sin()
    y[:, 0] = z[:, 1] * z[:, 2]
    y[:, 1] = 1.5
    y[..., 2:] = 2 * z[..., 2:]
    return y * z


def recurrent(name: str, *, cell: bool, **options: Any) -> Function:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if cell:
            one = getattr(nn, f"{name}Cell")(4, 4).double()
            return lambda z: one(z)[0] * z if name == "LSTM" else one(z) * z
        layers = getattr(nn, name)(2, 4, batch_first=True, **options).double()
        return lambda z: layers(z.view(7, 2, 2))[0][:, :, :4].sum(1) * layers(z.view(7, 2, 2))[0][:, -1, -4:]


W = torch.eye(4, dtype=F64) + 0.1
RULES: dict[str, Function] = {
    **{
        name: getattr(torch, name)
        for name in ("tanh", "sin", "cos", "exp", "exp2", "expm1", "sigmoid", "erf", "erfc", "atan", "sinh", "cosh", "asinh")
    },
    **{
        name: getattr(F, name)
        for name in ("softplus", "silu", "gelu", "mish", "elu", "selu", "logsigmoid", "softsign", "tanhshrink", "hardswish")
    },
    **{name: getattr(F, name) for name in ("relu", "leaky_relu", "hardtanh", "relu6", "softshrink", "hardshrink")},
    "gelu tanh": lambda z: F.gelu(z, approximate="tanh"),
    "softplus beta": lambda z: F.softplus(z, 2.0, 3.0),
    "celu": lambda z: F.celu(z, 2.0),
    "abs": torch.abs,
    "tan": lambda z: torch.tan(0.3 * z),
    "log": lambda z: torch.log(z * z + 1),
    "log10": lambda z: torch.log10(2 + torch.sin(z)),
    "log1p": lambda z: torch.log1p(z * z),
    "sqrt": lambda z: (z * z + 0.5).sqrt(),
    "rsqrt": lambda z: torch.rsqrt(z * z + 0.5),
    "reciprocal": lambda z: 1 / (z * z + 1),
    "whole power": lambda z: z**3,
    "power": lambda z: (z * z + 1) ** 2.5,
    "power of a number": lambda z: 2.0**z,
    "power of a power": lambda z: (1.5 + torch.sin(z)) ** z,
    "powers by a tensor": lambda z: (z * z + 1) ** torch.tensor([0.5, 1.0, 2.0, -1.5], dtype=F64),
    "asin": lambda z: torch.asin(0.2 * torch.sin(z)),
    "acos": lambda z: torch.acos(0.2 * torch.sin(z)),
    "acosh": lambda z: torch.acosh(2 + z * z),
    "atanh": lambda z: torch.atanh(0.3 * torch.sin(z)),
    "softmax": lambda z: torch.softmax(z, -1),
    "log_softmax": lambda z: F.log_softmax(z, -1),
    "logsumexp": lambda z: torch.logsumexp(z, -1, keepdim=True).expand(-1, 4),
    "norm": lambda z: z.norm(dim=-1, keepdim=True).expand(7, 4),
    "1-norm": lambda z: z * torch.linalg.vector_norm(z, ord=1, dim=-1, keepdim=True),
    "normalize": lambda z: F.normalize(z, dim=-1),
    "layer_norm": lambda z: F.layer_norm(z, (4,), z.new_tensor([1.0, 2.0, 3.0, 4.0]), z.new_ones(4)),
    "group_norm": lambda z: F.group_norm(z, 2, z.new_tensor([1.0, 2.0, 3.0, 4.0])),
    "instance_norm": lambda z: F.instance_norm(z[:, None])[:, 0],
    "rms_norm": lambda z: F.rms_norm(z, (4,)),
    "batch_norm": lambda z: F.batch_norm(z, torch.ones(4, dtype=F64), 2 * torch.ones(4, dtype=F64)) ** 2,
    "product": lambda z: z * z.flip(-1),
    "quotient": lambda z: z / (2 + z.roll(1, -1) ** 2),
    "where": lambda z: torch.where(z > 0, z**2, torch.sin(z)),
    "clamp": lambda z: z.clamp(-0.5, 0.5) * z,
    "maximum": lambda z: torch.maximum(z, z**2) + torch.minimum(z, 0.1 * z**3),
    "max": lambda z: z.max(-1, keepdim=True).values * z,
    "sort": lambda z: z.sort(-1).values * z,
    "matmul": lambda z: (z[:, :, None] @ z[:, None, :]).sum(-1),
    "constant matmul": lambda z: (torch.ones(4, 4, dtype=F64).tril() @ z[..., None].tanh()).squeeze(-1),
    "einsum": lambda z: torch.einsum("ni,nj->nj", z, torch.sin(z)),
    "constant einsum": lambda z: torch.einsum("ni,ij->nj", z.sin(), torch.ones(4, 4, dtype=F64).triu()),
    "baddbmm": lambda z: torch.baddbmm(z[:, None], z[:, None], torch.ones(7, 4, 4, dtype=F64), alpha=0.5)[:, 0] ** 2,
    "conv": lambda z: F.conv1d(z[:, None], torch.ones(1, 1, 3, dtype=F64), torch.ones(1, dtype=F64), padding=1)[:, 0] ** 2,
    "avg_pool": lambda z: z * F.avg_pool1d(z[:, None], 2)[:, 0].repeat_interleave(2, -1),
    "max_pool": lambda z: z * F.max_pool1d(z[:, None], 2)[:, 0].repeat_interleave(2, -1),
    "attention": lambda z: F.scaled_dot_product_attention(z[:, None, :, None], z.tanh()[:, None, :, None], z[:, None, :, None])[:, 0, :, 0],
    "std": lambda z: z.std(-1, keepdim=True) * z,
    "mean": lambda z: z**2 * z.mean(-1, keepdim=True),
    "cumsum": lambda z: z.cumsum(-1) ** 2,
    "prod": lambda z: z.prod(-1, keepdim=True) * z,
    "cat and stack": lambda z: torch.cat([torch.stack([z[..., 0], z[..., 1]], -1), z[:, 2:]], -1).tanh(),
    "pad": lambda z: F.pad(z, (1, 0), value=2.0)[:, :4] * z,
    "chunk": lambda z: torch.cat(z.chunk(2, -1)[::-1], -1) * z,
    "views": lambda z: z.view(7, 2, 2).transpose(1, 2).flatten(1).unflatten(1, (2, 2)).permute(0, 2, 1).reshape(-1, 4) ** 2,
    "gather": lambda z: z.gather(1, torch.tensor([[3, 2, 1, 0]]).expand(7, 4)) * z,
    "index": lambda z: z[:, [1, 0, 3, 2]] * z[..., None][..., 0],
    "expand and repeat": lambda z: (z[:, :1].expand(7, 4) * z[:, 1:2].repeat(1, 4)).tile(1, 1),
    "lerp": lambda z: torch.lerp(z, z**2, torch.sin(z)),
    "hypot": lambda z: torch.hypot(z, z.roll(1, -1) + 1),
    "addcmul": lambda z: torch.addcmul(z, z, z.sin(), value=2) + torch.addcdiv(z, z, 2 + z.cos()),
    "in place": lambda z: (z * 2).mul_(3).tanh_(),
    "masked_fill": lambda z: z.sin().masked_fill(torch.eye(7, 4, dtype=torch.bool), 2.0),
    "dtype": lambda z: z.to(torch.float64).double().tanh(),
    "amax": lambda z: z.amax(-1, keepdim=True) * z + z.amin((1,))[:, None],
    "equal extremes": lambda z: torch.stack([z**2, z * z.detach()], -1).amax(-1),
    "3-norm": lambda z: z.norm(p=3, dim=-1, keepdim=True) * z,
    "4-norm": lambda z: torch.linalg.vector_norm(z, 4, dim=-1, keepdim=True) * z,
    "max norm": lambda z: z.norm(p=math.inf, dim=-1, keepdim=True) * z,
    "matrix norm": lambda z: torch.linalg.matrix_norm(square(z))[:, None] * z,
    "cumprod": lambda z: z.cumprod(-1),
    "logaddexp": lambda z: torch.logaddexp(z, z.flip(-1) ** 2) + torch.logaddexp(z[:, :1], torch.ones(4, dtype=F64)),
    "logit": lambda z: torch.logit(0.5 + 0.2 * torch.sin(z)),
    "ndtr": torch.special.ndtr,
    "degrees": lambda z: torch.deg2rad(50 * z).sin() * torch.rad2deg(z),
    "remainders": lambda z: z.frac() * torch.remainder(z, 1.0) * torch.fmod(z, 0.5) * (z % 0.7),
    "hstack": lambda z: torch.hstack([z[:, :2], z[:, 2:] ** 2]),
    "vstack": lambda z: torch.vstack([z[:, 0] * z[:, 1], z[:, 1], z[:, 2] ** 3, torch.ones(7, dtype=F64)]).mT,
    "dstack": lambda z: torch.dstack([z**2, z * z.flip(-1)]).sum(-1),
    "flips": lambda z: z.fliplr() * torch.flipud(torch.flipud(z)),
    "diff": lambda z: F.pad((z**3).diff(dim=-1), (0, 1)),
    "unfold": lambda z: F.pad((z**2).unfold(1, 2, 1).sum(-1) * z[:, :3], (0, 1)),
    "writes": written,
    "complex": lambda z: (torch.complex(z, z**2).square() * torch.complex(z, torch.ones(4, dtype=F64)).conj()).imag,
    "complex parts": lambda z: torch.view_as_real(torch.exp(1j * z[:, :2])).flatten(1) * torch.exp((0.3 + 1j) * z).abs(),
    "complex views": lambda z: torch.view_as_complex(z.view(7, 2, 2)).angle().repeat(1, 2),
    "atan2": lambda z: torch.atan2(z, z.roll(1, -1)) * torch.atan2(z, torch.tensor(0.5, dtype=F64)),
    "det": lambda z: torch.linalg.det(square(z))[:, None] * z,
    "det of three": lambda z: torch.det(torch.einsum("ni,nj->nij", z[:, :3], z.sin()[:, :3]) + torch.eye(3, dtype=F64))[:, None] * z,
    "slogdet": lambda z: torch.linalg.slogdet(square(z)).logabsdet[:, None] * z + torch.slogdet(square(z))[0][:, None],
    "logdet": lambda z: torch.logdet(square(z) @ square(z).mT)[:, None] * z,
    "inverse": lambda z: torch.linalg.inv(square(z)).flatten(1) + square(z).inverse().flatten(1),
    "solve": lambda z: torch.linalg.solve(square(z), square(z**2)).flatten(1) * torch.linalg.solve(square(z), z[:, :2]).repeat(1, 2),
    "constant solve": lambda z: torch.linalg.solve(2 * torch.eye(4, dtype=F64).expand(7, 4, 4), z**2),
    "matrix_power": lambda z: torch.linalg.matrix_power(square(z), 3).flatten(1),
    "cross": lambda z: F.pad(torch.linalg.cross(z[:, :3], z[:, 1:] ** 2), (0, 1)),
    "vecdot": lambda z: torch.linalg.vecdot(z, z.sin())[:, None] * z,
    "inner": lambda z: torch.inner(z**2, torch.ones(4, 4, dtype=F64).tril()),
    "tensordot": lambda z: (
        torch.tensordot(z**2, torch.ones(4, 4, dtype=F64).tril(), dims=1) * torch.tensordot(z, torch.eye(4, dtype=F64), ([1], [0]))
    ),
    "distances": lambda z: (
        F.pairwise_distance(z, z.flip(-1) + 1)[:, None] * F.cosine_similarity(z, z.flip(-1) ** 2 + 1, dim=-1)[:, None] * z
    ),
    "glu": lambda z: F.glu(z, -1).repeat(1, 2) * z,
    **{f"{name} cell": recurrent(name, cell=True) for name in ("RNN", "GRU", "LSTM")},
    **{name: recurrent(name, cell=False) for name in ("RNN", "GRU", "LSTM")},
    "relu RNN": recurrent("RNN", cell=False, nonlinearity="relu"),
    "bidirectional": recurrent("LSTM", cell=False, num_layers=2, bidirectional=True, bias=False),
}


def by_both(f: Function) -> tuple[dict[Term, Tensor], dict[Term, Tensor]]:
    with sdpa_kernel(SDPBackend.MATH):
        return engine.taylor(f, [X], SLOTS, TERMS)[0], nested(f, [X], SLOTS, (7,), TERMS)


def off(left: Tensor, right: Tensor) -> float:
    assert left.shape == right.shape
    left, right = left.detach(), right.detach()
    return float((left - right).abs().max() / right.abs().max().clamp(min=1e-4))


@pytest.mark.parametrize("name", RULES)
def test_a_rule_against_nested_reverse_mode(name: str) -> None:
    ours, right = by_both(lambda x: LAST(RULES[name](FIRST(x)).reshape(7, 4))[:, 0])
    for term in TERMS:
        assert off(ours[term], right[term]) < 1e-9, term
    weights = torch.linspace(-1, 1, 7, dtype=F64)
    losses = [sum((found[term] * weights).sum() for term in TERMS[:4]) for found in (ours, right)]
    if not all(isinstance(loss, Tensor) and loss.requires_grad for loss in losses):
        return
    gradients = [torch.autograd.grad(loss, list(FIRST.parameters()), materialize_grads=True) for loss in losses]  # type: ignore[arg-type]
    for left, expected in zip(*gradients, strict=True):
        assert off(left, expected) < 1e-8


STEPS: list[Function] = [
    torch.tanh,
    torch.sin,
    F.silu,
    F.gelu,
    lambda z: z * z.roll(1, -1),
    lambda z: torch.softmax(z, -1),
    lambda z: F.layer_norm(z, (4,)),
    lambda z: z / (1.5 + torch.sin(z)),
    lambda z: torch.cat([z[:, 2:], z[:, :2].exp()], -1),
    lambda z: z @ torch.ones(4, 4, dtype=F64).tril() / 3,
    lambda z: (z * z + 1).sqrt(),
    lambda z: z - z.mean(-1, keepdim=True),
]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, len(STEPS) - 1), min_size=1, max_size=4))
def test_random_compositions(steps: list[int]) -> None:
    def f(x: Tensor) -> Tensor:
        z = FIRST(x)
        for step in steps:
            z = STEPS[step](z)
        return LAST(z)[:, 0]

    ours, right = by_both(f)
    for term in TERMS:
        assert off(ours[term], right[term]) < 1e-6, (steps, term)


def test_results_can_be_differentiated_again() -> None:
    """The nodes of a jet have derivatives of derivatives: d/dx of the Laplacian, by hand, is a third derivative."""
    x = X.clone().requires_grad_()
    found = engine.taylor(lambda x: LAST(torch.tanh(FIRST(x)))[:, 0], [x], SLOTS, TERMS)[0]
    (third,) = torch.autograd.grad(found[TERMS[4]].sum(), x, create_graph=True)
    expected = nested(lambda x: LAST(torch.tanh(FIRST(x)))[:, 0], [X], SLOTS, (7,), [Term((), (0, 1, 2))])
    assert off(third[:, 2], expected[Term((), (0, 1, 2))]) < 1e-12
    (fourth,) = torch.autograd.grad(third[:, 2].sum(), x)
    assert fourth.isfinite().all()


def test_distances_that_torch_cannot_differentiate_twice() -> None:
    """torch.cdist has no second derivative: its rule is compared with the same written out."""
    centres = torch.rand(3, 2, dtype=F64)
    found = derivatives(lambda X: torch.exp(-torch.cdist(X[:, None], centres)).sum((-1, -2)), "x", "xxyy", coords="xy", method="taylor")
    right = derivatives(lambda X: torch.exp(-(X[:, None] - centres).norm(dim=-1)).sum(-1), "x", "xxyy", coords="xy", method="nested")
    points = torch.rand(5, 2, dtype=F64)
    ours, theirs = (at(points) for at in (found, right))
    torch.testing.assert_close(ours.x, theirs.x)
    torch.testing.assert_close(ours.xxyy, theirs.xxyy)


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * g


@pytest.mark.parametrize(
    ("u", "named"),
    [
        (lambda X: Cube.apply(X[..., 0]) + X[..., 1], "CubeBackward"),
        (lambda X: torch.lgamma(X[..., 0] + 3), "lgamma"),
        (lambda X: torch.polar(X[..., 0], X[..., 1]).abs() * X[..., 0], "polar"),
    ],
)
def test_what_has_no_rule_goes_to_nested_reverse_mode_and_the_plan_names_it(u: Function, named: str) -> None:
    points = torch.rand(5, 2, dtype=F64) + 0.5
    d = derivatives(u, "xy", "xxxx", coords="xy")(points)
    right = derivatives(u, "xy", "xxxx", coords="xy", method="nested")(points)
    assert d.plan.method == "nested" and named in d.plan.reason
    assert torch.equal(d.xxxx, right.xxxx)
    with pytest.raises(MethodError, match=named):
        derivatives(u, "xy", coords="xy", method="taylor")(points)


def test_a_planted_error_in_a_rule_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(x: Tensor, n: int, value: Tensor | None = None) -> list[Any]:
        found = series.tanh(x, n, value)
        found[2:3] = [1.001 * entry.tensor * entry.factor for entry in found[2:3]]
        return found

    from partials.taylor.jets import compose

    monkeypatch.setitem(JET_RULES, torch.tanh, lambda f: compose(wrong, f))
    points = torch.rand(5, 2, dtype=F64)
    with pytest.raises(CheckError, match="disagree"):
        laplacian(lambda X: torch.tanh(X[..., 0] * X[..., 1]), method="taylor")(points)
    laplacian(lambda X: torch.tanh(X[..., 0] * X[..., 1]) + 0, method="taylor", check="never")(points)


@pytest.mark.parametrize("order", [2, 4])
def test_a_derivative_that_is_rounding_alone_is_no_disagreement(order: int) -> None:
    at = derivatives(lambda x: torch.sin(30 * x) ** 2 + torch.cos(30 * x) ** 2, "x" * order, method="taylor", check="always")
    for n in range(5):
        x = torch.rand(9, dtype=F64, generator=torch.Generator().manual_seed(n))
        assert at(x)["x" * order].abs().max() < 1e-14 * 60**order
