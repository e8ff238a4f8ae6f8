"""Stores made within the test's own process: small, of every kind."""

from __future__ import annotations

import torch

import partials as pt
from partials.distribute import job as jobs
from partials.distribute.ranks import Place
from partials.store.data import of_arrays

N, BLOCK = 10, 4
PATIENCE = 600
"""Seconds after which a process is taken to hang: many, since the machine may be busy."""


def problem(dtype=torch.float64, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).to(dtype)
        return model, torch.randn(N, 3, dtype=dtype)


def job(path, what="jacobian", *, model=None, x=None, block=BLOCK, dtype=torch.float64):
    default_model, default_x = problem(dtype)
    model, x = model or default_model, default_x if x is None else x
    return jobs.job(path, what, lambda inputs: pt.jacobian(model, *inputs[0]), of_arrays([x], {}), model.state_dict(), {}, {}, block=block)


def made(path, what="jacobian", **options):
    """The store, complete, and the Jacobian of all its samples."""
    one = job(path, what, **options)
    jobs.local(one, Place(), resume=False)
    model, x = problem(options.get("dtype", torch.float64))
    return pt.open(path), pt.jacobian(model, x)
