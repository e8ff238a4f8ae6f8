"""What capture cannot see it refuses: hidden uses, views without a graph, changed inputs, nested derivatives, mixing."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import partials as pt
from partials.capture import layout as layouts
from partials.capture.layout import Layout, candidates, find

N = 6


def net(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def x(dtype=torch.float64):
    return torch.randn(N, 4, generator=torch.Generator().manual_seed(1), dtype=dtype)


def same_as_loop(f, *inputs, **options):
    J, R = pt.jacobian(f, *inputs, **options), pt.jacobian(f, *inputs, method="loop", **options)
    torch.testing.assert_close(J.dense(), R.dense(), rtol=1e-11, atol=1e-13)
    return J


@pytest.mark.filterwarnings("ignore:`torch.jit.trace")
def test_a_use_hidden_in_a_traced_module_is_refused_and_done_otherwise():
    hidden = torch.jit.trace(nn.Linear(4, 3).double(), x())
    with pytest.raises(pt.MethodError, match="reached outside the recorded uses"):
        pt.jacobian(lambda x: hidden(x).sin(), x(), params=hidden, method="capture")
    J = same_as_loop(lambda x: hidden(x).sin(), x(), params=hidden)
    assert J.plan.method != "capture"
    assert "outside the recorded uses" in str(J.plan)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace")
def test_a_hidden_use_beside_a_seen_one_is_not_half_an_answer():
    layer = nn.Linear(4, 4).double()
    hidden = torch.jit.trace(layer, x())
    J = same_as_loop(lambda x: hidden(layer(x)).sin(), x(), params=layer)
    assert J.plan.method != "capture"


def test_a_custom_function_is_refused_not_missed():
    class Scale(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            return x * w

        @staticmethod
        def backward(ctx, g):
            x, w = ctx.saved_tensors
            return g * w, (g * x).sum(0)

    w = torch.randn(4, dtype=torch.float64, requires_grad=True)
    J = same_as_loop(lambda x, w: Scale.apply(x, w).sum(1), x(), w)
    assert J.plan.method != "capture"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_started_inside_is_refused():
    layer = nn.Linear(4, 3).double()

    def f(x):
        found = []
        worker = threading.Thread(target=lambda: found.append(layer(x)))
        worker.start()
        worker.join()
        return found[0]

    J = same_as_loop(f, x(), params=layer)
    assert J.plan.method != "capture"


def test_a_view_made_under_no_grad_is_a_constant():
    w = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        frozen = w.view(-1)
    J = same_as_loop(lambda x: (x @ w.t()).sin() * frozen[:3], x(), params=[w])
    assert J.plan.method == "capture"


def test_views_taken_before_the_call():
    w = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    before = w.t()
    assert same_as_loop(lambda x: (x @ before).sin() + w[:, 0], x(), params=[w]).plan.method == "capture"


def test_an_input_changed_in_place_after_a_use_is_an_error():
    layer = nn.Linear(4, 4).double()

    def f(x):
        h = x * 1.0
        z = layer(h)
        h.add_(1.0)
        return z

    with pytest.raises(pt.MethodError, match="changed in place"):
        pt.jacobian(f, x(), params=layer, method="capture")


def test_factors_that_read_a_changed_input_raise():
    data = x()
    J = pt.jacobian(net(), data)
    data.add_(1.0)
    with pytest.raises(pt.PartialsError, match="changed in place since"):
        J.norms()


def test_nested_derivatives_are_taped():
    model = net()

    def residual(x):
        x = x.detach().requires_grad_()
        u = model(x)[:, 0]
        (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        return u + slope.square().sum(1)

    assert same_as_loop(residual, x(), params=model).plan.method == "capture"


def test_hooking_the_layers_of_such_a_residual_is_the_classic_error():
    """Factors of the forward uses alone, which layer hooks would give, are far from the Jacobian: what the refusal prevents."""
    model = net()
    data = x().requires_grad_()
    kept = {}
    for name in ("0", "2"):
        layer = model.get_submodule(name)
        layer.register_forward_hook(lambda m, i, o, name=name: kept.__setitem__(name, (i[0], o)))
    u = model(data)[:, 0]
    (slope,) = torch.autograd.grad(u.sum(), data, create_graph=True)
    r = slope.square().sum(1)
    a, z = kept["0"]
    (g,) = torch.autograd.grad(r.sum(), z, retain_graph=True)
    by_hooks = torch.einsum("no,ni->noi", g, a).detach()
    true = torch.stack([torch.autograd.grad(value, model[0].weight, retain_graph=True)[0] for value in r])
    assert (by_hooks - true).norm() > 0.2 * true.norm()


@pytest.mark.parametrize(
    "mixing",
    [
        lambda h: h - h.mean(0),
        lambda h: h.softmax(0),
        lambda h: F.batch_norm(h, None, None, training=True),
        lambda h: h.cumsum(0),
        lambda h: h.flip(0) + h,
        lambda h: h.flip(0),
    ],
)
def test_mixing_is_found(mixing):
    model = net()
    with pytest.raises(pt.MixingError):
        pt.jacobian(lambda x: mixing(model(x)), x(), params=model)


def test_a_wrong_layout_is_not_accepted():
    weights = 1 + torch.arange(N, dtype=torch.float64) / N
    g = torch.randn(N, N, 3, dtype=torch.float64)
    by_second = g * weights[None, :, None]
    assert find(g, by_second, weights)[0] == Layout(1)
    folded = torch.randn(N * 4, 3, dtype=torch.float64)
    assert find(folded, folded * weights.repeat_interleave(4)[:, None], weights)[0] == Layout(0, 1, 4)
    assert find(folded, folded * weights.repeat(4)[:, None], weights)[0] == Layout(0, 4, 1)
    shuffled, sure = find(folded, folded * weights.repeat_interleave(4)[torch.randperm(4 * N)][:, None], weights)
    assert shuffled.owned.shape == (N, 4) and not sure
    mixed = weights.repeat_interleave(4)
    mixed[3] += 0.3 / N
    assert find(folded, folded * mixed[:, None], weights)[0] is None
    assert find(folded, folded * weights.repeat_interleave(4)[:, None] + 1e-6 * folded.roll(5, 0), weights)[0] is None


def test_positions_in_any_order_are_measured_one_by_one():
    weights = 1 + torch.arange(N, dtype=torch.float64) / N
    owner = torch.arange(N).repeat_interleave(torch.tensor([1, 4, 2, 3, 1, 5])[:N])[torch.randperm(16)]
    g = torch.randn(2, 16, 3, dtype=torch.float64)
    g[:, 3] = 0  # (says nothing, so belongs to nobody)
    layout, proved = find(g, g * weights[owner][:, None], weights)
    rows = layout.samples_first(g, N)
    assert layout.dim == 1
    assert not proved
    for n in range(N):
        mine = [r for r in range(16) if owner[r] == n and r != 3]
        assert torch.equal(rows[n][:, : len(mine)], g[:, mine])
        assert not rows[n][:, len(mine) :].any()
    mixed = g * weights[owner][:, None] + 1e-6 * torch.randn_like(g)
    assert find(g, mixed, weights)[0] is None


def test_what_fits_two_layouts_proves_neither():
    weights = 1 + torch.arange(N, dtype=torch.float64) / N
    g = torch.zeros(N, N, 3, dtype=torch.float64)
    g[range(N), range(N)] = torch.randn(N, 3, dtype=torch.float64)
    layout, proved = find(g, g * weights[:, None, None], weights)
    assert layout == Layout(0)
    assert not proved
    assert find(g, g * weights[:, None, None], weights, {0})[0] == Layout(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_layout_is_misplaced_in_large_batches(dtype):
    n, t = 50_000, 3
    weights = 1 + torch.arange(n, dtype=torch.float64) / n
    g = torch.randn(t, n, 2, dtype=dtype)
    assert find(g, g * weights.to(dtype)[None, :, None], weights)[0] == Layout(1)


def test_layouts_carry_over_to_other_sizes_and_zero_cotangents_prove_nothing():
    known = layouts.pattern(Layout(0, 1, 4))
    assert layouts.resolve(known, (30, 2), 5) == Layout(0, 1, 6)
    assert layouts.resolve(known, (31, 2), 5) is None
    zero = torch.zeros(N, 3)
    assert find(zero, zero, torch.ones(N))[1] is False
    assert candidates((N, 2 * N), N)[0] == Layout(0)


def test_a_layout_learnt_on_one_size_serves_another():
    torch.manual_seed(0)

    class Time(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x):
            return self.layer(x.transpose(0, 1)).sin().sum(0)

    model = Time().double()
    for n, t in ((5, 3), (3, 5), (4, 4), (2, 7)):
        same_as_loop(model, torch.randn(n, t, 4, dtype=torch.float64))


def test_threads_share_one_module():
    model, data = net(), x()
    expected = pt.jacobian(model, data).dense()
    wrong = []

    def work():
        found = [pt.jacobian(model, data, check="never").dense() for _ in range(10)]
        wrong.extend(rows for rows in found if not torch.equal(rows, expected))

    workers = [threading.Thread(target=work) for _ in range(8)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert not wrong


def test_nothing_is_left_behind_after_an_exception():
    model = net()
    before = {k: (v, v._version) for k, v in model.state_dict(keep_vars=True).items()}

    def f(x):
        model(x)
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine") as caught:
        pt.jacobian(f, x(), params=model)
    assert any("partials was" in note for note in caught.value.__notes__)
    assert torch.overrides.has_torch_function((torch.zeros(1),)) is False
    assert {k: (v, v._version) for k, v in model.state_dict(keep_vars=True).items()} == before
    assert all(p.grad is None for p in model.parameters())


def test_an_output_without_a_graph_is_said():
    layer = nn.Linear(4, 3).double()
    J = pt.jacobian(lambda x: layer(x).detach(), x(), params=layer)
    assert not J.dense().any()
    assert any("carries no graph" in note for note in J.plan.notes)


def test_a_layout_decided_by_data_is_not_remembered():
    """Sorted by length, as packed sequences are: samples in order in the first call, in another order in the next."""
    layer = nn.Linear(4, 3).double()

    def f(x):
        order = x[:, 0].argsort()
        return layer(x[order]).sin()[order.argsort()]

    data = x()
    in_order = data[data[:, 0].argsort()]
    assert same_as_loop(f, in_order, params=layer, check="never").plan.uses[0].layout == "dim 0"
    assert same_as_loop(f, data, params=layer, check="never").plan.uses[0].layout == "dim 0 (any order)"


@pytest.mark.parametrize("seed", range(4))
def test_rows_that_a_mask_picks(seed):
    """A number of rows for each sample that only the data tell, none for some; also where it happens to be a multiple of N."""
    layer = nn.Linear(4, 3).double()

    def f(x, mask):
        where = mask.nonzero()[:, 0]
        return torch.zeros(len(x), 3, dtype=x.dtype).index_add(0, where, layer(x[mask]).sin())

    generator = torch.Generator().manual_seed(seed)
    data, mask = torch.randn(N, 5, 4, generator=generator, dtype=torch.float64), torch.rand(N, 5, generator=generator) > 0.5
    if seed == 0:
        mask = mask & torch.tensor([True, False, True, True, True, True])[:, None]
    elif seed == 1:
        mask = torch.zeros(N, 5, dtype=torch.bool)
        mask.view(-1)[: 2 * N] = True
    J = same_as_loop(f, data, mask, params=layer, check="always")
    R = pt.jacobian(f, data, mask, params=layer, method="loop")
    assert J.plan.method == "capture"
    torch.testing.assert_close(J.norms(), R.norms())
    torch.testing.assert_close(J.gram(), R.gram())


def test_one_sample_at_a_time():
    """A loop over samples inside f, and integers that each sample reads by itself."""
    layer, table = nn.Linear(4, 3).double(), nn.Embedding(5, 4).double()
    model = nn.ModuleList([layer, table])

    def f(x, index):
        return torch.stack([layer(x[n] + table(index[n])).sin() for n in range(len(x))])

    index = torch.arange(N) % 5
    J = same_as_loop(f, x(), index, params=model, check="always")
    assert {use.layout for use in J.plan.uses} == {"dim 0 (any order)"} or J.plan.method == "capture"


def test_an_order_that_mixes_is_not_accepted():
    layer = nn.Linear(4, 3).double()

    def f(x):
        h = layer(x[torch.tensor([0, 1, 2, 3, 4, 5, 0])]).sin()
        return h[:N] + 1e-3 * h[6:]

    with pytest.raises(pt.MixingError):
        pt.jacobian(f, x(), params=layer)
    with pytest.raises(pt.MethodError, match="holds 6 samples apart"):
        pt.jacobian(lambda x: f(x) + 1e-6 * layer(x).roll(1, 0), x(), params=layer, method="capture", check="never")
