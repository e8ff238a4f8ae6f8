"""Taylor mode: one run of the function on jets gives every wanted derivative."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from .._compat import watched
from .._typing import Tensor
from .frame import Frame
from .jets import Jet
from .mode import JetMode
from .nested import Slot
from .specs import VALUE, Term


def taylor(
    call: Callable[..., Any], tensors: Sequence[Tensor], slots: Sequence[Slot], wanted: Iterable[Term]
) -> tuple[dict[Term, Tensor], frozenset[str]]:
    """The value of `call(*tensors)` and the derivatives of a frame that holds the wanted ones, each of the value's shape; and the names of
    the functions of straight pieces that it ran through.

    Raises
    ------
    NoRule
        where the function does something that no rule covers, or that torch functions do not show.
    """
    frame = Frame.of(wanted)
    mode = JetMode(frame)
    jets = [seeded(tensor, number, slots, frame) for number, tensor in enumerate(tensors)]
    with mode, torch.enable_grad():
        value = call(*[mode.expose(jet) for jet in jets])
    jet = mode.jet_of(value) if isinstance(value, torch.Tensor) else None
    if jet is None:
        zeros = torch.zeros_like(value) if isinstance(value, torch.Tensor) else value
        return dict.fromkeys(frame.slots, zeros) | {VALUE: value}, frozenset(mode.bent)
    parts = jet.rest.unbind(0)
    return {VALUE: jet.value, **dict(zip(frame.slots[1:], parts, strict=True))}, frozenset(mode.bent)


def seeded(tensor: Tensor, number: int, slots: Sequence[Slot], frame: Frame) -> Jet:
    """The jet of an input: first derivatives of one at its own components, all else zero; the same at every point."""
    by_feature = any(slot.leaf == number and slot.feature is not None for slot in slots)
    sizes = (*(1,) * (tensor.ndim - 1), tensor.shape[-1]) if by_feature else (1,) * tensor.ndim
    seeds = torch.zeros((frame.rest, *sizes), dtype=tensor.dtype, device=tensor.device)
    for component, slot in enumerate(slots):
        first = Term((), (component,))
        if slot.leaf == number and first in frame.slots:
            place = seeds[frame.place(first)]
            (place if slot.feature is None else place[..., slot.feature]).fill_(1)
    if watched():  # a mode around us sees the use of a weight at every point
        return Jet(frame, torch.cat([tensor.unsqueeze(0), seeds.expand(frame.rest, *tensor.shape)]))
    return Jet(frame, affine=(tensor, seeds))
