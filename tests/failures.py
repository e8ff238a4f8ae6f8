"""Calls that must fail, each with the error and the whole text that it must give."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn

import partials as pt
from partials._run import NAMES

N = 5


class Net(nn.Module):
    """A module with everything that could be left changed: buffers, a frozen part, hooks, batch statistics where asked for."""

    def __init__(self, *, mixing=False, dropout=False, broken=False):
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.drop = nn.Dropout(0.5 if dropout else 0.0)
        self.last = nn.Linear(4, 2)
        self.norm.train(mixing)
        self.broken = broken

    def forward(self, x):
        h = self.drop(self.frozen(self.norm(self.first(x))))
        if self.broken:
            raise KeyError("no such thing")
        return self.last(h)


def net(**options):
    model = Net(**options)
    model.register_buffer("count", torch.zeros(()))
    model.last.register_forward_hook(lambda module, args, out: out)
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    if not options.get("mixing"):
        model.norm.eval()
    return model.double()


def x():
    return torch.arange(3 * N, dtype=torch.float64).reshape(N, 3).sin()


def w():
    return torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64, requires_grad=True)


def line(x, a, b):
    return a * x + b


def text(what, got="", expected="", hint=""):
    parts = (("got", got), ("expected", expected), ("try", hint))
    return "\n".join([what, *(f"  {word:<10}{words}" for word, words in parts if words)])


FAILURES = {}
"""name -> (call of a module, error class, whole text); a function that ignores the module may be called instead."""


def failure(error, *message):
    def enter(call):
        FAILURES[call.__name__] = (call, error, text(*message))
        return call

    return enter


# --- inputs ------------------------------------------------------------------------------------------------------


@failure(
    pt.InputError,
    "the inputs have different batch sizes",
    "x: 5, y: 4",
    "one number of samples",
    "in_dims={'y': None} for an input that all samples share",
)
def different_batch_sizes(model):
    pt.jacobian(lambda x, y, w: x * w + y.sum(), x(), x()[:4], w())


@failure(pt.InputError, "no input was given", "no tensor among the arguments", "at least one tensor", "pt.jacobian(f, x)")
def no_input(model):
    pt.jacobian(model)


@failure(
    pt.InputError,
    "Net was given no batched input",
    "tensors: x",
    "at least one tensor with a sample dimension",
    "in_dims={'x': 0} to name it, or batched=False for a single sample",
)
def no_batched_input(model):
    pt.jacobian(model, x(), in_dims=None)


@failure(pt.InputError, "the function is not callable", "Tensor", "an nn.Module or a callable", "pt.jacobian(f, x)")
def not_callable(model):
    pt.jacobian(x(), x())


@failure(pt.InputError, "an input is given twice", "['x'] both in kwargs= and by keyword", "once")
def given_twice(model):
    pt.jacobian(model, x=x(), kwargs={"x": x()})


@failure(pt.InputError, "in_dims names 'y', which is no argument of the call", "y", "x", "one of: x")
def in_dims_of_nothing(model):
    pt.jacobian(model, x(), in_dims={"y": 0})


@failure(
    pt.InputError,
    "in_dims must have one entry for each positional input",
    "2 entries for 1 inputs",
    "1 entries, for x",
    "a dict by name for some of them: in_dims={'x': 0}",
)
def in_dims_of_another_length(model):
    pt.jacobian(model, x(), in_dims=(0, 0))


@failure(pt.InputError, "in_dims gives dimension 2 for 'x', which it does not have", "shape (5, 3)", "a dimension in [-2, 2)")
def in_dims_too_large(model):
    pt.jacobian(model, x(), in_dims=2)


# --- parameters --------------------------------------------------------------------------------------------------


@failure(
    pt.InputError,
    "Net has no parameter to differentiate",
    "8 parameters, none with requires_grad=True",
    "at least one trainable parameter",
    "wrt='name' to name a frozen parameter or an input",
)
def no_trainable_parameter(model):
    pt.jacobian(copy.deepcopy(model).requires_grad_(False), x())


@failure(
    pt.InputError,
    "line has no parameter to differentiate",
    "no tensor argument with requires_grad=True among x, a, b",
    "arguments that require grad, or names",
    "wrt=('a', 'b') to name them, or params=module for tensors that the function uses from outside",
)
def no_argument_requires_grad(model):
    pt.jacobian(line, x(), w().detach(), w().detach())


@failure(
    pt.InputError,
    "all tensor arguments of line require grad, so which are parameters is not known",
    "x, a, b",
    "parameters that require grad beside inputs that do not",
    "wrt=('a', 'b') to name the parameters",
)
def all_arguments_require_grad(model):
    pt.jacobian(line, x().requires_grad_(), w(), w())


@failure(
    pt.InputError,
    "parameter 'a' is not differentiable",
    "torch.int64",
    "a floating-point tensor",
    "convert it with .float(), or leave it out of wrt",
)
def integer_parameter(model):
    pt.jacobian(line, x(), torch.tensor([1]), w(), wrt=("a", "b"))


@failure(
    pt.InputError,
    "parameter 'scale' is detached: the function's use of it cannot be traced to this tensor",
    "requires_grad=False",
    "the tensor that the function uses, with requires_grad=True",
    "pass the original tensor, after .requires_grad_()",
)
def detached_parameter(model):
    pt.jacobian(lambda x: x, x(), params={"scale": w().detach()})


@failure(pt.InputError, "params holds no tensor", "an empty collection", "at least one parameter")
def empty_params(model):
    pt.jacobian(lambda x: x, x(), params=[])


@failure(
    pt.InputError,
    "wrt='frist.weight' matches nothing",
    "frist.weight",
    "first.weight, first.bias, norm.weight, norm.bias, frozen.weight, frozen.bias, last.weight, last.bias and 1 more",
    "did you mean 'first.weight' or 'last.weight' or 'frozen.weight'?",
)
def wrt_matches_nothing(model):
    pt.jacobian(model, x(), wrt="frist.weight")


@failure(pt.InputError, "wrt takes names", "Tensor", "a name, a glob, or several", "wrt='fc*.weight'; tensors go into params=")
def wrt_is_a_tensor(model):
    pt.jacobian(model, x(), wrt=model.first.weight)


# --- options -----------------------------------------------------------------------------------------------------


@failure(
    pt.InputError,
    "method='vmpa' is unknown",
    "'vmpa'",
    f"one of: auto, {', '.join(NAMES)}",
    "did you mean 'vmap'?",
)
def unknown_method(model):
    pt.jacobian(model, x(), method="vmpa")


@failure(pt.InputError, "check='sometimes' is unknown", "'sometimes'", "one of: first, always, never")
def unknown_check(model):
    pt.jacobian(model, x(), check="sometimes")


@failure(pt.InputError, "max_memory='much' is not an amount of memory", "'much'", 'bytes, or text such as "2GiB"')
def not_an_amount(model):
    pt.jacobian(model, x(), max_memory="much")


@failure(
    pt.MethodError,
    "method='loop' cannot run here: randomness=\"model\" needs the masks of the whole batch, and this method runs samples apart",
    "method='loop'",
    "",
    "method='forward'",
)
def method_that_refuses(model):
    pt.jacobian(model, x(), method="loop", randomness="model")


# --- what f returns ----------------------------------------------------------------------------------------------


@failure(pt.OutputError, "answer returned no tensor", "str", "a floating-point tensor, samples first", "output= to pick it")
def not_a_tensor(model):
    def answer(x):
        return str(model(x))

    pt.jacobian(answer, x(), params=model)


@failure(
    pt.OutputError, "classes returned an integer tensor", "torch.int64", "a floating-point tensor", "return the scores, not the classes"
)
def integer_output(model):
    def classes(x):
        return model(x).argmax(1)

    pt.jacobian(classes, x(), params=model)


@failure(pt.OutputError, "pair returned several outputs", "tuple of 2", "one tensor", "output=0, or a callable that picks it")
def several_outputs(model):
    def pair(x):
        return model(x), x

    pt.jacobian(pair, x(), params=model)


@failure(
    pt.OutputError,
    "answers returned several outputs",
    "dict with keys logits, loss",
    "one tensor",
    "output='logits', or a callable that picks it",
)
def several_outputs_by_key(model):
    def answers(x):
        return {"logits": model(x), "loss": x.sum()}

    pt.jacobian(answers, x(), params=model)


@failure(pt.OutputError, "output='z' is not in what answers returned", "dict with keys y", "a key, index or attribute of it")
def output_that_is_not_there(model):
    def answers(x):
        return {"y": model(x)}

    pt.jacobian(answers, x(), params=model, output="z")


@failure(
    pt.OutputError,
    "the output of turned has no sample dimension",
    "shape (2, 5) for 5 samples",
    "dimension 0 of size 5",
    "return samples first; in_dims for inputs that hold them elsewhere or not at all; "
    "torch.vmap(f) for a one-sample f; batched=False for one sample",
)
def no_sample_dimension(model):
    def turned(x):
        return model(x).T

    pt.jacobian(turned, x(), params=model)


@failure(
    pt.OutputError,
    "loss returned one number for the whole batch",
    "a 0-d tensor for 5 samples",
    "a tensor whose dimension 0 is the sample, of size 5",
    "reduction='none' in the loss, or pt.gradient(model, x, target, loss=...), which applies it to each sample",
)
def one_number_for_the_batch(model):
    def loss(x):
        return F.mse_loss(model(x), x[:, :2])

    pt.gradient(loss, x(), params=model)


@failure(
    pt.OutputError,
    "waves returned complex numbers, which are not supported yet",
    "torch.complex128",
    "a real tensor",
    "torch.view_as_real in f",
)
def complex_output(model):
    def waves(x):
        return torch.complex(model(x), model(x))

    pt.jacobian(waves, x(), params=model)


# --- what f does -------------------------------------------------------------------------------------------------


@failure(
    pt.RandomnessError,
    "Net draws random numbers (nn.functional.dropout) and no policy for them was given",
    'randomness="error" (the default)',
    "a function without random numbers, or a policy",
    'module.eval(), or randomness="model" (the masks that f itself would draw), "same" or "different" (as in vmap)',
)
def dropout_without_a_policy(model):
    model.drop.p = 0.5
    pt.jacobian(model, x())


@failure(KeyError, "'no such thing'")
def f_raises(model):
    model.broken = True
    pt.jacobian(model, x())
