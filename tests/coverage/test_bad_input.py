"""Bad input beyond the awkward list: exact, or refused in a sentence that says what, got, expected and try; and what torch gets wrong."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import partials as pt

N = 4


def refused(error, match, f, *inputs, **options):
    with pytest.raises(error, match=match) as caught:
        pt.jacobian(f, *inputs, **options)
    text = str(caught.value)
    assert all(word in text for word in ("  got ", "  expected ", "  try ")), text


@pytest.mark.parametrize("method", ["jacobian", "vmap"])
def test_methods_that_cannot_put_sparse_gradients_together_say_so(method):
    refused(pt.MethodError, "cannot run", nn.Embedding(5, 3, sparse=True), torch.randint(0, 5, (N, 3)), method=method)


def test_lazy_parameters_also_where_they_are_not_asked_for():
    module = nn.Sequential(nn.Linear(3, 3), nn.LazyLinear(2))
    refused(pt.InputError, "'1.weight' is not initialised", module, torch.randn(N, 3))
    refused(pt.InputError, "'1.weight' is not initialised", module, torch.randn(N, 3), wrt="0.weight")
    assert nn.parameter.is_lazy(module[1].weight)


def test_sparse_and_nested_tensors():
    w = torch.randn(2, 3, requires_grad=True)
    refused(pt.InputError, "'x' is not a dense", lambda x, w: torch.sparse.mm(x, w.T), torch.randn(N, 3).to_sparse(), w)
    sparse = torch.randn(2, 3).to_sparse().requires_grad_()
    refused(pt.InputError, "'w' is not a dense", lambda x, w: torch.sparse.mm(w, x.T).T, torch.randn(N, 3), sparse)


@pytest.fixture
def alone(tmp_path):
    """A process group of this process alone."""
    if not torch.distributed.is_available():
        pytest.skip("torch was built without torch.distributed")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
def test_modules_within_fsdp(alone):
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    fully_shard(module, mesh=alone)
    refused(pt.InputError, "sharded over processes", module, torch.randn(N, 3))
    wrapped = FullyShardedDataParallel(nn.Linear(3, 2), device_mesh=alone, device_id=torch.device("cpu"))
    refused(pt.InputError, "sharded over processes", wrapped, torch.randn(N, 3))


@pytest.mark.parametrize("kind", [nn.BCEWithLogitsLoss, nn.BCELoss])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("shape", [(N, 3), (N, 1)])
def test_a_loss_whose_weights_are_those_of_the_samples(kind, reduction, shape):
    model = nn.Sequential(nn.Linear(2, 3), nn.Sigmoid())
    with pytest.raises(pt.InputError, match="has a weight for each sample of a batch"):
        pt.gradient(model, torch.randn(N, 2), torch.rand(N, 3), loss=kind(weight=torch.rand(shape), reduction=reduction))


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_a_loss_with_weights_for_each_output_is_exact(reduction):
    model = nn.Sequential(nn.Linear(2, 3), nn.Sigmoid()).double()
    x, t = torch.randn(N, 2).double(), torch.rand(N, 3).double()
    loss = nn.BCELoss(weight=torch.rand(3).double(), reduction=reduction)
    G = pt.gradient(model, x, t, loss=loss, check="always")
    total = torch.autograd.grad(loss(model(x), t) * (N if reduction == "mean" else 1), list(model.parameters()))
    torch.testing.assert_close(G.sum(), torch.cat([g.flatten() for g in total]))


# --- what torch itself gets wrong, and what follows from it -------------------------------------------------------------


def test_several_outputs_of_group_norm_are_not_pulled_at_once():
    """torch 2.13: the batched backward of native_group_norm's statistics is wrong, with no error."""
    w = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)

    def f(x, w):
        z, mean, rstd = torch.native_group_norm(w, None, None, 3, 4, 5, 2, 0.5)
        return x * torch.stack([z.sum() * z.square().sum(), mean.sin().sum(), rstd.sum(), (z * mean.sum()).square().sum()])

    def g(x, w):
        z, mean, rstd = torch.native_group_norm(x * w[0], None, None, len(x), 4, 5, 2, 0.5)
        return torch.cat([z.flatten(1)[:, :3], mean, rstd], 1)

    for function, x in ((f, torch.randn(N, 1)), (g, torch.randn(N, 4, 5))):
        J, R = (pt.jacobian(function, x.double(), w, method=m, check="never") for m in ("auto", "loop"))
        torch.testing.assert_close(J.dense(), R.dense(), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("derived", [F.hardsigmoid, lambda p: F.embedding(torch.tensor([0, 1, 1]), p, padding_idx=0)])
def test_products_where_torch_has_no_second_derivative_or_a_wrong_one(derived):
    p = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    x, v = torch.randn(N, 4, dtype=torch.float64), torch.randn(12, dtype=torch.float64)
    J, R = (pt.jacobian(lambda x, p: x @ derived(p).T, x, p, method=m, check="always") for m in ("capture", "loop"))
    torch.testing.assert_close(J @ v, R @ v)


def test_rows_that_are_not_finite_in_every_sample_raise_no_alarm():
    w = torch.ones(3, dtype=torch.float64, requires_grad=True)
    x = torch.tensor([[torch.nan, 1, 2], [1, torch.nan, 2], [1, 2, torch.nan]], dtype=torch.float64)
    J = pt.jacobian(lambda x, w: x * w, x, w, check="always")
    R = pt.jacobian(lambda x, w: x * w, x, w, method="loop", check="never")
    torch.testing.assert_close(J.dense(), R.dense(), equal_nan=True)
