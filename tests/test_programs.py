"""Random programs: what nobody thought of. Every method agrees with the loop, or refuses; what once failed is kept by name."""

from __future__ import annotations

from collections import Counter

import hypothesis
import pytest
from hypothesis import HealthCheck, Phase, given, settings

from partials.capture import build, engine, layout
from partials.rules import conv
from tests.programs.compare import WAYS, exact, rows_by_loop
from tests.programs.draw import programs
from tests.programs.net import Program, Step

pytestmark = [
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
    pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),
]

SHARES = 8
"""Tests that the examples are spread over, for as many processes."""
TEXTBOOK = ("vmap", "grad", "jacobian", "backward", "forward", "auto")


def examples(seed):
    """2000 examples in all, drawn anew at every run, or in the quick run 320, the same ones always."""
    thorough = settings.get_current_profile_name() == "all"

    def decorate(test):
        quiet = settings(max_examples=(2000 if thorough else 320) // SHARES, derandomize=False, suppress_health_check=list(HealthCheck))
        return quiet(test if thorough else hypothesis.seed(seed)(test))

    return decorate


@pytest.mark.parametrize("share", range(SHARES))
def test_every_method_agrees_with_the_loop(share):
    done = Counter()

    @examples(share)
    @given(programs)
    def agree(program):
        rows = rows_by_loop(program)
        assert rows.isfinite().all()
        for way in ("native", "vmapped", TEXTBOOK[done["all"] % len(TEXTBOOK)]):
            done[way] += exact(program, way, rows)
        done["all"] += 1

    agree()
    assert done["native"] > 0.6 * done["all"], f"hardly anything was captured: {done}"
    assert done["vmapped"] > 0.6 * done["all"], f"hardly anything was captured: {done}"


# --- what was found ----------------------------------------------------------------------------------------------

FOUND = {
    "a convolution's transpose, whose backward torch cannot vectorise": Program((Step("conv_transpose", 7),), "all", n=2, t=1, d=2),
    "layer norm of one feature, whose weight has no derivative": Program((Step("layer_norm"),), "all", n=2, t=1, d=1),
    "as many outputs as samples before a prelu, whose vmap within a vmap torch has wrong": Program(
        (Step("prelu", 9, 7), Step("residual", 14, 7, (Step("prelu", 7, 2),)), Step("prelu", 9, 7)), "all", n=4, t=4, d=3
    ),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", FOUND)
def test_what_was_found(name, way):
    exact(FOUND[name], way)


# --- the generator is alive --------------------------------------------------------------------------------------


def layout_guessed_from_sizes(monkeypatch):
    monkeypatch.setattr(
        layout, "find", lambda first, second, weights, *more: (layout.candidates(tuple(first.shape), len(weights))[0], True)
    )


def second_use_of_a_parameter_dropped(monkeypatch):
    plain = engine.merged
    monkeypatch.setattr(engine, "merged", lambda group: plain(group)[:1])


def padding_forgotten(monkeypatch):
    plain = conv._padding
    monkeypatch.setattr(conv, "_padding", lambda *arguments: tuple((0, before + after) for before, after in plain(*arguments)))


def derived_parameter_a_little_off(monkeypatch):
    plain = build.carried
    monkeypatch.setattr(
        build, "carried", lambda block, derived, wanted, **rest: plain(block if derived is wanted else off(block), derived, wanted, **rest)
    )


def off(block):
    n, c = block.rows
    return block.scaled(block.dense().new_full((n, c), 1 + 1e-6))


@pytest.mark.parametrize(
    "error",
    [layout_guessed_from_sizes, second_use_of_a_parameter_dropped, padding_forgotten, derived_parameter_a_little_off],
)
def test_planted_error_is_found(error, monkeypatch):
    error(monkeypatch)

    @hypothesis.seed(0)
    @settings(max_examples=320, phases=[Phase.generate], database=None, suppress_health_check=list(HealthCheck))
    @given(programs)
    def agree(program):
        exact(program, "native")

    with pytest.raises((AssertionError, RuntimeError)):
        agree()
