# ---
# jupyter:
#   jupytext:
#     formats: py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A model of your own
#
# From a model to its checked Jacobian, to a store on disk, to a clipped step of training. Handwritten digits stand in for your data:
# put your model and your batch into the first cell, and the others go through unchanged (the loss apart).

# %%
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import partials as pt

torch.manual_seed(0)
digits = load_digits()
x, y = torch.tensor(digits.images, dtype=torch.float32)[:512, None] / 16, torch.tensor(digits.target)[:512]
net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10))

# %% [markdown]
# ## What will be done
# One forward, no reverse pass: which method, at what cost, and which uses of parameters were seen.

# %%
print(pt.explain(net, x))

# %% [markdown]
# ## The Jacobian, and its proof
# Every method against a loop of batches of one in float64, on a few samples. `to_html()` is the same for people who were not there.

# %%
J = pt.jacobian(net, x)
report = pt.check(net, x[:4], level="full").raise_if_failed()
folder = Path(tempfile.mkdtemp())
(folder / "check.html").write_text(report.to_html(), encoding="utf-8")
print(report)

# %% [markdown]
# ## Quantities

# %%
G = pt.gradient(net, x, y, loss=F.cross_entropy)
print("norms of the first five gradients", G.norms()[:5])
print("tangent kernel", tuple(J[:32].gram().shape))
assert torch.allclose(G.norms() ** 2, G.dense().square().sum(1), rtol=1e-4)

# %% [markdown]
# ## A store
# Sketches of all gradients, in blocks of 64 samples. Inner products of sketches are those of the gradients, to about one over the
# root of their length.

# %%
batches = list(zip(x.split(64), y.split(64), strict=True))
pt.stream(net, batches, "sketch:512", loss=F.cross_entropy, to=folder / "digits.store")
store = pt.open(folder / "digits.store")
sketches = store.dense()
assert store.complete and sketches.shape == (512, 512)
exact = G.gram()
error = (sketches @ sketches.T - exact).norm() / exact.norm()
print(f"inner products from the store, off by {error:.1%}")
assert error < 0.2

# %% [markdown]
# ## Clipped training

# %%
optimizer, clip = torch.optim.Adam(net.parameters(), 3e-3), 1.0
for _ in range(40):
    G = pt.gradient(net, x, y, loss=F.cross_entropy)
    for name, total in G.unflatten(G.clipped_sum(clip) / len(x)).items():
        net.get_parameter(name).grad = total
    optimizer.step()
right = (net(x).argmax(1) == y).float().mean()
print(f"{right:.1%} of the digits read right after 40 clipped steps")
assert right > 0.7
