"""`pt.gradient`: a scalar for each sample, from f itself or by a loss that acts within the sample."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import partials as pt
from partials.methods import METHODS
from partials.testing import modules

pytestmark = [
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),
]
each_method = pytest.mark.parametrize("method", ["auto", *METHODS])
N = 5


def data(*shape):
    return torch.randn(shape, dtype=torch.float64)


def grad(f, *inputs, **options):
    return pt.gradient(f, *inputs, **{"check": "never", **options})


def classifier():
    return modules.mlp().double(), data(N, 4), torch.tensor([0, 1, 2, 1, 0])


def reference(model, x, target, loss):
    """{name: (N, *shape)}: one backward of `loss` on each batch of one, computed beside the library."""
    parameters = dict(model.named_parameters())
    rows = {name: [] for name in parameters}
    for n in range(len(x)):
        value = loss(model(x[n : n + 1]), target[n : n + 1])
        for name, row in zip(parameters, torch.autograd.grad(value.sum(), list(parameters.values())), strict=True):
            rows[name].append(row)
    return {name: torch.stack(parts) for name, parts in rows.items()}


def assert_rows(G, expected):
    assert list(G.dict()) == list(expected)
    for name, rows in expected.items():
        torch.testing.assert_close(G[name], rows)


LOSSES = {
    "cross_entropy": (F.cross_entropy, lambda: torch.tensor([0, 1, 2, 1, 0])),
    "module": (nn.CrossEntropyLoss(), lambda: torch.tensor([0, 1, 2, 1, 0])),
    "sum": (nn.CrossEntropyLoss(reduction="sum"), lambda: torch.tensor([0, 1, 2, 1, 0])),
    "weighted_sum": (
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]).double(), reduction="sum"),
        lambda: torch.tensor([0, 1, 2, 1, 0]),
    ),
    "none": (nn.CrossEntropyLoss(reduction="none"), lambda: torch.tensor([0, 1, 2, 1, 0])),
    "probabilities": (F.cross_entropy, lambda: data(N, 3).softmax(1)),
    "mse": (F.mse_loss, lambda: data(N, 3)),
    "callable": (lambda output, target: (output - target).abs().sum() ** 1.5, lambda: data(N, 3)),
}


@each_method
@pytest.mark.parametrize("name", LOSSES)
def test_loss_acts_within_the_sample(name, method):
    loss, target = LOSSES[name]
    model, x, _ = classifier()
    target = target()
    G = grad(model, x, target, loss=loss, method=method)
    assert G.shape == (N, 43)
    values = torch.stack([loss(model(x[n : n + 1]), target[n : n + 1]) for n in range(N)])
    torch.testing.assert_close(G.values, values.flatten().detach())
    assert_rows(G, reference(model, x, target, loss))


@each_method
def test_without_a_loss_f_gives_one_scalar(method):
    model, x, target = classifier()
    G = grad(lambda x, y: F.cross_entropy(model(x), y, reduction="none"), x, target, params=model, method=method)
    assert G.out == ()
    assert_rows(G, reference(model, x, target, F.cross_entropy))


def test_loss_of_a_function():
    w = data(4, 3).requires_grad_()
    x, target = data(N, 4), data(N, 3)
    G = grad(lambda x, w: x @ w, x, w, target, loss=F.mse_loss)
    torch.testing.assert_close(G["w"], (torch.einsum("ni,nc->nic", x, x @ w - target) * 2 / 3).detach())


def test_target_by_keyword():
    model, x, target = classifier()
    G = grad(model, x, target=target, loss=F.cross_entropy)
    assert_rows(G, reference(model, x, target, F.cross_entropy))


def test_target_of_several_tensors():
    model, x, target = classifier()
    weight = torch.rand(N).double()

    def loss(output, target):
        return (F.cross_entropy(output, target["class"], reduction="none") * target["weight"]).mean()

    G = grad(model, x, {"class": target, "weight": weight}, loss=loss)
    plain = grad(model, x, target, loss=F.cross_entropy)
    torch.testing.assert_close(G.dense(), plain.dense() * weight[:, None])


def test_output_is_picked_before_the_loss():
    model, x, target = classifier()
    G = grad(lambda x: {"logits": model(x), "hidden": model[0](x)}, x, target, loss=F.cross_entropy, params=model, output="logits")
    assert_rows(G, reference(model, x, target, F.cross_entropy))
    torch.testing.assert_close(G.aux["hidden"], model[0](x).detach())


def test_mean_over_tokens_within_the_sample():
    table = nn.Linear(3, 4, dtype=torch.float64)
    x, target = data(N, 6, 3), torch.randint(4, (N, 6))

    def loss(logits, target):
        return F.cross_entropy(logits.transpose(1, 2), target, ignore_index=-100)

    target[1, 2:] = -100
    G = grad(table, x, target, loss=loss)
    assert_rows(G, reference(table, x, target, loss))


@each_method
def test_ignored_samples_give_nan_as_in_torch(method):
    model, x, target = classifier()
    target[2] = -100
    if method == "forward":
        with pytest.raises(pt.MethodError, match="not finite"):
            grad(model, x, target, loss=F.cross_entropy, method=method)
        return
    G = grad(model, x, target, loss=F.cross_entropy, method=method)
    assert G.values.isnan().tolist() == [False, False, True, False, False]
    assert_rows(G, reference(model, x, target, F.cross_entropy))  # torch's gradient there is zero, or NaN after a mean of nothing


def test_mean_of_nothing_gives_nan_rows():
    model, x, target = classifier()
    G = grad(model, x, target.eq(0), loss=lambda output, wanted: (output[:, 0] * wanted).sum() / wanted.sum())
    assert G.values.isnan().tolist() == [False, True, True, True, False]
    assert G.norms().isnan().tolist() == [False, True, True, True, False]
    with pytest.raises(pt.InputError, match="not finite"):
        G.clipped_sum(1.0)


def test_loss_that_vmap_cannot_run():
    model, x, target = classifier()

    def loss(output, target):
        return output[0, 0] * 2 if float(output.detach().sum()) > 0 else output[0, int(target)] * 3

    assert_rows(grad(model, x, target, loss=loss), reference(model, x, target, loss))


def test_exception_of_the_loss_comes_through():
    model, x, target = classifier()

    def loss(output, target):
        raise KeyError("the loss's own")

    with pytest.raises(KeyError, match="the loss's own"):
        grad(model, x, target, loss=loss)


def test_one_sample():
    model, x, target = classifier()
    G = grad(model, x[0], target[0], loss=F.cross_entropy, batched=False)
    assert G["0.weight"].shape == (5, 4) and G.values.shape == ()
    torch.testing.assert_close(G["0.weight"], reference(model, x[:1], target[:1], F.cross_entropy)["0.weight"][0])


def test_no_samples():
    model, x, target = classifier()
    G = grad(model, x[:0], target[:0], loss=F.cross_entropy)
    assert G.shape == (0, 43) and torch.equal(G.clipped_sum(1.0), torch.zeros(43).double())


def test_gradient_with_respect_to_the_input():
    model, x, target = classifier()
    G = grad(model, x, target, loss=F.cross_entropy, wrt="input")
    leaf = x.clone().requires_grad_()
    F.cross_entropy(model(leaf), target, reduction="sum").backward()
    torch.testing.assert_close(G["input"].reshape(N, 4), leaf.grad)


def test_target_is_never_a_parameter():
    model, x, _ = classifier()
    G = grad(model, x, data(N, 3).requires_grad_(), loss=F.mse_loss)
    assert "target" not in G


# --- refused -----------------------------------------------------------------------------------------------------


def test_weighted_mean_is_refused():
    model, x, target = classifier()
    with pytest.raises(pt.InputError) as error:
        grad(model, x, target, loss=nn.CrossEntropyLoss(weight=torch.ones(3).double()))
    assert str(error.value) == (
        "CrossEntropyLoss with class weights and reduction='mean' loses the weights within one sample (w*l/w = l)\n"
        "  got       weight=..., reduction='mean'\n"
        "  expected  a loss whose per-sample value keeps the weight\n"
        "  try       CrossEntropyLoss(weight=..., reduction='sum')"
    )


def test_loss_without_a_target_is_refused():
    model, x, _ = classifier()
    with pytest.raises(pt.InputError) as error:
        grad(model, x, loss=F.cross_entropy)
    assert str(error.value) == (
        "a loss needs a target\n"
        "  got       1 input\n"
        "  expected  the target as the last positional input\n"
        "  try       pt.gradient(model, x, target, loss=...)"
    )


def test_target_of_another_batch_size_is_refused():
    model, x, target = classifier()
    with pytest.raises(pt.InputError) as error:
        grad(model, x, target[:4], loss=F.cross_entropy)
    assert str(error.value) == (
        "the inputs have different batch sizes\n"
        "  got       input: 5, target: 4\n"
        "  expected  one number of samples\n"
        "  try       in_dims={'target': None} for an input that all samples share"
    )


def test_several_outputs_are_refused():
    model, x, _ = classifier()
    with pytest.raises(pt.OutputError) as error:
        grad(model, x)
    assert str(error.value) == (
        "gradient needs one scalar per sample\n"
        "  got       output shape (3,) for each sample\n"
        "  expected  ()\n"
        "  try       loss=..., or pt.jacobian for several outputs"
    )
