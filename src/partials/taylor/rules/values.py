"""What reads a value without differentiating it, and what cuts it from its derivatives."""

from __future__ import annotations

import torch

from ..._typing import Tensor
from ..jets import Jet, NoRule
from ..table import ATTRIBUTES, VALUE_ONLY, found, jet_rule

_ATTRIBUTES = (
    "shape dtype device ndim layout is_leaf requires_grad grad is_cuda is_sparse is_quantized is_meta is_mkldnn itemsize nbytes "
    "names grad_fn is_nested output_nr retains_grad"
)
_METHODS = (
    "size dim numel nelement stride storage_offset is_floating_point is_complex is_contiguous element_size get_device ndimension "
    "is_conj is_neg is_inference is_same_size result_type __len__ __bool__ item tolist __float__ __int__ __index__ __format__ __repr__ "
    "__hash__ __contains__ is_nonzero is_signed data_ptr"
)
_VALUES = (
    "eq ne lt le gt ge __eq__ __ne__ __lt__ __le__ __gt__ __ge__ isnan isinf isfinite isreal isposinf isneginf signbit isclose allclose "
    "equal sign floor ceil round trunc fix heaviside argmax argmin argsort any all count_nonzero nonzero logical_and logical_or "
    "logical_not logical_xor __and__ __or__ __invert__ zeros_like ones_like empty_like full_like rand_like randn_like randint_like "
    "new_zeros new_ones new_full new_empty new_tensor int long bool short byte floor_divide __floordiv__ __rfloordiv__ searchsorted "
    "bucketize bernoulli multinomial"
)

for _name in _ATTRIBUTES.split():
    if hasattr(torch.Tensor, _name):
        ATTRIBUTES.add(getattr(torch.Tensor, _name).__get__)
for _name in _METHODS.split():
    ATTRIBUTES.update(found(_name))
for _name in _VALUES.split():
    VALUE_ONLY.update(found(_name))


@jet_rule("detach", torch.Tensor.data.__get__)  # type: ignore[attr-defined]
def detach(f: Jet) -> Tensor:
    """A constant, as it is for reverse mode; it shares its memory with the tensor."""
    f.aliased = True
    return f.value.detach()


@jet_rule("sgn")
def sgn(f: Jet) -> Tensor:
    if f.anything.is_complex():
        raise NoRule("sgn of complex numbers")
    return torch.sgn(f.bare())
