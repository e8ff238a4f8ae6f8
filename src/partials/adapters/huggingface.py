"""Hugging Face models by the path of a local folder, and the loss of one sample that each kind of head stands for.

    model = load("my-gpt2")
    labels = labels_of(batch["input_ids"], batch["attention_mask"])
    G = pt.gradient(model, **batch, target=labels, loss=loss_of(model), output="logits")

A folder is what `model.save_pretrained(folder)` wrote: a config.json and safetensors. Nothing is fetched, no code of the folder is run, and
nothing is unpickled. A model's own `loss` is one number for the whole batch: a mean over all labels that count, in which a long text weighs
more than a short one. Here a sample's loss is a mean over its own labels, or with `reduction="sum"` their sum, of which the batch's is the
total; both are those of the model called with this sample alone.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import nn

from .._errors import InputError, listed
from .._typing import Tensor
from . import host

with host("transformers", "huggingface"):
    import transformers

IGNORED = -100
"""The label of a position that does not count."""
CAUSAL, TOKENS = ("ForCausalLM", "LMHeadModel"), ("ForMaskedLM", "ForTokenClassification")
EITHER, CLASSES = ("ForConditionalGeneration",), ("ForSequenceClassification", "ForImageClassification")
"""How the names of classes end, by what their logits predict."""


def load(folder: str | Path, **options: Any) -> nn.Module:
    """The model that a folder's config.json names, with the folder's weights, in evaluation mode.

    Parameters
    ----------
    folder
        Written by `save_pretrained`, with safetensors.
    options
        Of transformers' `from_pretrained`, such as `dtype` or `attn_implementation`.

    Raises
    ------
    InputError
        for a folder without a config or without safetensors, and for a model that is not in transformers itself (its code would have to
        come with the folder, and be run).
    """
    folder = Path(folder)
    config = folder / "config.json"
    if not config.is_file():
        raise InputError(f"{folder} holds no model", got="no config.json", expected="a folder written by model.save_pretrained(folder)")
    try:
        named = json.loads(config.read_text(encoding="utf-8")).get("architectures") or []
    except (ValueError, AttributeError) as error:
        raise InputError(f"{config} cannot be read", got=str(error), expected="JSON") from None
    kind: Any = getattr(transformers, str(named[0]), None) if named else None
    if not inspect.isclass(kind) or not issubclass(kind, transformers.PreTrainedModel):
        raise InputError(
            f"{folder} names no model of transformers",
            got=f"architectures {listed(named)}" if named else "no architectures in config.json",
            expected="a class of transformers itself: code that comes with a folder is not run",
        )
    if not list(folder.glob("*.safetensors")):
        others = listed(sorted(p.name for p in folder.iterdir()))
        raise InputError(
            f"{folder} holds no safetensors, and other files of weights may hold code",
            got=others,
            expected="model.safetensors",
            hint="model.save_pretrained(folder) of a recent transformers writes them",
        )
    options |= {"local_files_only": True, "trust_remote_code": False, "use_safetensors": True}
    found: Any = kind
    model: nn.Module = found.from_pretrained(str(folder), **options)
    return model.eval()


def labels_of(input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """The labels of a causal language model for these texts, (N, T): the tokens themselves, and -100 where the mask is 0."""
    return input_ids.clone() if attention_mask is None else input_ids.masked_fill(attention_mask == 0, IGNORED)


def loss_of(model: nn.Module, reduction: str = "mean") -> Callable[[Tensor, Tensor], Tensor]:
    """`loss(logits, labels)` of one sample, for `partials.gradient(..., loss=..., output="logits")`, by the kind of the model's head.

    | head | loss of one sample |
    |---|---|
    | `...ForCausalLM`, `...LMHeadModel` | cross entropy of logits [t] with label [t + 1]; labels of -100 do not count |
    | `...ForMaskedLM`, `...ForTokenClassification` | cross entropy of logits [t] with label [t]; labels of -100 do not count |
    | `...ForConditionalGeneration` | as masked where an encoder feeds the decoder (T5), else as causal |
    | `...ForSequenceClassification`, `...ForImageClassification` | by `problem_type`: cross entropy, squared error, binary cross entropy |

    Parameters
    ----------
    model
        Of transformers.
    reduction
        Over the labels of a sample: "mean", which is NaN where none counts, or "sum".

    Raises
    ------
    InputError
        for a head that is not in the table.
    """
    if reduction not in ("mean", "sum"):
        raise InputError(f"reduction={reduction!r} is unknown", got=repr(reduction), expected="'mean' or 'sum'")
    loss = _of_head(type(model).__name__, getattr(model, "config", None))
    if loss is None:
        known = f"a class that ends in one of: {listed((*CAUSAL, *TOKENS, *EITHER, *CLASSES))}"
        raise InputError("the loss of this model is not known", got=type(model).__name__, expected=known, hint="loss=, a function of yours")
    return partial(loss, reduction=reduction)


def next_token_loss(logits: Tensor, labels: Tensor, reduction: str) -> Tensor:
    """Logits (1, T, V), labels (1, T): position t predicts the label at t + 1."""
    return token_loss(logits[:, :-1], labels[:, 1:], reduction)


def token_loss(logits: Tensor, labels: Tensor, reduction: str) -> Tensor:
    """Logits (1, T, V), labels (1, T): position t predicts the label at t."""
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction=reduction)


def class_loss(logits: Tensor, labels: Tensor, reduction: str) -> Tensor:
    return F.cross_entropy(logits, labels, reduction=reduction)


def regression_loss(logits: Tensor, labels: Tensor, reduction: str) -> Tensor:
    return F.mse_loss(logits.reshape(labels.shape), labels.to(logits.dtype), reduction=reduction)


def several_classes_loss(logits: Tensor, labels: Tensor, reduction: str) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction=reduction)


PROBLEMS = {"regression": regression_loss, "single_label_classification": class_loss, "multi_label_classification": several_classes_loss}


def _of_head(name: str, config: Any) -> Callable[..., Tensor] | None:
    either = name.endswith(EITHER)
    if name.endswith(CAUSAL) or (either and not config.is_encoder_decoder):
        return next_token_loss
    if name.endswith(TOKENS) or either:
        return token_loss
    if name.endswith(CLASSES):  # (a problem that transformers would guess from the labels' type is one of a single label)
        return PROBLEMS[config.problem_type or ("regression" if config.num_labels == 1 else "single_label_classification")]
    return None
