"""Within a budget: rows that do not fit are not held. They are computed again, a few samples at a time, for each quantity.

How many samples a piece takes is measured, not guessed: the first piece is one sample, and while pieces grow (fourfold at most) the
bytes that the torch operations hold at once are counted; the next size follows by a straight line. A sample whose outputs do not fit
together is cut into ranges of outputs. Where f draws random numbers for the batch, the batch stays whole and only outputs are cut.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from ._blocks import size_of
from ._compat import meter
from ._errors import MemoryBudgetError
from ._machine import out_of_memory, share, trim
from ._measured import OVERHEAD, SAFE, Measured, too_small
from ._output import check_output, detached
from ._part import outputs_of, part, span
from ._pieces import Pieces
from ._plan import Plan, TooLarge, human_bytes
from ._probe import Facts, demand_policy, look
from ._problem import Problem
from ._rows import AbstractJacobian, Origin
from ._run import compute, wrap
from ._sinks import Place, Sink, Written, known
from ._snapshot import Snapshot
from ._state import drawn_from, rng_kept
from ._typing import Tensor
from .checks import Report, inspect, verify
from .checks.report import merged

HELD, TRIAL = 6, 5
"""A Jacobian is held whole if it takes a sixth of the budget at most (finding out where the samples lie takes twice that); samples of
the piece that is checked."""


IN_PIECES = "in pieces, since the whole was too large: "


def solve(problem: Problem, method: str, policy: str) -> Any:
    """The Jacobian that answers a problem: held whole where that fits, else in pieces."""
    budget = problem.budget
    if budget is not None:
        history, problem = problem.history, replace(problem, budget=None)
        problem.history = history
    if not problem.size:
        return _whole(problem, method, policy)
    if budget is not None:
        return _within(problem, method, policy, budget)
    found, failed = _held_whole(problem, method, policy)
    if failed:
        found = _within(problem, method, policy, share(problem.targets[0].tensor.device), hold=False)
        found.plan.notes.append(IN_PIECES + failed)
    return found


def _held_whole(problem: Problem, method: str, policy: str) -> tuple[Any, str]:
    """(the Jacobian, held whole, "") or (None, why there is no room for it)."""
    try:
        return _whole(problem, method, policy), ""
    except Exception as error:
        if problem.create_graph or not (isinstance(error, TooLarge) or out_of_memory(error)):
            raise
        failed = str(error).partition("\n")[0]
    return None, failed  # (outside the except block: a traceback keeps tensors alive)


def _whole(problem: Problem, method: str, policy: str) -> Any:
    computed, made = compute(problem, method)
    made.check = policy
    found = wrap(problem, computed, made, lambda J, level: inspect(problem, made.method, level, J))
    if policy != "never" or computed.doubtful:
        verify(problem, found, policy, doubtful=computed.doubtful, course=computed.course, kept=computed.kept)
    return found


def _within(problem: Problem, method: str, policy: str, budget: int, *, hold: bool = True) -> Any:
    facts = look(problem)
    demand_policy(problem, facts)
    together = not problem.batched or problem.size == 1 or bool(facts.random) or facts.single_error is not None
    if facts.random and problem.randomness in ("same", "different"):
        return _held(problem, method, policy, budget, f'randomness="{problem.randomness}" draws for the whole batch at once')
    if problem.create_graph:
        return _held(problem, method, policy, budget, "create_graph=True keeps the graph of every row")
    snapshot = Snapshot.of(problem)
    if together:
        return _pieces_of(problem, method, policy, budget, snapshot, facts, None)
    found, each, fixed = _trial(problem, method, policy, budget)
    failed = ""
    if hold and (fixed + each * problem.size) * HELD <= budget:
        whole, failed = _held_whole(problem, found.plan.method, policy)
        if not failed:
            return _limited(whole, budget)
    pieces = _pieces_of(problem, found.plan.method, policy, budget, snapshot, facts, found, each)
    if failed:
        pieces.plan.notes.append(IN_PIECES + failed)
    return pieces


def _trial(problem: Problem, method: str, policy: str, budget: int) -> tuple[Any, float, float]:
    """A Jacobian of a few samples, checked and then emptied, and the bytes of each sample and of none: measured once for calls alike."""
    known = {} if problem.history is None else problem.history.measured
    if method in known:
        each, fixed = known[method]
        found = _emptied(_whole(span(problem, slice(0, _few(problem, budget, each + fixed))), method, policy))
        return found, each, fixed
    with meter() as one:
        _whole(span(problem, slice(0, 1)), method, "never")
    trim()
    count = _few(problem, budget, one.peak)
    few = span(problem, slice(0, count))
    found = _emptied(_whole(few, method, policy))  # (what is found out once is found out here, so that the same call measures the same)
    trim()
    with meter() as several:
        _whole(few, found.plan.method, "never")
    trim()
    each = max((several.peak - one.peak) / max(1, count - 1), several.peak / count / 8, 1.0)
    known[method] = each, max(0.0, several.peak - each * count)
    return found, *known[method]


def _few(problem: Problem, budget: int, one: float) -> int:
    return min(TRIAL if 3 * TRIAL * one <= budget else 2, problem.size)


def _emptied(found: Any) -> Any:
    """The Jacobian's form without its rows."""
    inputs = getattr(found, "inputs", None)
    found = found if inputs is None else replace(found, inputs=_emptied(inputs))
    return replace(found, blocks={}, origin=Origin())


def _limited(found: Any, budget: int) -> Any:
    """A Jacobian that is held, its quantities in pieces where the largest of them might not fit."""
    inputs = getattr(found, "inputs", None)
    found = found if inputs is None else replace(found, inputs=_limited(inputs, budget))
    rows, held = size_of(found._lead), sum(block.nbytes() for group in found.blocks.values() for block in group)
    if found.attached or 4 * rows * max(rows, found.columns.width) * found.dtype.itemsize + held <= budget:
        return found
    return replace(found, blocks={}, pieces=Held(found, budget - held))


def _held(problem: Problem, method: str, policy: str, budget: int, why: str) -> Any:
    """A Jacobian that cannot be cut: refused where a sample's share says that the whole does not fit."""
    if problem.batched and problem.size > 1:
        with meter() as seen, rng_kept(problem.targets[0].tensor.device):  # (the masks of the call are those without a budget)
            _whole(span(problem, slice(0, 1)), method, "never")
        needed = seen.peak * problem.size
        if needed > budget:
            raise too_small(budget, needed, f"the whole batch at once, since {why}")
    return _limited(_whole(problem, method, policy), budget)


def _pieces_of(
    problem: Problem,
    method: str,
    policy: str,
    budget: int,
    snapshot: Snapshot,
    facts: Facts,
    found: Any | None,
    each: float | None = None,
) -> AbstractJacobian:
    """`each`: bytes of a sample, where they have been measured."""
    outputs = facts.outputs
    whole_batch = found is None
    again = Again(problem, (problem.size, outputs), method, policy, budget, snapshot, whole_batch, ())
    values, aux = _values(problem, again)
    again = replace(again, kept=(values,))
    if found is None:
        first = Place(slice(0, problem.size), slice(0, 1 if outputs > 1 else outputs))
        found = again.at(first)
        again = replace(again, method=found.plan.method)
        verify(again.problem_of(first), found, policy)
    plan = _planned(problem, found.plan, policy, budget, each)

    def put(J: Any, pieces: Pieces) -> Any:
        return replace(J, values=values if problem.batched else values.squeeze(0), blocks={}, plan=plan, aux=aux, pieces=pieces)

    sources = Origin(sources=snapshot.sources)
    inputs = getattr(found, "inputs", None)
    if inputs is not None:
        inputs = replace(put(inputs, again.through(lambda J: J.inputs)), origin=sources)
        found = replace(found, inputs=inputs)
    return replace(put(found, again), origin=sources)


def _planned(problem: Problem, made: Plan, policy: str, budget: int, each: float | None) -> Plan:
    note = f"rows are not held: for each quantity they are computed again in pieces that keep to {human_bytes(budget)}"
    if each is not None:
        count = max(1, min(problem.size, int(SAFE * (budget - min(OVERHEAD, budget // 2)) / each)))
        note += f", of about {count} of {problem.size} samples, of which each takes {human_bytes(each)}, less what a result takes"
    return replace(made, samples=problem.size, outputs=made.outputs, check=policy, notes=[*made.notes, note])


def _values(problem: Problem, again: Again) -> tuple[Tensor, Any]:
    """f's output on the user's batch, without a graph; all at once where the batch must stay whole or `output=` left something over."""
    if again.whole_batch or problem.picker.choice is not None:
        with problem.running("computing f's values"), torch.no_grad():
            returned, whole = problem.raw()
            out = problem.picker(returned)
            out = check_output(out if problem.batched else out.unsqueeze(0), problem.size, problem.name, batched=problem.batched)
        return out.detach(), None if problem.picker.choice is None else detached(whole)

    def forward(place: Place) -> Tensor:
        few = span(problem, place.samples)
        with few.running("computing f's values"), torch.no_grad():
            return few.values().detach()

    sink = _Values(problem.size)
    again.sweep(forward, sink, outputs=False)
    return known(sink.found), None


@dataclass
class _Values(Sink):
    """(N, *out) from (m, *out)."""

    samples: int
    found: Tensor | None = None

    def size(self, part: Tensor, place: Place) -> int:
        return part.nbytes // max(1, place.rows[0]) * self.samples

    def put(self, part: Tensor, place: Place) -> None:
        if self.found is None:
            self.found = part.new_empty(self.samples, *part.shape[1:])
        self.found[place.samples] = part


@dataclass(frozen=True, eq=False)
class Held(Measured):
    """Ranges of samples of a Jacobian that is held whole."""

    whole: Any
    budget: int
    cuts_outputs = False

    @property
    def rows(self) -> tuple[int, int]:  # type: ignore[override]
        found: tuple[int, int] = self.whole._flat
        return found

    def at(self, place: Place) -> Any:
        return self.whole if place.samples == slice(0, self.rows[0]) else self.whole[place.samples]

    def dtype(self) -> torch.dtype:
        found: torch.dtype = self.whole._dtype_of_rows()
        return found

    def select(self, index: Tensor) -> Pieces:
        return replace(self, whole=self.whole[index])

    def check(self, level: str) -> Report:
        found: Report = self.whole.check(level)
        return found


@dataclass(frozen=True, eq=False)
class Again(Measured):
    """Rows of a problem that are computed again for each quantity."""

    problem: Problem
    rows: tuple[int, int]
    method: str
    policy: str
    budget: int
    snapshot: Snapshot
    whole_batch: bool
    kept: tuple[Tensor, ...]

    def at(self, place: Place) -> Any:
        self.snapshot.demand_unchanged()
        few = self.problem_of(place)
        with self.snapshot.again():
            if self.whole_batch:
                with drawn_from(self.problem.random_state, self.problem.targets[0].tensor.device):
                    computed, made = compute(few, self.method)
            else:
                computed, made = compute(few, self.method)
        found = wrap(few, computed, made)
        for values in self.kept:
            self.snapshot.demand_same(values.reshape(*self.rows)[place.samples, place.outputs], found.values)
        if self.policy == "always":
            verify(few, found, "always")
        return found

    def problem_of(self, place: Place) -> Problem:
        few = self.problem if place.samples == slice(0, self.problem.size) else span(self.problem, place.samples)
        return few if place.outputs == slice(0, self.rows[1]) else outputs_of(few, place.outputs)

    def dtype(self) -> torch.dtype:
        first = Place(slice(0, self.rows[0] if self.whole_batch else 1), slice(0, min(1, self.rows[1])))
        found: torch.dtype = self.at(first)._dtype_of_rows()
        return found

    def select(self, index: Tensor) -> Pieces:
        if self.whole_batch:
            return self.through(lambda J: J[index]) if len(index) == self.rows[0] else _refused()
        few = part(self.problem, index.to(self.problem.targets[0].tensor.device))
        kept = tuple(values.index_select(0, index.to(values.device)) for values in self.kept)
        return replace(self, problem=few, rows=(len(index), self.rows[1]), kept=kept, snapshot=self.snapshot.plus(few))

    def check(self, level: str) -> Report:
        reports: list[Report] = []

        def one(place: Place) -> Tensor:
            reports.append(inspect(self.problem_of(place), self.method, level, self.at(place)))
            return self.kept[0].new_zeros(1)

        self.sweep(one, Written())
        return merged(reports, self.problem.size)


def _refused() -> Pieces:
    raise MemoryBudgetError(
        "samples cannot be chosen here: f draws random numbers for the whole batch, and its rows are not held",
        hint="choose from a quantity of the whole: J.norms()[index]",
    )
