"""Private training with Opacus's optimizer, noise, sampling and accountants: as Opacus where it is right, as a float64 loop elsewhere."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import partials as pt
from tests.oracle import gradients

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    opacus = pytest.importorskip("opacus")

from opacus.optimizers import AdaClipDPOptimizer, DPOptimizer, DPPerLayerOptimizer
from opacus.utils.batch_memory_manager import BatchMemoryManager

from partials.adapters.opacus import backward, make_private

pytestmark = [
    pytest.mark.filterwarnings("ignore:Secure RNG turned off:UserWarning"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning"),  # (Opacus's own hooks, on integer inputs)
    pytest.mark.filterwarnings("ignore:Optimal order is the:UserWarning"),
]
C, N = 3, 8


# --- models and data -----------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """An embedding whose matrix is also the head."""

    def __init__(self):
        super().__init__()
        self.embedding, self.middle = nn.Embedding(9, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.middle(self.embedding(x).mean(1)).tanh() @ self.embedding.weight.T


class Bag(nn.Module):
    """Sums and maxima of embeddings, with an index twice in a bag."""

    def __init__(self, mode):
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(9, 4, mode=mode), nn.Linear(4, C)

    def forward(self, x):
        return self.head(self.bag(x))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.gru, self.head = nn.Embedding(9, 4), nn.GRU(4, 5, batch_first=True), nn.Linear(5, C)

    def forward(self, x):
        return self.head(self.gru(self.embedding(x))[0][:, -1])


REFUSED = {"tied": Tied, "sum bag": lambda: Bag("sum"), "max bag": lambda: Bag("max"), "gru": Recurrent}
"""Models that Opacus refuses, or gets wrong."""


def words(n=N):
    torch.manual_seed(2)
    x = torch.randint(9, (n, 5))
    x[:, 1] = x[:, 0]
    return x, torch.randint(C, (n,))


def plain():
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(1, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8, C))


def images(n=N):
    torch.manual_seed(2)
    return torch.randn(n, 1, 3, 3), torch.randint(C, (n,))


def refused(name):
    torch.manual_seed(1)
    return REFUSED[name]()


def bounds_of(model, clipping):
    return 0.4 if clipping == "flat" else [0.1 * (i + 1) for i, _ in enumerate(model.parameters())]


def private(model, data, clipping="flat", batch=N, noise=1.0, poisson=False, **options):
    engine = opacus.PrivacyEngine()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    loader = DataLoader(TensorDataset(*data), batch_size=batch)
    made, loader = make_private(
        engine,
        module=model,
        optimizer=optimizer,
        data_loader=loader,
        noise_multiplier=noise,
        max_grad_norm=bounds_of(model, clipping),
        poisson_sampling=poisson,
        noise_generator=torch.Generator().manual_seed(7),
        **options,
    )
    return engine, made, loader


def trained(model, optimizer, loader, epochs=2, **options):
    for _ in range(epochs):
        for x, y in loader:
            backward(optimizer, model, x, y, loss=F.cross_entropy, **options)
            optimizer.step()
            optimizer.zero_grad()
    return [p.detach() for p in model.parameters()]


def clipped(model, x, y, clipping):
    """The float64 loop: each parameter's clipped sum, with Opacus's factor."""
    model = copy.deepcopy(model).double().train()
    params = dict(model.named_parameters())
    losses = [F.cross_entropy(model(x[n : n + 1]), y[n : n + 1]) for n in range(len(x))]
    rows = gradients(torch.stack(losses), params)
    norms = {name: part.flatten(1).norm(dim=1) for name, part in rows.items()}
    whole, bounds = torch.stack(list(norms.values())).norm(dim=0), bounds_of(model, clipping)
    found = []
    for i, (name, part) in enumerate(rows.items()):
        norm, bound = (whole, bounds) if clipping == "flat" else (norms[name], bounds[i])
        found.append(torch.einsum("n,n...", (bound / (norm + 1e-6)).clamp(max=1), part))
    return found


def near(found, expected, rtol=1e-5, atol=1e-6):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=rtol, atol=atol)


# --- as Opacus -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("clipping", ["flat", "per_layer"])
def test_as_opacus_with_the_same_noise(clipping, reduction):
    data, theirs, ours = images(), plain(), plain()
    engine = opacus.PrivacyEngine()
    wrapped, optimizer, loader = engine.make_private(
        module=theirs,
        optimizer=torch.optim.SGD(theirs.parameters(), lr=0.5, momentum=0.9),
        data_loader=DataLoader(TensorDataset(*data), batch_size=4),
        noise_multiplier=1.0,
        max_grad_norm=bounds_of(theirs, clipping),
        clipping=clipping,
        poisson_sampling=False,
        loss_reduction=reduction,
        noise_generator=torch.Generator().manual_seed(7),
    )
    loss = nn.CrossEntropyLoss(reduction=reduction)
    for _ in range(2):
        for x, y in loader:
            loss(wrapped(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    mine, made, batches = private(ours, data, clipping, batch=4, loss_reduction=reduction)
    near(trained(ours, made, batches), theirs.parameters())
    assert mine.get_epsilon(1e-5) == engine.get_epsilon(1e-5) > 0
    assert made.max_grad_norm == pytest.approx(optimizer.max_grad_norm)


@pytest.mark.parametrize("kind", [DPOptimizer, DPPerLayerOptimizer, AdaClipDPOptimizer])
def test_rows_for_opacus_own_optimizers(kind):
    data, theirs, ours = images(), plain(), plain()
    wrapped = opacus.GradSampleModule(theirs)
    made = []
    for model in (theirs, ours):
        options = {"max_grad_norm": bounds_of(model, "per_layer" if kind is DPPerLayerOptimizer else "flat")}
        if kind is AdaClipDPOptimizer:
            options |= {"target_unclipped_quantile": 0.5, "clipbound_learning_rate": 0.2, "max_clipbound": 10, "min_clipbound": 0.01}
            options |= {"unclipped_num_std": 1.0}
        sgd = torch.optim.SGD(model.parameters(), lr=0.5)
        made.append(kind(sgd, noise_multiplier=0.5, expected_batch_size=N, generator=torch.Generator().manual_seed(7), **options))
    for _ in range(2):
        torch.manual_seed(3)
        F.cross_entropy(wrapped(data[0]), data[1]).backward()
        made[0].step(), made[0].zero_grad()
        torch.manual_seed(3)
        backward(made[1], ours, *data, loss=F.cross_entropy)
        made[1].step(), made[1].zero_grad()
    near(ours.parameters(), theirs.parameters())


# --- models that Opacus refuses or gets wrong ----------------------------------------------------------------------


@pytest.mark.parametrize("clipping", ["flat", "per_layer"])
@pytest.mark.parametrize("name", REFUSED)
def test_clipped_sums(name, clipping):
    model, (x, y) = refused(name), words()
    _, optimizer, _ = private(model, (x, y), clipping)
    logits = backward(optimizer, model, x, y, loss=F.cross_entropy)
    torch.testing.assert_close(logits, model(x).detach())
    assert not logits.requires_grad
    near([p.grad for p in model.parameters()], clipped(model, x, y, clipping))


@pytest.mark.parametrize("name", REFUSED)
def test_opacus_refuses_them_or_gets_them_wrong(name):
    model, (x, y) = refused(name), words()
    try:
        opacus.PrivacyEngine.get_compatible_module(model)
        wrapped = opacus.GradSampleModule(copy.deepcopy(model), strict=True)
        F.cross_entropy(wrapped(x), y).backward()
        rows = {n: p.grad_sample.double() for n, p in wrapped._module.named_parameters()}
    except Exception:
        return
    double = copy.deepcopy(model).double()
    losses = torch.stack([F.cross_entropy(double(x[n : n + 1]), y[n : n + 1]) for n in range(N)])
    expected = gradients(losses, dict(double.named_parameters()))
    kept = opacus.PrivacyEngine.get_compatible_module(model)
    same = [type(m) for m in kept.modules()] == [type(m) for m in model.modules()]
    assert not same or any(not torch.allclose(rows[n], part, rtol=1e-3, atol=1e-5) for n, part in expected.items())


@pytest.mark.parametrize("name", REFUSED)
def test_the_noise_and_the_step(name):
    model, data = refused(name), words()
    before = [p.detach().clone() for p in model.parameters()]
    _, optimizer, loader = private(model, data)
    trained(model, optimizer, loader, epochs=1)
    again = torch.Generator().manual_seed(7)
    noise = [torch.normal(0, 0.4, p.shape, generator=again) for p in before]
    torch.manual_seed(1)
    sums = clipped(REFUSED[name](), *data, "flat")
    near(model.parameters(), [p - 0.5 * (s + z) / N for p, s, z in zip(before, sums, noise, strict=True)])


# --- batches -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REFUSED)
def test_parts_of_a_batch(name):
    """Opacus's own memory manager, and a budget of ours: the same step as at once."""
    data = words()
    whole, parts, budgeted = refused(name), refused(name), refused(name)
    _, optimizer, loader = private(whole, data)
    trained(whole, optimizer, loader)
    _, optimizer, loader = private(parts, data)
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=3, optimizer=optimizer) as small:
        sizes = [len(x) for x, _ in small]
        optimizer._step_skip_queue.clear()
        trained(parts, optimizer, small)
    assert max(sizes) <= 3 and len(sizes) == 3
    _, optimizer, loader = private(budgeted, data)
    trained(budgeted, optimizer, loader, max_memory="1GiB")
    near(parts.parameters(), whole.parameters())
    near(budgeted.parameters(), whole.parameters())


@pytest.mark.parametrize("name", REFUSED)
def test_empty_poisson_batches(name):
    model, data = refused(name), words(4)
    engine, optimizer, loader = private(model, data, batch=1, poisson=True)
    torch.manual_seed(4)
    steps, empty = 0, 0
    while empty < 2:
        for x, y in loader:
            logits = backward(optimizer, model, x, y, loss=F.cross_entropy)
            assert len(logits) == len(x)
            if not len(x):
                empty += 1
                assert all(not p.grad.count_nonzero() for p in model.parameters())
            before = [p.detach().clone() for p in model.parameters()]
            optimizer.step()
            assert all(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
            optimizer.zero_grad()
            steps += 1
    assert sum(count for *_, count in engine.accountant.history) == steps
    assert engine.get_epsilon(1e-5) > 0


def test_the_sample_rate_and_the_expected_batch_are_opacus_own():
    data = words(20)
    model = refused("gru")
    engine, optimizer, loader = private(model, data, batch=4, poisson=True)
    other = plain()
    theirs = opacus.PrivacyEngine().make_private(
        module=other,
        optimizer=torch.optim.SGD(other.parameters(), lr=1),
        data_loader=DataLoader(TensorDataset(*images(20)), batch_size=4),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    assert loader.sample_rate == theirs[2].sample_rate and optimizer.expected_batch_size == theirs[1].expected_batch_size
    trained(model, optimizer, loader, epochs=1)
    assert engine.accountant.history == [(1.0, 0.2, len(loader))]


@pytest.mark.parametrize("name", REFUSED)
def test_logits_come_from_the_only_forward(name):
    model, (x, y) = refused(name), words()
    _, optimizer, _ = private(model, (x, y))
    backward(optimizer, model, x, y, loss=F.cross_entropy)  # (the first call looks and checks)
    optimizer.step(), optimizer.zero_grad()
    calls = []
    handle = model.register_forward_pre_hook(lambda *_: calls.append(1))
    backward(optimizer, model, x, y, loss=F.cross_entropy)
    handle.remove()
    assert len(calls) == 1


# --- words ---------------------------------------------------------------------------------------------------------


def test_gradients_are_not_added_to_those_of_another_batch():
    model, data = refused("gru"), words()
    _, optimizer, _ = private(model, data)
    backward(optimizer, model, *data, loss=F.cross_entropy)
    with pytest.raises(pt.InputError, match="the gradients of another batch are still there"):
        backward(optimizer, model, *data, loss=F.cross_entropy)
    rows = DPOptimizer(torch.optim.SGD(model.parameters()), noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=N)
    backward(rows, model, *data, loss=F.cross_entropy)
    with pytest.raises(pt.InputError, match=r"gradients of parameters embedding\.weight"):
        backward(rows, model, *data, loss=F.cross_entropy)


def test_a_model_that_mixes_samples_is_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, C))
    data = torch.randn(N, 4), torch.randint(C, (N,))
    _, optimizer, _ = private(model, data)
    with pytest.raises(pt.MixingError):
        backward(optimizer, model, *data, loss=F.cross_entropy)


def test_rows_that_are_not_finite_are_refused():
    model, (x, y) = plain(), images()
    x[2] = torch.inf
    _, optimizer, _ = private(model, (x, y))
    with pytest.raises(pt.InputError, match="not finite"):
        backward(optimizer, model, x, y, loss=F.cross_entropy)


def test_words():
    model, data = plain(), images()
    engine, loader = opacus.PrivacyEngine(), DataLoader(TensorDataset(*data), batch_size=4)
    options = {"data_loader": loader, "noise_multiplier": 1.0, "module": model}
    with pytest.raises(pt.InputError, match="other parameters than the module"):
        make_private(engine, optimizer=torch.optim.SGD(plain().parameters()), max_grad_norm=1.0, **options)
    with pytest.raises(pt.InputError, match="a bound for each\n  got       2 bounds\n  expected  4"):
        make_private(engine, optimizer=torch.optim.SGD(model.parameters()), max_grad_norm=[1.0, 1.0], **options)


def test_frozen_parameters_and_dropout():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, C))
    model[0].weight.requires_grad_(False)
    data = torch.randn(N, 4), torch.randint(C, (N,))
    _, optimizer, _ = private(model, data)
    with pytest.raises(pt.RandomnessError):
        backward(optimizer, model, *data, loss=F.cross_entropy)
    torch.manual_seed(5)
    logits = backward(optimizer, model, *data, loss=F.cross_entropy, randomness="model")
    torch.manual_seed(5)
    torch.testing.assert_close(logits, model(data[0]).detach())
    assert model[0].weight.grad is None and model[2].weight.grad is not None
