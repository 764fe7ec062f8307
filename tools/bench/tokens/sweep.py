"""Plans of tokens alone for tools/bench/tokens.py: many of them, without an artefact each."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bench.tokens.cells import Cell
from fxprune.data import Batch
from fxprune.driver.decide_tokens import Decision
from fxprune.driver.run import Run, find_groups, open_model
from fxprune.ir.cost import Budget
from fxprune.ir.group import Kind
from fxprune.ir.plan import TokenPlan
from fxprune.passes.transform.merge_tokens import trial
from fxprune.process.events import Transcript
from fxprune.process.silence import quiet
from fxprune.request.goal import Goal
from fxprune.request.request import Request
from fxprune.request.tokens import TokenGoal


@dataclass
class Sweep:
    """Schedules of one reducer, its scores measured once: what ``--prune tokens`` decides, without an artefact.

    The graph that is run is the one that an artefact would hold, before its ops are spelt out.
    """

    model: nn.Module
    example: Tensor
    data: Sequence[Batch]
    _made: dict[str, Any] = field(default_factory=dict)

    def plan(self, cell: Cell) -> tuple[Callable[[Batch], Tensor], int, list[int]]:
        """(the reduced model, its multiply-accumulates, tokens that the attention of each block takes)."""
        one = self._decision(cell)
        with quiet():
            plan = one.within(one.limit)
        removed = [plan.removed.get(s.name, 0) for s in one.flow.usable]
        left, tokens = one.flow.usable[0].tokens, []
        for r in removed:
            tokens.append(left)
            left -= r
        return _running(one, plan), one.costs.total(removed), tokens

    def of_counts(self, cell: Cell, tokens: Sequence[int], macs: int) -> Callable[[Batch], Tensor]:
        """The reduced model of a plan that was made before."""
        one = self._decision(cell)
        return _running(one, one.plan_of(self.count_removed(cell, tokens, macs)))

    def count_removed(self, cell: Cell, tokens: Sequence[int], macs: int) -> list[int]:
        """Tokens that go at each attention, of a plan that is known by what attentions take and by its
        multiply-accumulates: these tell what goes at the last one."""
        known = [a - b for a, b in itertools.pairwise(tokens)]
        costs = self._decision(cell).costs
        return next([*known, last] for last in range(tokens[-1]) if costs.total([*known, last]) == macs)

    def _decision(self, cell: Cell) -> Decision:
        wish = TokenGoal(cell.tokens)
        if wish.reducer not in self._made:
            request, tell = Request(seed=cell.seed), Transcript(lambda _: None)
            with quiet():
                opened = open_model(request, tell, self.model, self.example)
                self._made[wish.reducer] = find_groups(Run.of(request, opened, tell), tokens=True), {}
        run, scores = self._made[wish.reducer]
        asked = Goal(Budget("flops", cell.ratio), "l2", (Kind.TOKEN,), 1, tokens=wish)
        return Decision(run, asked, wish, run.program, list(self.data), _scores=scores)


def _running(one: Decision, plan: TokenPlan) -> Callable[[Batch], Tensor]:
    program = one.program
    graph = torch.fx.Interpreter(trial(program, plan))

    def run(batch: Batch) -> Tensor:
        output: Tensor = graph.run(*program.arguments(program.flatten(batch.args)))[0]
        return output

    return run
