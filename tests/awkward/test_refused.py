"""Bad input, refused in a sentence; or exact after all."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import partials as pt
from partials._run import NAMES

from .exact import exact, refused

N = 5
TOKENS = torch.tensor([[0, 1, 1], [2, 3, 1], [4, 4, 4], [0, 2, 3], [1, 0, 0]])


def tail(layer):
    return nn.Sequential(layer, nn.Flatten(), nn.Linear(12, 2))


@pytest.mark.parametrize("option", [{"max_norm": 0.5}, {"scale_grad_by_freq": True}])
@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
@pytest.mark.parametrize("method", ["auto", *NAMES])
def test_embeddings_that_write_or_count(kind, option, method):
    layer = kind(5, 4, **option)
    model = tail(layer) if kind is nn.Embedding else nn.Sequential(layer, nn.Linear(4, 2))
    before = layer.weight.detach().clone()
    error = refused(pt.InputError, next(iter(option)), model, TOKENS, method=method)
    assert error.hint and torch.equal(layer.weight, before)


@pytest.mark.parametrize("option", [{"max_norm": 0.5}, {"scale_grad_by_freq": True}])
def test_functional_embeddings_that_write_or_count(option):
    table = torch.randn(5, 4, requires_grad=True)
    before = table.detach().clone()
    refused(pt.InputError, next(iter(option)), lambda i, w: F.embedding(i, w, **option).sum(1), TOKENS, table)
    assert torch.equal(table, before)


def test_a_frozen_embedding_that_writes():
    model = tail(nn.Embedding(5, 4, max_norm=100.0))
    model[0].weight.requires_grad_(False)
    exact(model, TOKENS)


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_sparse_gradients(kind):
    layer = kind(5, 4, sparse=True) if kind is nn.Embedding else kind(5, 4, sparse=True, mode="sum")
    model = tail(layer) if kind is nn.Embedding else nn.Sequential(layer, nn.Linear(4, 2))
    plain = kind(5, 4, **({} if kind is nn.Embedding else {"mode": "sum"}))
    plain.weight = layer.weight
    dense = nn.Sequential(plain, *model[1:])
    J = pt.jacobian(model, TOKENS, check="never")
    assert not J["0.weight"].is_sparse
    assert torch.allclose(J.dense(), pt.jacobian(dense, TOKENS).dense(), rtol=1e-12)
    assert torch.equal(pt.jacobian(model, TOKENS, check="always").dense(), J.dense())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per")
def test_quantised_weights():
    engine = torch.backends.quantized.engine
    if engine == "none":
        pytest.skip("this torch has no quantised kernels")
    model = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 3).float()), dtype=torch.qint8)
    refused(pt.InputError, "no parameter to differentiate", model, torch.randn(N, 4, dtype=torch.float32))


def test_weights_without_values():
    refused(pt.InputError, "has no values", nn.Linear(4, 3, device="meta"), torch.randn(N, 4))


def test_inputs_without_values():
    refused(pt.InputError, "has no values", nn.Linear(4, 3), torch.randn(N, 4, device="meta"))


def test_lazy_modules_that_were_never_run():
    error = refused(pt.InputError, "not initialised", nn.Sequential(nn.LazyLinear(3)), torch.randn(N, 4))
    assert "run the module once" in error.hint


def test_lazy_modules_that_were_run():
    model = nn.Sequential(nn.LazyLinear(6), nn.Tanh(), nn.LazyLinear(2))
    x = torch.randn(N, 4)
    model(x)
    exact(model, x)


def test_sharded_parameters(tmp_path):
    if not torch.distributed.is_available():
        pytest.skip("this torch has no distributed package")
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        model = nn.Linear(4, 3)
        model.weight = nn.Parameter(distribute_tensor(model.weight.detach(), init_device_mesh("cpu", (1,)), [Shard(0)]))
        error = refused(pt.InputError, "'weight' is sharded", model, torch.randn(N, 4))
        assert "full_tensor" in error.hint
    finally:
        dist.destroy_process_group()
