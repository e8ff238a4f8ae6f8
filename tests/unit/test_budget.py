"""max_memory: the same numbers as without it, in pieces of whatever size; what must not have changed in between; what is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import partials as pt
from partials import _budget, _measured
from partials.capture import trial
from partials.testing import CASES, modules
from tests.oracle import reference

QUANTITIES = {
    "norms": lambda J: J.norms(),
    "norms 1": lambda J: J.norms(ord=1),
    "dense": lambda J: J.dense(),
    "out=": lambda J: J.dense(out=torch.full(J.shape, torch.nan, dtype=J.dtype)),
    "strided out=": lambda J: J.dense(out=torch.full((*J.shape, 2), torch.nan, dtype=J.dtype)[..., 0]),
    "gram": lambda J: J.gram(),
    "gram_blocks": lambda J: J.gram_blocks(),
    "sum": lambda J: J.sum(torch.linspace(-1, 2, len(J), dtype=J.dtype)),
    "mean": lambda J: J.mean(),
    "variance": lambda J: J.variance(),
    "diagonal": lambda J: J.diagonal(),
    "diagonal H": lambda J: J.diagonal(_matrices(J)),
    "normal": lambda J: J.normal(),
    "J v": lambda J: J @ torch.linspace(-1, 1, J.shape[-1], dtype=J.dtype),
    "J V": lambda J: J @ torch.linspace(-1, 1, 2 * J.shape[-1], dtype=J.dtype).view(-1, 2),
    "J^T u": lambda J: J.T @ torch.linspace(-1, 1, J.values.numel(), dtype=J.dtype).view_as(J.values),
    "J^T U": lambda J: J.T @ torch.linspace(-1, 1, 3 * J.values.numel(), dtype=J.dtype).view(*J.values.shape, 3),
    "ggn": lambda J: J.ggn(_matrices(J)) @ torch.linspace(-1, 1, J.shape[-1], dtype=J.dtype),
    "solve": lambda J: J.solve(torch.ones_like(J.values), 0.5),
    "rows by name": lambda J: torch.cat([J[name].flatten() for name in J.names]),
    "chosen": lambda J: J[[2, 0, 0, 3]].norms(),
}


def _matrices(J):
    n, c = len(J), J.values.numel() // len(J)
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, c, c, generator=generator, dtype=J.dtype)


def near(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9 * (1 + max(expected.abs().flatten().tolist(), default=0)))


@pytest.fixture
def small_pieces(monkeypatch):
    """No Jacobian is held whole, and pieces do not grow."""

    def cut(rows):
        monkeypatch.setattr(_budget, "HELD", 10**9)
        monkeypatch.setattr(_measured.Measured, "_place", _places(rows))

    return cut


def _places(rows):
    """Pieces of `rows` rows: whole samples where a sample has no more, else ranges of outputs."""
    whole = _measured.Measured._place

    def place(self, at, count):
        return whole(self, at, max(1, rows) if self.cuts_outputs and count < 10**9 else count)

    return place


MODELS = ["mlp", "cnn", "matrix_output", "time_first", "embedding", "tied"]


@pytest.mark.parametrize("rows", [1, 2, 7])
@pytest.mark.parametrize("quantity", QUANTITIES)
@pytest.mark.parametrize("name", [name for name in MODELS if name in CASES])
def test_pieces_change_no_number(name, quantity, rows, small_pieces):
    call = CASES[name].make()
    expected = QUANTITIES[quantity](call.jacobian(check="never"))
    together = quantity in ("gram_blocks", "diagonal H")
    small_pieces(1000 if together else rows)
    J = call.jacobian(check="never", max_memory="1GiB")
    assert J.pieces is not None
    near(QUANTITIES[quantity](J), expected)
    assert torch.equal(J.values, call.jacobian(check="never").values) or rows < 1000


@pytest.mark.parametrize("name", list(CASES))
def test_every_case_in_pieces_is_the_loop(name, small_pieces):
    small_pieces(3)
    call = CASES[name].make()
    try:
        J = call.jacobian(max_memory="1GiB")
    except pt.MemoryBudgetError as refused:
        assert "at once" in str(refused)
        return
    values, rows = reference(name)
    near(J.values, values.to(J.values))
    for parameter, part in rows.items():
        near(J[parameter], part.to(J.values))


def scalar(n=64, **options):
    model, x, y = modules.mlp().double(), torch.randn(n, 4).double(), torch.randint(3, (n,))
    return model, pt.gradient(model, x, y, loss=F.cross_entropy, **options)


@pytest.mark.parametrize("per", ["all", "parameter"])
def test_clipped_sum(per, small_pieces):
    torch.manual_seed(3)
    _, whole = scalar()
    torch.manual_seed(3)
    small_pieces(7)
    _, J = scalar(max_memory="1GiB")
    expected, norms = whole.clipped_sum(0.5, per, return_norms=True, epsilon=0.01)
    found, its = J.clipped_sum(0.5, per, return_norms=True, epsilon=0.01)
    near(found, expected)
    near(J.clipped_sum(0.5, per, epsilon=0.01), expected)
    for a, b in zip(its.values() if per == "parameter" else [its], norms.values() if per == "parameter" else [norms], strict=True):
        near(a, b)


def test_joined_with_others(small_pieces):
    model, x = modules.mlp().double(), torch.randn(30, 4).double()
    whole = pt.concat([pt.jacobian(model, x[:20]), pt.jacobian(model, x[20:])], weights=[1, 2])
    small_pieces(9)
    J = pt.concat([pt.jacobian(model, x[:20], max_memory="1GiB"), pt.jacobian(model, x[20:])], weights=[1, 2])
    for quantity in ("norms", "dense", "gram", "sum", "J^T u", "variance", "rows by name", "chosen"):
        near(QUANTITIES[quantity](J), QUANTITIES[quantity](whole))
    near(J.gram(whole), whole.gram())
    near(whole.gram(J), whole.gram())


def test_inputs_in_pieces(small_pieces):
    model, x = modules.mlp().double(), torch.randn(30, 4).double()
    whole = pt.jacobian(model, x, wrt=("0.weight", "input"))
    alone = pt.jacobian(model, x, wrt="input")
    small_pieces(4)
    J = pt.jacobian(model, x, wrt=("0.weight", "input"), max_memory="1GiB")
    near(J["input"], whole["input"])
    near(J["0.weight"], whole["0.weight"])
    J = pt.jacobian(model, x, wrt="input", max_memory="1GiB")
    near(J.dense(), alone.dense())
    near(J @ x, alone @ x)
    near(J.T @ J.values, alone.T @ alone.values)


# --- random numbers ------------------------------------------------------------------------------------------------


def test_masks_are_those_of_the_whole_batch(small_pieces):
    model, x = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5), nn.Linear(16, 3)).double(), torch.randn(20, 4).double()
    torch.manual_seed(5)
    whole = pt.jacobian(model, x, randomness="model")
    after = torch.rand(())
    small_pieces(1)
    torch.manual_seed(5)
    J = pt.jacobian(model, x, randomness="model", max_memory="1GiB")
    assert torch.equal(torch.rand(()), after)  # the generator moved as by one call of f
    assert torch.equal(J.values, whole.values)
    for quantity in ("dense", "norms", "gram", "sum", "J^T u"):
        near(QUANTITIES[quantity](J), QUANTITIES[quantity](whole))
    with pytest.raises(pt.MemoryBudgetError, match="random numbers for the whole batch"):
        J[[1, 2]]


def test_masks_of_the_whole_batch_need_the_whole_batch():
    model, x = nn.Sequential(nn.Linear(400, 400), nn.Dropout(0.5), nn.Linear(400, 1)), torch.randn(1000, 400)
    J = pt.jacobian(model, x, randomness="model", max_memory="100MB", check="never")
    with pytest.raises(pt.MemoryBudgetError, match="smallest size"):
        pt.jacobian(model, x, randomness="model", max_memory="1MB", check="never").norms()
    assert J.norms().shape == (1000, 1)


@pytest.mark.parametrize("policy", ["same", "different"])
def test_a_budget_changes_no_mask_of_a_policy(policy):
    model, x = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5), nn.Linear(16, 3)).double(), torch.randn(20, 4).double()
    torch.manual_seed(5)
    whole = pt.jacobian(model, x, randomness=policy)
    after = torch.rand(())
    torch.manual_seed(5)
    near(pt.jacobian(model, x, randomness=policy, max_memory="1GiB").dense(), whole.dense())
    assert torch.equal(torch.rand(()), after)


@pytest.mark.parametrize("policy", ["same", "different"])
def test_policies_of_vmap_are_not_cut(policy):
    model, x = nn.Sequential(nn.Linear(400, 400), nn.Dropout(0.5), nn.Linear(400, 1)), torch.randn(1000, 400)
    with pytest.raises(pt.MemoryBudgetError, match="draws for the whole batch"):
        pt.jacobian(model, x, randomness=policy, max_memory="1MB")


# --- a snapshot ----------------------------------------------------------------------------------------------------


def changed_parameter(model, x):
    with torch.no_grad():
        model[0].weight.mul_(1.5)


def changed_input(model, x):
    x.add_(1)


def changed_mode(model, x):
    model.train(not model.training)


def changed_behind_the_counter(model, x):
    model[0].weight.data = model[0].weight.data * 2


@pytest.mark.parametrize("change", [changed_parameter, changed_input, changed_mode, changed_behind_the_counter])
def test_what_has_changed_is_noticed(change, small_pieces):
    small_pieces(5)
    model, x = modules.mlp().double(), torch.randn(30, 4).double()
    J = pt.jacobian(model, x, max_memory="1GiB")
    J.norms()
    change(model, x)
    with pytest.raises(RuntimeError, match="since this Jacobian was made"):
        J.norms()


def test_autocast_is_that_of_the_call(small_pieces):
    small_pieces(5)
    model, x = modules.mlp(), torch.randn(30, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        J = pt.jacobian(model, x, max_memory="1GiB")
        inside = J.norms()
    assert torch.equal(J.norms(), inside)


# --- too small -----------------------------------------------------------------------------------------------------


def test_too_small_for_one_sample():
    model = nn.Sequential(nn.Linear(10, 100_000), nn.ReLU(), nn.Linear(100_000, 1))
    with pytest.raises(pt.MemoryBudgetError) as refused:
        pt.jacobian(model, torch.randn(3, 10), max_memory="500KiB").norms()
    text = str(refused.value)
    assert "max_memory of 500 KiB" in text and "at least" in text and "one piece of the smallest size" in text


def test_a_sample_whose_outputs_do_not_fit_is_cut():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 256), nn.Tanh(), nn.Linear(256, 300)).double(), torch.randn(3, 16).double()
    whole = pt.jacobian(model, x, check="never")
    J = pt.jacobian(model, x, max_memory="1.5MB", check="never")
    seen = []
    at = J.pieces.at
    object.__setattr__(J.pieces, "at", lambda place: (seen.append(place), at(place))[1])
    near(J.norms(), whole.norms())
    assert any(place.rows[1] < 300 for place in seen)


def test_a_result_that_does_not_fit_unless_it_is_given():
    model, x = nn.Linear(100, 10), torch.randn(500, 100)
    J = pt.jacobian(model, x, max_memory="4MB")
    with pytest.raises(pt.MemoryBudgetError, match="the result alone"):
        J.dense()
    out = torch.empty(J.shape)
    assert J.dense(out=out) is out
    torch.testing.assert_close(out, pt.jacobian(model, x).dense())


# --- allocations that fail -----------------------------------------------------------------------------------------


def test_a_failed_allocation_halves_the_piece(monkeypatch):
    model, x = modules.mlp().double(), torch.randn(40, 4).double()
    expected = pt.jacobian(model, x).norms()
    J = pt.jacobian(model, x, max_memory="1GiB")
    monkeypatch.setattr(_budget, "HELD", 10**9)
    J = pt.jacobian(model, x, max_memory="1GiB")
    compute, sizes = _budget.compute, []

    def failing(problem, method):
        sizes.append(problem.size)
        if problem.size > 6:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return compute(problem, method)

    monkeypatch.setattr(_budget, "compute", failing)
    near(J.norms(), expected)
    assert max(sizes) > 6 and sizes[-1] <= 6


@pytest.mark.parametrize("budget", [None, "1GiB"])
@pytest.mark.parametrize(("module", "name"), [(_budget, "compute"), (trial, "solve")])
def test_a_whole_that_cannot_be_allocated_is_taken_in_pieces(module, name, budget, monkeypatch):
    """In the forward or in the reverse pass, where no other method may be taken for it."""
    model, x = modules.mlp().double(), torch.randn(40, 4).double()
    expected, function = pt.jacobian(model, x).norms(), getattr(module, name)

    def failing(problem, *rest):
        if problem.size > 20:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return function(problem, *rest)

    monkeypatch.setattr(module, name, failing)
    J = pt.jacobian(model, x, max_memory=budget)
    near(J.norms(), expected)
    assert J.plan.method == "capture"
    assert any("the whole was too large" in note for note in J.plan.notes)


def test_checks_of_pieces(small_pieces):
    small_pieces(10)
    model, x = modules.mlp().double(), torch.randn(30, 4).double()
    J = pt.jacobian(model, x, max_memory="1GiB", check="always")
    report = J.check()
    assert report.passed and report.samples == 30
    assert "max_memory" not in repr(J) and "piece by piece" in repr(J)
