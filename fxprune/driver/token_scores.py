"""What it does to lose tokens at an attention, measured on calibration data: OPTIN's token importance."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.nn import functional

from ..data.batch import Batch
from ..ir.dataflow import op_name
from ..ir.plan import TokenPlan
from ..ir.program import Program
from ..ir.signature import samples_in
from ..ir.token_flow import TokenSite
from ..passes.analysis.importance.distance import output_change
from ..passes.analysis.importance.features import Tap, find_taps
from ..passes.analysis.importance.objective import Target, targets
from ..passes.transform.reducers.one import One
from ..passes.transform.reducers.reducer import Reducer
from ..process.jobs import run_jobs

WEIGHT = 0.01  # lambda_c, the paper's default for vision
GRID = (0.125, 0.25, 0.5, 0.75, 1.0)  # shares of what may go at once
Merge = Callable[[Program, TokenPlan, Any], GraphModule]
"""The graph of a plan and a reducer, to be run with the program's arguments."""


@dataclass(frozen=True)
class _Dense:
    """One batch through the dense graph: normalised features of every layer [samples, tokens, width], and outputs."""

    batch: Batch
    flat: list[Any]
    features: dict[str, Tensor]
    outputs: list[Target]


class TokenScores:
    """The trajectory loss of reducing tokens at one attention alone.

    ``I = sum over later layers z of 1/T sum_t |M'_zt - M_zt|_F^2 / B^2  +  lambda KL``,   M_zt = F_zt F_zt^T [B, B]

    F_zt are the length-one features of token t over the samples of a batch, taken where the trajectory criterion takes
    them (the output of every feed-forward layer behind the attention); a merged token speaks for all that it took in,
    dropped ones are left out. lambda weighs by the ratio of the medians of the two terms.

    Source  OPTIN, arXiv:2403.17921, A.9. Its reference code takes the mean over tokens before the difference, so that
            differences cancel between tokens; here they are summed, as the paper writes, unless ``mean_first``
    """

    def __init__(self, program: Program, batches: Sequence[Batch], merge: Merge, mean_first: bool = False) -> None:
        self.program, self.merge, self.mean_first = program, merge, mean_first
        self.sites: tuple[TokenSite, ...] = program.need("tokens").usable
        nodes = {n.name: i for i, n in enumerate(program.graph.nodes)}
        taps = [t for t in find_taps(program) if t.rows]
        self.taps = {s.name: [t for t in taps if nodes[t.value] > nodes[s.value]] for s in self.sites}
        self.dense = [self._dense(b, taps) for b in batches]

    def curves(self, reducer: Reducer) -> list[list[float]]:
        """[site][k]: what the k-th token to go there adds, for every unprotected token. Costs a few runs per site.

        The loss is measured on a grid of counts up to the cap, made convex, and continued by its last power law beyond.
        """
        grids = [sorted({max(1, round(g * reducer.cap(s.tokens, s.protected))) for g in GRID}) for s in self.sites]
        jobs = [(s, r) for s, grid in zip(self.sites, grids, strict=True) for r in grid]
        found = run_jobs("tokens.curves", len(jobs), lambda i: self._job(jobs[i][0], reducer, jobs[i][1]))
        losses = _combine([(float(f["features"]), float(f["output"])) for f in found])
        out, at = [], 0
        for site, grid in zip(self.sites, grids, strict=True):
            out.append(increments(grid, losses[at : at + len(grid)], site.tokens - site.protected))
            at += len(grid)
        return out

    def removals(self, count: int) -> list[list[float]]:
        """[site][token]: what it does to lose that token alone (aligned removal). ``count`` tokens per site, evenly
        spaced; the others are given the score of the nearest one."""
        chosen = [even(s.tokens - s.protected, count) for s in self.sites]
        jobs = [(s, j) for s, tokens in zip(self.sites, chosen, strict=True) for j in tokens]
        found = run_jobs("tokens.removals", len(jobs), lambda i: self._job(jobs[i][0], One(jobs[i][1]), 1))
        losses, at, out = _combine([(float(f["features"]), float(f["output"])) for f in found]), 0, []
        for site, tokens in zip(self.sites, chosen, strict=True):
            near = losses[at : at + len(tokens)]
            at += len(tokens)
            out.append(
                [
                    near[min(range(len(tokens)), key=lambda i, j=j: abs(tokens[i] - j))]  # type: ignore[misc]
                    for j in range(site.tokens - site.protected)
                ]
            )
        return out

    def _job(self, site: TokenSite, reducer: Reducer, r: int) -> dict[str, Tensor]:
        features, output = self.loss(site, reducer, r)
        return {"features": torch.tensor(features, dtype=torch.float64), "output": torch.tensor(output).double()}

    def loss(self, site: TokenSite, reducer: Reducer, r: int) -> tuple[float, float]:
        """(feature term, KL) of reducing by r at one site, means over the batches."""
        small = self.merge(self.program, TokenPlan(str(reducer), {site.name: r}), reducer)
        taps, features, output = self.taps[site.name], 0.0, 0.0
        for dense in self.dense:
            run = _Watch(small, {t.value for t in taps})
            outputs = list(run.run(*self.program.arguments(dense.flat)))
            place = run.place
            for tap in taps:
                features += self._measure_shift(run.kept[tap.value], dense.features[tap.value], place, site.protected)
            now = targets(self.program, outputs, dense.batch, samples_in(dense.flat))
            output += float(output_change(now, dense.outputs, 4.0).mean())
        return features / len(self.dense), output / len(self.dense)

    def _measure_shift(self, value: Tensor, dense: Tensor, place: Tensor, protected: int) -> float:
        there = (place >= 0).all(0)  # tokens that every sample still has, so that the maps compare the same samples
        index = place.clamp_min(0)[:, :, None].expand(-1, -1, value.shape[-1])
        now = functional.normalize(value.float(), dim=-1).gather(1, index)[:, there]
        was = dense[:, there]
        if self.mean_first:
            maps = [torch.einsum("bti,cti->bc", x, x) / max(x.shape[1], 1) for x in (now, was)]
        else:
            maps = [torch.einsum("bti,cti->tbc", x, x) for x in (now, was)]
        return float((maps[0] - maps[1]).square().mean()) if there.any() else 0.0

    @torch.no_grad()
    def _dense(self, batch: Batch, taps: Sequence[Tap]) -> _Dense:
        flat = self.program.flatten(batch.args, batch.kwargs)
        run = _Watch(self.program.exported.graph_module, {t.value for t in taps})
        outputs = list(run.run(*self.program.arguments(flat)))
        features = {name: functional.normalize(v.float(), dim=-1) for name, v in run.kept.items()}
        return _Dense(batch, flat, features, targets(self.program, outputs, batch, samples_in(flat)))


class _Watch(Interpreter):
    """Runs a graph and keeps some values, and where the one token op of it put every token."""

    def __init__(self, module: GraphModule, wanted: set[str]) -> None:
        super().__init__(module)
        self.wanted, self.kept, self.place = wanted, dict[str, Tensor](), torch.zeros(0)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return super().run(*args, **kwargs)

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n.name in self.wanted:
            self.kept[n.name] = value
        if op_name(n).startswith("fxprune::") and isinstance(value, tuple):
            self.place = value[2]
        return value


def _combine(pairs: Sequence[tuple[float, float]]) -> list[float]:
    """features + lambda KL, lambda = WEIGHT * median(features) / median(KL) over those that are not zero."""
    one, two = ([p[i] for p in pairs if p[i] > 0] for i in (0, 1))
    factor = WEIGHT * median(one) / median(two) if one and two else 1.0
    return [features + factor * output for features, output in pairs]


def increments(grid: Sequence[int], losses: Sequence[float], tokens: int) -> list[float]:
    """What every further token adds, non-decreasing, from the losses of ``grid`` tokens gone at once. [tokens]

    >>> increments([2, 4], [2.0, 6.0], 5)
    [1.0, 1.0, 2.0, 2.0, 2.545746128748689]
    """
    points = [(0, 0.0)]
    for r, loss in sorted(zip(grid, losses, strict=True)):
        points.append((r, max(loss, points[-1][1])))
    hull: list[tuple[int, float]] = []
    for point in points:  # lower convex hull: slopes rise
        while len(hull) > 1 and (hull[-1][1] - hull[-2][1]) * (point[0] - hull[-1][0]) >= (point[1] - hull[-1][1]) * (
            hull[-1][0] - hull[-2][0]
        ):
            hull.pop()
        hull.append(point)
    out: list[float] = []
    for (a, low), (b, high) in itertools.pairwise(hull):
        out += [(high - low) / (b - a)] * (b - a)
    last, end = hull[-1]
    before, middle = hull[-2]
    power = max(1.0, math.log(end / middle) / math.log(last / before)) if before and middle > 0 and end > 0 else 2.0
    while len(out) < tokens and end > 0:  # loss ~ r^p as between the last two points
        k = len(out)
        out.append(max(out[-1], end * (((k + 1) / last) ** power - (k / last) ** power)))
    return (out + [0.0] * tokens)[:tokens]


def even(tokens: int, count: int) -> list[int]:
    """``count`` positions of ``tokens``, evenly spaced."""
    count = min(count, tokens)
    return [int((i + 0.5) * tokens / count) for i in range(count)]
