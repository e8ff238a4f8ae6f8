"""Why a bar is missed, and what was tried: printed under the table for the bars that a run misses."""

from __future__ import annotations

from benchmarks.bars import FIELD, LSTM, MLP, TRANSFORMER, Bar

CLOSE = (
    "What a reverse pass to the uses' outputs leaves out of a backward is one product of three for each layer but the first, so that 2/3"
    " of a step is the least; the rest is Python for each use and the fresh memory of the cotangents that are kept."
)
PRODUCTS = (
    "The step is one backward of the sum of the outputs; a product with factors goes over C cotangents of each sample. Tried: one matrix"
    " product in place of einsum for one column (three times as quick for the LSTM), products of transposed rows as one."
)
REASONS: dict[tuple[str, str], str] = {
    ("factors", ""): CLOSE,
    ("norms", ""): CLOSE,
    (
        "factors",
        FIELD,
    ): "At 64 features the weight gradients that are left out are a small part of a step, the calls for a use are not.",
    ("Gram", MLP): "Two products of N x N x features for each layer, of which three quarters are computed (the rest is mirrored).",
    (
        "clipped sum",
        "",
    ): "Factors and norms, then the weight gradients with the factors of clipping folded in: a third of a step more.",
    ("J v, given factors", ""): PRODUCTS,
    ("J^T u, given factors", ""): PRODUCTS,
    ("J v, given factors", LSTM): "The cotangents lie in the order of time, the product with the inputs in that of the samples.",
    ("dense, fresh memory", TRANSFORMER): (
        "Nearly all of the time is page faults of the result. Blocks are written straight into one result of all parameters, peers leave"
        " one tensor for each; into memory that is there already (`out=`) the same rows take a part of it."
    ),
    ("the whole call", ""): (
        "Of 126 microseconds in a loop of such calls (a training step takes 42, torch's vmap(grad) 235) the forward takes 4, watching it"
        " 21, the reverse pass to the two uses 18, their blocks 15, the random state 6, reading the call 6; the rest is the plan and the"
        " objects of the result, some 270 calls of Python in all. Tried: layouts remembered by the course of a run (266 to 205), the call"
        " read once and its run held against a script (to 134), the engine without its wrapper, sources and versions in one pass (to 126)."
    ),
    ("overhead of one use", ""): (
        "A torch function mode alone costs 1.4 microseconds for an operation, of which there are two for each use here; to name the"
        " arguments takes 1, the rule and its part 2, the edge and the engine's copy of a cotangent 3, the block 4. Tried: runs held"
        " against a script, without a search for parameters and samples and without the walk over the graph (44 and 29 to 18). Under vmap"
        " runs are watched closely each time."
    ),
    ('check="first"', ""): (
        "The check is an ordinary call with its backward, one more backward to the inputs, f on both halves of the batch and on two samples"
        " alone. Tried: norms by parts in float32, J v on sixteen samples, both lone samples compared at once."
    ),
}
"""(beginning of the quantity, case or "" for all) -> the reason."""


def reason(bar: Bar) -> str:
    """The reason for a missed bar; the one of its own case first."""
    for case in (bar.case, ""):
        for (quantity, its), words in REASONS.items():
            if its == case and bar.quantity.startswith(quantity):
                return words
    return "No reason is known."
