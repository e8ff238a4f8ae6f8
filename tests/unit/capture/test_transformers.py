"""Architectures that people have: `transformers` models with random weights, and a residual network, natively and exactly."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

import partials as pt
from tests.oracle import gradients

transformers = pytest.importorskip("transformers")

EXACT = 1e-11
"""Of the row's norm, in float64."""
N, T, V = 3, 5, 11
ATTENTION = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 6}
TEXT = {"vocab_size": V, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
IMAGES = {"image_size": 6, "patch_size": 3, "num_channels": 2}


def config(name, **options):
    return getattr(transformers, f"{name}Config")(**options)


def gpt2(**options):
    return transformers.GPT2LMHeadModel(config("GPT2", n_positions=8, n_embd=8, n_layer=2, n_head=2, **TEXT, **options))


def bert(**options):
    return transformers.BertForMaskedLM(config("Bert", max_position_embeddings=8, **ATTENTION, **TEXT, **options))


def llama():
    return transformers.LlamaForCausalLM(config("Llama", num_key_value_heads=1, **ATTENTION, **TEXT))


def mamba():
    return transformers.MambaForCausalLM(config("Mamba", hidden_size=8, num_hidden_layers=2, state_size=3, **TEXT))


def t5():
    return transformers.T5ForConditionalGeneration(
        config("T5", d_model=8, d_kv=4, d_ff=6, num_layers=2, num_heads=2, decoder_start_token_id=0, **TEXT)
    )


def vit():
    return transformers.ViTForImageClassification(config("ViT", num_labels=3, **ATTENTION, **IMAGES))


def text(**more):
    batch = {"input_ids": torch.randint(2, V, (N, T)), "attention_mask": torch.ones(N, T, dtype=torch.long)}
    batch["attention_mask"][0, 3:] = 0
    batch["attention_mask"][2, 4:] = 0
    return {**batch, **more}


MODELS = {
    "GPT-2, tied": (gpt2, text),
    "Llama": (llama, text),
    "BERT": (bert, text),
    "BERT with token types": (bert, lambda: text(token_type_ids=torch.randint(2, (N, T)))),
    "T5, tied, relative bias": (t5, lambda: text(decoder_input_ids=torch.randint(2, V, (N, T - 1)))),
    "ViT": (vit, lambda: {"pixel_values": torch.randn(N, 2, 6, 6, dtype=torch.float64)}),
    "Mamba": (mamba, text),
}
LANGUAGE = [name for name in MODELS if name != "ViT"]


class Wide(TorchFunctionMode):
    """`.float()` and `.to(torch.float32)` leave float64 alone: models that normalise in float32 are not exact otherwise."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.float, torch.Tensor.to) and args[0].dtype == torch.float64:
            args = tuple(torch.float64 if a is torch.float32 else a for a in args)
            kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
            return args[0] if func is torch.Tensor.float else func(*args, **kwargs)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def made(request):
    make, batch = MODELS[request.param]
    torch.manual_seed(1)
    model = make().double().eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    with Wide():
        yield model, batch()


def samples(batch):
    return [{name: x[n : n + 1] for name, x in batch.items()} for n in range(N)]


def assert_exact(J, rows):
    """rows: (N, C, P)."""
    n, c, p = rows.shape
    norms = rows.norm(dim=-1)
    scale = norms.clamp_min(1e-6 * norms.max())
    assert ((J.dense().reshape(n, c, p) - rows).norm(dim=-1) <= EXACT * scale).all()
    assert ((J.norms().reshape(n, c) - norms).abs() <= EXACT * scale).all()
    gram = rows.flatten(0, 1) @ rows.flatten(0, 1).T
    assert ((J.gram().reshape(n * c, n * c) - gram).abs() <= EXACT * scale.reshape(-1, 1) * scale.reshape(1, -1)).all()


def assert_native(J):
    assert J.plan.method == "capture"
    assert all(use.layout != "vmapped" and use.rule != "expansion" for use in J.plan.uses)


@pytest.mark.parametrize("made", MODELS, indirect=True)
def test_logits(made):
    model, batch = made
    J = pt.jacobian(model, output="logits", **batch)
    assert_native(J)
    parameters = dict(model.named_parameters())
    rows = [flat(gradients(model(**one).logits[0], parameters), parameters) for one in samples(batch)]
    assert_exact(J, torch.stack(rows))


def flat(found, parameters):
    return torch.cat([found[name].reshape(-1, p.numel()) for name, p in parameters.items()], 1)


def shifted(logits, labels):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


@pytest.mark.parametrize("made", LANGUAGE, indirect=True)
def test_language_model_losses(made):
    model, batch = made
    if "decoder_input_ids" in batch:
        labels = batch["decoder_input_ids"].clone()
    else:
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[1, 2] = -100
    ids = batch.pop("input_ids")
    G = pt.gradient(model, ids, labels, loss=shifted, output="logits", **batch)
    assert_native(G)
    parameters = dict(model.named_parameters())
    rows = []
    for n, one in enumerate(samples(batch)):
        value = shifted(model(ids[n : n + 1], **one).logits, labels[n : n + 1])
        rows.append(flat(gradients(value, parameters), parameters))
    assert_exact(G, torch.stack(rows))


@pytest.mark.parametrize("made", ["GPT-2, tied"], indirect=True)
def test_a_loss_of_the_whole_batch_is_refused_with_the_remedy(made):
    model, batch = made
    with pytest.raises(pt.OutputError, match=r"one number for the whole batch[\s\S]*loss=") as caught:
        pt.gradient(model, output="loss", labels=batch["input_ids"], **batch)
    assert "0-d" in str(caught.value)


@pytest.mark.parametrize("made", ["GPT-2, tied", "BERT", "Llama"], indirect=True)
def test_eager_attention(made):
    model, batch = made
    model.set_attn_implementation("eager")
    J = pt.jacobian(model, output="logits", **batch)
    assert_native(J)
    R = pt.jacobian(model, output="logits", method="loop", check="never", **batch)
    assert_exact(J, R.dense().flatten(1, -2))


@pytest.mark.parametrize("made", ["GPT-2, tied", "BERT", "ViT"], indirect=True)
def test_dropout_draws_the_masks_of_the_model(made):
    model, batch = made
    model.train()
    torch.manual_seed(3)
    out = model(**batch).logits
    parameters = dict(model.named_parameters())
    rows = [torch.autograd.grad(row.sum(), list(parameters.values()), retain_graph=True, allow_unused=True) for row in out]
    expected = torch.stack(
        [
            torch.cat([torch.zeros(p.numel()).double() if g is None else g.flatten() for g, p in zip(r, model.parameters(), strict=True)])
            for r in rows
        ]
    )
    torch.manual_seed(3)
    J = pt.jacobian(model, output="logits", randomness="model", **batch)
    assert_native(J)
    assert torch.equal(J.values, out)
    total = J.dense().flatten(1, -2).sum(1)
    assert (total - expected).norm() <= EXACT * expected.norm()


class Residual(nn.Module):
    """Two residual blocks, one of them strided, with batch norm in evaluation mode."""

    def __init__(self):
        super().__init__()
        self.stem = self.unit(2, 4)
        self.first = nn.Sequential(self.unit(4, 4), nn.ReLU(inplace=True), self.unit(4, 4))
        self.second = nn.Sequential(self.unit(4, 6, 2), nn.ReLU(inplace=True), self.unit(6, 6))
        self.short, self.head = self.unit(4, 6, 2), nn.Linear(6, 3)

    @staticmethod
    def unit(i, o, stride=1):
        return nn.Sequential(nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o))

    def forward(self, x):
        h = self.stem(x).relu_()
        h = F.relu(self.first(h) + h, inplace=True)
        h = F.relu(self.second(h) + self.short(h), inplace=True)
        return self.head(h.mean((2, 3)))


def test_a_residual_network_with_batch_norm_in_evaluation():
    net, x = Residual().double(), torch.randn(N, 2, 6, 6, dtype=torch.float64)
    net(x)  # (running statistics that are no longer 0 and 1)
    net.eval()
    J = pt.jacobian(net, x)
    assert_native(J)
    parameters = dict(net.named_parameters())
    assert_exact(J, torch.stack([flat(gradients(net(x[n : n + 1])[0], parameters), parameters) for n in range(N)]))
