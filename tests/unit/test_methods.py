"""The textbook methods: what each can and cannot do, and how `auto` chooses between them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

import partials as pt
from partials._problem import normalise
from partials._run import compute, plan
from partials.methods import METHODS, Method
from partials.testing import CASES, modules
from tests.oracle import assert_rows, gradients

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
AS_THEY_ARE = ["loop", "grad"]
"""The methods that use the parameters as they are, with no stand-ins."""


def data(*shape):
    return torch.randn(shape, dtype=torch.float64)


def parameter(*shape):
    return data(*shape).requires_grad_()


def jac(f, *inputs, **options):
    return pt.jacobian(f, *inputs, **{"check": "never", **options})


def expected(f, x, parameters):
    rows = [gradients(f(x[n : n + 1])[0], parameters) for n in range(len(x))]
    return {name: torch.stack([row[name] for row in rows]) for name in parameters}


# --- the table ---------------------------------------------------------------------------------------------------


def test_every_method_has_its_file_name_and_a_summary():
    assert list(METHODS) == ["vmap", "forward", "jacobian", "grad", "backward", "loop"]
    for name, method in METHODS.items():
        assert isinstance(method, Method) and method.name == name and method.summary
        assert method.run.__module__ == f"partials.methods.{name}"


def test_costs_count_the_passes():
    call = CASES["mlp"].make()
    verdicts = {v.method: v for v in pt.explain(call.f, *call.inputs).verdicts}
    passes = {name: verdicts[name].cost.passes for name in METHODS}
    assert passes == {"vmap": 2, "forward": 43, "jacobian": 13, "grad": 13, "backward": 13, "loop": 16}
    assert all(v.cost.bytes >= 4 * 3 * 43 * 8 for v in verdicts.values() if v.method in METHODS)


def test_auto_takes_the_cheapest_that_can():
    call = CASES["mlp"].make()
    problem = normalise(call.f, call.inputs, {})
    made, facts = plan(problem)
    accepted = [m.verdict(problem, facts) for m in METHODS.values()]
    cheapest = min((v for v in accepted if v.accepted), key=lambda v: v.cost.seconds)
    assert made.method in ("capture", cheapest.method)


def test_few_parameters_are_forward_and_many_are_not():
    def costs(f, *inputs):
        return {v.method: v.cost.seconds for v in pt.explain(f, *inputs).verdicts if v.accepted and v.method in METHODS}

    few = costs(lambda x, a: a * x.sin(), data(500, 50), parameter(1))
    many = costs(modules.mlp().double(), data(500, 4))
    assert min(few, key=few.get) == "forward"
    assert min(many, key=many.get) == "vmap"


def test_auto_goes_on_where_a_method_fails_while_running(monkeypatch):
    def f(x, w):
        y = x @ w
        return y * 2 if float(y.detach().sum()) > 1e9 else y * 3

    x, w = data(4, 3), parameter(3, 2)
    made = compute(normalise(f, (x, w), {}))[1]
    assert made.method not in ("vmap", "forward")
    assert_rows(jac(f, x, w).dict(), expected(lambda x: f(x, w), x, {"w": w}))
    with pytest.raises(pt.MethodError, match=r"method='vmap' cannot run f"):
        jac(f, x, w, method="vmap")


# --- the parameters stay the user's ------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_grad_and_hooks_of_the_parameters_are_left_alone(method):
    model = modules.mlp().double()
    fired = []
    for p in model.parameters():
        p.grad = torch.full_like(p, 7.0)
    model[0].weight.register_post_accumulate_grad_hook(lambda p: fired.append(p))
    jac(model, data(4, 4), method=method)
    assert all((p.grad == 7).all() for p in model.parameters())
    assert not fired


# --- where stand-ins cannot go -----------------------------------------------------------------------------------


class Square(torch.autograd.Function):
    """An old-style function: it sees its arguments where no torch function mode does."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * w**2

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g * w**2, (g * x * 2 * w).sum_to_size(w.shape)


def agrees_or_refuses(method, f, x, params):
    try:
        J = jac(f, x, params=params, method=method)
    except pt.MethodError as refused:
        assert method not in AS_THEY_ARE
        assert str(refused).startswith(f"method={method!r} cannot ")
        return
    assert_rows(J.dict(), expected(f, x, params))


@pytest.mark.parametrize("method", METHODS)
def test_custom_function_on_a_tensor_from_outside(method):
    w = parameter(3)
    agrees_or_refuses(method, lambda x: Square.apply(x, w), data(4, 3), {"w": w})


@pytest.mark.parametrize("method", METHODS)
def test_view_taken_before_the_call(method):
    w = parameter(6)
    matrix = w.reshape(3, 2)
    agrees_or_refuses(method, lambda x: x @ matrix, data(4, 3), {"w": w})


@pytest.mark.parametrize("method", METHODS)
def test_weights_computed_before_the_call(method):
    w = parameter(3, 2)
    square = w**2
    agrees_or_refuses(method, lambda x: x @ square + x @ w, data(4, 3), {"w": w})


@pytest.mark.parametrize("method", METHODS)
def test_parametrized_module(method):
    model = parametrize.register_parametrization(nn.Linear(3, 2), "weight", nn.Softplus()).double()
    x = data(4, 3)
    J = jac(model, x, method=method)
    assert J.names == ("bias", "parametrizations.weight.original")
    assert_rows(J.dict(), expected(model, x, dict(model.named_parameters())))


@pytest.mark.parametrize("method", METHODS)
def test_tensors_held_in_lists_of_a_module(method):
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(data(3, 2))
            self.again = [self.w, {"deep": self.w}]

        def forward(self, x):
            return x @ self.w + (x @ self.again[0]).sin() + (x @ self.again[1]["deep"]).cos()

    model, x = Listed(), data(4, 3)
    try:
        J = jac(model, x, method=method)
    except pt.MethodError:
        assert method not in AS_THEY_ARE
        return
    assert_rows(J.dict(), expected(model, x, {"w": model.w}))


@pytest.mark.parametrize("method", METHODS)
def test_module_that_cannot_be_copied(method):
    class Stubborn(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 2, dtype=torch.float64)

        def __deepcopy__(self, memo):
            raise TypeError("not me")

        def forward(self, x):
            return self.linear(x)

    model, x = Stubborn(), data(4, 3)
    if method in AS_THEY_ARE:
        assert_rows(jac(model, x, method=method).dict(), expected(model, x, dict(model.named_parameters())))
        return
    with pytest.raises(pt.MethodError) as error:
        jac(model, x, method=method)
    assert str(error.value) == (
        "Stubborn cannot be copied in structure, so other tensors cannot stand in for its parameters\n"
        "  got       TypeError: not me\n"
        "  expected  a module that copy.deepcopy accepts\n"
        "  try       method='loop' or method='grad', which use the parameters as they are"
    )


# --- where vmap and forward mode cannot go -----------------------------------------------------------------------


def test_forward_refuses_an_operation_that_it_differentiates_wrongly():
    table = nn.Embedding(5, 3, padding_idx=0)
    tokens = torch.tensor([[0, 1], [2, 0]])
    with pytest.raises(pt.MethodError, match="forward-mode derivative of embedding with padding_idx differs"):
        jac(table, tokens, method="forward")
    assert not jac(table, tokens)["weight"][0, 0, :, 0].any()


@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize("channels", [1, 3])
def test_vmap_of_prelu_with_as_many_outputs_as_samples(n, channels):
    """torch's own vmap within a vmap takes the outputs for samples there, with no error."""
    x, w = data(n, 3, n), parameter(channels)

    def f(x, w):
        return F.prelu(x, w).sum(1)

    assert_rows(jac(f, x, w, method="vmap").dict(), expected(lambda x: f(x, w), x, {"w": w}))


def test_vmap_refuses_operations_whose_derivative_it_has_wrong():
    x, centres = data(3, 1), parameter(1, 1, 2)
    others = data(2, 1, 2, 2)

    def distances(x, centres):
        return x * torch.cdist(centres, others, 1.0).reshape(-1)

    with pytest.raises(pt.MethodError, match="cdist under vmap is wrong"):
        jac(distances, x, centres, method="vmap")
    assert_rows(jac(distances, x, centres).dict(), expected(lambda x: distances(x, centres), x, {"centres": centres}))
    matrices, right = data(3, 3, 3), parameter(3, 2)

    def solved(matrices, right):
        return torch.linalg.lu_solve(*torch.linalg.lu_factor(matrices), right).flatten(1)

    with pytest.raises(pt.MethodError, match="lu_solve under vmap is wrong"):
        jac(solved, matrices, right, method="vmap")
    for f in (solved, torch.vmap(lambda x, right: solved(x[None], right)[0], in_dims=(0, None))):
        for options in ({}, {"method": "capture", "randomness": "same"}):
            rows = expected(lambda x: solved(x, right), matrices, {"right": right})
            assert_rows(jac(f, matrices, right, **options).dict(), rows)


def test_vmap_refuses_branches_on_values():
    def f(x, w):
        return x @ w if bool((x > 0).all()) else x @ w * 2

    with pytest.raises(pt.MethodError) as error:
        jac(f, data(4, 3), parameter(3), method="vmap")
    lines = str(error.value).splitlines()
    assert lines[0] == "method='vmap' cannot run f"
    assert lines[2:] == ["  expected  operations that torch.func.vmap supports", "  try       method='loop'"]


@pytest.mark.parametrize("method", [*METHODS, "auto"])
def test_derivatives_inside_f(method):
    """A function that calls torch.autograd.grad itself."""
    net = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1)).double()

    def slope(x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(net(x).sum(), x, create_graph=True)[0]

    x = data(4, 2)
    try:
        J = jac(slope, x, params=net, method=method)
    except (pt.MethodError, RuntimeError) as refused:
        assert method in ("vmap", "forward", "jacobian"), refused
        return
    assert_rows(J.dict(), expected(slope, x, dict(net.named_parameters())))


# --- budgets -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "bytes_"), [(10**9, 10**9), ("10 MB", 10**7), ("1GiB", 2**30), ("1.5 KiB", 1536), (2.5e6, 2_500_000)])
def test_amounts_of_memory(text, bytes_):
    from partials._plan import parse_bytes

    assert parse_bytes(text) == bytes_


# --- the plan ----------------------------------------------------------------------------------------------------


def test_plan_names_the_losers_and_why():
    table = CASES["embedding"].make()
    made = pt.explain(table.f, *table.inputs)
    by_name = {v.method: v for v in made.verdicts}
    assert not by_name["forward"].accepted and "padding_idx" in by_name["forward"].reason
    text = str(made)
    assert "Jacobian of 2 outputs w.r.t. 26 entries of 3 tensors, 4 samples, float64" in text
    assert "refused: torch's forward-mode derivative of embedding with padding_idx" in text
    assert f"> {made.method}" in text
    as_dict = made.to_dict()
    assert as_dict["method"] == made.method and {m["method"] for m in as_dict["methods"]} >= set(METHODS)
    assert as_dict["parameters"] == {"table.weight": [6, 3], "head.weight": [2, 3], "head.bias": [2]}


def test_plan_runs_nothing_that_is_left_behind():
    model = modules.mlp().double()
    state = torch.get_rng_state()
    pt.explain(model, data(4, 4))
    torch.set_rng_state(state)
    made = pt.explain(model, torch.ones(4, 4).double())
    assert torch.equal(torch.get_rng_state(), state)
    assert made.samples == 4 and made.outputs == (3,)
    assert F.softmax(model(data(2, 4)), 1).requires_grad
