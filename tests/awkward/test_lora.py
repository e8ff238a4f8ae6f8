"""Low-rank adapters of `peft` on a frozen base."""

import pytest
import torch
from torch import nn

from .exact import exact

peft = pytest.importorskip("peft")
N = 5


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.query, self.value, self.head = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, tokens):
        h = self.table(tokens)
        return self.head((self.query(h) @ h.mT).softmax(-1) @ self.value(h)).sum(1)


def adapted(**options):
    torch.manual_seed(3)
    model = peft.get_peft_model(Base(), peft.LoraConfig(r=2, target_modules=["query", "value"], lora_dropout=0.0, **options)).double()
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p)
    return model


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"use_dora": True}, {"modules_to_save": ["head"]}], ids=["plain", "rs", "dora", "head"]
)
def test_lora_with_a_frozen_base(options, train):
    model = adapted(**options).train(train)
    J = exact(model, torch.randint(9, (N, 4)))
    assert all("lora" in name or "head" in name for name in J.names)


def test_lora_on_an_embedding():
    torch.manual_seed(3)
    model = peft.get_peft_model(Base(), peft.LoraConfig(r=2, target_modules=["table", "head"])).double()
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p)
    exact(model, torch.randint(9, (N, 4)))


def test_lora_merged_into_the_base():
    model = adapted()
    tokens = torch.randint(9, (N, 4))
    before = model(tokens)
    merged = model.merge_and_unload()
    assert torch.allclose(merged(tokens), before)
    merged.requires_grad_(True)
    exact(merged, tokens)
