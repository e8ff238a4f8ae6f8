"""The verbs. Each reads as a story: normalise, plan, run, wrap, check."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, overload

from ._budget import solve
from ._compare import Comparison, compare_methods
from ._errors import InputError, OutputError
from ._input_jacobian import InputJacobian
from ._jacobian import Jacobian
from ._plan import Plan, parse_bytes
from ._problem import Problem
from ._repeated import problem_of
from ._run import plan
from ._typing import Function
from .checks import Report, inspect
from .checks.first import POLICIES


@overload
def jacobian(
    f: Function,
    *inputs: Any,
    params: Any = None,
    wrt: None = None,
    in_dims: Any = 0,
    batched: bool = True,
    output: Any = None,
    method: str = "auto",
    check: str = "first",
    max_memory: int | str | None = None,
    create_graph: bool = False,
    randomness: str = "error",
    kwargs: Mapping[str, Any] | None = None,
    **input_kwargs: Any,
) -> Jacobian: ...


@overload
def jacobian(f: Function, *inputs: Any, wrt: Any, **options: Any) -> Any: ...


def jacobian(
    f: Function,
    *inputs: Any,
    params: Any = None,
    wrt: Any = None,
    in_dims: Any = 0,
    batched: bool = True,
    output: Any = None,
    method: str = "auto",
    check: str = "first",
    max_memory: int | str | None = None,
    create_graph: bool = False,
    randomness: str = "error",
    kwargs: Mapping[str, Any] | None = None,
    **input_kwargs: Any,
) -> Any:
    """The Jacobian of f's output with respect to its parameters, for every sample of the batch.

    Parameters
    ----------
    f
        An `nn.Module` (its trainable parameters are differentiated) or a function of a batch (its tensor arguments that
        require grad are). Output: a floating tensor (N, *out), samples first.
    inputs, input_kwargs, kwargs
        What f is called with. `kwargs={...}` holds keywords whose names clash with those below.
    params
        Tensors that f uses from outside: a module, a mapping of names, or a sequence (named "0", "1", ...).
    wrt
        Names or globs of parameters or inputs to differentiate; `requires_grad` of the arguments is then ignored.
    in_dims
        The sample dimension of inputs: a prefix as in `torch.vmap`, or {name: dim or None}.
    batched
        False for one sample: no sample dimension anywhere.
    output
        Key, index, attribute or callable that picks the tensor where f returns several.
    method
        "auto", or a name from `print(pt.explain(f, *inputs))`.
    check
        "first": compared with one ordinary backward the first time; "always"; "never": not compared. Without checks it is still proved that
        every use of a parameter was seen, and measured where the samples are; but values that one sample takes from others without a
        gradient (detached batch statistics) are not looked for: rows are then those of f with these values held constant.
    max_memory
        Bytes, or text such as "2GiB": a bound on the growth of memory.
    create_graph
        Results are differentiable in parameters and inputs.
    randomness
        "error", "model" (the masks that f itself would draw), "same" or "different" (as in `torch.vmap`).

    Returns
    -------
    Jacobian
        An operator of shape (N, *out, P); an `InputJacobian` where `wrt` names inputs only.

    Raises
    ------
    InputError, OutputError, MixingError, RandomnessError, MethodError, MemoryBudgetError, CheckError
        What each means is said in its message; f's own exceptions come through unchanged, with a note.

    Examples
    --------
    >>> import torch, partials as pt
    >>> f = lambda x, a, b: a * x + b
    >>> a, b = torch.tensor([2.0], requires_grad=True), torch.tensor([1.0], requires_grad=True)
    >>> J = pt.jacobian(f, torch.randn(1000, 1), a, b)
    >>> J["a"].shape, J["b"].shape
    (torch.Size([1000, 1, 1]), torch.Size([1000, 1, 1]))
    """
    problem = problem_of(
        f,
        inputs,
        input_kwargs if kwargs is None else _keywords(kwargs, input_kwargs),
        params=params,
        wrt=wrt,
        in_dims=in_dims,
        batched=batched,
        output=output,
        randomness=randomness,
        create_graph=create_graph,
        budget=None if max_memory is None else parse_bytes(max_memory),
    )
    return _solve(problem, method, check)


@overload
def gradient(
    f: Function,
    *inputs: Any,
    loss: Callable[..., Any] | None = None,
    params: Any = None,
    wrt: None = None,
    in_dims: Any = 0,
    batched: bool = True,
    output: Any = None,
    method: str = "auto",
    check: str = "first",
    max_memory: int | str | None = None,
    create_graph: bool = False,
    randomness: str = "error",
    kwargs: Mapping[str, Any] | None = None,
    **input_kwargs: Any,
) -> Jacobian: ...


@overload
def gradient(f: Function, *inputs: Any, wrt: Any, **options: Any) -> Any: ...


def gradient(
    f: Function,
    *inputs: Any,
    loss: Callable[..., Any] | None = None,
    params: Any = None,
    wrt: Any = None,
    in_dims: Any = 0,
    batched: bool = True,
    output: Any = None,
    method: str = "auto",
    check: str = "first",
    max_memory: int | str | None = None,
    create_graph: bool = False,
    randomness: str = "error",
    kwargs: Mapping[str, Any] | None = None,
    **input_kwargs: Any,
) -> Any:
    """The gradient of a scalar for every sample: a Jacobian of shape (N, P).

    With `loss`, the last positional input is the target (or `target=`), and the scalar of sample n is
    `loss(output[n:n+1], target[n:n+1])`, so that reductions act within the sample. Without it, f itself returns one scalar
    per sample, (N,). All else is as in `jacobian`.

    Raises
    ------
    OutputError
        where f, or the loss, gives more than one number per sample, or one for the whole batch.

    Examples
    --------
    >>> import torch, partials as pt
    >>> model = torch.nn.Linear(4, 3)
    >>> G = pt.gradient(model, torch.randn(8, 4), torch.randint(3, (8,)), loss=torch.nn.functional.cross_entropy)
    >>> G.norms().shape
    torch.Size([8])
    """
    problem = _gradient_problem(
        f,
        inputs,
        input_kwargs if kwargs is None else _keywords(kwargs, input_kwargs),
        loss,
        params=params,
        wrt=wrt,
        in_dims=in_dims,
        batched=batched,
        output=output,
        randomness=randomness,
        create_graph=create_graph,
        budget=None if max_memory is None else parse_bytes(max_memory),
    )
    G = _solve(problem, method, check)
    if G.out not in ((), (1,)):
        raise OutputError(
            "gradient needs one scalar per sample",
            got=f"output shape {G.out} for each sample",
            expected="()",
            hint="loss=..., or pt.jacobian for several outputs",
        )
    return G


def check(f: Function, *inputs: Any, level: str = "quick", method: str = "auto", **options: Any) -> Report:
    """Compute the Jacobian and compare it with independent computations; takes the options of `jacobian` or `gradient`.

    Levels: "quick" (identities against one ordinary backward, values, independence, a few samples against a batch of one),
    "full" (every method, against the float64 loop) and "deep" (also step-halved differences, permuted and duplicated
    batches, chunk sizes).

    Returns
    -------
    Report
        A row for each parameter and comparison; `.raise_if_failed()`, `.to_dict()`, `.to_html()`. Errors are over the size of a
        row, told in eps of the dtype.

    Raises
    ------
    InputError
        for an unknown level, and whatever `jacobian` refuses.
    MixingError
        where f itself mixes samples: no method can be right then.

    Examples
    --------
    >>> import torch, partials as pt
    >>> report = pt.check(torch.nn.Linear(3, 2), torch.randn(5, 3), level="full")
    >>> report.raise_if_failed().passed
    True
    """
    return inspected(_problem(f, inputs, options), method, level)


def inspected(problem: Problem, method: str, level: str) -> Report:
    """The report on a problem; within a budget, on a Jacobian that keeps to it."""
    return inspect(problem, method, level) if problem.budget is None else solve(problem, method, "never").check(level)


def explain(f: Function, *inputs: Any, method: str = "auto", **options: Any) -> Plan:
    """The plan for a call, without computing it: which method, why, at what cost, and why the others lost.

    Takes the options of `jacobian` or `gradient`. Runs f on one sample, and once on the batch to record the uses of parameters; no reverse
    pass. Costs are estimates that rank methods: passes, bytes of memory, seconds.

    Raises
    ------
    MethodError, MemoryBudgetError
        where the method that is named, or every one, cannot run, or does not fit; and whatever `jacobian` refuses.

    Examples
    --------
    >>> import torch, partials as pt
    >>> plan = pt.explain(torch.nn.Linear(3, 2), torch.randn(5, 3))
    >>> plan.method, [(use.parameter, use.rule) for use in plan.uses]
    ('capture', [('weight', 'outer'), ('bias', 'sum')])
    """
    return plan(_problem(f, inputs, options), method)[0]


def compare(
    f: Function, *inputs: Any, methods: Any = None, repeats: int = 7, progress: Callable[[str], None] | None = None, **options: Any
) -> Comparison:
    """Time every method on the user's own problem, beside its worst error against the float64 loop and its peak memory.

    `methods` are names from the table, all by default; takes the options of `jacobian` or `gradient`.

    Returns
    -------
    Comparison
        `print` it; `.plot(path)`, `.to_json()`, `.to_markdown()`, `.to_html()`. Seconds, bytes, and errors over the size of a row.

    Raises
    ------
    InputError
        for names that are not in the table, or `repeats` below one.
    MixingError
        where f mixes samples. What a single method refuses is a row of the table.

    Examples
    --------
    >>> import torch, partials as pt
    >>> found = pt.compare(torch.nn.Linear(3, 2), torch.randn(5, 3), methods=["capture", "loop"], repeats=2)
    >>> [(row.method, row.status, row.error < 1e-6) for row in found.rows]
    [('capture', 'ok', True), ('loop', 'ok', True)]
    """
    return compare_methods(_problem(f, inputs, options), methods, repeats=repeats, progress=progress)


def _solve(problem: Problem, method: str, policy: str) -> Jacobian | InputJacobian:
    if policy not in POLICIES:
        raise InputError(f"check={policy!r} is unknown", got=repr(policy), expected=f"one of: {', '.join(POLICIES)}")
    return solve(problem, method, policy)


def _problem(f: Function, inputs: tuple[Any, ...], options: dict[str, Any]) -> Problem:
    """The problem of `jacobian`, or with `loss` of `gradient`, from loose options: what is no option is f's keyword."""
    names = ("params", "wrt", "in_dims", "batched", "output", "randomness", "create_graph")
    asked = {name: options.pop(name) for name in names if name in options}
    budget = parse_bytes(options.pop("max_memory", None))
    loss = options.pop("loss", None)
    keywords = _keywords(options.pop("kwargs", None), options)
    if loss is None:
        return problem_of(f, inputs, keywords, budget=budget, **asked)
    return _gradient_problem(f, inputs, keywords, loss, budget=budget, **asked)


def _gradient_problem(f: Function, inputs: tuple[Any, ...], keywords: dict[str, Any], loss: Any, **asked: Any) -> Problem:
    if loss is None:
        return problem_of(f, inputs, keywords, **asked)
    if "target" in keywords:
        inputs = (*inputs, keywords.pop("target"))
    if len(inputs) + len(keywords) < 2:
        raise InputError(
            "a loss needs a target",
            got=f"{len(inputs)} input",
            expected="the target as the last positional input",
            hint="pt.gradient(model, x, target, loss=...)",
        )
    return problem_of(f, inputs, keywords, loss=loss, **asked)


def _keywords(kwargs: Mapping[str, Any] | None, more: Mapping[str, Any]) -> dict[str, Any]:
    if kwargs is None:
        return dict(more)
    twice = kwargs.keys() & more.keys()
    if twice:
        raise InputError("an input is given twice", got=f"{sorted(twice)} both in kwargs= and by keyword", expected="once")
    return {**kwargs, **more}
