"""What a store can hold, and what one block of it computes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
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
    others: Callable[[], Iterator[tuple[int, int, Inputs]]] | None = None
    """For "gram": all blocks of the data, which every block's rows are multiplied with."""

    def arrays(self, J: Any, samples: int, block: int) -> list[Array]:
        """The arrays of a store of so many samples, from the Jacobian of some of them."""
        c, dtype = _blocks.size_of(J.out), _numpy(J.dtype)
        table, offset = {}, 0
        for name, shape in J.columns.shapes.items():
            table[name] = {"offset": offset, "shape": list(shape)}
            offset += _blocks.size_of(shape)
        main: dict[str, Any] = {"what": self.what, "out": list(J.out), "columns": table, "aliases": dict(J.columns.aliases)}
        blocks = -(-samples // block)
        if self.kind in REDUCED:
            result = [*J.out, offset] if self.what == "sum" else [offset]
            width = (c, offset) if self.what == "sum" else (offset,)
            first = array("parts", (blocks, *width), dtype, 1, {**main, "result": result})
        else:
            widths = {"jacobian": (c, offset), "norms": (c,), "gram": (c, samples, c), "sketch": (c, *parsed(self.what)[1][:1])}
            first = array(self.kind, (samples, *widths[self.kind]), dtype, block, main)
        return [first, array("values", (samples, c), dtype, block)]

    def block_rows(self, J: Any, samples: int, together: int, most: int | None = None) -> int:
        """Samples in a block: as many as make 64 MiB of the main array (or `most` bytes), but no more than keep many workers busy."""
        if self.kind in REDUCED:
            wanted = max(together, -(-samples // PARTS))
        else:
            row = self.arrays(J, max(1, samples), 1)[0].row_bytes
            wanted = min((most or BLOCK_BYTES) // max(1, row), max(together, -(-samples // BLOCKS)))
        return max(1, min(max(1, samples), wanted))

    def together(self, J: Any, inputs: Inputs) -> int:
        """Samples whose factors and inputs make 64 MiB, from one sample and its Jacobian."""
        factors = sum(block.nbytes() for group in J.blocks.values() for block in group)
        read = sum(t.nbytes for t in (*inputs[0], *inputs[1].values()) if isinstance(t, Tensor))
        return max(TOGETHER, BLOCK_BYTES // max(1, factors + read))

    def compute(self, parts: Iterable[Inputs], out: numpy.ndarray | None = None) -> tuple[dict[str, numpy.ndarray], dict[str, Any]]:
        """One block's arrays, and what its journal line says, from its inputs, of which a part is computed at a time.

        `out` is memory for the dense rows, used where it fits.
        """
        start, done, found = time.perf_counter(), 0, []
        values, digests, methods = [], [], []
        for inputs in parts:
            J = self.jacobian(inputs)
            found.append(self._quantity(J, None if out is None else out[done:]))
            if self.kind in REDUCED and len(found) > 1:
                found = [found[0] + found[1]]
            values.append(_array(J.values.detach()).reshape(len(J), -1))
            digests.append(fingerprint.of_inputs([*inputs[0], *inputs[1].values()]))
            methods.append(J.plan.method)
            done += len(J)
            del J
        together = out is not None and all(rows.base is out for rows in found)
        rows = out[:done] if together and out is not None else found[0] if len(found) == 1 else numpy.concatenate(found)
        info = {
            "method": "+".join(dict.fromkeys(methods)),
            "threads": torch.get_num_threads(),
            "torch": str(torch.__version__),
            "seconds": round(time.perf_counter() - start, 4),
            "nonfinite": int((~numpy.isfinite(rows.reshape(len(rows), -1))).any(1).sum()) if rows.size else 0,
            "inputs": digests[0] if len(digests) == 1 else fingerprint.of_inputs(digests),
        }
        return {REDUCED.get(self.kind, self.kind): rows, "values": numpy.concatenate(values)}, info

    @property
    def kind(self) -> str:
        return parsed(self.what)[0]

    def _quantity(self, J: Any, out: numpy.ndarray | None) -> numpy.ndarray:
        n, c = len(J), _blocks.size_of(J.out)
        if self.kind == "jacobian":
            if out is not None and len(out) >= n and out.dtype == _numpy(J.dtype) and J.dtype != torch.bfloat16:
                J.dense(out=torch.from_numpy(out[:n]).view(J.shape))
                return out[:n]
            return _array(J.dense()).reshape(n, c, -1)
        if self.kind == "norms":
            return _array(J.norms()).reshape(n, c)
        if self.kind == "sketch":
            how = parsed(self.what)[1]
            return _array(J.sketch(*how)).reshape(n, c, how[0])
        if self.kind == "sum":
            return _array(J.sum()).reshape(1, c, -1)
        if self.kind == "diagonal":
            return _array(J.diagonal()).reshape(1, -1)
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
        "options": {name: str(value) for name, value in sorted(options.items())},
        "torch": str(torch.__version__).partition("+")[0],
        "partials": __version__,
    }


def _numpy(dtype: torch.dtype) -> str:
    if dtype not in NUMPY:
        raise InputError("a store cannot hold this type", got=str(dtype), expected=f"one of: {', '.join(map(str, NUMPY))}")
    return NUMPY[dtype]


def _array(t: Tensor) -> numpy.ndarray:
    return t.detach().to(torch.float32 if t.dtype == torch.bfloat16 else t.dtype).cpu().numpy()
