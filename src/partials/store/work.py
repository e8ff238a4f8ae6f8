"""What a store can hold, and what one block of it computes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy
import torch

from .. import _blocks
from .._errors import InputError
from .._typing import Tensor
from .._what import parsed
from . import fingerprint
from .data import Inputs
from .format import Array, array

BLOCK_BYTES = 64 * 2**20
"""Of a block's main array, unless told otherwise: large enough for a disk, small enough to lose."""
BLOCKS, PARTS, TOGETHER = 4096, 256, 8
"""Blocks that a run of small rows is cut into, and one of a reduction, whose every block is kept; samples that are computed together
where even they take more than `BLOCK_BYTES`."""
REDUCED = {"sum": "parts", "diagonal": "parts"}
"""Quantities that add up over samples, and the array that keeps those of each block."""
NUMPY = {torch.float16: "float16", torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "float32"}
"""bfloat16 is no type of zarr's; float32 holds every one of its numbers."""


@dataclass(frozen=True)
class Work:
    """A quantity of the Jacobians of blocks of samples."""

    what: str
    jacobian: Callable[[Inputs], Any]
    """The `Jacobian` of one block's inputs."""
    others: Callable[[], Iterable[tuple[int, int, Inputs]]] | None = None
    """For "gram": all blocks of the data, which every block's rows are multiplied with."""

    def arrays(self, J: Any, samples: int, block: int) -> list[Array]:
        """The arrays of a store of so many samples, from the Jacobian of some of them."""
        c, dtype = _blocks.size_of(J.out), _numpy(self.dtype(J))
        table, offset = {}, 0
        for name, shape in J.columns.shapes.items():
            table[name] = {"offset": offset, "shape": list(shape)}
            offset += _blocks.size_of(shape)
        main: dict[str, Any] = {"what": self.what, "out": list(J.out), "columns": table, "aliases": dict(J.columns.aliases)}
        blocks = -(-samples // block)
        if self.kind in REDUCED:
            first = array("parts", (blocks, *((c, offset) if self.what == "sum" else (offset,))), dtype, 1, main)
        else:
            widths = {"jacobian": (c, offset), "norms": (c,), "gram": (c, samples, c), "sketch": (c, *parsed(self.what)[1][:1])}
            first = array(self.kind, (samples, *widths[self.kind]), dtype, block, main)
        return [first, array("values", (samples, c), _numpy(J.values.dtype), block)]

    def dtype(self, J: Any) -> torch.dtype:
        """Of the quantity; sums of half precision are kept in float32, where parts that are added later still count."""
        found: torch.dtype = J._dtype_of_rows()
        return found if self.kind == "jacobian" else torch.promote_types(found, torch.float32)

    def block_rows(self, J: Any, samples: int, together: int, most: int | None = None) -> int:
        """Samples in a block: as many as make 64 MiB of the main array (or `most` bytes), but no more than keep many workers busy."""
        if self.kind in REDUCED:
            wanted = max(together, -(-samples // PARTS))
        else:
            row = self.arrays(J, max(1, samples), 1)[0].row_bytes
            computed = together if self.kind == "gram" else max(together, -(-samples // BLOCKS))  # (a block of "gram" is one part)
            wanted = min((most or BLOCK_BYTES) // max(1, row), computed)
        return max(1, min(max(1, samples), wanted))

    def together(self, J: Any, inputs: Inputs) -> int:
        """Samples whose factors and inputs make 64 MiB, from one sample and its Jacobian."""
        factors = sum(block.nbytes() for group in J.blocks.values() for block in group)
        read = sum(t.nbytes for t in (*inputs[0], *inputs[1].values()) if isinstance(t, Tensor))
        return max(TOGETHER, BLOCK_BYTES // max(1, factors + read))

    def compute(
        self, parts: Iterable[Inputs], out: numpy.ndarray | None = None, told: Callable[[int], None] = lambda _: None
    ) -> tuple[dict[str, numpy.ndarray], dict[str, Any]]:
        """One block's arrays, and what its journal line says, from its inputs, of which a part is computed at a time.

        Rows that are not finite are counted; of a reduction, which has no rows, samples whose values are not finite.

        `out` is memory for the dense rows, used where it fits; `told` hears how many samples each part had.
        """
        start, done, found = time.perf_counter(), 0, []
        values, digests, methods = [], [], []
        for inputs in parts:
            J = self.jacobian(inputs)
            found.append(self._quantity(J, None if out is None else out[done:]))
            if self.kind in REDUCED and len(found) > 1:
                found = [found[0] + _alike(found[1], found[0])]
            values.append(_array(J.values.detach()).reshape(len(J), _blocks.size_of(J.out)))
            digests.append(fingerprint.of_inputs([*inputs[0], *inputs[1].values()]))
            methods.append(J.plan.method)
            done += len(J)
            told(len(J))
            del J
        together = out is not None and all(rows.base is out for rows in found)
        rows = out[:done] if together and out is not None else _joined(found)
        judged = values if self.kind in REDUCED else [rows]
        info = {
            "method": "+".join(dict.fromkeys(methods)),
            "threads": torch.get_num_threads(),
            "torch": str(torch.__version__),
            "seconds": round(time.perf_counter() - start, 4),
            "nonfinite": sum(int((~numpy.isfinite(part)).any(tuple(range(1, part.ndim))).sum()) for part in judged),
            "inputs": digests[0] if len(digests) == 1 else fingerprint.of_inputs(digests),
        }
        return {REDUCED.get(self.kind, self.kind): rows, "values": _joined(values)}, info

    @property
    def kind(self) -> str:
        return parsed(self.what)[0]

    def _quantity(self, J: Any, out: numpy.ndarray | None) -> numpy.ndarray:
        n, c, width = len(J), _blocks.size_of(J.out), J.columns.width
        if self.kind == "jacobian":
            fits = out is not None and len(out) >= n and out.shape[1:] == (c, width) and out.dtype == _numpy(J.dtype)
            if out is not None and fits and J.dtype != torch.bfloat16 and J.device.type == "cpu":
                J.dense(out=torch.from_numpy(out[:n]).view(J.shape))
                return out[:n]
            return _array(J.dense()).reshape(n, c, width)
        if self.kind == "norms":
            return _array(J.norms()).reshape(n, c)
        if self.kind == "sketch":
            how = parsed(self.what)[1]
            return _array(J.sketch(*how)).reshape(n, c, how[0])
        if self.kind == "sum":
            return _wide(_array(J.sum())).reshape(1, c, width)
        if self.kind == "diagonal":
            return _wide(_array(J.diagonal())).reshape(1, width)
        assert self.others is not None
        parts = [_array(J.gram(self.jacobian(inputs))).reshape(n, c, stop - start, c) for start, stop, inputs in self.others()]
        return numpy.concatenate(parts, 2)


def identity(
    named: Mapping[str, Tensor], what: str, data: str, samples: int | None, block: int, together: int, options: Mapping[str, Any]
) -> dict[str, Any]:
    """The fingerprint: two runs with the same one write the same numbers."""
    from .. import __version__

    return {
        "parameters": fingerprint.of_tensors(named),
        "data": data,
        "what": what,
        "samples": samples,
        "block size": block,
        "samples at once": together,
        "options": {name: fingerprint.words_of(value) for name, value in sorted(options.items())},
        "torch": str(torch.__version__).partition("+")[0],
        "partials": __version__,
    }


def _numpy(dtype: torch.dtype) -> str:
    if dtype not in NUMPY:
        raise InputError("a store cannot hold this type", got=str(dtype), expected=f"one of: {', '.join(map(str, NUMPY))}")
    return NUMPY[dtype]


def _wide(part: numpy.ndarray) -> numpy.ndarray:
    return part.astype("float32") if part.dtype == numpy.float16 else part


def _joined(parts: list[numpy.ndarray]) -> numpy.ndarray:
    return parts[0] if len(parts) == 1 else numpy.concatenate([parts[0], *(_alike(part, parts[0]) for part in parts[1:])])


def _alike(part: numpy.ndarray, other: numpy.ndarray) -> numpy.ndarray:
    """A part that can be added to another, which must have its shape: nothing is stretched to fit."""
    if part.shape[1:] != other.shape[1:]:
        raise InputError(
            "samples have outputs or parameters of several shapes",
            got=f"parts of shape {other.shape[1:]} and {part.shape[1:]}",
            expected="one shape",
        )
    return part


def _array(t: Tensor) -> numpy.ndarray:
    return t.detach().to(torch.float32 if t.dtype == torch.bfloat16 else t.dtype).cpu().numpy()
