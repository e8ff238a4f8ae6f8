"""What the results are attached to: parameters, inputs that require grad, transforms around the call; and what is left untouched."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor, nn

from partials.taylor import derivatives, laplacian, partial

Points = tuple[Tensor, Tensor]
Parameters = dict[str, Tensor]


def residual(parameters: Parameters, net: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    d = derivatives(lambda x, t: torch.func.functional_call(net, parameters, (torch.stack([x, t], -1),))[..., 0], "t", "xx")(x, t)
    return d.t - d.xx


def by_hand(net: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    x, t = x.detach().requires_grad_(), t.detach().requires_grad_()
    u = net(torch.stack([x, t], -1))
    u_x, u_t = torch.autograd.grad(u.sum(), (x, t), create_graph=True)
    return u_t - torch.autograd.grad(u_x.sum(), x, create_graph=True)[0]


def test_gradients_by_parameters(points: Points, net: nn.Module) -> None:
    parameters = dict(net.named_parameters())
    found = torch.autograd.grad(residual(parameters, net, *points).square().sum(), list(parameters.values()), materialize_grads=True)
    expected = torch.autograd.grad(by_hand(net, *points).square().sum(), list(parameters.values()), materialize_grads=True)
    for left, right in zip(found, expected, strict=True):
        torch.testing.assert_close(left, right)


def test_vmap_of_grad_and_a_loop_of_batches_of_one(points: Points, net: nn.Module) -> None:
    parameters = {name: parameter.detach() for name, parameter in net.named_parameters()}
    one = torch.func.grad(lambda p, x, t: residual(p, net, x, t))
    rows = torch.func.vmap(one, in_dims=(None, 0, 0))(parameters, *points)
    for n, (x, t) in enumerate(zip(*points, strict=True)):
        live = dict(net.named_parameters())
        loop = torch.autograd.grad(residual(live, net, x[None], t[None]), list(live.values()), materialize_grads=True)
        hand = torch.autograd.grad(by_hand(net, x[None], t[None]), list(live.values()), materialize_grads=True)
        for name, left, right in zip(live, loop, hand, strict=True):
            torch.testing.assert_close(left, right)
            torch.testing.assert_close(rows[name][n], right)


def test_jacobians_by_parameters_under_transforms(points: Points, net: nn.Module) -> None:
    parameters = {name: parameter.detach() for name, parameter in net.named_parameters()}
    reverse = torch.func.jacrev(residual)(parameters, net, *points)
    rows = torch.func.vmap(torch.func.grad(residual), in_dims=(None, None, 0, 0))(parameters, net, *points)
    for name in parameters:
        torch.testing.assert_close(reverse[name], rows[name])
    seed = torch.randn(7, dtype=torch.float64)
    _, pull = torch.func.vjp(lambda p: residual(p, net, *points), parameters)
    torch.testing.assert_close(pull(seed)[0]["0.weight"], torch.einsum("n,noi->oi", seed, rows["0.weight"]))


def test_parameters_batched_by_vmap_while_the_points_are_not(points: Points, net: nn.Module) -> None:
    """An ensemble: no input is batched, only what the function closes over."""
    parameters = {name: torch.stack([parameter.detach(), 2 * parameter.detach()]) for name, parameter in net.named_parameters()}
    both = torch.func.vmap(lambda p: residual(p, net, *points))(parameters)
    for k in range(2):
        torch.testing.assert_close(both[k], residual({name: stacked[k] for name, stacked in parameters.items()}, net, *points))


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # torch's own, when it first loads forward mode
def test_forward_over_reverse(points: Points, net: nn.Module) -> None:
    x, t = points
    parameters = {name: parameter.detach() for name, parameter in net.named_parameters()}
    _, tangent = torch.func.jvp(lambda x: residual(parameters, net, x, t), (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, partial(lambda x, t: residual(parameters, net, x, t), "x")(x, t))


def test_inputs_that_require_grad(points: Points) -> None:
    """The user differentiates once more, by hand: d/dx of u_x is u_xx."""
    x, t = (point.clone().requires_grad_() for point in points)
    d = derivatives(lambda x, t: torch.sin(x) * t**2, "x", "t")(x, t)
    u_xx, u_xt = torch.autograd.grad(d.x.sum(), (x, t), create_graph=True)
    torch.testing.assert_close(u_xx, -torch.sin(x) * t**2)
    torch.testing.assert_close(u_xt, 2 * t * torch.cos(x))
    torch.testing.assert_close(torch.autograd.grad(d.value.sum(), x)[0], torch.cos(x) * t**2)


def test_a_broadcast_input_that_requires_grad_gets_the_sum(points: Points) -> None:
    x, _ = points
    t = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    d = derivatives(lambda x, t: torch.sin(x) * t**2, "t")(x, t)
    (found,) = torch.autograd.grad(d.t.sum(), t)
    torch.testing.assert_close(found, (2 * torch.sin(x)).sum())


def test_inputs_inside_a_larger_graph(points: Points) -> None:
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    x, _ = points
    u_x = partial(lambda x: x**3, "x", coords="x")(scale * x)
    (found,) = torch.autograd.grad(u_x.sum(), scale)
    torch.testing.assert_close(found, (6 * scale * x * x).sum().detach())


def test_nothing_to_differentiate_further_gives_plain_tensors(points: Points) -> None:
    d = derivatives(lambda x, t: x**2 * t, "xx", "xt")(*points)
    assert not d.xx.requires_grad and not d.value.requires_grad and not d.x.requires_grad
    d.xt.numpy()


def test_a_frozen_module_gives_plain_tensors(points: Points, net: nn.Module) -> None:
    packed = torch.stack(points, -1)
    assert partial(net, "xx", coords="xt")(packed).requires_grad
    assert not partial(net.requires_grad_(False), "xx", coords="xt")(packed).requires_grad


def test_zeros_can_be_trained_on(points: Points) -> None:
    """A residual that is identically zero is no error, and has gradients of zero."""
    line = nn.Linear(2, 1).double()
    partial(line, "xx", coords="xt")(torch.stack(points, -1)).square().mean().backward()
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in line.parameters())


def test_no_grad(points: Points, net: nn.Module) -> None:
    packed = torch.stack(points, -1)
    expected = derivatives(net, "x", "xx", coords="xt")(packed)
    with torch.no_grad():
        d = derivatives(net, "x", "xx", coords="xt")(packed.requires_grad_())
        assert not torch.is_grad_enabled()
    for found, right in ((d.value, expected.value), (d.x, expected.x), (d.xx, expected.xx)):
        assert not found.requires_grad
        torch.testing.assert_close(found, right.detach())


def test_inference_mode(points: Points, net: nn.Module) -> None:
    with torch.inference_mode():
        found = partial(net, "xx", coords="xt")(torch.stack(points, -1))
    torch.testing.assert_close(found, partial(net, "xx", coords="xt")(torch.stack(points, -1)).detach())


def test_module_inputs_and_random_state_are_left_alone(points: Points) -> None:
    model = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 1)).double().eval()
    model[3].train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x, t = points
    torch.manual_seed(5)
    torch.stack([x, t], -1)
    model(torch.stack([x, t], -1))
    one_call = torch.get_rng_state()
    torch.manual_seed(5)
    d = derivatives(lambda x, t: model(torch.stack([x, t], -1)), "xx")(x, t)
    assert torch.equal(torch.get_rng_state(), one_call)
    torch.manual_seed(5)
    torch.testing.assert_close(d.value, model(torch.stack([x, t], -1)))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not x.requires_grad and x.grad is None and not any(layer._forward_hooks for layer in model.modules())


def test_hooks_of_the_user_run_once_for_each_call(points: Points, net: nn.Module) -> None:
    calls = []
    net.register_forward_hook(lambda *_: calls.append(1))
    at = derivatives(net, "xx", "xt", coords="xt")
    at(torch.stack(points, -1))
    first = len(calls)
    at(torch.stack(points, -1))
    assert len(calls) == first + 1


def test_threads(points: Points, net: nn.Module) -> None:
    packed = torch.stack(points, -1)
    expected = laplacian(net)(packed).detach()
    wrong: list[int] = []

    def work() -> None:
        wrong.extend(1 for _ in range(10) if not torch.allclose(laplacian(net)(packed), expected))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("enabled", [True, False])
def test_an_exception_leaves_the_grad_mode_as_it_was(points: Points, enabled: bool) -> None:
    def fails(x: Tensor, t: Tensor) -> Tensor:
        raise RuntimeError("inside")

    with torch.set_grad_enabled(enabled):
        with pytest.raises(RuntimeError, match="inside"):
            partial(fails, "x")(*points)
        assert torch.is_grad_enabled() is enabled
