"""Bad input gets a sentence: what, got, expected, try. The whole text of each."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch

import partials as pt
from tests.failures import FAILURES, net, x


@pytest.mark.parametrize("name", FAILURES)
def test_whole_text(name):
    call, kind, message = FAILURES[name]
    with pytest.raises(kind) as error:
        call(net())
    assert type(error.value) is kind
    assert str(error.value) == message


def without_numbers(message):
    """The samples, and the size of what was found, are drawn at random; where the culprit stands is a line of these tests."""
    message = re.sub(r" at \S+\.py:\d+", " at HERE", message)
    return re.sub(r"of \d[\d.e+-]* of", "of # of", re.sub(r"sample \d", "sample #", message))


def test_mixing_in_batch_norm():
    with pytest.raises(pt.MixingError) as error:
        pt.jacobian(net(mixing=True), x())
    assert without_numbers(str(error.value)) == (
        "Net mixes samples: the output of sample # depends on input 'x' of sample #\n"
        "  got       a derivative across samples of # of the sample's own; batch statistics in norm (BatchNorm1d); "
        "first in F.batch_norm at HERE in norm (BatchNorm1d)\n"
        "  expected  zero: each output depends on its own sample, else there is no Jacobian for each sample\n"
        "  try       module.eval() for batch norm, or GroupNorm or LayerNorm; batched=False to treat the whole batch as one sample"
    )


def test_mixing_by_a_mean_over_samples():
    w = torch.ones(3, dtype=torch.float64, requires_grad=True)

    def centred(x, w):
        return (x - x.mean(0)) * w

    with pytest.raises(pt.MixingError) as error:
        pt.jacobian(centred, x(), w)
    assert without_numbers(str(error.value)) == (
        "centred mixes samples: the output of sample # depends on input 'x' of sample #\n"
        "  got       a derivative across samples of # of the sample's own; first in Tensor.mean at HERE\n"
        "  expected  zero: each output depends on its own sample, else there is no Jacobian for each sample\n"
        "  try       a function that treats samples apart; batched=False to treat the whole batch as one sample"
    )


@pytest.mark.parametrize("method", ["grad", "backward", "jacobian"])
def test_mixing_is_found_by_methods_that_differentiate_inputs(method):
    def shifted(x):
        return x + x.roll(1, 0) * 0.25

    with pytest.raises(pt.MixingError) as error:
        pt.jacobian(shifted, x(), wrt="x", in_dims={"x": 0}, method=method, check="never")
    assert without_numbers(str(error.value)) == (
        "shifted mixes samples: the output of sample # depends on input 'x' of other samples\n"
        "  got       a derivative of up to 0.25 across samples; first in Tensor.roll at HERE\n"
        "  expected  zero: each output depends on its own sample, else there is no Jacobian for each sample\n"
        "  try       a function that treats samples apart; batched=False to treat the whole batch as one sample"
    )


@pytest.mark.parametrize("method", ["auto", "capture", "vmap", "forward", "jacobian", "grad", "backward", "loop"])
def test_own_exception_comes_through_with_a_note(method):
    class Own(Exception):
        pass

    raised = Own("mine", 3)

    def f(x):
        raise raised

    with pytest.raises(Own) as error:
        pt.jacobian(f, x(), params=[torch.ones(3, requires_grad=True)], method=method)
    assert error.value is raised and error.value.args == ("mine", 3)
    assert len(raised.__notes__) == 1
    assert raised.__notes__[0].startswith("partials was ") and raised.__notes__[0].endswith(" for f (5 samples)")


def test_exception_of_a_late_sample_comes_through():
    last = x()[4:]

    def f(x, w):
        if torch.equal(x, last):
            raise ZeroDivisionError("sample four")
        return x * w

    with pytest.raises(ZeroDivisionError, match="sample four"):
        pt.jacobian(f, x(), torch.ones(3, dtype=torch.float64, requires_grad=True), method="loop", check="never")


def test_mismatched_shapes_inside_the_model_are_torch_words():
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        pt.jacobian(net(), torch.ones(5, 4, dtype=torch.float64))


def test_memory_budget():
    with pytest.raises(pt.MemoryBudgetError) as error:
        pt.jacobian(net(), x(), max_memory="100 B", method="loop")
    lines = str(error.value).splitlines()
    assert lines[0] == "the result does not fit within max_memory"
    assert lines[1] == "  got       max_memory of 100 B"
    assert lines[2].startswith("  expected  at least ") and lines[2].endswith("for the result and one piece of the smallest size")
    assert lines[3] == "  try       fewer samples or parameters at once, out= where a quantity takes it, or a larger max_memory"


# --- the Jacobian's own sentences --------------------------------------------------------------------------------


def made():
    model = torch.nn.Linear(3, 2, dtype=torch.float64)
    return pt.jacobian(model, x(), check="never")


SENTENCES = {
    "unknown name": (
        lambda J: J["wieght"],
        "'wieght' is not in this Jacobian\n  got       wieght\n  expected  weight, bias\n  try       did you mean 'weight'?",
    ),
    "index": (
        lambda J: J[7],
        "the index does not choose samples\n  got       7\n  expected  an int, slice, list, mask or int64 tensor within 5 samples",
    ),
    "vector": (
        lambda J: J @ torch.ones(7).double(),
        "the vector does not fit the parameters\n"
        "  got       shape (7, 1)\n  expected  8 entries along dimension 0\n  try       a dict by name",
    ),
    "vector part": (
        lambda J: J @ {"weight": torch.ones(2, 3).double()},
        "the vector lacks parameters\n  got       weight\n  expected  weight, bias\n  try       add bias",
    ),
    "left vector": (
        lambda J: J.T @ torch.ones(5).double(),
        "u has another shape than the Jacobian asks for\n  got       shape (5,)\n  expected  shape (5, 2)",
    ),
    "weights": (
        lambda J: J.sum(torch.ones(4)),
        "weights has another shape than the Jacobian asks for\n  got       shape (4,)\n  expected  shape (5,)",
    ),
    "H": (
        lambda J: J.diagonal(torch.ones(5, 2)),
        "H has another shape than the Jacobian asks for\n  got       shape (5, 2)\n  expected  shape (5, 2, 2)",
    ),
    "out": (
        lambda J: J.dense(out=torch.empty(5, 2, 8)),
        "out= does not fit the Jacobian\n  got       shape (5, 2, 8), torch.float32, cpu\n  expected  shape (5, 2, 8), torch.float64, cpu",
    ),
    "clipping": (
        lambda J: J.clipped_sum(1.0),
        "clipped_sum needs one scalar per sample\n"
        "  got       output shape (2,)\n  expected  ()\n  try       pt.gradient(f, x, target, loss=...)",
    ),
    "accumulate": (
        lambda J: J.accumulate_grad(),
        "accumulate_grad needs one scalar per sample\n  got       output shape (2,)\n  expected  ()\n  try       J.T @ u, unflattened",
    ),
    "damping": (lambda J: J.solve(J.values, -1), "damping is not understood\n  got       -1\n  expected  zero or more"),
    "residual": (
        lambda J: J.solve(J.values[:3], 1),
        "r has another shape than the Jacobian asks for\n  got       shape (3, 2)\n  expected  shape (5, 2)",
    ),
    "nothing to stack": (
        lambda J: pt.concat([]),
        "there is nothing to stack\n  got       an empty sequence\n  expected  at least one Jacobian",
    ),
    "other parameters": (
        lambda J: pt.concat([J, pt.jacobian(torch.nn.Linear(3, 1), torch.ones(2, 3), check="never")]),
        "the Jacobians have different parameters\n  got       weight (1, 3), bias (1,)\n  expected  weight (2, 3), bias (2,)",
    ),
    "stack weights": (
        lambda J: pt.concat([J, J], weights=[1.0]),
        "weights do not fit the Jacobians\n  got       1 weights\n  expected  2, one for each Jacobian",
    ),
}


@pytest.mark.parametrize("name", SENTENCES)
def test_whole_text_of_the_jacobian(name):
    call, message = SENTENCES[name]
    with pytest.raises(pt.InputError) as error:
        call(made())
    assert str(error.value) == message


def test_clipping_words():
    J = pt.jacobian(torch.nn.Linear(3, 1), torch.ones(2, 3), check="never")
    bounds = dict.fromkeys(J.names, 1.0)
    wrong = [{"max_norm": 0}, {"max_norm": -1.0}, {"max_norm": 1.0, "per": "layer"}, {"max_norm": 1.0, "epsilon": -1.0}]
    wrong += [
        {"max_norm": bounds},
        {"max_norm": {"weight": 1.0}, "per": "parameter"},
        {"max_norm": bounds | {"bias": 0}, "per": "parameter"},
    ]
    for options in wrong:
        with pytest.raises(pt.InputError, match="clipped_sum is not understood"):
            J.clipped_sum(**options)


def test_accumulate_grad_needs_leaves():
    w = torch.ones(3, requires_grad=True)
    J = pt.jacobian(lambda x, v: x @ v, torch.ones(2, 3), 2 * w, check="never")
    with pytest.raises(pt.InputError) as error:
        J.accumulate_grad()
    assert str(error.value) == "some parameters have no .grad to add to\n  got       v\n  expected  leaf tensors that require grad"


# --- errors as objects -------------------------------------------------------------------------------------------


def test_errors_are_also_those_that_ordinary_handlers_catch():
    for kind in (pt.InputError, pt.OutputError):
        assert issubclass(kind, pt.PartialsError) and issubclass(kind, ValueError)
    for kind in (pt.MixingError, pt.RandomnessError, pt.MethodError, pt.MemoryBudgetError, pt.CheckError, pt.StoreError):
        assert issubclass(kind, pt.PartialsError) and issubclass(kind, RuntimeError)


def test_errors_survive_pickling_and_copying():
    error = pt.CheckError("off", got="1", expected="2", hint="3")
    error.report = {"rows": [1]}
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(again) is pt.CheckError and str(again) == str(error) and again.report == {"rows": [1]}
    assert str(error) == "off\n  got       1\n  expected  2\n  try       3"
