"""`J.to(device)`: values and every factor move, and quantities are computed there."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import partials as pt

FAR = "cuda" if torch.cuda.is_available() else "meta"
"""A device that is not the CPU: without an accelerator, one that knows shapes only, and refuses to meet a tensor that was left behind."""


class Several(nn.Module):
    """A block of every kind: rows by index, outer products, convolutions, views, parameters computed from others."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.conv, self.head = nn.Embedding(7, 6), nn.Conv1d(3, 4, 3), weight_norm(nn.Linear(4, 2))
        self.free, self.halves = nn.Parameter(torch.randn(2)), nn.Parameter(torch.randn(8, 2))

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        z = self.conv(self.table(index)).mean(-1).tanh()
        return self.head(z) * self.free + z @ self.halves[:4]


@pytest.fixture
def case():
    torch.manual_seed(0)
    return Several().double(), torch.randint(7, (5, 3))


QUANTITIES = {
    "dense": lambda J: J.dense(),
    "norms": lambda J: J.norms(),
    "gram": lambda J: J.gram(),
    "gram_blocks": lambda J: J.gram_blocks(),
    "sum": lambda J: J.sum(),
    "variance": lambda J: J.variance(),
    "diagonal": lambda J: J.diagonal(),
    "J v": lambda J: J @ torch.ones(J.shape[-1], dtype=J.dtype, device=J.device),
    "J^T u": lambda J: J.T @ torch.ones(J.shape[:-1], dtype=J.dtype, device=J.device),
    "chosen": lambda J: J[torch.tensor([3, 1])].norms(),
    "name": lambda J: J["table.weight"],
}


@pytest.mark.parametrize("name", QUANTITIES)
@pytest.mark.parametrize("budget", [None, 2**20])
def test_quantities_are_computed_where_the_jacobian_is(case, name, budget):
    model, x = case
    J = pt.jacobian(model, x, max_memory=budget)
    if J.pieces is not None and FAR == "meta":
        pytest.skip("pieces that have no numbers cannot be compared with those of the call")
    here, there = QUANTITIES[name](J), QUANTITIES[name](J.to(FAR))
    assert there.device.type == FAR and there.shape == here.shape and there.dtype == here.dtype
    if FAR != "meta":
        assert torch.allclose(there.cpu(), here, rtol=1e-12, atol=1e-12)


def test_factors_of_several_batches_come_back_one_at_a_time(case):
    model, x = case
    J = pt.jacobian(model, x)
    stacked = pt.concat([J.to("cpu"), J.to("cpu")]).to(FAR)
    assert stacked.norms().device.type == FAR and stacked.gram().shape == (10, 2, 10, 2)
    assert all(block.nbytes() for J in (J, J) for group in J.blocks.values() for block in group)


def test_the_same_device_gives_the_same_jacobian(case):
    model, x = case
    J = pt.jacobian(model, x)
    assert J.to("cpu") is J and J.to(torch.device("cpu", 0)) is J


def test_rows_of_inputs_move_too():
    x = torch.randn(4, 3, dtype=torch.float64)
    w = torch.randn(3, dtype=torch.float64)
    J = pt.jacobian(lambda x, w: (x * w).sin().sum(-1), x, w, wrt=("x", "w")).to(FAR)
    assert J["x"].device.type == J["w"].device.type == FAR


def test_gradients_are_added_where_the_parameters_are(case):
    model, x = case
    G = pt.gradient(model, x, loss=None, output=lambda out: out.sum(-1)).to("cpu")
    G.accumulate_grad()
    assert torch.allclose(model.free.grad, G.unflatten(G.sum())["free"])


def test_what_has_moved_has_no_function_to_be_checked_against(case):
    model, x = case
    with pytest.raises(pt.MethodError, match="another device"):
        pt.jacobian(model, x).to(FAR).check()


def test_no_such_device(case):
    model, x = case
    with pytest.raises(RuntimeError):
        pt.jacobian(model, x).to("nowhere")
