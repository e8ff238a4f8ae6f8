"""Random numbers in f: refused without a policy, and each policy in every method that can follow it."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import partials as pt
from partials._run import NAMES

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
N, WIDTH = 6, 40


def data(*shape):
    return torch.randn(shape, dtype=torch.float64)


def dropout():
    return nn.Sequential(nn.Linear(3, WIDTH), nn.Dropout(0.5), nn.Linear(WIDTH, 2)).double()


def jac(f, *inputs, **options):
    return pt.jacobian(f, *inputs, **{"check": "never", **options})


def masks(J):
    """(N, WIDTH): which hidden units were kept, as the rows of the last weight show."""
    return J["2.weight"][:, 0, 0] != 0


def tried(method, policy, model, x):
    """The Jacobian, or None where the method refuses the policy with its reason."""
    try:
        return jac(model, x, method=method, randomness=policy)
    except pt.MethodError as refused:
        assert "policy" in str(refused) or "masks" in str(refused) or "random" in str(refused)
        return None


# --- model: the masks that f itself would draw -------------------------------------------------------------------


@pytest.mark.parametrize("method", ["auto", *NAMES])
def test_model_draws_the_masks_that_f_draws(method):
    model, x = dropout(), data(N, 3)
    torch.manual_seed(7)
    out = model(x)
    after = torch.get_rng_state()
    torch.manual_seed(7)
    J = tried(method, "model", model, x)
    if J is None:
        assert method in ("vmap", "loop")
        return
    assert torch.equal(torch.get_rng_state(), after)
    torch.testing.assert_close(J.values, out.detach())
    parameters = dict(model.named_parameters())
    for n in range(N):
        for c in range(2):
            rows = torch.autograd.grad(out[n, c], list(parameters.values()), retain_graph=True)
            for name, row in zip(parameters, rows, strict=True):
                torch.testing.assert_close(J[name][n, c], row)


def test_model_is_followed_twice_in_a_row_by_other_masks():
    model, x = dropout(), data(N, 3)
    first, second = (masks(jac(model, x, randomness="model")) for _ in range(2))
    assert not torch.equal(first, second)


# --- same and different ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["auto", *NAMES])
def test_same_gives_every_sample_the_same_mask(method):
    J = tried(method, "same", dropout(), data(N, 3))
    if J is None:
        assert method not in ("auto", "loop", "vmap")
        return
    kept = masks(J)
    assert (kept == kept[:1]).all() and kept.any() and not kept.all()


@pytest.mark.parametrize("method", ["auto", *NAMES])
def test_different_gives_every_sample_its_own(method):
    J = tried(method, "different", dropout(), data(N, 3))
    if J is None:
        assert method not in ("auto", "loop", "vmap")
        return
    kept = masks(J)
    assert len({tuple(row.tolist()) for row in kept}) == N
    assert 0.3 < kept.double().mean() < 0.7


@pytest.mark.parametrize("policy", ["same", "different"])
def test_values_and_rows_have_the_same_masks(policy):
    for method in ("vmap", "loop"):
        model, x = dropout(), data(N, 3)
        J = jac(model, x, method=method, randomness=policy)
        hidden = J["2.weight"][:, 0, 0]
        expected = hidden @ model[2].weight.T + model[2].bias
        torch.testing.assert_close(J.values, expected.detach())


# --- error -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["auto", *NAMES])
def test_error_names_the_operation(method):
    state = torch.get_rng_state()
    with pytest.raises(pt.RandomnessError) as error:
        jac(dropout(), state.new_zeros(N, 3, dtype=torch.float64), method=method)
    assert str(error.value) == (
        "Sequential draws random numbers (nn.functional.dropout) and no policy for them was given\n"
        '  got       randomness="error" (the default)\n'
        "  expected  a function without random numbers, or a policy\n"
        '  try       module.eval(), or randomness="model" (the masks that f itself would draw), "same" or "different" (as in vmap)'
    )


def test_error_leaves_the_random_state():
    model, x = dropout(), data(N, 3)
    state = torch.get_rng_state()
    with pytest.raises(pt.RandomnessError):
        jac(model, x)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "f",
    [
        lambda x, w: (x + torch.randn_like(x)) @ w,
        lambda x, w: x @ w + torch.randn(2, dtype=x.dtype),
        lambda x, w: F.dropout(x @ w, 0.5),
        lambda x, w: F.rrelu(x @ w, training=True),
        lambda x, w: torch.bernoulli(torch.sigmoid(x)) @ w,
        lambda x, w: x @ w + torch.empty(2, dtype=x.dtype).normal_(),
        lambda x, w: F.gumbel_softmax(x @ w),
        lambda x, w: F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], dropout_p=0.5)[:, 0] @ w,
    ],
)
def test_every_source_of_random_numbers_is_seen(f):
    w = data(3, 2).requires_grad_()
    with pytest.raises(pt.RandomnessError):
        jac(f, data(N, 3), w)


class Beside(nn.Module):
    """A layer beside which, during some of its calls, another thread of the process draws."""

    def __init__(self, calls):
        super().__init__()
        self.layer, self.calls = nn.Linear(3, 2), calls

    def forward(self, x):
        if self.calls:
            self.calls -= 1
            other = threading.Thread(target=torch.rand, args=(3,))
            other.start()
            other.join()
        return self.layer(x)


@pytest.mark.parametrize("method", ["auto", "vmap", "loop"])
@pytest.mark.parametrize("calls", [1, 2, 3])
def test_another_thread_that_draws_is_no_draw_of_f(method, calls):
    model, x = Beside(0), torch.randn(5, 3)
    expected = jac(model, x, method=method).dense()
    model.calls = calls
    assert jac(model, x, method=method).dense().equal(expected)


def test_where_the_random_state_moves_in_every_call_the_error_says_that_it_may_be_another_thread():
    with pytest.raises(pt.RandomnessError, match="function modes do not see, or another thread meanwhile"):
        jac(Beside(1000), torch.randn(5, 3))


def test_evaluation_needs_no_policy():
    J = jac(dropout().eval(), data(N, 3))
    assert J.shape == (N, 2, 4 * WIDTH + 2 * WIDTH + 2)


def test_unknown_policy():
    with pytest.raises(pt.InputError) as error:
        jac(dropout(), data(N, 3), randomness="off")
    assert str(error.value) == "randomness='off' is unknown\n  got       'off'\n  expected  one of: error, model, same, different"
