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
# # A small formula, solved row by row
#
# $f(x; a, b) = a x + b$ has the partial derivatives $\partial_x f = a$, $\partial_a f = x$, $\partial_b f = 1$. They are wanted for each
# of a thousand samples. The usual recipes are tried first; each has a catch.

# %%
import time

import torch
from torch import nn
from torch.autograd import grad
from torch.autograd.functional import jacobian

import partials as pt


def linear(x, a, b):
    return a * x + b


torch.manual_seed(0)
x = torch.randn(1000, 1)
a, b = torch.randn(1, requires_grad=True), torch.randn(1, requires_grad=True)


def is_right(by_a, by_b):
    return bool((by_a.flatten() == x.flatten()).all() and (by_b.flatten() == 1).all())


# %% [markdown]
# ## One backward for every sample
# Right, but each of the thousand passes runs through the whole batch, and `.grad` must be put back to zero each time.

# %%
start = time.perf_counter()
y = linear(x, a, b)
rows = torch.empty(1000, 2)
for i in range(1000):
    v = torch.zeros(1000, 1)
    v[i] = 1
    y.backward(v, retain_graph=True)
    rows[i, 0], rows[i, 1] = a.grad, b.grad
    a.grad, b.grad = None, None
slow = time.perf_counter() - start
assert is_right(rows[:, 0], rows[:, 1])
print(f"{slow * 1e3:.0f} ms")

# %% [markdown]
# The order of these lines matters. Read after the reset, the matrix is zero, without a word:

# %%
model = nn.Linear(1, 1)
y = model(x[:10])
zeros = torch.empty(10, 2)
for i in range(10):
    y.backward(torch.eye(10)[i].reshape(10, 1), retain_graph=True)
    weight, bias = model.weight.grad, model.bias.grad  # no copies: the same memory
    model.weight.grad.zero_(), model.bias.grad.zero_()
    zeros[i, 0], zeros[i, 1] = weight, bias
assert not zeros.any()
model.weight.grad = model.bias.grad = None

# %% [markdown]
# ## `grad` of the batch
# It wants one number, and the sum over samples is not what is asked for.

# %%
try:
    grad(linear(x, a, b), (a, b))
except RuntimeError as error:
    print(error)

# %% [markdown]
# ## `torch.autograd.functional.jacobian`
# Right, by as many passes. By `x` the result is a thousand by thousand matrix, which is zero off its diagonal.

# %%
start = time.perf_counter()
by_x, by_a, by_b = jacobian(linear, (x, a, b))
print(f"{(time.perf_counter() - start) * 1e3:.0f} ms, {tuple(by_x.shape)} by x")
assert is_right(by_a, by_b)

# %% [markdown]
# ## One call
# The arguments that require grad are the parameters. The result is exactly `x` and exactly 1.

# %%
J = pt.jacobian(linear, x, a, b)
assert is_right(J["a"], J["b"])
print(J)

# %% [markdown]
# The time, beside every other method; the largest error of each; and what they need of memory:

# %%
print(pt.compare(linear, x, a, b, repeats=3))

# %% [markdown]
# `wrt` names others, inputs too: those come as one derivative for each sample.

# %%
J = pt.jacobian(linear, x, a, b, wrt=("x", "a", "b"), in_dims={"a": None, "b": None})
assert torch.equal(J["x"].flatten(), a.detach().expand(1000)) and is_right(J["a"], J["b"])

# %% [markdown]
# A module is passed as it is, and is left as it was. One sample without a batch dimension is `batched=False`.

# %%
J = pt.jacobian(model, x)
assert is_right(J["weight"], J["bias"]) and model.weight.grad is None
one = pt.jacobian(model, x[0], batched=False)
assert one["weight"].shape == (1, 1, 1) and torch.equal(one["weight"].flatten(), x[0])

# %% [markdown]
# ## The derivatives of `u(x, t)`
# The last cell of the story asks for $u_t$, $u_x$ and $u_{xx}$.


# %%
def u(x, t):
    return torch.sin(2 * x) * torch.exp(-t)


x, t = torch.rand(100, dtype=torch.float64), torch.rand(100, dtype=torch.float64)
d = pt.derivatives(u, "t", "x", "xx")(x, t)
torch.testing.assert_close(d.t, -u(x, t))
torch.testing.assert_close(d.x, 2 * torch.cos(2 * x) * torch.exp(-t))
torch.testing.assert_close(d.xx, -4 * u(x, t))
