"""The backends for laplace-torch: its interface, against its own backends and a float64 loop; fit and predict; models its own get wrong."""

import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import partials as pt
from tests.oracle import gradients

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    laplace = pytest.importorskip("laplace", reason="laplace-torch, which asks for torchvision, is no part of the dev extra")

from laplace.curvature import AsdlEF, AsdlGGN, BackPackEF, BackPackGGN, CurvlinopsEF, CurvlinopsGGN

from partials.adapters.laplace import PartialsEF, PartialsGGN

N, C = 6, 3
THEIRS = {"backpack": BackPackGGN, "curvlinops": CurvlinopsGGN, "asdl": AsdlGGN}
KINDS = ("regression", "classification")

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),  # of the host and of its backends
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


# --- models and data -----------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """One matrix, used forwards and backwards."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(4, 4), nn.Linear(4, C)

    def forward(self, x):
        return self.head((self.first(x).tanh() @ self.first.weight).tanh())


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru, self.head = nn.GRU(4, 5, batch_first=True), nn.Linear(5, C)

    def forward(self, x):
        return self.head(self.gru(x)[0][:, -1])


class Scaled(nn.Module):
    """Something comes after the last layer."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(4, 5), nn.Linear(5, C)

    def forward(self, x):
        return 3 * self.head(self.first(x).tanh())


def plain():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, C))


def conv():
    return nn.Sequential(nn.Conv2d(1, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, C))


MODELS = {"plain": (plain, (4,)), "conv": (conv, (1, 3, 3)), "tied": (Tied, (4,)), "gru": (Recurrent, (7, 4)), "scaled": (Scaled, (4,))}


def made(name="plain", likelihood="classification", n=N):
    torch.manual_seed(1)
    make, shape = MODELS[name]
    model = make().double().eval()
    model.output_size = C
    x = torch.randn(n, *shape).double()
    y = torch.randint(C, (n,)) if likelihood == "classification" else torch.randn(n, C).double()
    return model, x, y


def rows_of(model, x, params=None):
    """The float64 loop: (N, C, P)."""
    params = dict(model.named_parameters()) if params is None else params
    found = [gradients(model(x[n : n + 1])[0], params) for n in range(len(x))]
    return torch.stack([torch.cat([rows[name].reshape(C, -1) for name in params], 1) for rows in found])


def output_hessians(f, likelihood):
    if likelihood == "regression":
        return torch.eye(C).double().expand(len(f), C, C)
    p = f.softmax(-1)
    return torch.diag_embed(p) - p[:, :, None] * p[:, None]


def ggn(model, x, likelihood, rows=None):
    rows = rows_of(model, x) if rows is None else rows
    return torch.einsum("ncp,ncd,ndq->pq", rows, output_hessians(model(x).detach(), likelihood), rows)


def near(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


# --- the interface -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_jacobians(name):
    model, x, _ = made(name)
    J, f = PartialsGGN(model, "classification").jacobians(x)
    near(J, rows_of(model, x))
    near(f, model(x).detach())
    assert not J.requires_grad and not f.requires_grad


@pytest.mark.parametrize("likelihood", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_full_and_diagonal(name, likelihood):
    model, x, y = made(name, likelihood)
    backend = PartialsGGN(model, likelihood)
    (loss, full), (again, diagonal) = backend.full(x, y, N=N), backend.diag(x, y, N=N)
    expected = ggn(model, x, likelihood)
    near(full, expected)
    near(diagonal, expected.diagonal())
    near(loss, backend.factor * backend.lossfunc(model(x), y).detach())
    near(again, loss)


@pytest.mark.parametrize("likelihood", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_the_empirical_fisher_matrix(name, likelihood):
    model, x, y = made(name, likelihood)
    backend = PartialsEF(model, likelihood)
    losses = torch.stack([backend.lossfunc(model(x[n : n + 1]), y[n : n + 1]) for n in range(N)])
    params = dict(model.named_parameters())
    g = torch.cat([part.reshape(N, -1) for part in gradients(losses, params).values()], 1)
    rows, total = backend.gradients(x, y)
    near(rows, g)
    near(total, losses.sum().detach())
    near(backend.full(x, y)[1], backend.factor * g.T @ g)
    near(backend.diag(x, y)[1], backend.factor * g.square().sum(0))
    near(backend.diag(x, y)[0], backend.factor * losses.sum().detach())


QUANTITIES = {
    "jacobians": lambda backend, x, y: backend.jacobians(x),
    "full": lambda backend, x, y: backend.full(x, y),
    "diag": lambda backend, x, y: backend.diag(x, y),
}


@pytest.mark.parametrize("quantity", QUANTITIES)
@pytest.mark.parametrize("likelihood", KINDS)
@pytest.mark.parametrize("theirs", THEIRS)
def test_as_the_hosts_own_backends(theirs, likelihood, quantity):
    if theirs == "asdl" and quantity != "diag":
        pytest.skip("the release of asdl lacks an argument that the host passes")
    model, x, y = made("plain", likelihood)
    ours = QUANTITIES[quantity](PartialsGGN(model, likelihood), x, y)
    other = QUANTITIES[quantity](THEIRS[theirs](made("plain", likelihood)[0], likelihood), x, y)
    for found, expected in zip(ours, other, strict=True):
        if (theirs, quantity) == ("curvlinops", "full"):  # (it multiplies with an identity in float32)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        else:
            near(found, expected.detach())


@pytest.mark.parametrize("theirs", [BackPackEF, CurvlinopsEF, AsdlEF])
def test_as_the_hosts_own_empirical_fisher(theirs):
    model, x, y = made()
    other, _, _ = made()
    near(theirs(other, "classification").diag(x, y)[1], PartialsEF(model, "classification").diag(x, y)[1])


def test_one_output_without_a_dimension():
    model, x = nn.Sequential(nn.Linear(4, 1), nn.Flatten(0)).double(), torch.randn(N, 4).double()
    J, f = PartialsGGN(model, "regression").jacobians(x)
    assert J.shape == (N, 1, 5) and f.shape == (N, 1)


@pytest.mark.parametrize("likelihood", KINDS)
def test_several_predictions_of_a_sample(likelihood):
    """(N, T, C): the loss is that of every token."""
    model, _, _ = made("plain")
    x = torch.randn(N, 2, 4).double()
    y = torch.randint(C, (N, 2)) if likelihood == "classification" else torch.randn(N, 2, C).double()
    folded, labels = x.flatten(0, 1), y.flatten(0, 1)
    backend = PartialsGGN(model, likelihood)
    near(backend.full(x, y)[1], ggn(model, folded, likelihood))
    near(backend.diag(x, y)[1], ggn(model, folded, likelihood).diagonal())
    near(backend.diag(x, y)[0], backend.diag(folded, labels)[0])
    assert torch.isfinite(PartialsEF(model, likelihood).diag(x, y)[1]).all()


@pytest.mark.parametrize("order", [[0, 7, 30], [41, 3, 25, 4]], ids=["sorted", "not sorted"])
@pytest.mark.parametrize("likelihood", KINDS)
def test_subnetworks(likelihood, order):
    model, x, y = made("plain", likelihood)
    indices = torch.tensor(order)
    backend = PartialsGGN(model, likelihood, subnetwork_indices=indices)
    near(backend.jacobians(x)[0], rows_of(model, x)[..., indices])
    expected = ggn(model, x, likelihood)[indices][:, indices]
    near(backend.full(x, y)[1], expected)
    near(backend.diag(x, y)[1], expected.diagonal())
    rows = PartialsEF(model, likelihood).gradients(x, y)[0][:, indices]
    fisher = PartialsEF(model, likelihood, subnetwork_indices=indices)
    near(fisher.full(x, y)[1], fisher.factor * rows.T @ rows)
    near(fisher.diag(x, y)[1], fisher.factor * rows.square().sum(0))


def test_only_the_parameters_of_a_subnetwork_are_differentiated():
    model, _, _ = made("plain")
    backend = PartialsGGN(model, "classification", subnetwork_indices=torch.tensor([0, 1, 22]))
    assert list(backend._targets()) == ["0.weight", "0.bias"]


def test_frozen_parameters():
    model, x, y = made()
    model[0].weight.requires_grad_(False)
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rows = rows_of(model, x, params)
    near(PartialsGGN(model, "classification").jacobians(x)[0], rows)
    near(PartialsGGN(model, "classification").full(x, y)[1], ggn(model, x, "classification", rows))


@pytest.mark.parametrize("choice", [torch.tensor([2, 0, 1, 1, 0, 2]), torch.tensor([[0, 2]] * N)], ids=["one", "two"])
def test_selected_outputs(choice):
    model, x, _ = made("conv")
    rows, f = PartialsGGN(model, "classification").selected_output_jacobians(x, choice)
    columns = choice.reshape(N, -1)
    near(rows, rows_of(model, x)[torch.arange(N)[:, None], columns])
    near(f, model(x).detach())
    with pytest.raises(ValueError, match=r"chosen for 2 inputs, and there are 6"):
        PartialsGGN(model, "classification").selected_output_jacobians(x, choice[:2])


@pytest.mark.parametrize("selected", [False, True])
def test_results_can_be_differentiated(selected):
    model, x, _ = made("plain")
    backend, choice = PartialsGGN(model, "classification"), torch.arange(N) % C

    def size(x):
        J, f = (
            backend.selected_output_jacobians(x, choice, enable_backprop=True) if selected else backend.jacobians(x, enable_backprop=True)
        )
        return J.square().sum() + f.sum()

    ours = x.clone().requires_grad_()
    size(ours).backward()
    slow = x.clone().requires_grad_()
    total = model(slow).sum()
    for n in range(N):
        for c in [int(choice[n])] if selected else range(C):
            grads = torch.autograd.grad(model(slow[n : n + 1])[0, c], list(model.parameters()), create_graph=True)
            total = total + sum(g.square().sum() for g in grads)
    total.backward()
    near(ours.grad, slow.grad)


def test_a_sampled_curvature_is_right_on_average():
    model, x, y = made("plain")
    exact = PartialsGGN(model, "classification").diag(x, y)[1]
    sampled = PartialsGGN(model, "classification", stochastic=True, num_samples=4000).diag(x, y)[1]
    assert (sampled - exact).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize("backend", [PartialsGGN, PartialsEF])
def test_kronecker_factors_are_refused(backend):
    model, x, y = made()
    with pytest.raises(NotImplementedError, match=r"approximation by assumptions .* hessian_structure='diag' or 'full'"):
        backend(model, "classification").kron(x, y, N)


def test_options_reach_the_library():
    model, x, y = made(n=64)
    with pytest.raises(pt.MemoryBudgetError):
        PartialsGGN(model, "classification", max_memory=10).diag(x, y)
    near(
        PartialsGGN(model, "classification", max_memory="1GiB", check="never").diag(x, y)[1],
        PartialsGGN(model, "classification").diag(x, y)[1],
    )


# --- fitted and asked ----------------------------------------------------------------------------------------------


def loader(x, y, size=4):
    return DataLoader(TensorDataset(x, y), batch_size=size)


def fitted(model, x, y, likelihood, subset, structure, backend=PartialsGGN, **options):
    found = laplace.Laplace(model, likelihood, subset_of_weights=subset, hessian_structure=structure, backend=backend, **options)
    found.fit(loader(x, y))
    return found


@pytest.mark.parametrize("structure", ["full", "diag"])
@pytest.mark.parametrize("subset", ["all", "last_layer"])
@pytest.mark.parametrize("likelihood", KINDS)
def test_fit_and_predict(likelihood, subset, structure):
    model, x, y = made("plain", likelihood)
    ours = fitted(model, x, y, likelihood, subset, structure)
    theirs = fitted(made("plain", likelihood)[0], x, y, likelihood, subset, structure, BackPackGGN)
    near(ours.H, theirs.H)
    near(ours.log_marginal_likelihood(), theirs.log_marginal_likelihood())
    for found, expected in zip(answers(ours, x), answers(theirs, x), strict=True):
        near(found, expected)


def answers(fit, x):
    found = fit(x)
    return found if isinstance(found, tuple) else (found,)


@pytest.mark.parametrize("likelihood", KINDS)
@pytest.mark.parametrize("name", ["tied", "gru"])
def test_models_that_its_own_backends_refuse_or_get_wrong(name, likelihood):
    model, x, y = made(name, likelihood)
    near(fitted(model, x, y, likelihood, "all", "full").H, ggn(model, x, likelihood))
    near(fitted(model, x, y, likelihood, "all", "diag").H, ggn(model, x, likelihood).diagonal())


def test_its_own_backends_refuse_them_or_get_them_wrong():
    for name in ("tied", "gru"):
        model, x, _ = made(name)
        for theirs in (BackPackGGN, AsdlGGN):
            try:
                rows = theirs(made(name)[0], "classification").jacobians(x)[0]
            except Exception:
                continue
            assert rows.shape != rows_of(model, x).shape or not torch.allclose(rows, rows_of(model, x))


@pytest.mark.parametrize("structure", ["full", "diag"])
def test_what_comes_after_the_last_layer_is_differentiated(structure):
    model, x, y = made("scaled")
    head = {"weight": model.head.weight, "bias": model.head.bias}
    rows = rows_of(model, x, head)
    expected = ggn(model, x, "classification", rows)
    ours = fitted(model, x, y, "classification", "last_layer", structure, last_layer_name="head")
    near(ours.H, expected if structure == "full" else expected.diagonal())
    near(ours.backend.last_layer_jacobians(x)[0], rows)
    theirs = fitted(made("scaled")[0], x, y, "classification", "last_layer", "full", CurvlinopsGGN, last_layer_name="head")
    assert not torch.allclose(theirs.backend.last_layer_jacobians(x)[0], rows)


def test_gradients_of_the_last_layer():
    model, x, y = made("conv")
    whole = PartialsEF(model, "classification").gradients(x, y)[0]
    ours = fitted(model, x, y, "classification", "last_layer", "diag", PartialsEF)
    near(ours.H, whole[:, -12 * C - C :].square().sum(0))


def test_a_subnetwork_is_fitted():
    model, x, y = made("plain")
    indices = torch.tensor([1, 8, 33])
    found = fitted(model, x, y, "classification", "subnetwork", "full", subnetwork_indices=indices)
    near(found.H, ggn(model, x, "classification")[indices][:, indices])
    assert found(x).shape == (N, C)


def test_training_by_marginal_likelihood_and_nystroem_features():
    model, x, y = made("plain", "regression")
    options = {"likelihood": "regression", "hessian_structure": "diag", "n_epochs": 4, "n_epochs_burnin": 2, "marglik_frequency": 2}
    found = []
    for backend in (PartialsGGN, BackPackGGN):
        torch.manual_seed(3)
        _, _, margin, _ = laplace.marglik_training(made("plain", "regression")[0], loader(x, y), backend=backend, **options)
        found.append(margin)
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    features = laplace.baselaplace.ELLA(model, "regression", n_eigenvalues=3, subsample_size=6, backend=PartialsGGN)
    features.fit(loader(x, y))
    assert features(x)[1].shape == (N, C, C)


@pytest.mark.parametrize("structure", ["full", "diag"])
def test_a_transformer_with_inputs_by_name(structure):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 3}
    config = transformers.BertConfig(vocab_size=11, max_position_embeddings=8, num_labels=C, **sizes)

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.bert = transformers.BertForSequenceClassification(config).double()

        def forward(self, batch):
            return self.bert(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits

    model = Logits().eval()
    data = [
        {"input_ids": torch.randint(11, (5,)), "attention_mask": torch.ones(5).long(), "labels": torch.randint(C, ())} for _ in range(N)
    ]
    data[0]["attention_mask"][3:] = 0
    found = laplace.Laplace(model, "classification", subset_of_weights="all", hessian_structure=structure, backend=PartialsGGN)
    found.fit(DataLoader(data, batch_size=4))
    params = dict(model.named_parameters())
    H = torch.zeros(sum(p.numel() for p in params.values()), dtype=torch.float64)
    for one in data:
        batch = {name: value[None] for name, value in one.items()}
        f = model(batch)[0]
        rows = torch.cat([g.reshape(C, -1) for g in gradients(f, params).values()], 1)
        H += ((torch.diag(f.softmax(0)) - f.softmax(0)[:, None] * f.softmax(0)).detach() @ rows * rows).sum(0)
    torch.testing.assert_close(found.H if structure == "diag" else found.H.diagonal(), H, rtol=1e-9, atol=1e-11)
    batch = next(iter(DataLoader(data, batch_size=3)))
    assert found(batch).shape == (3, C)


def test_real_digits_and_a_real_regression():
    datasets = pytest.importorskip("sklearn.datasets")
    for likelihood in KINDS:
        data = datasets.load_digits() if likelihood == "classification" else datasets.load_diabetes()
        x, y = torch.tensor(data.data[:200]).float(), torch.tensor(data.target[:200])
        x = (x - x.mean(0)) / x.std(0).clamp_min(1e-3)
        y = y if likelihood == "classification" else ((y - y.mean()) / y.std()).float()[:, None]
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(x.shape[1], 12), nn.Tanh(), nn.Linear(12, 10 if likelihood == "classification" else 1))
        optimizer, loss = (
            torch.optim.Adam(model.parameters(), 1e-2),
            nn.CrossEntropyLoss() if likelihood == "classification" else nn.MSELoss(),
        )
        for _ in range(60):
            optimizer.zero_grad()
            loss(model(x), y).backward()
            optimizer.step()
        ours = laplace.Laplace(model, likelihood, subset_of_weights="all", hessian_structure="diag", backend=PartialsGGN)
        theirs = laplace.Laplace(model, likelihood, subset_of_weights="all", hessian_structure="diag", backend=BackPackGGN)
        ours.fit(loader(x, y, 64)), theirs.fit(loader(x, y, 64))
        torch.testing.assert_close(ours.H, theirs.H, rtol=1e-4, atol=1e-5)
        ours.optimize_prior_precision(), theirs.optimize_prior_precision()
        for found, expected in zip(answers(ours, x[:50]), answers(theirs, x[:50]), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
