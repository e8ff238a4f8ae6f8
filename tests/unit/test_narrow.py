"""wrt= leaves parameters out: a run keeps nothing for those, and the rows of the others are what they were."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import partials as pt


class Deep(nn.Module):
    def __init__(self, depth=6):
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.layers = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(depth))
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            x = x + layer(x.relu())
        return self.fc(x.mean((2, 3)))


class Differentiates(nn.Module):
    """Its output is the gradient of an inner loss by a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 1), nn.Linear(3, 1)

    def forward(self, x):
        inner = self.inner(x)
        (by,) = torch.autograd.grad(inner.square().sum(), self.inner.bias, create_graph=True)
        return self.outer(x) * inner.detach() + 0 * by.detach()


def kept(call):
    """(what the call gives, the bytes that autograd kept meanwhile)."""
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.nbytes), t)[1], lambda t: t):
        return call(), sum(sizes)


def same(narrow, full):
    for name, part in narrow.dict().items():
        assert torch.allclose(part, full.dict()[name], rtol=1e-12, atol=1e-12), name


@pytest.mark.parametrize(("wrt", "most"), [("fc.*", 0.05), (("layers.4.*", "fc.bias"), 0.5), ("stem.*", 1.01)])
@pytest.mark.parametrize("method", ["capture", "auto"])
def test_rows_are_those_of_the_full_jacobian_and_little_is_kept(wrt, most, method):
    model, x = Deep().double(), torch.randn(5, 1, 6, 6, dtype=torch.float64)
    full, everything = kept(lambda: pt.jacobian(model, x, check="never"))
    narrow, some = kept(lambda: pt.jacobian(model, x, wrt=wrt, method=method, check="never"))
    assert narrow.plan.method == "capture"
    same(narrow, full)
    assert some <= most * everything
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_functions_with_parameters_from_outside():
    model, x = Deep().double(), torch.randn(5, 1, 6, 6, dtype=torch.float64)
    for params in (model, dict(model.named_parameters())):
        full, everything = kept(lambda params=params: pt.jacobian(lambda x: model(x).square(), x, params=params, check="never"))
        narrow, some = kept(lambda params=params: pt.jacobian(lambda x: model(x).square(), x, params=params, wrt="fc.*", check="never"))
        same(narrow, full)
        assert some < 0.1 * everything


def test_a_parameter_computed_from_one_that_was_asked_for_is_no_constant():
    w = torch.randn(3, dtype=torch.float64, requires_grad=True)
    params, x = {"w": w, "doubled": w * 2}, torch.randn(4, 3, dtype=torch.float64)
    J = pt.jacobian(lambda x: x @ (params["doubled"] + w), x, params=params, wrt="w")
    assert torch.allclose(J.dense(), 3 * x)


def test_the_masked_encoder_runs_as_it_does_in_training():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)

    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True), nn.Linear(8, 2)

        def forward(self, x, mask):
            return self.head(self.encoder(x, src_key_padding_mask=mask).sum(1))  # padded positions count: the fast path has zeros there

    model = Classifier().double().eval()
    x, mask = torch.randn(4, 5, 8, dtype=torch.float64), torch.arange(5) >= torch.tensor([5, 3, 4, 2])[:, None]
    full, narrow = pt.jacobian(model, x, mask), pt.jacobian(model, x, mask, wrt="head.*")
    assert torch.allclose(full.values, narrow.values)
    same(narrow, full)


def test_a_function_that_differentiates_by_what_was_not_asked_for():
    model, x = Differentiates().double(), torch.randn(4, 3, dtype=torch.float64)
    J = pt.jacobian(model, x, wrt="outer.*")
    expected = model.inner(x) * x
    assert torch.allclose(J.dict()["outer.weight"].reshape(4, 3), expected)


def test_random_masks_are_those_of_the_plain_run():
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1)).double()
    x, rows = torch.randn(4, 3, dtype=torch.float64), []
    for wrt in (None, "2.*"):
        torch.manual_seed(3)
        rows.append(pt.jacobian(model, x, wrt=wrt, randomness="model").dict()["2.weight"])
    assert torch.equal(*rows)


class Uncopyable(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 1)
        self.held = (i for i in range(3))

    def forward(self, x):
        return self.b(F.relu(self.a(x)))


class CopiesAnew(Uncopyable):
    def __deepcopy__(self, memo):
        return CopiesAnew().double()


@pytest.mark.parametrize("kind", [Uncopyable, CopiesAnew])
def test_modules_that_have_no_structural_copy_run_as_they_are(kind):
    model, x = kind().double(), torch.randn(4, 3, dtype=torch.float64)
    same(pt.jacobian(model, x, wrt="b.*"), pt.jacobian(model, x))
