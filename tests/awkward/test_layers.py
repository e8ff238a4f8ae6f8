"""Layers that other libraries get silently wrong: padding rows, bags, padding modes, groups, weights in two places, LoRA."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from .exact import exact

N = 5
LOOKUPS = torch.tensor([[0, 3, 3, 1], [2, 2, 2, 2], [0, 0, 4, 1], [5, 1, 0, 3], [4, 4, 5, 5]])
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")


def tail(*layers, into=3):
    """Layers, then a linear layer on whatever they give."""
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(into))


def ready(model, *inputs):
    with torch.no_grad():
        model(*inputs)
    return model


def conv(layer, *shape):
    x = torch.randn(N, *shape)
    return exact(ready(tail(layer, nn.Tanh()), x), x)


# --- embeddings and bags -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding_idx", [0, 3, -1])
def test_padding_idx(padding_idx):
    J = exact(ready(tail(nn.Embedding(6, 4, padding_idx=padding_idx), nn.Tanh()), LOOKUPS), LOOKUPS)
    assert not J["0.weight"][..., padding_idx, :].any()


def test_padding_idx_of_the_function():
    table = torch.randn(6, 4, requires_grad=True)
    exact(lambda i, w: F.embedding(i, w, padding_idx=2).sin().sum(1), LOOKUPS, table)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_with_a_repeated_index(mode):
    exact(nn.Sequential(nn.EmbeddingBag(6, 4, mode=mode), nn.Tanh(), nn.Linear(4, 2)), LOOKUPS)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_with_a_padding_row(mode):
    exact(nn.Sequential(nn.EmbeddingBag(6, 4, mode=mode, padding_idx=0), nn.Tanh(), nn.Linear(4, 2)), LOOKUPS)


def test_bags_with_weights_for_each_entry():
    class Weighted(nn.Module):
        def __init__(self):
            super().__init__()
            self.bag = nn.EmbeddingBag(6, 4, mode="sum")

        def forward(self, i, w):
            return self.bag(i, per_sample_weights=w).sin()

    exact(Weighted(), LOOKUPS, torch.randn(N, 4))


# --- convolutions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
def test_padding_modes(mode):
    conv(nn.Conv2d(2, 3, 3, padding=2, padding_mode=mode), 2, 5, 6)


@pytest.mark.parametrize("kernel", [2, 3, 4])
@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_padding_same(kernel, mode):
    conv(nn.Conv1d(2, 3, kernel, padding="same", padding_mode=mode, dilation=2), 2, 9)


def test_grouped_convolution():
    conv(nn.Conv2d(4, 6, 3, padding=1, groups=2, stride=2), 4, 6, 6)


def test_depthwise_convolution():
    conv(nn.Conv2d(4, 8, 3, groups=4), 4, 6, 6)


def test_dilated_convolution_in_three_dimensions():
    conv(nn.Conv3d(2, 4, 2, dilation=2, groups=2, stride=2), 2, 5, 5, 5)


def test_transposed_convolution_with_groups_and_output_padding():
    conv(nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2), 4, 4, 4)


def test_stride_with_a_remainder():
    conv(nn.Conv1d(2, 4, 3, stride=3), 2, 10)


# --- norms -------------------------------------------------------------------------------------------------------


def test_layer_norm_without_bias():
    exact(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4, bias=False), nn.Linear(4, 2)), torch.randn(N, 3, 4))


def test_batch_norm_in_eval():
    model = nn.Sequential(nn.Conv1d(2, 4, 1), nn.BatchNorm1d(4), nn.Flatten(), nn.Linear(12, 2))
    model(torch.randn(8, 2, 3))
    exact(model.eval(), torch.randn(N, 2, 3))


def test_linear_on_four_dimensions():
    exact(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Flatten(), nn.Linear(24, 2)), torch.randn(N, 2, 3, 3))


# --- parametrised weights ----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, parametrizations.weight_norm])
def test_weight_norm(norm):
    exact(nn.Sequential(norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 2)), torch.randn(N, 4))


@pytest.mark.parametrize("norm", [nn.utils.spectral_norm, parametrizations.spectral_norm])
def test_spectral_norm_in_eval(norm):
    exact(nn.Sequential(norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 2)).eval(), torch.randn(N, 4))


def test_orthogonal():
    exact(nn.Sequential(parametrizations.orthogonal(nn.Linear(4, 4)), nn.Tanh(), nn.Linear(4, 2)), torch.randn(N, 4))


def test_a_parametrization_of_ones_own():
    class Symmetric(nn.Module):
        def forward(self, w):
            return w.triu() + w.triu(1).mT

    layer = nn.Linear(4, 4)
    parametrize.register_parametrization(layer, "weight", Symmetric())
    exact(nn.Sequential(layer, nn.Tanh(), nn.Linear(4, 2)), torch.randn(N, 3, 4))


def test_a_parametrization_of_a_convolution():
    exact(nn.Sequential(parametrizations.weight_norm(nn.Conv1d(2, 3, 3)), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2)), torch.randn(N, 2, 6))


# --- subclasses --------------------------------------------------------------------------------------------------


def test_subclassed_linear_and_convolution():
    class Scaled(nn.Linear):
        def forward(self, x):
            return super().forward(x) * self.weight.norm()

    class Standardised(nn.Conv1d):
        def forward(self, x):
            w = self.weight - self.weight.mean((1, 2), keepdim=True)
            return F.conv1d(x, w, self.bias, self.stride, self.padding)

    exact(nn.Sequential(Standardised(2, 3, 3), nn.Tanh(), nn.Flatten(), Scaled(12, 2)), torch.randn(N, 2, 6))
