"""torch.func inside f: transforms of a function that reaches parameters from outside, ensembles, functional_call."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, hessian, jacrev, stack_module_state, vmap

import partials as pt
from partials.methods import METHODS

from .exact import exact, loop, refused, same, trainable

N = 5


def net():
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))


class Force(nn.Module):
    """The gradient of a network by its input, times a parameter: only that last use is seen by a torch function."""

    def __init__(self, transform):
        super().__init__()
        self.net, self.scale, self.transform = net(), nn.Parameter(torch.randn(3)), transform

    def forward(self, x):
        return vmap(self.transform(lambda z: self.net(z[None])[0, 0]))(x) * self.scale


@pytest.mark.parametrize("method", ["auto", "capture", *METHODS])
@pytest.mark.parametrize("transform", [grad, jacrev, hessian], ids=lambda f: f.__name__)
def test_a_derivative_inside_whose_last_use_alone_is_seen(transform, method):
    model, x = Force(transform), torch.randn(N, 3)
    if method == "capture":
        refused(pt.MethodError, "reached outside the recorded uses", model, x, method=method)
        refused(pt.MethodError, "f differentiates inside", model, x, method=method, randomness="same")
    elif not (transform is hessian and method == "forward"):
        exact(model, x, method=method)


def test_an_ensemble():
    class Ensemble(nn.Module):
        def __init__(self):
            super().__init__()
            self.like = [net()]
            self.stacked = nn.ParameterDict(
                {name.replace(".", "_"): nn.Parameter(p.detach()) for name, p in stack_module_state([net() for _ in range(3)])[0].items()}
            )

        def forward(self, x):
            weights = {name.replace("_", ".", 1): p for name, p in self.stacked.items()}
            return vmap(lambda w: functional_call(self.like[0], w, (x,)))(weights).movedim(0, 1)[..., 0].sin()

    exact(Ensemble(), torch.randn(N, 3))


def test_functional_call_with_weights_computed_from_others():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.gain = net(), nn.Parameter(torch.randn(1))

        def forward(self, x):
            return functional_call(self.net, {name: p * self.gain for name, p in self.net.named_parameters()}, (x,))

    exact(Scaled(), torch.randn(N, 3))


def test_a_hypernetwork():
    class Hyper(nn.Module):
        def __init__(self):
            super().__init__()
            self.weights, self.bias = nn.Linear(4, 6), nn.Parameter(torch.randn(2))

        def forward(self, x, c):
            return vmap(lambda z, w: torch.tanh(w.view(2, 3) @ z + self.bias))(x, self.weights(c))

    model, inputs = Hyper(), (torch.randn(N, 3), torch.randn(N, 4))
    same(exact(model, *inputs), loop(model, inputs, trainable(model)))
