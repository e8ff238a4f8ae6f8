"""A zoo of layers and operations: every method gives the rows of the loop, or refuses; only the loop must always run."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

import partials as pt
from partials._run import NAMES
from tests.oracle import assert_rows, gradients

pytestmark = [
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),
]
N = 3
EPS = 10**4
"""Forward mode of logcumsumexp loses four digits more than reverse mode."""


def flat():
    return torch.randn(N, 4)


def steps():
    return torch.randn(N, 5, 4)


def image():
    return torch.randn(N, 4, 6, 6)


def tokens():
    return torch.tensor([[0, 1, 2, 1], [3, 0, 0, 1], [1, 1, 1, 1]])


def attention(**options):
    return nn.MultiheadAttention(4, 2, batch_first=True, **options)


LAYERS = {
    "bilinear": lambda: (nn.Bilinear(4, 4, 2), flat(), flat()),
    "linear on steps": lambda: (nn.Linear(4, 2), steps()),
    "conv1d same dilated": lambda: (nn.Conv1d(5, 4, 3, padding="same", dilation=2), steps()),
    "conv2d reflect": lambda: (nn.Conv2d(4, 2, 3, padding=1, padding_mode="reflect"), image()),
    "conv2d depthwise": lambda: (nn.Conv2d(4, 4, 3, padding=1, padding_mode="replicate", groups=4), image()),
    "conv2d stride": lambda: (nn.Conv2d(4, 2, (3, 2), stride=(2, 1), padding=(1, 0)), image()),
    "conv3d dilated groups": lambda: (nn.Conv3d(2, 2, 2, dilation=2, groups=2), torch.randn(N, 2, 4, 4, 4)),
    "conv_transpose2d": lambda: (nn.ConvTranspose2d(4, 2, 3, stride=2, padding=1, output_padding=1), image()),
    "conv_transpose1d groups": lambda: (nn.ConvTranspose1d(4, 4, 3, groups=2), torch.randn(N, 4, 6)),
    "embedding": lambda: (nn.Embedding(5, 3), tokens()),
    "embedding padded at the end": lambda: (nn.Embedding(5, 3, padding_idx=-1), torch.tensor([[0, 4], [4, 4], [1, 2]])),
    "embedding_bag mean": lambda: (nn.EmbeddingBag(5, 3, mode="mean"), tokens()),
    "embedding_bag sum padded": lambda: (nn.EmbeddingBag(5, 3, mode="sum", padding_idx=0), tokens()),
    "embedding_bag max": lambda: (nn.EmbeddingBag(5, 3, mode="max"), tokens()),
    "layer_norm": lambda: (nn.LayerNorm([5, 4]), steps()),
    "layer_norm without bias": lambda: (nn.LayerNorm(4, bias=False), steps()),
    "group_norm": lambda: (nn.GroupNorm(2, 4), image()),
    "instance_norm": lambda: (nn.InstanceNorm2d(4, affine=True), image()),
    "instance_norm tracked": lambda: (nn.InstanceNorm2d(4, affine=True, track_running_stats=True).eval(), image()),
    "batch_norm": lambda: (nn.BatchNorm2d(4).eval(), image()),
    "rms_norm": lambda: (nn.RMSNorm(4), steps()),
    "prelu": lambda: (nn.PReLU(4), flat()),
    "rnn": lambda: (nn.RNN(4, 3, batch_first=True), steps()),
    "rnn_cell": lambda: (nn.RNNCell(4, 3), flat()),
    "lstm_cell": lambda: (nn.LSTMCell(4, 3), flat()),
    "gru_cell": lambda: (nn.GRUCell(4, 3), flat()),
    "attention with biases": lambda: (attention(add_bias_kv=True, add_zero_attn=True), steps(), steps(), steps()),
    "attention across": lambda: (attention(), flat()[:, None], steps(), steps()),
    "decoder layer": lambda: (nn.TransformerDecoderLayer(4, 2, 8, batch_first=True).eval(), steps(), steps()),
    "encoder layer": lambda: (nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, norm_first=True, activation="gelu").eval(), steps()),
    "weight_norm": lambda: (parametrizations.weight_norm(nn.Linear(4, 2)), flat()),
    "spectral_norm": lambda: (parametrizations.spectral_norm(nn.Linear(4, 2)).eval(), flat()),
    "orthogonal": lambda: (parametrizations.orthogonal(nn.Linear(4, 4)), flat()),
    "adaptive pool": lambda: (nn.Sequential(nn.Conv2d(4, 2, 3), nn.AdaptiveAvgPool2d(2), nn.Flatten()), image()),
    "pixel_shuffle": lambda: (nn.Sequential(nn.Conv2d(4, 4, 3), nn.PixelShuffle(2)), image()),
    "upsample": lambda: (nn.Sequential(nn.Conv2d(4, 2, 3), nn.Upsample(scale_factor=2, mode="bilinear")), image()),
    "unfold": lambda: (nn.Sequential(nn.Unfold(2), nn.Conv1d(16, 2, 1)), image()),
}


def written(x, w):
    y = torch.zeros_like(x)
    y[:, 1] = (x * w).sum(1)
    y[:, 2:] = w[2:]
    return y


def well(x, w):
    """A well-conditioned matrix for each sample."""
    return torch.eye(4, dtype=x.dtype) * 9 + torch.diag_embed(x) + torch.outer(w, w)


FUNCTIONS = {
    "cumsum": lambda x, w: (x * w).cumsum(1),
    "cumprod": lambda x, w: (x * w).cumprod(1),
    "logcumsumexp": lambda x, w: (x * w).logcumsumexp(1),
    "sort": lambda x, w: (x * w).sort(1)[0],
    "topk": lambda x, w: (x * w).topk(2, 1)[0],
    "median": lambda x, w: (x * w).median(1)[0],
    "amax": lambda x, w: (x * w).amax(1),
    "norm": lambda x, w: (x * w).norm(dim=1),
    "std": lambda x, w: (x * w).std(1),
    "prod": lambda x, w: (x * w).prod(1),
    "in place": lambda x, w: (x * w).clone().mul_(w).add_(1).relu_(),
    "written into": written,
    "index": lambda x, w: w[(x > 0).long()] * x,
    "gather": lambda x, w: torch.gather(x * w, 1, x.argsort(1)),
    "scatter_add": lambda x, w: torch.zeros_like(x).scatter_add(1, x.argsort(1), x * w),
    "where": lambda x, w: torch.where(x > 0, x * w, w.exp()),
    "masked_fill": lambda x, w: (x * w).masked_fill(x > 0, 1.0),
    "einsum": lambda x, w: torch.einsum("ni,i,j->nj", x, w, w),
    "outer": lambda x, w: x @ torch.outer(w, w),
    "added mm": lambda x, w: torch.addmm(x, x, torch.outer(w, w)),
    "same for every sample": lambda x, w: w.exp().expand(len(x), 4) * 1.0,
    "cat": lambda x, w: torch.cat([x * w, w.expand_as(x)], 1),
    "stack": lambda x, w: torch.stack([x * w, x + w], 1),
    "roll": lambda x, w: (x * w).roll(1, 1).flip(1),
    "repeat": lambda x, w: (x * w).repeat(1, 2).repeat_interleave(2, 1),
    "partly detached": lambda x, w: x * w.detach() + w * x.sin(),
    "complex inside": lambda x, w: torch.fft.rfft(x * w).abs(),
    "det": lambda x, w: torch.linalg.slogdet(well(x, w))[1],
    "inv": lambda x, w: torch.linalg.inv(well(x, w)) @ w,
    "eigvalsh": lambda x, w: torch.linalg.eigvalsh(well(x, w)),
    "svdvals": lambda x, w: torch.linalg.svdvals(well(x, w)),
    "cholesky": lambda x, w: torch.linalg.cholesky(well(x, w)),
    "cosine_similarity": lambda x, w: F.cosine_similarity(x, w[None]),
    "normalize": lambda x, w: F.normalize(x * w),
    "glu": lambda x, w: F.glu(x * w),
    "pow": lambda x, w: x.abs() ** w,
    "atan2": lambda x, w: torch.atan2(x, w.expand_as(x)),
    "lgamma": lambda x, w: torch.lgamma(x.abs() + w.abs()),
    "grid_sample": lambda x, w: F.grid_sample(
        w.reshape(1, 1, 2, 2).expand(len(x), 1, 2, 2), x.reshape(-1, 1, 2, 2).tanh(), align_corners=False
    ).flatten(1),
}


def made(name):
    torch.manual_seed(1)
    if name in LAYERS:
        module, *inputs = LAYERS[name]()
        module = module.double()
        inputs = [x.double() if x.is_floating_point() else x for x in inputs]
        return module, inputs, dict(module.named_parameters()), {}
    w = torch.randn(4, dtype=torch.float64, requires_grad=True)
    function = FUNCTIONS[name]
    return (lambda x: function(x, w)), [flat().double()], {"0": w}, {"params": [w]}


def first(returned):
    return returned[0] if isinstance(returned, tuple) else returned


@pytest.mark.parametrize("name", [*LAYERS, *FUNCTIONS])
def test_methods_agree_or_refuse(name):
    f, inputs, parameters, options = made(name)
    rows = [gradients(first(f(*(x[n : n + 1] for x in inputs)))[0], parameters) for n in range(N)]
    expected = {key: torch.stack([row[key] for row in rows]) for key in parameters}
    if isinstance(f(*inputs), tuple):
        options = {**options, "output": 0}
    done = []
    for method in NAMES:
        try:
            J = pt.jacobian(f, *inputs, method=method, check="never", **options)
        except pt.MethodError:
            continue
        assert_rows(J.dict(), expected, EPS if method == "forward" else 256)
        done.append(method)
    assert {"loop", "grad"} <= set(done)
