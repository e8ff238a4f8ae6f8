"""Why a bar is missed, and what was tried: printed under the table for the bars that a run misses."""

from __future__ import annotations

from benchmarks.bars import CNN, FIELD, HUNDRED, MLP, ROWS, TEN, TRANSFORMER, Bar

CLOSE = (
    "What a reverse pass to the uses' outputs leaves out of a backward is one product of three for each layer but the first, so that 2/3"
    " of a step is the least; the rest is Python for each use and the fresh memory of the cotangents that are kept."
)
PRODUCTS = (
    "Matrix products of v or u with the inputs are a third of a step; the cotangents are read once for a weight and its bias together,"
    " and 0.1 to 0.2 ms are Python where a training step has left nothing of it in the caches. Tried: one matrix product in place of"
    " einsum, batches of rows times a matrix in place of a matrix times a column (ten times as quick for C = 100), J^T u written to its"
    " place, the wider side of one multiplied first (LSTM: 0.59 to 0.4), what depends on the blocks alone laid out once for all vectors"
    " (the table 0.65 to 0.5, C = 10 0.60 to 0.46)."
)
TEN_OUTPUTS = (
    "The three matrix products take 0.31 of this step, with one reading of the cotangents (2.6 MB) 0.34 to 0.40 (torch's addmm and bmm"
    " alone, nothing else): what they read, the step before has put out of the nearer caches. Some 0.1 ms is Python for six blocks. Tried:"
    " a weight's and its bias' cotangent met once (J v 0.74 to 0.58), what depends on the blocks alone laid out once (to 0.46 to 0.52)."
)
HUNDRED_OUTPUTS = (
    "The cotangents are 28.8 MB: one reading takes 0.27 of this step where they lie in the last cache (35 GB/s), more where they do not;"
    " the matrix products of v or u with the inputs take 0.28 and 0.33, so that 0.55 and 0.60 are the least, and 0.73 and 0.67 with torch's"
    " batched products as the readers (0.45 and 0.34). Tried: a weight's and its bias' cotangent met once, as batches of a row times a"
    " matrix, without copies or temporaries (J v 2.9 to 1.0, J^T u 3.5 to 0.95), what depends on the blocks alone laid out once (J v to"
    " 0.8, J^T u to 0.7). Another pass through the network in place of the cotangents would multiply as much: 0.59 of a step's products."
)
TABLE = (
    "The result is 12.8 MB, of which 1024 rows are added to: zeroing it takes 0.1 ms where it lies in the last cache and 0.4 where it does"
    " not, nearly half of this step; to add the rows takes 0.1. Tried: zeroed once and written in place, where it was zeroed, copied and"
    " joined (1.25 to 0.75); what depends on the blocks alone laid out once (to 0.6). Pages that the system zeroes (numpy) took 1.7 times"
    " as long."
)
REASONS: dict[tuple[str, str], str] = {
    ("factors", ""): CLOSE,
    ("norms", ""): CLOSE,
    ("norms", TRANSFORMER): (
        "The factors take 0.85 of a step, the norms of the eight weights used at 64 positions 0.23: pairs of positions, the products"
        " of inputs and of cotangents each as one batch. Tried: rows formed and freed (1.1 to 2 times as long for each of the eight), pairs"
        " that meet the cotangents first (1.3 times)."
    ),
    (
        "factors",
        FIELD,
    ): "At 64 features the weight gradients that are left out are a small part of a step, the calls for a use are not.",
    ("Gram", MLP): (
        "The factors take 0.7 of a step. Two products of N x N x features for each layer, of which three quarters are computed (the rest is"
        " mirrored), take 0.28 at the rate of the largest matrix products of this machine (70 billion multiplications a second), so that"
        " 0.98 is the least; their sum and the mirroring take 0.05. Tried: a bias' part is a one in its weight's (one product of"
        " cotangents for both: 0.65 to 0.45 beyond the factors), strips of three, four and uneven parts of the rows (no better than two),"
        " equal sizes as one batch (the copy takes what it saves), the sum mirrored once and not each product (to 0.38)."
    ),
    (
        "clipped sum",
        "",
    ): "Factors and norms, then the weight gradients with the factors of clipping folded in: a third of a step more.",
    ("J v, given factors", ""): PRODUCTS,
    ("J^T u, given factors", ""): PRODUCTS,
    ("J v, given factors", TEN): TEN_OUTPUTS,
    ("J^T u, given factors", TEN): TEN_OUTPUTS,
    ("J v, given factors", HUNDRED): HUNDRED_OUTPUTS,
    ("J^T u, given factors", HUNDRED): HUNDRED_OUTPUTS,
    ("J^T u, given factors", ROWS): TABLE,
    ("dense, fresh memory", TRANSFORMER): (
        "Nearly all of the time is page faults of the result. Blocks are written straight into one result of all parameters, peers leave"
        " one tensor for each; into memory that is there already (`out=`) the same rows take a part of it. Tried: the products of a few"
        " samples at a time in the same memory, which a cache holds (a sixth off the products)."
    ),
    ("dense, fresh memory", CNN): (
        "The factors take 7 of 10 ms and page faults of the result 1; convolutions' rows are 3. Tried: patches of a few samples laid out in"
        " the same memory, which a cache holds, and one product of them, where offsets of the kernel had one each (the whole 0.84 of what"
        " it was, in processor time)."
    ),
    ("the whole call", ""): (
        "In a loop of such calls one takes 2 training steps (of 44 microseconds; torch's vmap(grad) takes 5.5): the forward 4, watching"
        " it 10, the reverse pass to the two uses with its seed 14, their blocks 8, whether random numbers were drawn 8, reading the call"
        " 8; the rest is the plan, the objects of the result and letting go of them, some 130 calls of Python in all. Beside other code,"
        " as here, all of it is half as long again, since none of it is in the caches. Tried: layouts remembered by the course of a run"
        " (266 to 205 microseconds), the call read once and its run held against a script (to 134), the engine without its wrapper (to"
        " 126), steps that compare objects, blocks by remembered steps, the generator copied and not read (to 87)."
    ),
    ("overhead of one use", ""): (
        "A torch function mode alone costs 1 to 2 microseconds for the two operations that go with each use here; to compare what they took"
        " with the script takes 3, the edge and what the block will read 2, the engine's copy of a cotangent 1 to 2, the block 2 to 4 (a"
        " view takes one, and a weight with its bias has three); a step's weight gradients, which are left out, take 4 to 10. Tried: runs"
        " held against a script, without a search for parameters and samples and without the walk over the graph (44 and 29 to 17), steps"
        " that compare objects, blocks by remembered steps (to 11 to 16)."
        " Under vmap, torch's batching and a batch dimension more take 4 in the"
        " forward and 5 in the reverse pass, a batch that is taken out and put back around a use 8, graph nodes that are looked up beneath"
        " vmap 4. Tried: watched in each call (107), held against a script (to 55), linears on the batch beneath in place of what vmap"
        " makes of them, a cotangent at the product itself in place of a copied view, blocks by remembered steps (to 40); all operations on"
        " the rows beneath (no better: the views that are saved in the reverse pass are made in the forward)."
    ),
    ('check="first"', ""): (
        "By profile: an ordinary call with its backward takes 1 to 1.3 steps (its memory is fresh), a second reverse pass 0.3 to 0.6,"
        " J^T u 0.3 to 0.5 (for C outputs it reads C cotangents of each sample, which the step does not have: at C=100 half of the"
        " check), f on both halves of the batch 0.4, two samples alone two gradients more, and 0.1 ms of Python for each parameter."
        " Tried and kept: no norms of rows, one number for the rows of single samples, inputs read behind the first layer, tables at"
        " the rows looked up, cotangents that several parameters share read once (0.92 of the call at C = 100), memory of gradients that"
        " are done with (the table: 0.81 of the call)."
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
