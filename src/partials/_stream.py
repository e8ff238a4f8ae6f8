"""`stream`: a quantity of batches that come one after the other, in memory that does not grow with their number."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch

from ._errors import InputError, MethodError
from ._signature import rebuild, walk
from ._typing import Function, Tensor
from ._what import STORED, parsed

if TYPE_CHECKING:
    from ._jacobian import Jacobian
    from .store import Store

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
ITERATED: dict[str, Callable[..., Tensor]] = {
    "jacobian": lambda J: J.dense(),
    "norms": lambda J: J.norms(),
    "sketch": lambda J, *how: J.sketch(*how),
}
"""Quantities of each batch's own rows."""
REDUCED: dict[str, Callable[..., Tensor]] = {
    "sum": lambda J: J.sum(),
    "diagonal": lambda J: J.diagonal(),
    "clipped_sum": lambda J, most: J.clipped_sum(most),
}
"""Quantities that add up over batches."""


@overload
def stream(f: Function, batches: Iterable[Any], what: str, to: str | Path, **options: Any) -> Store: ...


@overload
def stream(f: Function, batches: Iterable[Any], what: str = "jacobian", *, to: str | Path, **options: Any) -> Store: ...


@overload
def stream(f: Function, batches: Iterable[Any], what: str = "jacobian", to: None = None, **options: Any) -> Any: ...


def stream(
    f: Function,
    batches: Iterable[Any],
    what: str = "jacobian",
    to: str | Path | None = None,
    *,
    loss: Callable[..., Any] | None = None,
    progress: bool | Callable[[Iterable[Any]], Iterable[Any]] = False,
    **options: Any,
) -> Iterator[Tensor] | Tensor | Store:
    """A quantity of the Jacobians of f for every batch of an iterable or a `DataLoader`, one batch in memory at a time.

    Parameters
    ----------
    f
        As in `jacobian`.
    batches
        Each is a tensor, a tuple or list of positional inputs, or a mapping of keyword inputs.
    what
        "jacobian", "norms", "sketch:K": one result for each batch, (n, *out, P), (n, *out) or (n, *out, K), made when it is asked for.
        A sketch is Gaussian, or of another kind of `Jacobian.sketch`: "sketch:4096:kronecker" forms no rows.
        "sum", "diagonal", "clipped_sum:C", "gram": one tensor for all batches together, (*out, P), (P,), (P,) or (N, *out, N, *out),
        added in the order of the batches, half precision in float32. The inputs of all batches are kept for "gram", whose result is
        larger than they are; their rows are not.
    to
        A folder: results go into a store there (see `open`), a block for each batch; what it holds already is not computed again.
    loss
        With it the rows are gradients, as in `gradient`: the last input of a batch is its target.
    progress
        True for tqdm's bar (`pip install 'partials[progress]'`), or a function that wraps the batches, such as tqdm itself.
    options
        Those of `jacobian`, the same for every batch.

    Returns
    -------
    Iterator[Tensor], Tensor or Store

    Raises
    ------
    InputError
        for an unknown `what`, a batch that is no input, or no batch at all.

    Examples
    --------
    >>> import torch, partials as pt
    >>> model = torch.nn.Linear(3, 2)
    >>> data = torch.utils.data.DataLoader(torch.randn(10, 3), batch_size=4)
    >>> [norms.shape[0] for norms in pt.stream(model, data, "norms")]
    [4, 4, 2]
    >>> pt.stream(model, data, "sum").shape
    torch.Size([2, 8])
    """
    name, how = parsed(what)
    if not options.get("batched", True):
        raise InputError("stream takes batches", got="batched=False", expected="samples along a dimension of every batch")
    of = rows_of(f, loss, options)
    told = wrapped(batches, progress)
    if to is not None:
        return _stored(f, told, what, Path(to), of, loss, options)
    if name == "gram":
        return _gram(of, told)
    if name in ITERATED:
        return (ITERATED[name](of(inputs_of(batch)), *how) for batch in told)
    return _reduced(REDUCED[name](of(inputs_of(batch)), *how) for batch in told)


def rows_of(f: Function, loss: Callable[..., Any] | None, options: Mapping[str, Any]) -> Callable[[Inputs], Jacobian]:
    """From the inputs of a batch to its Jacobian, or its gradients."""
    from ._api import gradient, jacobian

    shared = dict(options)
    more = dict(shared.pop("kwargs", None) or {})

    def rows(inputs: Inputs) -> Jacobian:
        args, kwargs = inputs
        if loss is None:
            found = jacobian(f, *args, kwargs=more | kwargs, **shared)
        else:
            found = gradient(f, *args, loss=loss, kwargs=more | kwargs, **shared)
        if not hasattr(found, "leaves"):
            raise InputError("stream is of rows with respect to parameters", got="wrt of inputs only", expected="parameters")
        return found

    return rows


def inputs_of(batch: Any) -> Inputs:
    """(positional, keyword) inputs of one batch."""
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, Mapping) and all(isinstance(name, str) for name in batch):
        return (), dict(batch)
    if isinstance(batch, tuple | list):
        return tuple(batch), {}
    raise InputError(
        "a batch is no input", got=type(batch).__name__, expected="a tensor, a tuple or list of inputs, or a mapping of keyword inputs"
    )


def wrapped(batches: Iterable[Any], progress: bool | Callable[[Iterable[Any]], Iterable[Any]]) -> Iterable[Any]:
    """The batches, with a bar that moves as they are taken."""
    if isinstance(batches, Tensor):
        raise InputError("the batches are one tensor", got=f"shape {tuple(batches.shape)}", expected="a list of them", hint="x.split(32)")
    if not isinstance(batches, Iterable):
        raise InputError("the batches are not iterable", got=type(batches).__name__, expected="a list of batches, or a DataLoader")
    if progress is False:
        return batches
    if progress is not True:
        return progress(batches)
    try:
        from tqdm.auto import tqdm
    except ImportError:
        raise InputError("progress=True needs tqdm", got="no module named 'tqdm'", hint="pip install 'partials[progress]'") from None
    bar: Iterable[Any] = tqdm(batches)
    return bar


def _reduced(parts: Iterator[Tensor]) -> Tensor:
    """The sum of the parts in their order."""
    total: Tensor | None = None
    for part in parts:
        wide = part.to(torch.promote_types(part.dtype, torch.float32))  # (in half precision a long sum stands still)
        if total is None:
            total = wide
        elif total.shape != part.shape:
            raise InputError(
                "the results of the batches have several shapes, and cannot be added",
                got=f"{tuple(total.shape)}, then {tuple(part.shape)}",
                expected="outputs of one shape for each sample, and the same parameters",
            )
        elif total.requires_grad or wide.requires_grad or total.dtype != wide.dtype:
            total = total + wide
        else:
            total.add_(wide)
        del part, wide
    if total is None:
        raise _nothing()
    return total


def _gram(of: Callable[[Inputs], Jacobian], batches: Iterable[Any]) -> Tensor:
    """J J^T of all batches; the rows of two are held at a time."""
    kept = [_kept(inputs_of(batch)) for batch in batches]
    if not kept:
        raise _nothing()
    blocks: list[list[Tensor]] = [[] for _ in kept]
    for i, inputs in enumerate(kept):
        mine = of(inputs)
        lead = len(mine._lead)
        blocks[i].append(mine.gram())
        for j in range(i + 1, len(kept)):
            pair = mine.gram(of(kept[j]))
            blocks[i].append(pair)
            blocks[j].append(pair.permute(*range(lead, 2 * lead), *range(lead)))
    return torch.cat([torch.cat(row, lead) for row in blocks])


def _kept(inputs: Inputs) -> Inputs:
    """Inputs that stay as they are, whoever fills the tensors of a batch anew for the next; what carries a graph is not copied."""
    tensors = [tensor if tensor.requires_grad else tensor.clone() for _, tensor in walk(inputs, "")]
    copied: Inputs = rebuild(inputs, iter(tensors))
    return copied


def _nothing() -> InputError:
    return InputError("there is no batch", got="an empty iterable", expected="at least one batch")


def _stored(
    f: Function,
    batches: Iterable[Any],
    what: str,
    path: Path,
    of: Callable[[Inputs], Jacobian],
    loss: Callable[..., Any] | None,
    options: Mapping[str, Any],
) -> Store:
    """The results in a store, a block for each batch."""
    from .store import open_store
    from .store.produce import write_batches
    from .store.work import Work, identity

    if parsed(what)[0] in ("gram", "clipped_sum"):
        raise MethodError(
            f"a stream of {what!r} cannot be stored: a store takes batches as they come",
            got=what,
            expected=f"one of: {', '.join(name for name in STORED if name != 'gram')}",
            hint="to=None, or `partials run --what gram` on data with rows by number",
        )
    named = _named(f, options)
    said = {"loss": getattr(loss, "__qualname__", loss), **{name: value for name, value in options.items() if name != "params"}}

    def fingerprint(block: int) -> Mapping[str, Any]:
        return identity(named, what, "batches", None, block, block, said)

    config = {"what": what, "options": {name: str(value) for name, value in said.items()}}
    write_batches(
        path,
        Work(what, of),
        (inputs_of(batch) for batch in batches),
        fingerprint,
        config,
        drawn=options.get("randomness", "error") != "error",
    )
    return open_store(path)


def _named(f: Function, options: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors that results depend on, as far as they are known by name."""
    found: dict[str, Tensor] = {}
    for source in (f, options.get("params")):
        if isinstance(source, torch.nn.Module):
            found |= source.state_dict()
        elif isinstance(source, Mapping):
            found |= source
    return found
