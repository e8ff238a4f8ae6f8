"""Models saved in a folder: loaded without network, code or pickles; each head's loss of one sample; the command line."""

import json
import logging
import socket
from pathlib import Path

import pytest
import torch
from torch import nn

import partials as pt
from tests.oracle import gradients

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

from partials.adapters.huggingface import labels_of, load, loss_of  # noqa: E402

N, T, V, C = 4, 6, 11, 3
SIZES = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 6}
TEXT = {"vocab_size": V, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
T5 = {"d_model": 8, "d_kv": 4, "d_ff": 6, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
IMAGES = {"image_size": 6, "patch_size": 3, "num_channels": 2}


@pytest.fixture(autouse=True)
def _no_network_no_noise(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the network is not to be used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)


def text():
    torch.manual_seed(2)
    batch = {"input_ids": torch.randint(2, V, (N, T)), "attention_mask": torch.ones(N, T, dtype=torch.long)}
    batch["attention_mask"][0, 3:] = 0
    batch["attention_mask"][2, 4:] = 0
    return batch


def tokens(batch):
    return labels_of(batch["input_ids"], batch["attention_mask"])


def masked(batch):
    labels = torch.full((N, T), -100)
    labels[:, 1::2] = torch.randint(V, (N, T))[:, 1::2]
    return labels


def made(kind, config, **options):
    torch.manual_seed(1)
    return getattr(transformers, kind)(getattr(transformers, config)(**options))


def bert(head, **options):
    return made(f"BertFor{head}", "BertConfig", max_position_embeddings=8, **SIZES, **TEXT, **options)


def gpt2():
    return made("GPT2LMHeadModel", "GPT2Config", n_positions=8, n_embd=8, n_layer=1, n_head=2, **TEXT)


def vit():
    return made("ViTForImageClassification", "ViTConfig", num_labels=C, **SIZES, **IMAGES)


def images():
    torch.manual_seed(2)
    return {"pixel_values": torch.randn(N, 2, 6, 6)}


HEADS = {
    "GPT-2": (gpt2, text, tokens),
    "Llama": (lambda: made("LlamaForCausalLM", "LlamaConfig", num_key_value_heads=1, **SIZES, **TEXT), text, tokens),
    "BERT, masked": (lambda: bert("MaskedLM"), text, masked),
    "BERT, tokens": (lambda: bert("TokenClassification", num_labels=C), text, lambda batch: torch.randint(C, (N, T))),
    "T5": (
        lambda: made("T5ForConditionalGeneration", "T5Config", **T5, **TEXT),
        lambda: text() | {"decoder_input_ids": torch.randint(2, V, (N, 4))},
        lambda batch: torch.randint(2, V, (N, 4)),
    ),
    "BERT, one class": (lambda: bert("SequenceClassification", num_labels=C), text, lambda batch: torch.randint(C, (N,))),
    "BERT, a number": (lambda: bert("SequenceClassification", num_labels=1), text, lambda batch: torch.randn(N)),
    "BERT, several classes": (
        lambda: bert("SequenceClassification", num_labels=C, problem_type="multi_label_classification"),
        text,
        lambda batch: torch.randint(2, (N, C)).float(),
    ),
    "ViT": (
        lambda: made("ViTForImageClassification", "ViTConfig", num_labels=C, **SIZES, **IMAGES),
        images,
        lambda b: torch.randint(C, (N,)),
    ),
}


@pytest.mark.parametrize("name", HEADS)
def test_a_saved_model_and_the_loss_of_one_sample(name, tmp_path):
    """The rows are those of the model's own loss, called with each sample alone."""
    make, batch_of, labels_for = HEADS[name]
    saved = make().eval()
    saved.save_pretrained(tmp_path)
    model = load(tmp_path, dtype=torch.float32)
    assert type(model) is type(saved) and not model.training
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), saved.parameters(), strict=True))
    batch = batch_of()
    labels = labels_for(batch)
    G = pt.gradient(model, **batch, target=labels, loss=loss_of(model), output="logits")
    params = dict(model.named_parameters())
    own = [model(**{k: x[n : n + 1] for k, x in batch.items()}, labels=labels[n : n + 1]).loss for n in range(N)]
    torch.testing.assert_close(G.values, torch.stack(own).detach().reshape(N), rtol=1e-5, atol=1e-6)
    rows = torch.stack([torch.cat([gradients(loss.reshape(1), params)[p].reshape(-1) for p in params]) for loss in own])
    assert (G.dense() - rows).norm() < 1e-4 * rows.norm()


def test_sums_add_up_to_the_batchs_loss():
    model, batch = gpt2().eval(), text()
    labels = tokens(batch)
    G = pt.gradient(model, **batch, target=labels, loss=loss_of(model, "sum"), output="logits")
    counted = int((labels[:, 1:] != -100).sum())
    whole = model(**batch, labels=labels).loss
    torch.testing.assert_close(G.values.sum() / counted, whole.detach())
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(whole, list(model.parameters()))])
    torch.testing.assert_close(G.sum() / counted, expected, rtol=1e-4, atol=1e-6)


def test_labels():
    batch = text()
    labels = tokens(batch)
    assert (labels[0, 3:] == -100).all() and torch.equal(labels[1], batch["input_ids"][1])
    assert torch.equal(labels_of(batch["input_ids"]), batch["input_ids"])


# --- what is refused -----------------------------------------------------------------------------------------------


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(pt.InputError, match="holds no model\n  got       no config"):
        load(tmp_path)


def test_code_that_comes_with_a_folder_is_not_run(tmp_path):
    gpt2().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"architectures": ["MyModel"], "auto_map": {"AutoModel": "mine.MyModel"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "mine.py").write_text("raise SystemExit('this was run')")
    with pytest.raises(pt.InputError, match="names no model of transformers\n  got       architectures MyModel"):
        load(tmp_path)


@pytest.mark.parametrize("named", [[], ["GPT2Config"], ["pipeline"], ["torch"]])
def test_names_that_are_no_model(tmp_path, named):
    gpt2().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"architectures": named}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(pt.InputError, match="names no model of transformers"):
        load(tmp_path)


def test_pickled_weights_are_not_read(tmp_path):
    model = gpt2()
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(pt.InputError, match="holds no safetensors"):
        load(tmp_path)


def test_a_config_that_is_no_json(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(pt.InputError, match="cannot be read"):
        load(tmp_path)


def test_heads_without_a_loss():
    with pytest.raises(pt.InputError, match="the loss of this model is not known\n  got       Linear"):
        loss_of(nn.Linear(2, 2))
    with pytest.raises(pt.InputError, match="reduction='none' is unknown"):
        loss_of(gpt2(), "none")


# --- the command line ----------------------------------------------------------------------------------------------


@pytest.fixture
def command(tmp_path, monkeypatch):
    pytest.importorskip("typer")
    from typer.testing import CliRunner

    from partials.cli.app import app

    monkeypatch.chdir(tmp_path)
    gpt2().save_pretrained("gpt2")
    batch = text()
    safetensors.save_file(batch, "bare.safetensors")
    safetensors.save_file(batch | {"labels": tokens(batch)}, "tokens.safetensors")
    return lambda *words: CliRunner().invoke(app, [str(word) for word in words])


@pytest.mark.parametrize("loss", ["labels", "labels-sum"])
def test_run(command, loss):
    done = command("run", "gpt2", "--data", "tokens.safetensors", "--loss", loss, "--what", "norms", "--out", "store", "--block", 3)
    assert done.exit_code == 0, done.output
    model, batch = gpt2().eval(), text()
    G = pt.gradient(model, **batch, target=tokens(batch), loss=loss_of(model, "sum" if loss == "labels-sum" else "mean"), output="logits")
    torch.testing.assert_close(torch.as_tensor(pt.open("store").dense()).reshape(-1), G.norms(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["check", "explain"])
def test_other_commands(command, name):
    done = command(name, "gpt2", "--data", "tokens.safetensors", "--loss", "labels")
    assert done.exit_code == 0 and "transformer." in done.stdout, done.output
    done = command(name, "gpt2", "--data", "bare.safetensors", "--limit", 2, "--wrt", "transformer.ln_f.*")
    assert done.exit_code == 0, done.output


def test_words_of_the_command_line(command):
    done = command("check", "gpt2", "--data", "bare.safetensors", "--loss", "labels")
    assert done.exit_code == 2 and "labels among the data, or --target" in done.stderr
    Path("empty").mkdir()
    done = command("check", "empty", "--data", "bare.safetensors")
    assert done.exit_code == 2 and "empty holds no model" in done.stderr
