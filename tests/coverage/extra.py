"""Modules that torch's database lacks: each maker gives (module, inputs) for N samples, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tests.coverage.judge import Call
from tests.coverage.modules import Called, N, emptied, scaling

Made = tuple[nn.Module, tuple[Any, ...]]
EXTRA: dict[str, Callable[[], Made]] = {}
RANDOM = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout, nn.RReLU)
"""Random in training."""


def of(name: str, make: Callable[[], nn.Module], *shapes: tuple[int, ...]) -> None:
    EXTRA[name] = lambda: (make(), tuple(torch.randn(N, *shape) for shape in shapes))


def tokens(vocabulary: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, vocabulary, (N, *shape))


for kind, rank in ((nn.Dropout, 1), (nn.Dropout1d, 2), (nn.Dropout2d, 3), (nn.Dropout3d, 4), (nn.AlphaDropout, 1), (nn.RReLU, 2)):
    of(f"nn.{kind.__name__}", kind, (3, 2, 2, 2)[:rank])
of("nn.FeatureAlphaDropout", nn.FeatureAlphaDropout, (3, 2, 2))


class Bags(nn.Module):
    """Samples of different lengths, put one after the other."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(5, 3, mode=mode, include_last_offset=True)

    def forward(self, index: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        ends = lengths.cumsum(0)
        return self.bag(index[torch.arange(index.shape[1]) < lengths[:, None]], torch.cat([ends.new_zeros(1), ends]))


for mode in ("sum", "mean", "max"):
    EXTRA[f"nn.EmbeddingBag ({mode})"] = lambda mode=mode: (nn.EmbeddingBag(5, 3, mode=mode), (tokens(5, 6),))
    EXTRA[f"nn.EmbeddingBag ({mode}, padded)"] = lambda mode=mode: (nn.EmbeddingBag(5, 3, mode=mode, padding_idx=1), (tokens(3, 6),))
    EXTRA[f"nn.EmbeddingBag ({mode}, offsets)"] = lambda mode=mode: (Bags(mode), (tokens(5, 4), torch.tensor([2, 0, 4])))
EXTRA["nn.EmbeddingBag (sum, weighted)"] = lambda: (Weighted(), (tokens(4, 5), torch.randn(N, 5)))


class Weighted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(4, 3, mode="sum")

    def forward(self, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return self.bag(index, per_sample_weights=weights)


class LogProbabilities(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.AdaptiveLogSoftmaxWithLoss(4, 9, [2, 5], div_value=2.0, head_bias=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head.log_prob(x)


class Targets(nn.Module):
    """The log-probability of each target: which cluster a sample goes to depends on it."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.AdaptiveLogSoftmaxWithLoss(4, 9, [2, 5], div_value=2.0)

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self.head(x, target).output


of("nn.AdaptiveLogSoftmaxWithLoss.log_prob", LogProbabilities, (4,))
EXTRA["nn.AdaptiveLogSoftmaxWithLoss"] = lambda: (Targets(), (torch.randn(N, 4), torch.tensor([1, 8, 3])))
of("nn.Bilinear on steps", lambda: nn.Bilinear(3, 2, 4), (5, 3), (5, 2))
for mode, rank in (("nearest", 1), ("linear", 1), ("bilinear", 2), ("bicubic", 2), ("trilinear", 3), ("nearest-exact", 2), ("area", 2)):
    of(f"nn.Upsample ({mode})", lambda mode=mode: nn.Upsample(scale_factor=2, mode=mode), (2, *(3,) * rank))
of("nn.UpsamplingNearest2d", lambda: nn.UpsamplingNearest2d(scale_factor=2), (2, 3, 3))
of("nn.UpsamplingBilinear2d", lambda: nn.UpsamplingBilinear2d(scale_factor=2), (2, 3, 3))
of("nn.PixelShuffle", lambda: nn.PixelShuffle(2), (4, 3, 3))
of("nn.PixelUnshuffle", lambda: nn.PixelUnshuffle(2), (1, 4, 4))
of("nn.ChannelShuffle", lambda: nn.ChannelShuffle(2), (4, 3, 3))
of("nn.Fold", lambda: nn.Fold((4, 4), 2), (8, 9))
of("nn.Unfold", lambda: nn.Unfold(2, padding=1, stride=2), (2, 4, 4))
of("nn.Flatten", nn.Flatten, (2, 3))
of("nn.Unflatten", lambda: nn.Unflatten(1, (2, 3)), (6,))
of("nn.Identity", nn.Identity, (3,))
of("nn.CosineSimilarity", nn.CosineSimilarity, (4, 3), (4, 3))
of("nn.PairwiseDistance", nn.PairwiseDistance, (4,), (4,))
of("nn.CrossMapLRN2d", lambda: nn.CrossMapLRN2d(3), (5, 3, 3))
of("nn.TripletMarginLoss", lambda: nn.TripletMarginLoss(reduction="none"), (4,), (4,), (4,))
of("nn.TripletMarginWithDistanceLoss", lambda: nn.TripletMarginWithDistanceLoss(reduction="none"), (4,), (4,), (4,))
for rank, pool, back in ((1, nn.MaxPool1d, nn.MaxUnpool1d), (2, nn.MaxPool2d, nn.MaxUnpool2d), (3, nn.MaxPool3d, nn.MaxUnpool3d)):

    class Unpooled(nn.Module):
        def __init__(self, pool: Any = pool, back: Any = back) -> None:
            super().__init__()
            self.pool, self.back = pool(2, return_indices=True), back(2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.back(*self.pool(x))

    of(f"nn.{back.__name__}", Unpooled, (2, *(4,) * rank))
of("nn.LazyLinear", lambda: nn.LazyLinear(2), (3,))
for rank, norm, instance in (
    (1, nn.LazyBatchNorm1d, nn.LazyInstanceNorm1d),
    (2, nn.LazyBatchNorm2d, nn.LazyInstanceNorm2d),
    (3, nn.LazyBatchNorm3d, nn.LazyInstanceNorm3d),
):
    of(f"nn.{norm.__name__}", norm, (3, *(2,) * rank))
    of(f"nn.{instance.__name__}", lambda instance=instance: instance(affine=True), (3, *(2,) * rank))
of("nn.SyncBatchNorm", lambda: nn.SyncBatchNorm(3), (3, 2))
for rank, transposed in ((1, nn.ConvTranspose1d), (2, nn.ConvTranspose2d), (3, nn.ConvTranspose3d)):
    of(
        f"nn.{transposed.__name__} (output_padding, groups, dilation)",
        lambda kind=transposed: kind(4, 6, 2, stride=3, padding=1, output_padding=2, groups=2, dilation=2),
        (4, *(3,) * rank),
    )
of("nn.TransformerDecoder", lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(4, 2, 8, 0.0, batch_first=True), 2), (3, 4), (2, 4))


class Held(nn.Module):
    """Layers and parameters in every container."""

    def __init__(self) -> None:
        super().__init__()
        self.several = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.named = nn.ModuleDict({"norm": nn.LayerNorm(4), "head": nn.Sequential(nn.Linear(4, 3), nn.Tanh())})
        self.scales = nn.ParameterList([nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(()))])
        self.shifts = nn.ParameterDict({"in": torch.randn(4), "out": torch.randn(3)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.shifts["in"]
        for layer, scale in zip(self.several, self.scales, strict=True):
            x = F.gelu(layer(x)) * scale
        return self.named["head"](self.named["norm"](x)) + self.shifts["out"]


of("containers", Held, (4,))


def made(name: str, training: bool, requires_grad: bool) -> Call:
    torch.manual_seed(4)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        module, inputs = EXTRA[name]()
        if any(nn.parameter.is_lazy(p) for p in module.parameters()):
            module(*inputs)
    finally:
        torch.set_default_dtype(before)
    module.train(training)
    for buffer_name, buffer in module.named_buffers():
        if buffer_name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
    inputs = tuple(x.requires_grad_(requires_grad and x.is_floating_point()) for x in inputs)
    scale = None if any(True for _ in module.parameters()) else scaling(list(inputs), True)
    f = Called(module, emptied((inputs, {})), True, scale).train(training)
    parameters = {key: p for key, p in f.named_parameters() if p.requires_grad}
    return Call(f, inputs, parameters, random=training and isinstance(module, RANDOM))
