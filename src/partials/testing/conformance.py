"""What a conformance test found: for every law its error beside what rounding allows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .._errors import CheckError
from .._typing import Tensor

ALLOWED = {torch.float64: 1e-11, torch.float32: 2e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
"""Error allowed, relative to the scale that a law states."""


@dataclass(frozen=True)
class Finding:
    """One law: how far its two sides are apart, relative to their scale."""

    law: str
    error: float
    allowed: float

    @property
    def holds(self) -> bool:
        return self.error <= self.allowed  # (False for NaN)


@dataclass(frozen=True)
class Conformance:
    """All laws that a rule, a method, a block or a Jacobian was held to; `print` shows them."""

    subject: str
    findings: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        return all(finding.holds for finding in self.findings)

    def __add__(self, other: Conformance) -> Conformance:
        return Conformance(self.subject, self.findings + other.findings)

    def __str__(self) -> str:
        width = max((len(f.law) for f in self.findings), default=0)
        lines = [f"  {f.law:<{width}}  {f.error:9.1e} of {f.allowed:.0e}  {'holds' if f.holds else 'BROKEN'}" for f in self.findings]
        return "\n".join([f"{self.subject}: {len(self.findings)} laws, {'all hold' if self.passed else 'some are broken'}", *lines])

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {
            "subject": self.subject,
            "passed": self.passed,
            "laws": [{"law": f.law, "error": f.error, "allowed": f.allowed, "holds": f.holds} for f in self.findings],
        }

    def raise_if_failed(self) -> Conformance:
        """Itself.

        Raises
        ------
        CheckError
            where a law is broken; `.report` is this object.
        """
        broken = [f for f in self.findings if not f.holds]
        if broken:
            error = CheckError(
                f"{self.subject} breaks a law of per-sample derivatives",
                got="; ".join(f"{f.law}: off by {f.error:.1e} of its scale" for f in broken[:3]),
                expected=f"at most {broken[0].allowed:.0e}",
                hint="print(error.report), which shows every law",
            )
            error.report = self
            raise error
        return self


def finding(law: str, got: Tensor, expected: Tensor, scale: Tensor | None = None) -> Finding:
    """The error of `got` in the norm, relative to `scale` (by default the norm of what is expected); infinite for another shape."""
    allowed = ALLOWED.get(got.dtype, 1e-11)
    if got.shape != expected.shape:
        return Finding(f"{law} (shape {tuple(got.shape)}, not {tuple(expected.shape)})", float("inf"), allowed)
    got, expected = got.detach().double(), expected.detach().double()
    apart = float((got - expected).norm())
    whole = float(expected.norm() if scale is None else scale)
    return Finding(law, apart / whole if whole > 0 else apart, allowed)


def rows_finding(law: str, got: Tensor, expected: Tensor) -> Finding:
    """Rows (N, C, P), each against its own norm, or a thousandth of the largest row's where it is smaller."""
    allowed = ALLOWED.get(got.dtype, 1e-11)
    if got.shape != expected.shape:
        return Finding(f"{law} (shape {tuple(got.shape)}, not {tuple(expected.shape)})", float("inf"), allowed)
    if not expected.numel():
        return Finding(law, 0.0, allowed)
    got, expected = got.detach().double(), expected.detach().double()
    norms = expected.norm(dim=-1)
    scale = norms.clamp_min(1e-3 * float(norms.max()))
    far = (got - expected).norm(dim=-1)
    return Finding(law, float((far / torch.where(scale > 0, scale, torch.ones_like(scale))).max()), allowed)
