"""The list of cases: small problems, each the least that shows one thing a per-sample Jacobian must get right.

A maker draws its numbers in float32 from a fixed seed and converts them, so that a case has the same values in every dtype and
a float64 run of it is the reference of all others.

>>> from partials.testing import CASES
>>> call = CASES["mlp"].make()
>>> J = call.jacobian(method="loop")
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.func import grad, vmap

from .._api import jacobian
from .._typing import Function, Tensor
from . import modules

N = 4
"""Samples in every case."""


@dataclass(frozen=True)
class Call:
    """One call of `partials.jacobian`, and what a reference that knows nothing of it needs: tensors and sample dimensions."""

    f: Function
    inputs: tuple[Any, ...]
    parameters: Mapping[str, Tensor]
    """What the Jacobian is with respect to, by name, in the order of P."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of `partials.jacobian`."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Keyword inputs of f."""
    dims: Mapping[int | str, int | None] = field(default_factory=dict)
    """Sample dimension of an input, by position or keyword, where it is not 0; parameters have none."""
    pick: Callable[[Any], Tensor] = lambda returned: returned
    """The differentiated tensor among what f returns."""

    def jacobian(self, **options: Any) -> Any:
        """The Jacobian of this call by `partials.jacobian`, with further options."""
        return jacobian(self.f, *self.inputs, kwargs=self.kwargs, **{**self.options, **options})

    @property
    def samples(self) -> int:
        """How many samples the batch holds."""
        sizes: list[int] = []
        self._each(lambda x, dim: sizes.append(x.shape[dim]))
        return sizes[0]

    def part(self, start: int, stop: int) -> Call:
        """The same call of some of the samples. Parameters and shared inputs stay whole."""
        inputs, kwargs = self._each(lambda x, dim: x.narrow(dim, start, stop - start))
        return replace(self, inputs=inputs, kwargs=kwargs)

    def _each(self, function: Callable[[Tensor, int], Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """`function` of every tensor that holds samples, and of its sample dimension; the rest as it is."""
        shared = {id(p) for p in self.parameters.values()}

        def of(value: Any, dim: int | None) -> Any:
            if isinstance(value, dict):
                return {key: of(part, dim) for key, part in value.items()}
            if not isinstance(value, Tensor) or dim is None or value.ndim == 0 or id(value) in shared:
                return value
            return function(value, dim)

        inputs = tuple(of(value, self.dims.get(i, 0)) for i, value in enumerate(self.inputs))
        return inputs, {key: of(value, self.dims.get(key, 0)) for key, value in self.kwargs.items()}


Make = Callable[[torch.dtype, torch.device], Call]


@dataclass(frozen=True)
class Case:
    """A named problem; `make` gives it afresh, with the same numbers every time."""

    name: str
    maker: Make
    refuses: Mapping[str, str] = field(default_factory=dict)
    """Methods that need not do this case (in every dtype), with words of the reason that they give."""

    def make(self, dtype: torch.dtype = torch.float64, device: torch.device | str | None = None) -> Call:
        """On `device` (None: torch's default one), with the numbers that the CPU draws."""
        device = torch.get_default_device() if device is None else torch.device(device)
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.default_generator.manual_seed(20)  # (the CPU's alone: those of accelerators are not set back)
            return self.maker(dtype, device)


CASES: dict[str, Case] = {}
"""Every case by name."""


def case(refuses: Mapping[str, str] | None = None) -> Callable[[Make], Make]:
    """Puts a maker into `CASES` under its own name."""

    def enter(maker: Make) -> Make:
        CASES[maker.__name__] = Case(maker.__name__, maker, refuses or {})
        return maker

    return enter


def of_module(module: nn.Module, *inputs: Any, dtype: torch.dtype, device: torch.device, **rest: Any) -> Call:
    """A call of a module: all trainable parameters."""
    module = module.to(device, dtype)
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    return Call(module, tuple(moved(x, dtype, device) for x in inputs), parameters, **rest)


def moved(value: Any, dtype: torch.dtype, device: torch.device) -> Any:
    if isinstance(value, dict):
        return {key: moved(part, dtype, device) for key, part in value.items()}
    return value.to(device, dtype) if value.is_floating_point() else value.to(device)


def parameters_of(dtype: torch.dtype, device: torch.device, **shapes: tuple[int, ...]) -> dict[str, Tensor]:
    return {name: torch.randn(shape).to(device, dtype).requires_grad_() for name, shape in shapes.items()}


# --- functions ---------------------------------------------------------------------------------------------------


@case()
def line(dtype: torch.dtype, device: torch.device) -> Call:
    """a x + b."""

    def f(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return a * x + b

    p = parameters_of(dtype, device, a=(1,), b=(1,))
    return Call(f, (moved(torch.randn(N, 1), dtype, device), *p.values()), p)


@case()
def scalar_output(dtype: torch.dtype, device: torch.device) -> Call:
    """Output shape ()."""

    def f(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return (x @ w).sin() + b

    p = parameters_of(dtype, device, w=(3,), b=())
    return Call(f, (moved(torch.randn(N, 3), dtype, device), *p.values()), p)


@case()
def matrix_output(dtype: torch.dtype, device: torch.device) -> Call:
    """Output shape (C, D)."""

    def f(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        return (x @ w).tanh().unsqueeze(-1) * (x @ v).exp().unsqueeze(-2)

    p = parameters_of(dtype, device, w=(3, 2), v=(3, 4))
    return Call(f, (moved(torch.randn(N, 3), dtype, device), *p.values()), p)


@case()
def many_shapes(dtype: torch.dtype, device: torch.device) -> Call:
    """Parameters of dimension 0 to 3, one of them empty."""

    def f(x: Tensor, scale: Tensor, empty: Tensor, w: Tensor, cube: Tensor) -> Tensor:
        return scale * (x @ w) + torch.einsum("ni,ijk->nk", x, cube.square()) + empty.sum()

    p = parameters_of(dtype, device, scale=(), empty=(0, 2), w=(3, 2), cube=(3, 4, 2))
    return Call(f, (moved(torch.randn(N, 3), dtype, device), *p.values()), p)


@case()
def unused_parameter(dtype: torch.dtype, device: torch.device) -> Call:
    """One parameter that f does not use, one that some samples do not."""

    def f(x: Tensor, used: Tensor, unused: Tensor, sometimes: Tensor) -> Tensor:  # noqa: ARG001
        return torch.where(x[:, :1] > 0, x * used, x * sometimes)

    p = parameters_of(dtype, device, used=(2,), unused=(3,), sometimes=(2,))
    return Call(f, (moved(torch.randn(N, 2), dtype, device), *p.values()), p)


@case()
def keyword_inputs(dtype: torch.dtype, device: torch.device) -> Call:
    """An input and a parameter by keyword, and a number that is no tensor."""

    def f(x: Tensor, *, shift: Tensor, w: Tensor, power: int = 1) -> Tensor:
        return (x @ w + shift) ** power

    p = parameters_of(dtype, device, w=(3, 2))
    shift = moved(torch.randn(N, 2), dtype, device)
    return Call(f, (moved(torch.randn(N, 3), dtype, device),), p, kwargs={"shift": shift, "w": p["w"], "power": 3})


@case()
def time_first(dtype: torch.dtype, device: torch.device) -> Call:
    """Samples along dimension 1, with as many steps as samples; a table that all samples share."""

    def f(x: Tensor, table: Tensor, w: Tensor) -> Tensor:
        return torch.einsum("tni,ts,io->no", x, table, w).tanh()

    p = parameters_of(dtype, device, w=(3, 2))
    inputs = (moved(torch.randn(N, N, 3), dtype, device), moved(torch.randn(N, 2), dtype, device), p["w"])
    return Call(f, inputs, p, {"in_dims": {"x": 1, "table": None}}, dims={0: 1, 1: None})


@case()
def one_sample_function(dtype: torch.dtype, device: torch.device) -> Call:
    """A function of one sample through torch.vmap."""

    def f(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return (w @ x + b).softmax(0)

    p = parameters_of(dtype, device, w=(3, 2), b=(3,))
    batch = vmap(f, in_dims=(0, None, None))
    return Call(batch, (moved(torch.randn(N, 2), dtype, device), *p.values()), p)


@case({"capture": "differentiates inside"})
def residual(dtype: torch.dtype, device: torch.device) -> Call:
    """u_xx + sin(x) of a network that the function reaches from outside."""
    net = nn.Sequential(nn.Linear(1, 5), nn.Tanh(), nn.Linear(5, 1)).to(device, dtype)

    def u(x: Tensor) -> Tensor:
        value: Tensor = net(x.reshape(1, 1)).squeeze()
        return value

    def f(x: Tensor) -> Tensor:
        u_xx: Tensor = vmap(grad(grad(u)))(x.squeeze(1))
        return u_xx + x.squeeze(1).sin()

    return Call(f, (moved(torch.randn(N, 1), dtype, device),), dict(net.named_parameters()), {"params": net})


# --- modules -----------------------------------------------------------------------------------------------------


@case()
def mlp(dtype: torch.dtype, device: torch.device) -> Call:
    return of_module(modules.mlp(), torch.randn(N, 4), dtype=dtype, device=device)


@case()
def mlp_frozen(dtype: torch.dtype, device: torch.device) -> Call:
    """The first layer is frozen."""
    module = modules.mlp()
    module[0].requires_grad_(False)
    return of_module(module, torch.randn(N, 4), dtype=dtype, device=device)


@case()
def tied(dtype: torch.dtype, device: torch.device) -> Call:
    """One table, used for looking up and as the head."""
    return of_module(modules.Tied(), torch.randint(6, (N, 3)), dtype=dtype, device=device)


@case()
def cnn(dtype: torch.dtype, device: torch.device) -> Call:
    return of_module(modules.cnn(), torch.randn(N, 2, 6, 6), dtype=dtype, device=device)


@case()
def norms(dtype: torch.dtype, device: torch.device) -> Call:
    """Layer, group, batch (evaluation) and root-mean-square normalisation."""
    return of_module(modules.norms(), torch.randn(N, 4, 3), dtype=dtype, device=device)


@case({"forward": "embedding with padding_idx"})
def embedding(dtype: torch.dtype, device: torch.device) -> Call:
    """A padded table, repeated indices, the mean over tokens."""
    tokens = torch.tensor([[0, 1, 1, 0], [2, 3, 4, 5], [5, 5, 5, 5], [0, 0, 0, 1]])
    return of_module(modules.Bag(), tokens, dtype=dtype, device=device)


@case({"forward": "_transformer_encoder_layer_fwd"})
def transformer(dtype: torch.dtype, device: torch.device) -> Call:
    layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.1, batch_first=True).eval()
    return of_module(layer, torch.randn(N, 2, 6), dtype=dtype, device=device)


@case()
def attention(dtype: torch.dtype, device: torch.device) -> Call:
    """Multi-head attention returns a pair."""
    module = nn.MultiheadAttention(4, 2, batch_first=True).to(device, dtype)
    x = moved(torch.randn(N, 3, 4), dtype, device)
    return of_module(module, x, x, x, dtype=dtype, device=device, options={"output": 0}, pick=lambda pair: pair[0])


@case()
def gru(dtype: torch.dtype, device: torch.device) -> Call:
    module = modules.Last(nn.GRU(3, 2, batch_first=True))
    return of_module(module, torch.randn(N, 3, 3), dtype=dtype, device=device)


@case({"forward": "mkldnn_rnn_layer"})
def lstm(dtype: torch.dtype, device: torch.device) -> Call:
    module = modules.Last(nn.LSTM(3, 2, num_layers=2, batch_first=True))
    return of_module(module, torch.randn(N, 3, 3), dtype=dtype, device=device)


@case()
def lora(dtype: torch.dtype, device: torch.device) -> Call:
    """A frozen weight and a product of two trainable factors."""
    return of_module(modules.LowRank(), torch.randn(N, 4), dtype=dtype, device=device)


@case()
def dict_input(dtype: torch.dtype, device: torch.device) -> Call:
    """Two inputs in a mapping, the output in another."""
    batch = {"left": torch.randn(N, 3), "right": torch.randn(N, 2)}
    return of_module(modules.Two(), batch, dtype=dtype, device=device, options={"output": "y"}, pick=lambda returned: returned["y"])
