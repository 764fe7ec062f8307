"""The exact scan for two classes of chunks that cost the same everywhere (heads and neurons of a plain transformer)."""

from __future__ import annotations

from collections.abc import Sequence

from ...ir.cost import Expression
from .ladder import Ladder, Levels, ledger_at, step_costs


def applies(ladders: Sequence[Ladder], terms: Sequence[Expression]) -> bool:
    """True when every chunk of a ladder costs the same, there are at most two different costs and values are concave.

    The caller has made sure that costs are separable; see ``CostModel.separable``.
    """
    costs = step_costs(terms, ladders)
    alike = all(len(set(c)) <= 1 for c in costs) and len({c[0] for c in costs if c and c[0] > 0}) <= 2
    return alike and all(one.concave for one in ladders)


def two_class(ladders: Sequence[Ladder], terms: Sequence[Expression], limit: float) -> Levels:
    """The exact optimum: for every number of chunks of the dear class, as many of the cheap class as still fit.

        ``max over n:  A[n] + B[min(len(B), floor((limit - fixed - n*a) / b))]``      A, B: prefix sums of sorted values

    Shapes   n runs over 0..number of dear chunks, so the scan is linear after sorting
    Source   the PTF search (Kwon et al. 2022, arXiv:2204.09656, algorithm 1), which starts at one head and never checks
             that the heads alone fit, so that it can exceed its budget; both mended here
    Law      equal to the exhaustive search; a tighter limit never costs more (equal values are won by the greater cost)

    Chunks that cost nothing stay. The floors' own cost must fit within ``limit``.

    >>> from fxprune.ir.axis import Axis
    >>> from fxprune.ir.group import Kind
    >>> heads = Ladder("h", Kind.HEAD, Axis(2), (0, 1), (0, 1, 2), (0.0, 5.0, 6.0))
    >>> neurons = Ladder("f", Kind.FFN, Axis(4), (0, 1, 2, 3), (0, 1, 2, 3, 4), (0.0, 4.0, 7.0, 9.0, 10.0))
    >>> two_class([heads, neurons], [Expression(3, (heads.axis,)), Expression(1, (neurons.axis,))], 5)
    [1, 2]
    """
    costs = step_costs(terms, ladders)
    levels = [one.top if not steps or steps[0] == 0 else 0 for one, steps in zip(ladders, costs, strict=True)]
    room = int(limit // 1) - ledger_at(terms, ladders, levels).total
    prices = sorted({steps[0] for steps in costs if steps and steps[0] > 0}, reverse=True)
    # (value, ladder, rung), best first; a stable order keeps the rungs of one ladder in order, since values are concave
    classes = [
        sorted(
            (
                (one.values[r + 1] - one.values[r], i, r)
                for i, (one, steps) in enumerate(zip(ladders, costs, strict=True))
                if steps and steps[0] == price
                for r in range(one.top)
            ),
            key=lambda chunk: (-chunk[0], chunk[2], chunk[1]),
        )
        for price in prices
    ]
    dear, cheap = [*classes, [], []][:2]
    a, b = [*prices, 1, 1][:2]
    sum_dear, sum_cheap = _prefix(dear), _prefix(cheap)
    best: tuple[float, int] | None = None
    pick = (0, 0)
    for n in range(len(dear) + 1):
        rest = room - n * a
        if rest < 0:
            break
        m = min(len(cheap), rest // b)
        entry = (sum_dear[n] + sum_cheap[m], n * a + m * b)
        if best is None or entry > best:
            best, pick = entry, (n, m)
    for _, i, _ in [*dear[: pick[0]], *cheap[: pick[1]]]:
        levels[i] += 1
    return levels


def _prefix(chunks: Sequence[tuple[float, int, int]]) -> list[float]:
    sums = [0.0]
    for value, _, _ in chunks:
        sums.append(sums[-1] + value)
    return sums
