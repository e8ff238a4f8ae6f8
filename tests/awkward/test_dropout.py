"""Dropout with `randomness="model"`: exactly the masks that the model itself draws for the whole batch."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import partials as pt

from .exact import same, trainable

N = 6


def mlp():
    return nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5), nn.ReLU(), nn.Linear(16, 3)), torch.randn(N, 4)


def channels():
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.Dropout2d(0.4), nn.AlphaDropout(0.2), nn.Flatten(), nn.Linear(24, 3))
    return model, torch.randn(N, 2, 4, 4)


def recurrent():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.head = nn.LSTM(3, 4, num_layers=2, dropout=0.5, batch_first=True), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.lstm(x)[0][:, -1])

    return Recurrent(), torch.randn(N, 5, 3)


def attention():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.3, batch_first=True), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(F.dropout(self.layer(x), 0.2).mean(1))

    return Attention(), torch.randn(N, N, 4)


def leaky():
    return nn.Sequential(nn.Linear(4, 8), nn.RReLU(), nn.FeatureAlphaDropout(0.1), nn.Linear(8, 2)), torch.randn(N, 4)


def by_one_call(model, x):
    """(N, C, P) by the reverse passes of one call of the whole batch."""
    out = model(x).flatten(1)
    rows = [torch.autograd.grad(entry, trainable(model), retain_graph=True) for entry in out.flatten()]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]).reshape(*out.shape, -1)


@pytest.mark.parametrize("make", [mlp, channels, recurrent, attention, leaky])
@pytest.mark.parametrize("check", ["never", "always"])
@pytest.mark.parametrize("method", ["auto", "grad"])
def test_the_models_own_masks(make, check, method):
    model, x = make()
    torch.manual_seed(5)
    rows = by_one_call(model, x)
    after = torch.get_rng_state()
    torch.manual_seed(5)
    J = pt.jacobian(model, x, randomness="model", check=check, method=method)
    same(J, rows)
    assert torch.equal(torch.get_rng_state(), after), "the random state moves as one call of the model moves it"
