"""On an accelerator, under any default device: every quantity is the CPU's, and what a call leaves behind is as on the CPU.

Without a CUDA device the tests run in a process of their own on the one of `tests/device`, which must be there before the first
reverse pass: torch starts a thread for each device then.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import partials as pt
from partials import _machine
from partials._run import NAMES
from partials.testing import CASES
from tests.device import pretend

if "PRETEND" in os.environ:
    pretend.load()
PRETENDED = torch._C._get_privateuse1_backend_name() == pretend.NAME
CARD = torch.device(pretend.NAME, 0) if PRETENDED else torch.device("cuda", 0) if torch.cuda.is_available() else None
SITUATIONS = {"f there": (CARD, "cpu"), "f and the default there": (CARD, CARD), "the default there": (torch.device("cpu"), CARD)}
"""Where f is, and torch's default device."""

on_card = pytest.mark.skipif(CARD is None, reason="runs in the process of test_on_the_pretended_device")


@pytest.mark.skipif(CARD is not None, reason="this process has an accelerator")
@pytest.mark.skipif(pretend.why_not() is not None, reason=str(pretend.why_not()))
def test_on_the_pretended_device():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", __file__]
    root = Path(__file__).parents[2]
    ran = subprocess.run(command, cwd=root, env={**os.environ, "PRETEND": "1"}, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-2000:]


@pytest.fixture(params=SITUATIONS)
def place(request):
    """Where f is to be, under a default device."""
    where, default = SITUATIONS[request.param]
    torch.set_default_device(default)
    yield where
    torch.set_default_device(os.environ.get("DEVICE"))


# --- the device itself -------------------------------------------------------------------------------------------


@on_card
@pytest.mark.parametrize(
    "mixed",
    [
        lambda x, here: x + here,
        lambda x, here: here @ x,
        lambda x, here: x.index_select(0, torch.tensor([0])),
        lambda x, here: here[torch.tensor([0], device=CARD)],
        lambda x, here: torch.zeros(3, device=CARD).index_fill(0, torch.tensor(1), 1),
        lambda x, here: F.embedding(torch.tensor([1]), x),
        lambda x, here: torch.randn(3, generator=torch.Generator(), device=CARD),
        lambda x, here: torch.randn(3, generator=torch.Generator(CARD)),
        lambda x, here: torch.cat([x, here]),
        lambda x, here: torch.add(x, 1, out=here),
    ],
)
def test_tensors_of_two_devices_do_not_meet(mixed):
    with pytest.raises(RuntimeError, match="device"):
        mixed(torch.ones(3, 3, device=CARD), torch.ones(3, 3))


@on_card
def test_numbers_and_indices_of_the_host_meet_tensors_of_the_device():
    x = torch.arange(6.0, device=CARD).reshape(2, 3)
    assert (x * torch.tensor(2.0)).device == CARD and x[torch.tensor([1])].tolist() == [[3, 4, 5]]
    x[torch.tensor([0])] = torch.tensor(7.0)
    x[1:].T.mul_(2)
    assert x.tolist() == [[7, 7, 7], [6, 8, 10]]


# --- quantities --------------------------------------------------------------------------------------------------


def weights(*shape, like):
    return (torch.arange(torch.Size(shape).numel(), dtype=torch.float64, device="cpu") + 1).sin().reshape(shape).to(like)


QUANTITIES = {
    "values": lambda J: J.values,
    "dense": lambda J: J.dense(),
    "by name": lambda J: torch.cat([part.flatten() for part in J.dict().values()]),
    "norms": lambda J: J.norms(),
    "gram": lambda J: J.gram(),
    "gram with some": lambda J: J.gram(J[torch.tensor([2, 0], device="cpu")]),
    "gram blocks": lambda J: J.gram_blocks(),
    "sum": lambda J: J.sum(),
    "weighted sum": lambda J: J.sum(weights(len(J), like=J.values)),
    "variance": lambda J: J.variance(),
    "diagonal": lambda J: J.diagonal(),
    "J v": lambda J: J @ weights(J.shape[-1], like=J.values),
    "J^T u": lambda J: J.T @ weights(*J.shape[:-1], like=J.values),
    "solve": lambda J: J.solve(weights(*J.shape[:-1], like=J.values), damping=1e-2),
    "gaussian": lambda J: J.sketch(7, "gaussian"),
    "rademacher": lambda J: J.sketch(7, "rademacher"),
    "kronecker": lambda J: J.sketch(9, "kronecker"),
    "sparse": lambda J: J.sketch(7, "sparse"),
    "some": lambda J: J[1:].dense(),
    "chosen": lambda J: J[[2, 0]].norms(),
    "masked": lambda J: J[(torch.arange(len(J), device="cpu") > 0).to(J.device)].norms(),
    "together": lambda J: pt.concat([J[2:], J[:2]]).gram(),
}


def quantities(J):
    return {name: of(J).detach() for name, of in QUANTITIES.items()}


@functools.cache
def expected(name):
    return quantities(CASES[name].make(device="cpu").jacobian(check="never"))


def assert_same(found, wanted, where):
    for name, value in wanted.items():
        assert found[name].device.type == where.type, name
        scale = max(float(value.norm()), 1e-9)
        assert float((found[name].cpu() - value).norm()) <= 1e-9 * scale, name


@on_card
@pytest.mark.parametrize("name", CASES)
def test_every_quantity_of_every_case(name, place):
    if name == "tied" and PRETENDED:
        pytest.skip("torch unties parameters that it moves to a device that is not its own")
    with torch.device("cpu"):
        wanted = expected(name)
    J = CASES[name].make(device=place).jacobian(check="always" if place == CARD else "never")
    assert_same(quantities(J), wanted, place)


@on_card
@pytest.mark.parametrize(("name", "method"), [(name, m) for name in ("cnn", "embedding") for m in NAMES if m not in CASES[name].refuses])
def test_every_method(name, method, place):
    with torch.device("cpu"):
        wanted = {key: expected(name)[key] for key in ("values", "dense", "J^T u", "gram")}
    J = CASES[name].make(device=place).jacobian(method=method, check="never")
    assert_same({key: QUANTITIES[key](J) for key in wanted}, wanted, place)


@on_card
@pytest.mark.parametrize("name", ["cnn", "embedding"])
def test_in_pieces(name, place):
    with torch.device("cpu"):
        wanted = expected(name)
        wanted = {key: wanted[key] for key in ("norms", "sum", "gram", "diagonal", "gaussian")}
    J = CASES[name].make(device=place).jacobian(check="always", max_memory=100_000)
    assert_same({key: QUANTITIES[key](J) for key in wanted}, wanted, place)


@on_card
@pytest.mark.parametrize(("name", "level"), [("residual", "full"), ("residual", "deep"), ("cnn", "full"), ("embedding", "full")])
def test_checks(name, level, place):
    call = CASES[name].make(device=place)
    assert pt.check(call.f, *call.inputs, level=level, **call.kwargs, **call.options).passed


# --- other ways in and out ---------------------------------------------------------------------------------------


class Several(nn.Module):
    """A block of every kind: rows by index, outer products, convolutions, views."""

    def __init__(self):
        super().__init__()
        self.table, self.conv, self.head = nn.Embedding(7, 6), nn.Conv1d(3, 4, 3), nn.Linear(4, 2)
        self.halves = nn.Parameter(torch.randn(8, 2))

    def forward(self, index):
        z = self.conv(self.table(index)).mean(-1).tanh()
        return self.head(z) + z @ self.halves[:4]


def several(place):
    """The model and its inputs on a device, with the numbers that the CPU draws."""
    with torch.device("cpu"):
        torch.default_generator.manual_seed(0)
        model, x, y = Several().double(), torch.randint(7, (5, 3)), torch.randint(2, (5,))
    return model.to(place), x.to(place), y.to(place)


@functools.cache
def here():
    model, x, y = several("cpu")
    return {
        "gradient": pt.gradient(model, x, y, loss=F.cross_entropy, check="never").dense(),
        "rows": pt.jacobian(model, x, check="never").dense(),
    }


@on_card
def test_gradients_of_a_loss(place):
    model, x, y = several(place)
    J = pt.gradient(model, x, y, loss=F.cross_entropy, check="always")
    found = {"dense": J.dense(), "clipped": J.clipped_sum(0.1), "input": J.gram()}
    with torch.device("cpu"):
        rows = here()["gradient"]
        wanted = {"dense": rows, "clipped": (rows * (0.1 / rows.norm(dim=1).clamp(min=0.1))[:, None]).sum(0), "input": rows @ rows.T}
    assert_same(found, wanted, place)


@on_card
def test_rows_to_the_host_and_back(place):
    model, x, _ = several(place)
    J = pt.jacobian(model, x, check="never")
    with torch.device("cpu"):
        there = quantities(pt.jacobian(*several("cpu")[:2], check="never"))
    for target in (torch.device("cpu"), CARD):
        assert_same(quantities(J.to(target)), there, target)
    assert_same(quantities(J.to("cpu").to(CARD)), there, CARD)


@on_card
@pytest.mark.parametrize("method", ["auto", "loop", "vmap"])
@pytest.mark.parametrize("randomness", ["model", "same", "different"])
def test_random_numbers_are_the_devices_own(randomness, method, place):
    """The rows are of the values that were drawn, and a second call with the same state draws them again."""
    if method in ("loop", "vmap") and randomness == "model":
        pytest.skip("runs samples apart")
    with torch.device("cpu"):
        model, x = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5), nn.Tanh(), nn.Linear(16, 2)).double(), torch.randn(5, 4).double()
    model, x = model.to(place), x.to(place)
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        J = pt.jacobian(model, x, randomness=randomness, method=method, check="always")
        states.append((J.values, J.dense(), torch.get_rng_state(), torch.get_device_module(CARD).get_rng_state(CARD)))
    assert all(torch.equal(first, second) for first, second in zip(*states, strict=True))
    torch.manual_seed(3)
    drawn, other = (CARD, "cpu") if place == CARD else ("cpu", CARD)
    untouched = torch.Generator(other).manual_seed(3).get_state()
    after = torch.get_device_module(CARD).get_rng_state(CARD) if other is CARD else torch.get_rng_state()
    assert torch.equal(after, untouched), drawn
    if randomness == "model":
        torch.manual_seed(3)
        assert torch.equal(model(x), J.values)


@on_card
def test_streams_and_stores(place, tmp_path):
    model, x, _ = several(place)
    found = {what: pt.stream(model, x.split(2), what, check="never") for what in ("sum", "gram")}
    found["norms"] = torch.cat(list(pt.stream(model, x.split(2), "norms", check="never")))
    store = pt.stream(model, x.split(2), "jacobian", to=tmp_path / "rows", check="never")
    with torch.device("cpu"):
        rows = here()["rows"]
        wanted = {"norms": rows.norm(dim=-1), "sum": rows.sum(0), "gram": torch.einsum("icp,jdp->icjd", rows, rows)}
        assert torch.allclose(torch.as_tensor(store[:]).double().reshape(rows.shape), rows, rtol=1e-12, atol=1e-12)
    assert_same({what: part.to(place) for what, part in found.items()}, wanted, place)
    chosen = torch.tensor([3, 1])
    assert torch.allclose(store[chosen].cpu().reshape(2, *rows.shape[1:]), rows[[3, 1]], rtol=1e-12, atol=1e-12)


@on_card
def test_derivatives_in_the_inputs(place):
    with torch.device("cpu"):
        net, x = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).double(), torch.randn(6, 3).double()
    made = {}
    for where in (place, torch.device("cpu")):
        with torch.device("cpu") if where.type == "cpu" else torch.device(CARD):
            model = net.to(where)
            points = x.to(where)

            def f(z, model=model):
                return model(z).squeeze(-1)

            made[where.type] = {
                "laplacian": pt.laplacian(f)(points).detach(),
                "biharmonic": pt.biharmonic(f)(points).detach(),
                "hessian": pt.hessian(f)(points).detach(),
                "input": pt.jacobian(model, points, wrt="input").dense().detach(),
            }
    assert_same(made[place.type], made["cpu"], place)


@on_card
@pytest.mark.filterwarnings("ignore")
def test_memory_is_that_of_the_device():
    whole = torch.ones(1000, 1000, device=CARD)
    before = _machine.free(CARD)
    _, _, grown = _machine.measured(lambda: (whole * 2 + whole).sum(), CARD)
    assert 4e6 <= grown <= 13e6 and before > 1e9


@on_card
def test_methods_are_compared(place):
    model, x, _ = several(place)
    found = pt.compare(model, x, repeats=1, methods=["capture"])
    assert all(row.status == "ok" and row.error < 1e-10 for row in found.rows)


@on_card
@pytest.mark.parametrize("quantity", ["norms", "gram", "sum", "diagonal"])
def test_a_call_that_comes_again_does_not_wait_for_the_device(quantity):
    """Once a call is known, nothing in it reads a number back."""
    model, x, y = several(CARD)

    def call():
        return getattr(pt.gradient(model, x, y, loss=F.cross_entropy), quantity)()

    for _ in range(4):
        wanted = call()
    refuse = torch.ops.pretend.refuse_waiting if PRETENDED else lambda on: torch.cuda.set_sync_debug_mode("error" if on else "default")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        refuse(True)
    try:
        found = call()
    finally:
        refuse(False)
    assert torch.equal(found, wanted)
