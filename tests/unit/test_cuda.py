"""What only a CUDA device shows: its memory and the lack of it, its generator, streams, kernels of its own, and moving between devices."""

from __future__ import annotations

import copy
import gc
import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import partials as pt

pytestmark = [pytest.mark.cuda, pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS")]
CARD = torch.device("cuda")


def mlp(*sizes):
    return nn.Sequential(*[layer for i, o in itertools.pairwise(sizes) for layer in (nn.Linear(i, o), nn.Tanh())][:-1]).to(CARD)


def images(n):
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(10)
    )
    net = net.to(CARD)
    x = torch.randn(n, 3, 16, 16, device=CARD)
    net(x[:1])
    return net, x


def labels(n):
    return torch.randint(10, (n,), device=CARD)


def off(found, expected):
    return float(((found.double() - expected.double()).norm() / expected.double().norm()).detach())


KINDS = {  # model, inputs, the quantity
    "dense": lambda: (mlp(256, 512, 10), torch.randn(4096, 256, device=CARD), labels(4096), lambda J, out: J.dense(out=out)),
    "norms": lambda: (mlp(512, 1024, 1024, 10), torch.randn(16384, 512, device=CARD), labels(16384), lambda J, out: J.norms()),
    "norms of a CNN": lambda: (*images(2048), labels(2048), lambda J, out: J.norms()),
    "sums": lambda: (mlp(256, 256, 256, 10), torch.randn(65536, 256, device=CARD), labels(65536), lambda J, out: J.sum()),
    "clipped": lambda: (mlp(512, 1024, 1024, 10), torch.randn(16384, 512, device=CARD), labels(16384), lambda J, out: J.clipped_sum(0.1)),
    "gram": lambda: (mlp(256, 2048, 2048, 10), torch.randn(2048, 256, device=CARD), labels(2048), lambda J, out: J.gram()),
    "ten outputs": lambda: (mlp(256, 1024, 1024, 10), torch.randn(4096, 256, device=CARD), lambda J, out: J.norms()),
}


def peak(model, inputs, quantity, budget, out):
    """(bytes that the allocator handed out at once, beyond what was held, the answer)."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    if len(inputs) == 1:
        J = pt.jacobian(model, *inputs, max_memory=budget)
    else:
        J = pt.gradient(model, *inputs, loss=F.cross_entropy, max_memory=budget)
    found = quantity(J, out).clone() if out is None else quantity(J, out)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, found


@pytest.mark.parametrize("kind", KINDS)
def test_a_budget_is_kept_on_the_device(kind):
    model, *inputs, quantity = KINDS[kind]()
    width = sum(p.numel() for p in model.parameters())
    out = torch.zeros(len(inputs[0]), width, device=CARD) if kind == "dense" else None
    peak(model, inputs, quantity, "8GiB", out)  # (libraries take their workspaces in the first call)
    unbudgeted, expected = peak(model, inputs, quantity, "60GiB", out)
    total = float(expected.double().abs().sum())
    for part in (2, 8, 32):
        grown, found = peak(model, inputs, quantity, unbudgeted // part, out)
        assert grown <= 1.1 * unbudgeted / part, f"1/{part}: {grown / 1e6:.1f} MB of {unbudgeted / part / 1e6:.1f}"
        assert abs(float(found.double().abs().sum()) - total) <= 1e-4 * total


@pytest.fixture
def small_card():
    """A device of which this process gets about 2 GB."""
    gc.collect()
    torch.cuda.empty_cache()
    held = torch.cuda.memory_allocated()
    torch.cuda.set_per_process_memory_fraction((held + 2e9) / torch.cuda.get_device_properties(CARD).total_memory)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


def first_two(model, x):
    exact = copy.deepcopy(model).cpu().double()
    return pt.jacobian(exact, x[:2].cpu().double(), method="loop", check="never").norms()


def test_what_does_not_fit_on_the_device_is_computed_in_pieces(small_card):
    model, x = mlp(512, 2048, 2048, 10), torch.randn(16384, 512, device=CARD)
    J = pt.jacobian(model, x)  # (its cotangents alone are 2.7 GB)
    norms = J.norms()
    assert off(norms[:2].cpu(), first_two(model, x)) < 1e-4
    assert J.plan.method == "capture" and any("in pieces, since the whole was too large" in note for note in J.plan.notes)


def test_an_allocation_that_fails_in_a_piece_halves_it(small_card):
    model, x = mlp(512, 2048, 2048, 10), torch.randn(16384, 512, device=CARD)
    J = pt.jacobian(model, x, max_memory="1.9GB")
    held = torch.empty(int(1.2e9), dtype=torch.uint8, device=CARD)
    norms = J.norms()
    del held
    assert J.plan.method == "capture" and off(norms[:2].cpu(), first_two(model, x)) < 1e-4


def test_after_out_of_memory_nothing_is_kept(small_card):
    model, x = mlp(512, 2048, 2048, 10), torch.randn(16384, 512, device=CARD)
    gc.collect()
    before = torch.cuda.memory_allocated()
    with pytest.raises((torch.OutOfMemoryError, pt.MemoryBudgetError)):
        pt.jacobian(model, x, max_memory="60GB").dense()
    gc.collect()
    assert torch.cuda.memory_allocated() - before < 20e6


@pytest.mark.parametrize("randomness", ["same", "different"])
@pytest.mark.parametrize("method", ["auto", "loop", "vmap"])
def test_masks_are_those_of_f(randomness, method):
    """Dropout draws from the device's own generator: what is computed is the derivative of the values that f gave."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Dropout(0.5), nn.Tanh(), nn.Linear(32, 2)).to(CARD).double()
    x = torch.randn(6, 8, device=CARD, dtype=torch.float64)
    state = torch.cuda.get_rng_state(CARD)
    J = pt.jacobian(model, x, randomness=randomness, method=method)
    torch.cuda.set_rng_state(state, CARD)
    again = pt.jacobian(model, x, randomness=randomness, method=method)
    assert torch.equal(J.values, again.values) and torch.equal(J.dense(), again.dense())
    weights = torch.randn_like(J.values)
    total = J.T @ weights
    last = J["3.bias"]
    assert torch.equal(last.diagonal(dim1=1, dim2=2), torch.ones_like(last.diagonal(dim1=1, dim2=2)))
    assert off(total, (J.dense() * weights[..., None]).sum((0, 1))) < 1e-10


def test_the_generators_are_left_as_one_call_leaves_them():
    model = nn.Sequential(nn.Linear(8, 32), nn.Dropout(0.5), nn.Linear(32, 2)).to(CARD)
    x = torch.randn(6, 8, device=CARD)
    state = torch.cuda.get_rng_state(CARD), torch.get_rng_state()
    model(x)
    expected = torch.cuda.get_rng_state(CARD)
    torch.cuda.set_rng_state(state[0], CARD)
    pt.jacobian(model, x, randomness="different")
    assert torch.equal(torch.cuda.get_rng_state(CARD), expected) and torch.equal(torch.get_rng_state(), state[1])


def test_a_budget_changes_no_mask():
    model = nn.Sequential(nn.Linear(64, 256), nn.Dropout(0.5), nn.Linear(256, 2)).to(CARD)
    x = torch.randn(512, 64, device=CARD)
    state = torch.cuda.get_rng_state(CARD)
    whole = pt.jacobian(model, x, randomness="same").norms()
    torch.cuda.set_rng_state(state, CARD)
    pieces = pt.jacobian(model, x, randomness="same", max_memory="64MB").norms()
    assert off(pieces, whole) < 1e-5


def test_a_side_stream_gives_the_same():
    model, x = mlp(256, 512, 512, 10), torch.randn(2048, 256, device=CARD)
    expected = pt.jacobian(model, x).norms()
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        later = x * 1.0
        torch.cuda._sleep(50_000_000)
        later.mul_(2).div_(2)
        for _ in range(3):
            found = pt.jacobian(model, later).norms()
    side.synchronize()
    assert off(found, expected) < 1e-5


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("training", [True, False])
def test_recurrent_layers_of_the_vendor(kind, training):
    """cuDNN has no backward in evaluation, and none for lone samples' second derivatives."""

    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = kind(5, 7, batch_first=True, num_layers=2), nn.Linear(7, 3)

        def forward(self, x):
            return self.head(self.inner(x)[0][:, -1])

    torch.manual_seed(0)
    model, x = Last().to(CARD).train(training), torch.randn(4, 6, 5, device=CARD)
    found = pt.jacobian(model, x).dense()
    exact = Last().double()
    exact.load_state_dict({name: value.cpu().double() for name, value in model.state_dict().items()})
    expected = pt.jacobian(exact, x.cpu().double(), method="loop").dense()
    assert off(found.cpu(), expected) < 1e-4  # (TF32 in cuDNN's kernels)


def test_masks_between_recurrent_layers_are_those_of_the_vendor():
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = nn.LSTM(5, 7, batch_first=True, num_layers=2, dropout=0.5), nn.Linear(7, 3)

        def forward(self, x):
            return self.head(self.inner(x)[0][:, -1])

    model, x = Last().to(CARD).double(), torch.randn(4, 6, 5, device=CARD, dtype=torch.float64)
    state = torch.cuda.get_rng_state(CARD)
    J = pt.jacobian(model, x, randomness="model")
    torch.cuda.set_rng_state(state, CARD)
    out = model(x)
    assert off(J.values, out.detach()) < 1e-9
    row = torch.autograd.grad(out[2, 1], model.inner.weight_ih_l0)[0]
    assert off(J["inner.weight_ih_l0"][2, 1], row) < 1e-9


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("heads", [1, 4])
def test_fused_attention(dtype, heads):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.out = nn.Linear(64, 192), nn.Linear(64, 64)

        def forward(self, x):
            q, k, v = (z.unflatten(-1, (heads, -1)).transpose(1, 2) for z in self.qkv(x).chunk(3, -1))
            return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)).mean((1, 2))

    torch.manual_seed(0)
    model = Attention().to(CARD, dtype)
    x = torch.randn(8, 32, 64, device=CARD, dtype=dtype)
    exact = Attention().double()
    exact.load_state_dict({name: value.cpu().double() for name, value in model.state_dict().items()})
    expected = pt.jacobian(exact, x.cpu().double(), method="loop").dense()
    found = off(pt.jacobian(model, x).dense().cpu(), expected)
    torchs = off(pt.jacobian(model, x, method="loop").dense().cpu(), expected)
    assert found < max(2 * torchs, 4 * torch.finfo(dtype).eps), f"{found:.1e}, one by one {torchs:.1e}"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(dtype):
    torch.manual_seed(0)
    net, x = images(32)
    with torch.autocast("cuda", dtype):
        J = pt.gradient(net, x, labels(32), loss=F.cross_entropy, check="always")
        norms = J.norms()
    torch.manual_seed(0)
    net, x = images(32)
    assert off(norms, pt.gradient(net, x, labels(32), loss=F.cross_entropy).norms()) < 0.05


@pytest.mark.parametrize("allowed", [True, False])
def test_tf32_is_as_the_user_set_it(allowed):
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
    try:
        torch.manual_seed(0)
        net, x = images(64)
        J = pt.jacobian(net, x, check="always")
        assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == (allowed, allowed)
        exact = pt.jacobian(net.double(), x.double(), method="loop")
        assert off(J.norms(), exact.norms()) < (5e-3 if allowed else 1e-5)
        assert pt.check(net.float(), x, level="full").passed
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def test_rows_wait_in_the_memory_of_the_host():
    model, x = mlp(64, 128, 10).double(), torch.randn(40, 64, device=CARD, dtype=torch.float64)
    whole = pt.jacobian(model, x)
    parts = pt.concat([pt.jacobian(model, part).to("cpu") for part in x.split(16)])
    assert parts.device.type == "cpu"
    assert off(parts.gram(), whole.gram().cpu()) < 1e-12
    assert off(parts.to("cuda").gram(), whole.gram()) < 1e-12


def test_sketches_are_those_of_the_host():
    model, x = mlp(64, 128, 10).double(), torch.randn(12, 64, device=CARD, dtype=torch.float64)
    J = pt.jacobian(model, x)
    for kind in ("gaussian", "rademacher", "kronecker"):
        assert off(J.sketch(32, kind).cpu(), J.to("cpu").sketch(32, kind)) < 1e-12


def test_a_store_is_written_from_the_device(tmp_path):
    model, x = mlp(64, 128, 10), torch.randn(64, 64, device=CARD)
    store = pt.stream(model, x.split(16), "jacobian", to=tmp_path / "rows")
    whole = pt.jacobian(model, x).dense().cpu()
    assert off(torch.as_tensor(store[:]).reshape(whole.shape), whole) < 1e-6


def test_inputs_on_another_device_are_refused_by_torchs_words():
    with pytest.raises(Exception, match="cuda"):
        pt.jacobian(mlp(4, 3, 2), torch.randn(5, 4))


def test_derivatives_in_the_inputs():
    model, x = mlp(3, 32, 32, 1).double(), torch.randn(100, 3, device=CARD, dtype=torch.float64)
    found = pt.laplacian(lambda z: model(z).squeeze(-1))(x).detach()
    hessian = torch.func.vmap(torch.func.hessian(lambda z: model(z).squeeze(-1)))(x)
    assert off(found, hessian.diagonal(dim1=1, dim2=2).sum(-1)) < 1e-10


@pytest.mark.parametrize("quantity", ["norms", "gram"])  # (a clipped sum asks once whether rows are finite)
def test_a_call_that_comes_again_does_not_wait_for_the_device(quantity):
    """Once a call is known, nothing in it reads a number back: the host runs ahead, as torch's own backward does."""
    model, x, y = mlp(64, 128, 10), torch.randn(256, 64, device=CARD), labels(256)
    of = {"norms": lambda J: J.norms(), "gram": lambda J: J.gram()}[quantity]

    def call():
        return of(pt.gradient(model, x, y, loss=F.cross_entropy))

    for _ in range(4):
        expected = call()
    torch.cuda.synchronize()
    with warnings.catch_warnings():  # (torch says that the mode does not see every operation)
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode("error")
    try:
        found = call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found, expected)
