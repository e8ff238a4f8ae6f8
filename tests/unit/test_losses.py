"""Losses that are computed for all samples at once: the same as the loss of each sample alone, or left to it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import partials as pt
from partials._losses import at_once

N = 6


def output(*shape, seed=0):
    return torch.randn(N, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


CLASSES = torch.tensor([0, 2, 1, 1, 0, 2])
CASES = {
    "mse": (F.mse_loss, output(3), output(3, seed=1), True),
    "mse of one number": (F.mse_loss, output(), output(seed=1), True),
    "mse of images": (nn.MSELoss(), output(2, 3, 4), output(2, 3, 4, seed=1), True),
    "summed": (nn.MSELoss(reduction="sum"), output(3), output(3, seed=1), True),
    "l1": (nn.L1Loss(), output(3), output(3, seed=1), True),
    "smooth l1": (F.smooth_l1_loss, output(3), output(3, seed=1), True),
    "huber": (F.huber_loss, output(3), output(3, seed=1), True),
    "logits": (F.binary_cross_entropy_with_logits, output(3), output(3, seed=1).sigmoid(), True),
    "classes": (F.cross_entropy, output(3), CLASSES, True),
    "classes of a module": (nn.CrossEntropyLoss(), output(3), CLASSES, True),
    "smoothed": (nn.CrossEntropyLoss(label_smoothing=0.1), output(3), CLASSES, True),
    "summed, one ignored": (nn.CrossEntropyLoss(reduction="sum", ignore_index=2), output(3), CLASSES, True),
    "one ignored": (nn.CrossEntropyLoss(ignore_index=2), output(3), CLASSES, True),
    "one ignored, of the function": (F.cross_entropy, output(3), CLASSES.index_fill(0, torch.tensor(1), -100), True),
    "with weights": (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]).double(), reduction="sum"), output(3), CLASSES, False),
    "probabilities": (F.cross_entropy, output(3), output(3, seed=1).softmax(1), False),
    "tokens": (F.cross_entropy, output(3, 4), torch.zeros(N, 4, dtype=torch.long), False),
    "a target that broadcasts": (F.mse_loss, output(3), output(1, seed=1), False),
    "another dtype": (F.mse_loss, output(3), output(3, seed=1).float(), False),
    "their own": (lambda y, t: ((y - t) ** 2).sum(), output(3), output(3, seed=1), False),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:Using a target size")
def test_the_loss_of_every_sample(name):
    loss, y, target, known = CASES[name]
    y = y.requires_grad_()
    found = at_once(loss, y, target)
    assert (found is not None) is known
    G = pt.gradient(lambda x, w, t=None: x * w, y.detach(), torch.ones_like(y[0]).requires_grad_(), target, loss=loss, check="never")
    rows, values = [], []
    for n in range(N):
        values.append(loss(y[n : n + 1], target[n : n + 1]))
        rows.append(torch.autograd.grad(values[-1], y, retain_graph=True)[0][n])
    torch.testing.assert_close(G.values.flatten(), torch.stack(values).detach(), rtol=1e-12, atol=1e-14, equal_nan=True)
    if known:
        assert found.shape == (N,)
        torch.testing.assert_close(found, torch.stack(values), rtol=1e-12, atol=1e-14, equal_nan=True)
    expected = torch.stack(rows) * y.detach()
    torch.testing.assert_close(G["w"].reshape(expected.shape), expected, rtol=1e-11, atol=1e-13, equal_nan=True)


@pytest.mark.parametrize("method", ["vmap", "forward", "loop", "jacobian"])
def test_by_every_method(method):
    net, x = nn.Linear(4, 3).double(), output(4)
    found, expected = (pt.gradient(net, x, CLASSES, loss=F.cross_entropy, method=m) for m in (method, "capture"))
    torch.testing.assert_close(found.dense(), expected.dense(), rtol=1e-11, atol=1e-13)


def test_a_call_with_such_a_loss_comes_again_by_its_script():
    from partials import _repeated

    net, x = nn.Linear(4, 3).double(), output(4)
    for _ in range(5):
        pt.gradient(net, x, CLASSES, loss=F.cross_entropy, check="never")
    (known,) = _repeated._OF_MODULES[net].values()
    assert known.history.kept == 3
