"""The laws: each quantity of a Jacobian, and of one block, against the same quantity of its dense rows.

Letters: N samples, C flattened outputs, P parameter entries, k columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from .._blocks import Block
from .._jacobian import Jacobian, concat
from .._typing import Tensor
from .conformance import Finding, finding, rows_finding


def laws_of(J: Jacobian) -> Iterator[Finding]:
    """Quantities of factors against those of the dense rows, and J v against J^T u."""
    n, c, p = len(J), J.values[:1].numel() if len(J) else 0, J.shape[-1]
    lead = J.values.shape
    rows = J.dense().detach().reshape(n, c, p)
    flat, draw = rows.reshape(n * c, p), _drawer(rows)
    u, v, w = draw(n, c), draw(p, 2), draw(n)
    squares = flat.square().sum(0).norm()
    forward, back = J @ v, J.T @ u.reshape(lead)
    yield finding("J v", forward.reshape(n, c, 2), rows @ v)
    yield finding("J^T u", back, u.flatten() @ flat)
    yield finding(
        "<u, J v> = <J^T u, v>", (u.unsqueeze(-1) * forward.reshape(n, c, 2)).sum((0, 1)), v.T @ back, u.norm() * (rows @ v).norm()
    )
    yield finding("norms", J.norms().reshape(n, c), rows.norm(dim=-1))
    yield finding("Gram", J.gram().reshape(n * c, n * c), flat @ flat.T)
    yield finding("own Gram blocks", J.gram_blocks().reshape(n, c, c), rows @ rows.mT)
    yield finding("sum", J.sum().reshape(c, p), rows.sum(0), flat.norm())
    yield finding("weighted sum", J.sum(w).reshape(c, p), torch.einsum("n,ncp->cp", w, rows), flat.norm() * w.norm())
    yield finding("diagonal", J.diagonal(), flat.square().sum(0))
    if n > 1:
        yield finding("variance", J.variance().reshape(c, p), rows.var(0), squares)
    if c == 1:
        limit = float(rows.norm(dim=-1).median().clamp_min(1e-6))
        factors = (limit / rows.norm(dim=-1)).clamp(max=1).nan_to_num(1.0)
        yield finding("clipped sum", J.clipped_sum(limit).flatten(), (rows * factors.unsqueeze(-1)).sum((0, 1)), flat.norm())
    out = torch.full_like(J.dense(), torch.nan)
    yield rows_finding("dense(out=)", J.dense(out=out).reshape(n, c, p), rows)
    yield from _selection(J, rows)


def _selection(J: Jacobian, rows: Tensor) -> Iterator[Finding]:
    """Some of the samples, and parts put together again."""
    n, c, p = rows.shape
    chosen = torch.tensor([n - 1, 0], device=rows.device)
    some = J[chosen]
    yield rows_finding("J[index]", some.dense().reshape(2, c, p), rows[chosen])
    yield finding("norms of J[index]", some.norms().reshape(2, c), rows[chosen].norm(dim=-1))
    yield finding("Gram with J[index]", J.gram(some).reshape(n * c, 2 * c), rows.reshape(n * c, p) @ rows[chosen].reshape(2 * c, p).T)
    whole = concat([J[:1], J[1:]]) if n > 1 else concat([J])
    yield rows_finding("concat", whole.dense().reshape(n, c, p), rows)
    yield finding("Gram of concat", whole.gram().reshape(n * c, n * c), rows.reshape(n * c, p) @ rows.reshape(n * c, p).T)


def laws_of_block(block: Block) -> Iterator[Finding]:
    """The algebra of one block against that of its dense rows; see `partials._blocks.Block` for shapes."""
    (n, c), shape = block.rows, tuple(block.shape)
    p = torch.Size(shape).numel()
    rows = block.dense().detach().reshape(n, c, p)
    flat, draw = rows.reshape(n * c, p), _drawer(rows)
    v, u, w, seed, H = draw(*shape, 2), draw(n, c, 2), draw(n), draw(n, c), draw(n, 2, c)
    out, both = torch.full((n, c, p + 1), torch.nan, dtype=rows.dtype, device=rows.device)[..., :p], rows.clone()
    block.write(out)
    block.write(both, add=True)
    yield rows_finding("write", out, rows)
    yield rows_finding("write, added", both, 2 * rows)
    yield finding("J v", block.matmul(v), rows @ v.reshape(p, 2))
    yield finding("J^T u", block.rmatmul(u).reshape(p, 2), flat.T @ u.reshape(n * c, 2))
    yield finding("squared norms", block.squared_norms(), rows.square().sum(-1))
    yield finding("inner", block.inner(block), rows.square().sum(-1))
    yield finding("Gram", block.gram(block).reshape(n * c, n * c), flat @ flat.T)
    yield finding("own Gram blocks", block.own_gram(block), rows @ rows.mT)
    yield finding("weighted sum", block.weighted_sum(w).reshape(c, p), torch.einsum("n,ncp->cp", w, rows), flat.norm() * w.norm())
    yield finding(
        "products", block.products(block, w).reshape(c, p), torch.einsum("n,ncp->cp", w, rows.square()), w.norm() * flat.norm() ** 2
    )
    mean = rows.mean(0)
    yield finding("scatter", block.scatter(mean.reshape(c, *shape)).reshape(c, p), (rows - mean).square().sum(0), flat.norm() ** 2)
    yield rows_finding("scaled", block.scaled(seed).dense().reshape(n, c, p), rows * seed.unsqueeze(-1))
    yield rows_finding("mixed", block.mixed(H).dense().reshape(n, 2, p), H @ rows)
    chosen = torch.tensor([n - 1, 0], device=rows.device)
    yield rows_finding("select", block.select(chosen).dense().reshape(2, c, p), rows[chosen])
    yield finding(
        "inner with another", block.select(chosen).inner(block.select(chosen.flip(0))), (rows[chosen] * rows[chosen.flip(0)]).sum(-1)
    )


def _drawer(like: Tensor) -> Callable[..., Tensor]:
    """A function from sizes to standard normal numbers, the same at every call of a law."""
    generator = torch.Generator(device=like.device).manual_seed(11)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(sizes, dtype=like.dtype, device=like.device, generator=generator)

    return draw
