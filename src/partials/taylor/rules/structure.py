"""What moves, copies, picks or pads entries: applied to every slot alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ..._typing import Tensor
from ..jets import Jet, NoRule, join, lengthened, lifted, linear
from ..table import enter, jet_rule

_BY_DIMENSION = {
    "transpose": "dim0 dim1",
    "swapaxes": "axis0 axis1",
    "swapdims": "dim0 dim1",
    "movedim": "source destination",
    "moveaxis": "source destination",
    "narrow": "dim start length",
    "select": "dim index",
    "index_select": "dim index",
    "flip": "dims",
    "roll": "shifts dims",
    "rot90": "k dims",
    "permute": "dims",
    "flatten": "start_dim=0 end_dim=-1",
    "unflatten": "dim sizes",
    "cumsum": "dim",
    "diagonal": "offset=0 dim1=0 dim2=1",
    "diag_embed": "offset=0 dim1=-2 dim2=-1",
    "tril": "diagonal=0",
    "triu": "diagonal=0",
    "repeat_interleave": "repeats dim",
}
"""Arguments after the tensor; those named for dimensions are moved behind the slots."""
_SEVERAL = {
    "chunk": "chunks dim=0",
    "split": "split_size_or_sections dim=0",
    "tensor_split": "indices_or_sections dim=0",
    "unbind": "dim=0",
    "split_with_sizes": "split_sizes dim=0",
}
_DIMENSIONS = ("dim", "dims", "dim0", "dim1", "dim2", "axis0", "axis1", "source", "destination", "start_dim", "end_dim")
_VIEWS = ["transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "narrow", "select", "permute", "flatten", "unflatten", "diagonal"]


def behind(dim: Any, ndim: int) -> Any:
    """A dimension, or several, of the tensor as dimensions of the stack."""
    if isinstance(dim, int):
        return dim % max(ndim, 1) + 1
    return tuple(behind(one, ndim) for one in dim)


def bound(spec: str, args: Sequence[Any], kwargs: dict[str, Any], ndim: int) -> dict[str, Any]:
    """The arguments by name, dimensions moved behind the slots."""
    names = [part.partition("=")[0] for part in spec.split()]
    given: dict[str, Any] = {part.partition("=")[0]: int(part.partition("=")[2]) for part in spec.split() if "=" in part}
    if len(names) == 1 and len(args) > 1:  # dimensions one by one: x.permute(1, 0)
        args = (tuple(args),)
    given.update(zip(names, args, strict=False))
    given.update({{"split_size": "split_size_or_sections", "axis": "dim"}.get(name, name): value for name, value in kwargs.items()})
    if isinstance(given.get("dims"), int):
        given["dims"] = (given["dims"],)
    if missing := [name for name in names if name not in given]:
        raise NoRule(f"a tensor function without its argument {missing[0]!r}")
    return {name: behind(value, ndim) if name in _DIMENSIONS else value for name, value in given.items()}


def _single(name: str, spec: str) -> Callable[..., Jet]:
    function: Any = getattr(torch, name, None) or getattr(torch.Tensor, name)

    def rule(f: Jet, *args: Any, **kwargs: Any) -> Jet:
        if not isinstance(f, Jet):
            raise NoRule(f"{name} with an index that depends on the coordinates")
        if name == "flatten" and not f.ndim:
            return linear(f, lambda t: t.reshape(-1, 1))
        given = bound(spec, args, kwargs, f.ndim)
        if name == "permute":
            given["dims"] = (0, *given["dims"])
        made = linear(f, lambda t: function(t, **given))
        return alias(f, made) if name in _VIEWS else made

    return rule


def _several(name: str, spec: str) -> Callable[..., tuple[Jet, ...]]:
    function: Any = getattr(torch, name, None) or getattr(torch.Tensor, name)

    def rule(f: Jet, *args: Any, **kwargs: Any) -> tuple[Jet, ...]:
        given = bound(spec, args, kwargs, f.ndim)
        if name in ("split", "split_with_sizes"):
            return pieces(f, lambda t: t.split(next(iter(given[key] for key in given if key.startswith("split"))), given["dim"]))
        return pieces(f, lambda t: function(t, **given))

    return rule


for _name, _spec in _BY_DIMENSION.items():
    enter(_single(_name, _spec), _name)
for _name, _spec in _SEVERAL.items():
    enter(_several(_name, _spec), _name)


def alias(f: Jet, view: Jet) -> Jet:
    """Neither may be written to any more: a write would be seen by the other."""
    f.aliased = view.aliased = True
    return view


def pieces(f: Jet, function: Callable[[Tensor], Sequence[Tensor]]) -> tuple[Jet, ...]:
    """A linear map with several results."""
    if f.whole:
        made = tuple(Jet(f.frame, piece) for piece in function(f.stack))
    else:
        value, rest = f.parts
        both = zip(function(value.unsqueeze(0)), function(rest), strict=True)
        made = tuple(Jet(f.frame, parts=(first.squeeze(0), others)) for first, others in both)
    for piece in made:
        alias(f, piece)
    return made


def sizes_of(args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[int, ...]:
    """Sizes given one by one or as one sequence."""
    given = args or tuple(kwargs.values())
    sizes = given[0] if len(given) == 1 and not isinstance(given[0], int) else given
    if isinstance(sizes, torch.dtype) or not all(isinstance(size, int) for size in sizes):
        raise NoRule("a view by another dtype")
    return tuple(sizes)


@jet_rule("reshape", "view", torch.Tensor.reshape, torch.Tensor.view)
def reshape(f: Jet, *args: Any, **kwargs: Any) -> Jet:
    shape = sizes_of(args, kwargs)
    return alias(f, linear(f, lambda t: t.reshape(t.shape[0], *shape)))


@jet_rule("reshape_as", "view_as")
def reshape_as(f: Jet, other: Any) -> Jet:
    return reshape(f, tuple(other.shape))


@jet_rule("expand", "broadcast_to")
def expand(f: Jet, *args: Any, **kwargs: Any) -> Jet:
    sizes = sizes_of(args, kwargs)
    return alias(f, linear(lengthened(f, len(sizes)), lambda t: t.expand(t.shape[0], *sizes)))


@jet_rule("expand_as")
def expand_as(f: Jet, other: Any) -> Jet:
    return expand(f, tuple(other.shape))


@jet_rule("repeat")
def repeat(f: Jet, *args: Any, **kwargs: Any) -> Jet:
    sizes = sizes_of(args, kwargs)
    return linear(lengthened(f, len(sizes)), lambda t: t.repeat(1, *sizes))


@jet_rule("tile")
def tile(f: Jet, *args: Any, **kwargs: Any) -> Jet:
    sizes = sizes_of(args, kwargs)
    return repeat(f, (1,) * (f.ndim - len(sizes)) + sizes)


@jet_rule("unsqueeze")
def unsqueeze(f: Jet, dim: int) -> Jet:
    return alias(f, linear(f, lambda t: t.unsqueeze(dim % (f.ndim + 1) + 1)))


@jet_rule("squeeze")
def squeeze(f: Jet, dim: Any = None) -> Jet:
    chosen = range(f.ndim) if dim is None else [d % max(f.ndim, 1) for d in ((dim,) if isinstance(dim, int) else dim)]
    dims = tuple(d + 1 for d in chosen if d < f.ndim and f.shape[d] == 1)
    return alias(f, linear(f, lambda t: t.squeeze(dims))) if dims else alias(f, Jet(f.frame, parts=f.parts))


@jet_rule("t", "adjoint", torch.Tensor.T.__get__, torch.Tensor.mT.__get__)  # type: ignore[attr-defined]
def transposed(f: Jet) -> Jet:
    if f.anything.is_complex():
        raise NoRule("a transpose of complex numbers")
    return alias(f, linear(f, lambda t: t.mT)) if f.ndim > 1 else same(f)


@jet_rule("contiguous", "positive", "__pos__", "alias", "resolve_conj", "resolve_neg")
def same(f: Jet, **memory_format: Any) -> Jet:
    """Perhaps the tensor itself."""
    return alias(f, copied(f))


@jet_rule("clone")
def copied(f: Jet, **memory_format: Any) -> Jet:
    return Jet(f.frame, f.stack) if f.whole else Jet(f.frame, parts=f.parts)


@jet_rule("cat", "concat", "concatenate")
def cat(tensors: Sequence[Any], dim: int = 0, **axis: int) -> Jet:
    ndim = next(t.ndim for t in tensors if isinstance(t, Jet))
    along = behind(axis.get("axis", dim), ndim)
    return join(tensors, lambda stacks: torch.cat(list(stacks), along), along - 1)


@jet_rule("stack")
def stack(tensors: Sequence[Any], dim: int = 0) -> Jet:
    ndim = next(t.ndim for t in tensors if isinstance(t, Jet))
    return join(tensors, lambda stacks: torch.stack(list(stacks), dim % (ndim + 1) + 1))


@jet_rule("column_stack")
def column_stack(tensors: Sequence[Any]) -> Jet:
    wide = [unsqueeze(t, 1) if isinstance(t, Jet) and t.ndim == 1 else t[:, None] if t.ndim == 1 else t for t in tensors]
    return cat(wide, 1)


def _stacks(name: str, least: int, dim: Callable[[int], int]) -> Callable[..., Jet]:
    """cat along a dimension, of tensors with at least so many."""
    raised: Any = (torch.atleast_1d, torch.atleast_2d, torch.atleast_3d)[least - 1]

    def rule(tensors: Sequence[Any]) -> Jet:
        wide = [_atleast(t, least) if isinstance(t, Jet) else raised(t) for t in tensors]
        return cat(wide, dim(wide[0].ndim))

    return rule


def _atleast(f: Jet, ndim: int) -> Jet:
    """As torch has it: (n,) to (1, n) for two dimensions and to (1, n, 1) for three."""
    if ndim == 3 and f.ndim < 3:
        return unsqueeze(_atleast(f, 2), 2)
    return f if f.ndim >= ndim else unsqueeze(_atleast(f, ndim - 1), 0)


enter(_stacks("hstack", 1, lambda ndim: 0 if ndim == 1 else 1), "hstack")
enter(_stacks("vstack", 2, lambda ndim: 0), "vstack", "row_stack")
enter(_stacks("dstack", 3, lambda ndim: 2), "dstack")


@jet_rule("fliplr")
def fliplr(f: Jet) -> Jet:
    return linear(f, lambda t: t.flip(2))


@jet_rule("flipud")
def flipud(f: Jet) -> Jet:
    return linear(f, lambda t: t.flip(1))


@jet_rule("diff")
def diff(f: Jet, n: int = 1, dim: int = -1, prepend: Any = None, append: Any = None) -> Jet:
    if prepend is not None or append is not None:
        raise NoRule("diff with more entries")
    return linear(f, lambda t: torch.diff(t, n, behind(dim, f.ndim)))


@jet_rule("unfold")
def unfold(f: Jet, dimension: int, size: int, step: int) -> Jet:
    return alias(f, linear(f, lambda t: t.unfold(behind(dimension, f.ndim), size, step)))


@jet_rule("__setitem__")
def setitem(f: Any, index: Any, value: Any) -> Jet:
    """A copy with other entries; `JetMode` puts it in the place of the tensor that is written to."""
    if not isinstance(f, Jet) or isinstance(index, Jet):
        raise NoRule("a write to a tensor that did not depend on the coordinates")
    parts = index if isinstance(index, tuple) else (index,)
    if any(isinstance(part, torch.Tensor | list) for part in parts) and len(parts) > 1:
        raise NoRule("a write by several lists of numbers")
    made, others = (part.clone() for part in f.parts)
    where = (slice(None), *parts)
    if isinstance(value, Jet):
        made[parts] = value.value
        others[where] = lengthened(value, others[where].ndim - 1).rest
    else:
        made[parts] = value
        others[where] = 0
    return Jet(f.frame, parts=(made, others))


@jet_rule("__getitem__")
def getitem(f: Jet, index: Any) -> Jet:
    if not isinstance(f, Jet) or isinstance(index, Jet):
        raise NoRule("an index that depends on the coordinates")
    parts = index if isinstance(index, tuple) else (index,)
    advanced = [part for part in parts if isinstance(part, torch.Tensor | list)]
    if len(advanced) > 1 or (advanced and any(isinstance(part, int) for part in parts)):
        return Jet(f.frame, torch.stack([slot[index] for slot in f.stack.unbind(0)]))
    made = linear(f, lambda t: t[(slice(None), *parts)])
    return made if advanced else alias(f, made)


@jet_rule("gather", "take_along_dim")
def gather(f: Jet, dim: Any = None, index: Any = None, **kwargs: Any) -> Jet:
    dim, index = (
        (kwargs.get("dim", index), kwargs.get("indices", dim)) if isinstance(dim, torch.Tensor) or "indices" in kwargs else (dim, index)
    )
    if not isinstance(f, Jet) or isinstance(index, Jet) or dim is None:
        raise NoRule("an index that depends on the coordinates")
    return linear(f, lambda t: t.gather(behind(dim, f.ndim), index.expand(t.shape[0], *index.shape)))


@jet_rule("masked_fill")
def masked_fill(f: Any, mask: Any, value: Any) -> Jet:
    if not isinstance(f, Jet) or isinstance(value, Jet):
        raise NoRule("masked_fill with a value that depends on the coordinates")
    shape = torch.broadcast_shapes(f.shape, mask.shape)
    wide = expand(f, tuple(shape))
    return Jet(f.frame, parts=(wide.value.masked_fill(mask, value), wide.rest.masked_fill(mask, 0)))


@jet_rule("where")
def where(condition: Any, f: Any = None, g: Any = None, *, input: Any = None, other: Any = None) -> Jet:
    """torch's own convention: the branch that is taken has the derivatives."""
    f, g = (input if f is None else f), (other if g is None else g)
    if isinstance(condition, Jet) or f is None or g is None:
        raise NoRule("where with one argument")
    like = f if isinstance(f, Jet) else g
    f, g = (t if isinstance(t, Jet) else lifted(t, like.frame, like) for t in (f, g))
    ndim = max(condition.ndim, f.ndim, g.ndim)
    f, g = lengthened(f, ndim), lengthened(g, ndim)
    return Jet(f.frame, parts=(torch.where(condition, f.value, g.value), torch.where(condition, f.rest, g.rest)))


@jet_rule(F.pad)
def pad(f: Jet, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Jet:
    if mode != "constant":
        return batchwise(f, lambda t: F.pad(t, pad, mode), len(pad) // 2 + 2)
    if not value:
        return linear(f, lambda t: F.pad(t, pad))
    return Jet(f.frame, parts=(F.pad(f.value, pad, value=value), F.pad(f.rest, pad)))


def batchwise(f: Jet, function: Callable[[Tensor], Tensor], ndim: int) -> Jet:
    """A linear map of images with `ndim` dimensions, the batch among them: the slots are further images."""
    if f.ndim == ndim:
        return Jet(f.frame, function(f.stack.flatten(0, 1)).unflatten(0, (1 + f.frame.rest, f.shape[0])))
    if f.ndim == ndim - 1:
        return Jet(f.frame, function(f.stack))
    raise NoRule("an operation on images of an unusual number of dimensions")


def _images(function: Any, dims: int) -> Callable[..., Jet]:
    return lambda f, *args, **kwargs: batchwise(f, lambda t: function(t, *args, **kwargs), dims + 2)


for _function, _dims in (
    *((getattr(F, f"avg_pool{d}d"), d) for d in (1, 2, 3)),
    *((getattr(F, f"adaptive_avg_pool{d}d"), d) for d in (1, 2, 3)),
    (F.pixel_shuffle, 2),
    (F.pixel_unshuffle, 2),
    (F.unfold, 2),
):
    enter(_images(_function, _dims), _function)


@jet_rule(F.interpolate)
def interpolate(f: Jet, *args: Any, **kwargs: Any) -> Jet:
    return batchwise(f, lambda t: F.interpolate(t, *args, **kwargs), f.ndim)


@jet_rule(F.dropout)
def dropout(f: Jet, p: float = 0.5, training: bool = True) -> Jet:
    """One mask for all slots, drawn as for the value."""
    if not training or not p:
        return same(f)
    mask = F.dropout(torch.ones_like(f.value), p)
    return linear(f, lambda t: t * mask)


@jet_rule(F.alpha_dropout, F.feature_alpha_dropout, torch.feature_dropout)
def other_dropout(f: Jet, p: float = 0.5, training: bool = False, train: bool = False) -> Jet:
    if training or train:
        raise NoRule("dropout by channels, or with alpha")
    return same(f)
