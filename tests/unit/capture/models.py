"""Models that a capture must see through: each maker is (module or function, inputs, parameters), float64, N = 5 samples."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

N = 5


def of(module, *inputs):
    return module, inputs, {name: p for name, p in module.named_parameters() if p.requires_grad}


def tail(*layers, into=2):
    """Layers, then a linear layer on whatever they give."""
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(into))


class Tied(nn.Module):
    """An embedding with a padding row, free position parameters, and a head that is the embedding: by module or by `@ weight.T`."""

    def __init__(self, by_module):
        super().__init__()
        self.table = nn.Embedding(7, 4, padding_idx=1)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.table.weight
        self.places = nn.Parameter(torch.randn(6, 4))
        self.by_module = by_module

    def forward(self, i):
        h = (self.table(i) + self.places[: i.shape[1]]).tanh()
        return (self.head(h) if self.by_module else h @ self.table.weight.T).mean(1)


class ClassToken(nn.Module):
    """A learned token expanded to the batch, and position ids that all samples share."""

    def __init__(self):
        super().__init__()
        self.token, self.mix, self.places = nn.Parameter(torch.randn(1, 1, 4)), nn.Linear(4, 4), nn.Embedding(9, 4)

    def forward(self, x):
        h = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        return self.mix(h + self.places(torch.arange(h.shape[1])))[:, 0].sin()


class Folded(nn.Module):
    """The batch folded into another dimension, sample-major or position-major."""

    def __init__(self, sample_major):
        super().__init__()
        self.a, self.b, self.sample_major = nn.Linear(4, 4), nn.Conv1d(1, 2, 3), sample_major

    def forward(self, x):
        n, t, _ = x.shape
        h = self.a(x if self.sample_major else x.transpose(0, 1)).reshape(n * t, 4).sin()
        h = self.b(h[:, None]).flatten(1)
        return h.view(n, t, -1).sum((1, 2)) if self.sample_major else h.view(t, n, -1).sum((0, 2))


class TimeFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0), nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.layer(x.transpose(0, 1)).mean(0))


class Derived(nn.Module):
    """Parameters of parameters: a low-rank update, a buffer, softplus of a number."""

    def __init__(self):
        super().__init__()
        self.w, self.a, self.b = (nn.Parameter(torch.randn(*s)) for s in ((5, 4), (2, 4), (5, 2)))
        self.t = nn.Parameter(torch.randn(()))
        self.register_buffer("mask", torch.randn(5, 4))

    def forward(self, x):
        return F.linear(x, (self.w + self.b @ self.a) * self.mask) * F.softplus(self.t)


class Views(nn.Module):
    """Views of one weight and one bias: chunk, split, t, mT, indexing, reshape, permute."""

    def __init__(self):
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(12, 4)), nn.Parameter(torch.randn(12))

    def forward(self, x):
        q, k, v = self.w.chunk(3)
        bq, bk, bv = self.b.split(4)
        first, second = F.linear(x, q, bq), x @ k.t() + bk
        third = x @ v.mT + bv[None]
        fourth = x @ self.w.reshape(2, 6, 4).permute(2, 0, 1)[:, 0, :4]
        return (first * second.sin() + third * self.w[3]).mean(1) + fourth.sum(1)


class Twice(nn.Module):
    """One layer twice and its weight once more, a frozen weight, an unused and an empty parameter."""

    def __init__(self):
        super().__init__()
        self.layer, self.unused, self.empty, self.head = (
            nn.Linear(4, 4),
            nn.Parameter(torch.randn(3)),
            nn.Parameter(torch.zeros(0)),
            nn.Linear(4, 2),
        )
        self.head.weight.requires_grad_(False)

    def forward(self, x):
        return self.head(self.layer(self.layer(x).sin()).cos() + self.layer.weight.sum())


class InPlace(nn.Module):
    """In-place activations after a use, a write into a fresh buffer, a branch on the data."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(3, 3)

    def forward(self, x):
        h = self.a(x).relu_()
        kept = torch.zeros(x.shape[0], 2, 3, dtype=x.dtype)
        kept[:, 0] = self.b(h)
        return (kept.sin() if x.sum() > -1e9 else kept).flatten(1)


def norm(layer):
    return lambda: of(tail(nn.Conv1d(3, 4, 1), layer()), torch.randn(N, 3, 7))


def conv(layer, *shape):
    return lambda: of(tail(layer(), nn.Tanh()), torch.randn(N, *shape))


def encoder(train):
    return lambda: of(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).train(train), torch.randn(N, 3, 8))


def function(f, *shapes, x=(4,)):
    """A function of x and parameters a, b, ... of the given shapes."""

    def make():
        names = "abc"[: len(shapes)]
        parameters = {name: torch.randn(shape).requires_grad_() for name, shape in zip(names, shapes, strict=True)}
        return f, (torch.randn(N, *x), *parameters.values()), parameters

    return make


def line(x, a, b):
    return a * x + b


MODELS = {
    "line": function(line, (1,), (1,), x=(1,)),
    "mlp": lambda: of(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), torch.randn(N, 4)),
    "mlp on tokens": lambda: of(nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 2)), torch.randn(N, 3, 4)),
    "scalar output": lambda: of(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1), nn.Flatten(0)), torch.randn(N, 4)),
    "conv2d groups": conv(lambda: nn.Conv2d(2, 4, 3, padding=1, groups=2, stride=2), 2, 6, 6),
    "conv1d circular dilated": conv(lambda: nn.Conv1d(2, 4, 3, padding=2, padding_mode="circular", dilation=2), 2, 8),
    "conv1d reflect": conv(lambda: nn.Conv1d(2, 4, 3, padding=2, padding_mode="reflect"), 2, 8),
    "conv1d same, even kernel": conv(lambda: nn.Conv1d(2, 4, 4, padding="same"), 2, 8),
    "conv1d with a remainder": conv(lambda: nn.Conv1d(2, 4, 3, stride=3), 2, 10),
    "conv3d depthwise dilated": conv(lambda: nn.Conv3d(2, 4, 2, groups=2, dilation=2, stride=2), 2, 5, 5, 5),
    "layer norm": lambda: of(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2)), torch.randn(N, 3, 4)),
    "rms norm": lambda: of(nn.Sequential(nn.Linear(4, 4), nn.RMSNorm(4), nn.Linear(4, 2)), torch.randn(N, 3, 4)),
    "group norm": norm(lambda: nn.GroupNorm(2, 4)),
    "instance norm": norm(lambda: nn.InstanceNorm1d(4, affine=True)),
    "batch norm eval": norm(lambda: nn.BatchNorm1d(4).eval()),
    "prelu": norm(lambda: nn.PReLU(4)),
    "prelu of one": norm(nn.PReLU),
    "tied embedding": lambda: of(Tied(True), torch.randint(0, 7, (N, 6))),
    "tied by transpose": lambda: of(Tied(False), torch.randint(0, 7, (N, 6))),
    "class token": lambda: of(ClassToken(), torch.randn(N, 3, 4)),
    "encoder, eval": encoder(False),
    "encoder, train": encoder(True),
    "time first": lambda: of(TimeFirst(), torch.randn(N, 3, 8)),
    "time first, T = N": lambda: of(TimeFirst(), torch.randn(N, N, 8)),
    "folded, sample-major": lambda: of(Folded(True), torch.randn(N, 3, 4)),
    "folded, sample-major, T = N": lambda: of(Folded(True), torch.randn(N, N, 4)),
    "folded, position-major": lambda: of(Folded(False), torch.randn(N, 3, 4)),
    "folded, position-major, T = N": lambda: of(Folded(False), torch.randn(N, N, 4)),
    "weight norm": lambda: of(nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 2)), torch.randn(N, 4)),
    "orthogonal": lambda: of(nn.Sequential(parametrizations.orthogonal(nn.Linear(4, 4)), nn.Tanh(), nn.Linear(4, 2)), torch.randn(N, 4)),
    "derived": lambda: of(Derived(), torch.randn(N, 4)),
    "views": lambda: of(Views(), torch.randn(N, 3, 4)),
    "twice": lambda: of(Twice(), torch.randn(N, 4)),
    "in place": lambda: of(InPlace(), torch.randn(N, 4)),
    "inputs that require grad": lambda: of(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), torch.randn(N, 4).requires_grad_()),
    "bmm": function(lambda x, a: torch.bmm(x.transpose(0, 1), a).transpose(0, 1).sin().sum(1), (3, 4, 2), x=(3, 4)),
    "addmm": function(lambda x, a, b: torch.addmm(a, x, b, beta=2, alpha=3).sin(), (3,), (4, 3)),
    "matmul from the left": function(lambda x, a: (a @ x).sin().sum(-1), (2, 4), x=(4, 3)),
    "columns from the left": function(lambda x, a: (a @ x.t()).t().sin(), (2, 4)),
    "mv": function(lambda x, a: (x @ a).sin(), (4,)),
    "rows by index": function(lambda x, a: a[x.abs().mul(3).long().clamp(max=6)].sum(1).sin(), (7, 3)),
    "entry by entry": function(
        lambda x, a, b: torch.where(x > 0, x.abs() ** a.abs(), a) / b - b * 2 + (1 - b) * (b / (x.abs() + 1)), (4,), ()
    ),
    "vmapped one-sample function": lambda: vmapped(),
}


def vmapped():
    w = torch.randn(3, 4).requires_grad_()
    return torch.vmap(lambda x: torch.tanh(w @ x + w[:, 0])), (torch.randn(N, 4),), {"0": w}
