"""Facts about a function from one forward of a single sample: output shape, operations, FLOPs, saved bytes, random numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode, resolve_name

from ._compat import transform_of
from ._errors import OutputError, RandomnessError
from ._graph import hides_uses
from ._output import check_output
from ._problem import Problem
from ._signature import first_tensor
from ._state import drawn_since, random_state, rng_kept
from ._typing import Tensor
from .rules import embedding

UNBATCHED = frozenset({torch.native_group_norm})
"""torch 2.13: vmap of the backward of its second and third output is wrong, with no error (F.group_norm has only the first)."""

UNVECTORISED = frozenset({torch.cdist, torch.lu_solve, torch.Tensor.lu_solve, torch.linalg.lu_solve})
"""torch 2.13: vmap of their vjp is wrong, with no error: `cdist` where batch dimensions broadcast, `lu_solve` within another vmap."""

ROLLS = frozenset({torch.roll, torch.Tensor.roll})
"""torch 2.13: vmap of the derivative of a single number's rolls over the samples, with no error."""

AGAIN = 4
"""Times that f is run once more where the random state has moved and no operation was seen that moves it."""

STATISTICS = frozenset({F.layer_norm, torch.layer_norm, F.instance_norm, torch.instance_norm})
"""torch 2.13: their third derivative is wrong, with no error; under a transform the second one is."""


@dataclass(frozen=True)
class Facts:
    """What a forward of `samples` samples did."""

    out_shape: tuple[int, ...]
    dtype: torch.dtype
    operations: int
    flops: int
    saved_bytes: int
    samples: int
    random: tuple[str, ...]
    single_error: Exception | None = None
    """Why f cannot be called with one sample, where it cannot though it can with the whole batch."""
    forward_unsafe: tuple[str, ...] = ()
    """Operations whose forward-mode derivative differs from the reverse-mode one."""
    vmap_unsafe: tuple[str, ...] = ()
    """Operations whose derivative under vmap is not that of the operation."""
    inexact: bool = False
    """f differentiates through one of `STATISTICS` itself, or calls a fused loss that allows one reverse pass: written out then."""
    reentrant: bool = False
    """The graph has a node that runs a part of f again in the reverse pass (`torch.utils.checkpoint` with use_reentrant=True)."""
    course: int = 0
    """A number for the operations, and for what small integers among their arguments say of dimensions."""

    @property
    def outputs(self) -> int:
        return int(torch.Size(self.out_shape).numel())


def look(problem: Problem) -> Facts:
    """Run f once on one sample (on the batch where f refuses a single sample), leaving no trace."""
    with problem.running("looking at one sample"), rng_kept(problem.targets[0].tensor.device):
        tensors = problem.tensors()
        if problem.size == 0 or not problem.batched:
            return _measure(problem, tensors, None)
        leaves, cut = problem.sample(0, tensors)
        try:
            return _measure(problem, cut, leaves)
        except OutputError:
            problem.values()  # on the whole batch the sentence has the user's own numbers
            raise
        except Exception as single:
            try:
                whole = _measure(problem, tensors, None)
            except Exception as error:
                raise error from None
            return Facts(**{**vars(whole), "single_error": single})


def _measure(problem: Problem, tensors: dict[str, Tensor], leaves: list[Tensor] | None) -> Facts:
    size = problem.size if leaves is None else 1
    device = problem.targets[0].tensor.device
    before = random_state(device)
    out, counter = _counted(problem, tensors, leaves)
    if not counter.random and drawn_since(before, device) and _draws_again(problem, tensors, leaves):
        counter.random["an operation that torch's function modes do not see, or another thread meanwhile"] = None
    check_output(out, size, problem.name, batched=problem.batched)
    return Facts(
        tuple(out.shape[1:]),
        out.dtype,
        counter.operations,
        counter.flops,
        counter.saved or counter.written,
        max(size, 1),
        tuple(counter.random),
        None,
        tuple(counter.unsafe),
        tuple(counter.unbatched),
        counter.inexact,
        hides_uses(out),
        hash(tuple(counter.course)),
    )


def _draws_again(problem: Problem, tensors: dict[str, Tensor], leaves: list[Tensor] | None) -> bool:
    """Whether the random state moves each time that f runs: once may have been another thread, with which the generator is shared."""
    device = problem.targets[0].tensor.device
    for _ in range(AGAIN):
        before = random_state(device)
        _counted(problem, tensors, leaves)
        if not drawn_since(before, device):
            return False
    return True


def _counted(problem: Problem, tensors: dict[str, Tensor], leaves: list[Tensor] | None, *, hooks: bool = True) -> tuple[Tensor, _Counter]:
    """f's output and what was counted; without hooks on saved tensors where f uses torch.func, which does not run under them."""
    counter = _Counter(problem.targets[0].tensor.device)
    try:
        with counter, counter.saving() if hooks else nullcontext():
            return problem(tensors, leaves), counter
    except RuntimeError as error:
        if not hooks or "saved tensor hooks" not in str(error):
            raise
    return _counted(problem, tensors, leaves, hooks=False)


def demand_policy(problem: Problem, facts: Facts) -> None:
    """With randomness="error", random numbers are an error that names the operation."""
    if facts.random and problem.randomness == "error":
        raise RandomnessError(
            f"{problem.name} draws random numbers ({', '.join(facts.random)}) and no policy for them was given",
            got='randomness="error" (the default)',
            expected="a function without random numbers, or a policy",
            hint='module.eval(), or randomness="model" (the masks that f itself would draw), "same" or "different" (as in vmap)',
        )


class _Counter(TorchFunctionMode):
    """Counts what the torch functions that it sees do."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.operations = self.flops = self.saved = self.written = 0
        self.random: dict[str, None] = {}
        self.unsafe: dict[str, None] = {}
        self.unbatched: dict[str, None] = {}
        self.differentiates = self.normalises = self.once = False
        self.seen: set[int] = set()
        self.course: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (F.embedding, F.embedding_bag) and (kwargs["weight"] if "weight" in kwargs else args[1]).requires_grad:
            embedding.refuse(func, args, kwargs)
        state = random_state(self.device) if _may_be_random(func) else None
        out = func(*args, **kwargs)
        result = first_tensor(out)
        self.course.append(func)
        # (shifted: hash(-1) is hash(-2))
        self.course += [value + 16 for value in (*args, *kwargs.values()) if type(value) is int and abs(value) <= 8]
        if result is not None:
            self.operations += 1
            self.flops += _flops(func, args, kwargs, result)
            self.written += result.numel() * result.element_size()
        if state is not None and drawn_since(state, self.device):
            self.random[(resolve_name(func) or getattr(func, "__name__", "a random operation")).removeprefix("torch.")] = None
        self.differentiates |= func is torch.autograd.grad
        self.once |= func is getattr(F, "linear_cross_entropy", None) and not getattr(kwargs.get("options"), "allow_retain_graph", True)
        if func in STATISTICS:
            self.normalises = True
            self.differentiates |= transform_of(args[0] if args else kwargs["input"]) != ""
        if func in UNBATCHED or func in UNVECTORISED or (func in ROLLS and result is not None and not result.ndim):
            self.unbatched[func.__name__] = None
        if func is F.embedding and (kwargs.get("padding_idx") is not None or (len(args) > 2 and args[2] is not None)):
            self.unsafe["embedding with padding_idx"] = None
        return out

    @property
    def inexact(self) -> bool:
        return self.once or (self.differentiates and self.normalises)

    @contextmanager
    def saving(self) -> Iterator[None]:
        def pack(tensor: Tensor) -> Tensor:
            if tensor.data_ptr() not in self.seen:
                self.seen.add(tensor.data_ptr())
                self.saved += tensor.numel() * tensor.element_size()
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            yield


_RANDOM_WORDS = ("drop", "rand", "bernoulli", "normal", "multinomial", "poisson", "uniform", "exponential", "cauchy", "geometric", "rrelu")
_PRODUCTS = ("linear", "conv", "matmul", "mm", "addmm", "bmm", "baddbmm", "einsum", "attention", "lstm", "gru", "rnn", "bilinear")


def _may_be_random(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    return any(word in name for word in (*_RANDOM_WORDS, "attention", "lstm", "gru", "rnn"))


def _flops(func: Any, args: Any, kwargs: Any, result: Tensor) -> int:
    """Two per multiply-add where an operation is a product, one per entry elsewhere: enough to rank methods."""
    name = getattr(func, "__name__", "")
    if not any(word in name for word in _PRODUCTS):
        return result.numel()
    tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.ndim]
    if "conv" in name and len(tensors) > 1:
        return 2 * result.numel() * max(tensors[1][0].numel(), 1)
    return 2 * result.numel() * max((t.shape[-1] for t in tensors[:2]), default=1)
