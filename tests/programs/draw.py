"""How hypothesis draws a program."""

from __future__ import annotations

from hypothesis import strategies as st

from tests.programs.heads import HEADS
from tests.programs.net import Program, Step
from tests.programs.steps import STEPS

SMALL = st.integers(0, 15)
KINDS = sorted(set(STEPS) - {"residual"})

simple = st.builds(Step, st.sampled_from(KINDS), SMALL, SMALL)
block = st.builds(Step, st.just("residual"), SMALL, SMALL, st.lists(simple, min_size=1, max_size=3).map(tuple))
programs = st.builds(
    Program,
    st.lists(simple | simple | simple | block, min_size=1, max_size=6).map(tuple),
    st.sampled_from(sorted(HEADS)),
    n=st.integers(2, 4),
    t=st.integers(1, 4),
    d=st.integers(1, 4),
    frozen=st.sampled_from([0, 0, 0, 2, 3]),
    dtype=st.sampled_from(["float64", "float64", "float64", "float32"]),
)
