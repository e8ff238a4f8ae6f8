"""Attention: torch's layers in every mode, and the kernel's own call on the physical batch under vmap."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import partials as pt
from partials.capture import trial
from partials.capture.trace import Refused
from partials.rules import attention as rules

EXACT = 1e-11
N, T, S, E = 3, 4, 5, 8

pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")


def draw(*shape, **options):
    return torch.randn(*shape, dtype=torch.float64, **options)


def agrees(f, *inputs, check="always", **options):
    R = pt.jacobian(f, *inputs, method="loop", check="never", **options)
    J = pt.jacobian(f, *inputs, method="capture", check=check, **options)
    scale = R.norms().max()
    assert (J.values - R.values).abs().max() <= EXACT * R.values.abs().max()
    assert (J.dense() - R.dense()).norm(dim=-1).max() <= EXACT * scale
    assert (J.norms() - R.norms()).abs().max() <= EXACT * scale
    assert (J.gram() - R.gram()).abs().max() <= EXACT * scale**2
    return J


def native(f, *inputs, **options):
    J = agrees(f, *inputs, **options)
    assert all("vmapped" not in use.layout for use in J.plan.uses)
    return J


class Attention(nn.Module):
    """nn.MultiheadAttention; what it returns besides the output is used where `weights` is "mean" or "heads"."""

    def __init__(self, weights="", batch_first=True, **options):
        super().__init__()
        self.inner = nn.MultiheadAttention(E, 2, batch_first=batch_first, **options).double()
        self.weights, self.batch_first = weights, batch_first

    def forward(self, q, k=None, v=None, padding=None, mask=None):
        q, k, v = (x if self.batch_first else x.transpose(0, 1) for x in (q, q if k is None else k, q if v is None else v))
        out, weights = self.inner(
            q, k, v, padding, bool(self.weights), attn_mask=mask, average_attn_weights=self.weights != "heads", is_causal=False
        )
        out = (out if self.batch_first else out.transpose(0, 1)).sin().sum(1)[:, :2]
        return out + weights.flatten(1)[:, 1:3] if self.weights else out


def padding(lengths, width):
    return torch.arange(width)[None] >= torch.tensor(lengths)[:, None]


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("weights", ["", "mean", "heads"])
@pytest.mark.parametrize("train", [True, False])
def test_multi_head_attention(train, weights, batch_first):
    net = Attention(weights, batch_first).train(train)
    native(net, draw(N, T, E))
    native(net, draw(N, T, E), draw(N, S, E), draw(N, S, E), padding([5, 2, 3], S))
    native(net, draw(N, N, E), kwargs={"mask": torch.ones(N, N).triu(1).bool()}, in_dims={"mask": None})


@pytest.mark.parametrize("options", [{"kdim": 5, "vdim": 6}, {"add_bias_kv": True}, {"add_zero_attn": True}, {"bias": False}], ids=str)
def test_variants_of_multi_head_attention(options):
    k, v = draw(N, S, options.get("kdim", E)), draw(N, S, options.get("vdim", E))
    native(Attention(**options), draw(N, T, E), k, v, padding([5, 2, 3], S))


class Encoder(nn.Module):
    def __init__(self, dropout=0.0, nested=True, **options):
        super().__init__()
        layer = nn.TransformerEncoderLayer(E, 2, 6, dropout, batch_first=True, **options).double()
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested and not options.get("norm_first"))

    def forward(self, x, padded=None):
        return self.layers(x, src_key_padding_mask=padded)[:, 0, :2]


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_encoder(train, norm_first, activation):
    """In evaluation torch has fused layers and nested tensors for padding; under gradients it takes neither."""
    net = Encoder(norm_first=norm_first, activation=activation).train(train)
    native(net, draw(N, T, E))
    native(net, draw(N, T, E), padding([4, 2, 3], T))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.parametrize("which", ["one weight", "head"])
def test_a_frozen_encoder_whose_fast_path_is_open(which):
    net = Encoder().eval().requires_grad_(False)
    head = nn.Linear(2, 2).double()
    if which == "one weight":
        net.layers.layers[1].linear2.requires_grad_(True)
    trained = net if which == "one weight" else head
    wanted = {name: p for name, p in trained.named_parameters() if p.requires_grad}
    native(lambda x, padded: head(net(x, padded)), draw(N, T, E), padding([4, 2, 3], T), params=wanted)


class Pair(nn.Module):
    def __init__(self, batch_first):
        super().__init__()
        self.inner = nn.Transformer(E, 2, 1, 1, 6, dropout=0.0, batch_first=batch_first).double()
        self.batch_first = batch_first

    def forward(self, target, source, padded):
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1], dtype=target.dtype)
        options = {"tgt_mask": mask, "src_key_padding_mask": padded, "memory_key_padding_mask": padded}
        if self.batch_first:
            return self.inner(source, target, **options)[:, -1, :2]
        return self.inner(source.transpose(0, 1), target.transpose(0, 1), **options)[-1, :, :2]


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("train", [True, False])
def test_encoder_and_decoder(train, batch_first):
    native(Pair(batch_first).train(train), draw(N, T, E), draw(N, S, E), padding([5, 2, 3], S))


def test_dropout_draws_the_masks_of_f():
    net, x = Encoder(dropout=0.3), draw(N, T, E)
    torch.manual_seed(5)
    out = net(x)
    rows = [torch.autograd.grad(row.sum(), list(net.parameters()), retain_graph=True) for row in out]
    expected = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    torch.manual_seed(5)
    J = pt.jacobian(net, x, randomness="model", method="capture")
    assert (J.values - out).norm() <= EXACT * out.norm()
    assert (J.dense().sum(1) - expected).norm() <= EXACT * expected.norm()


class Scores(nn.Module):
    """Learned biases on the scores and learned queries: parameters that the kernel itself takes."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(E, E)
        self.bias, self.flat, self.query = (nn.Parameter(torch.randn(s)) for s in ((1, 2, T, T), (T, T), (1, 2, 3, 4)))

    def forward(self, x):
        h = heads(self.inner(x), 2)
        both = F.scaled_dot_product_attention(h, h, h, self.bias) + F.scaled_dot_product_attention(h, h, h, self.flat)
        return F.scaled_dot_product_attention(self.query.expand(len(x), -1, -1, -1), both, both).flatten(1)[:, ::7]


def test_parameters_among_the_kernels_arguments():
    native(Scores().double(), draw(N, T, E))


# --- under vmap --------------------------------------------------------------------------------------------------


def heads(x, count):
    return x.unflatten(-1, (count, -1)).transpose(-3, -2)


class Kernels(TorchDispatchMode):
    """Which attention kernels ran, forward and backward."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "scaled_dot_product" in str(func):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def vmapped(monkeypatch):
    def refuse(problem, *_):
        raise Refused("switched off for the test")

    monkeypatch.setitem(trial.RUNNERS, "native", refuse)


MASKS = {
    "none": lambda n: None,
    "of each sample": lambda n: torch.rand(n, T, T) > 0.4,
    "of each head": lambda n: draw(n, 2, T, T),
    "broadcast over queries": lambda n: draw(n, 1, 1, T),
}


def attend(net, x, mask=None, **options):
    q, k, v = net(x).split([E, net.pairs * 4, net.pairs * 4], -1)
    return F.scaled_dot_product_attention(heads(q, 2), heads(k, net.pairs), heads(v, net.pairs), mask, **options).sin().sum((1, 2))


def layer(pairs=2):
    net = nn.Linear(E, E + 8 * pairs).double()
    net.pairs = pairs
    return net


@pytest.mark.usefixtures("vmapped")
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.3}, {"enable_gqa": True}], ids=str)
def test_one_run_of_the_kernel_for_all_samples(options):
    net = layer(1 if "enable_gqa" in options else 2)
    x = draw(N, T, E)

    def f(x):
        return attend(net, x, **options)[:, 0]

    with Kernels() as kernels:
        J = pt.jacobian(f, x, params=net, method="capture", check="never")
    assert [use.layout for use in J.plan.uses] == ["vmapped"] * 2
    assert [name.endswith("backward.default") for name in kernels.seen] == [False, True]
    agrees(f, x, params=net)


@pytest.mark.usefixtures("vmapped")
@pytest.mark.parametrize("mask", [name for name in MASKS if name != "none"])
def test_masks(mask):
    net, given = layer(), MASKS[mask](N)
    if given.dtype == torch.bool:
        given[..., 0] = True
        given = given[:, None]
    agrees(lambda x, m: attend(net, x, m), draw(N, T, E), given, params=net)


@pytest.mark.usefixtures("vmapped")
@pytest.mark.parametrize("shape", [(T, T), (2, T, T), (1, 2, T, T)])
def test_a_mask_that_samples_share(shape):
    net, mask = layer(), draw(*shape)
    agrees(lambda x: attend(net, x, mask), draw(N, T, E), params=net)


@pytest.mark.usefixtures("vmapped")
def test_learned_biases_under_vmap():
    agrees(Scores().double(), draw(N, T, E))


@pytest.mark.usefixtures("vmapped")
def test_dropout_follows_the_policy():
    net = layer()

    def f(x):
        return attend(net, x, dropout_p=0.5)

    with pytest.raises(pt.RandomnessError):
        pt.jacobian(f, draw(N, T, E), params=net)
    x = draw(1, T, E).expand(N, T, E)
    same, different = (pt.jacobian(f, x, params=net, randomness=r, method="capture", check="never") for r in ("same", "different"))
    assert torch.allclose(same.values[0], same.values[1])
    assert not torch.allclose(different.values[0], different.values[1])


@given(n=st.integers(1, 4), batch=st.lists(st.integers(1, 3), max_size=2), h=st.integers(1, 3), masked=st.booleans(), data=st.data())
def test_merged_is_attention_of_each_sample(n, batch, h, masked, data):
    lead = (n, *batch, h)
    q, k, v = draw(*lead, 2, 4), draw(*lead, 3, 4), draw(*lead, 3, 5)
    rank = data.draw(st.integers(0, len(batch) + 1))
    mask = draw(n, *[data.draw(st.sampled_from([1, size])) for size in lead[len(lead) - rank :]], 2, 3) if masked else None
    out = rules.merged(q, k, v, mask)
    each = [F.scaled_dot_product_attention(q[i], k[i], v[i], None if mask is None else mask[i]) for i in range(n)]
    assert torch.allclose(out, torch.stack(each), rtol=1e-12, atol=1e-12)
