"""What tools/bench/tokens.py measures: reducers, schedules, ledgers, and cells, each known by its key."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

REDUCERS = {
    "tome": "tome",
    "prune-class-value": "prune{score=class-value}",
    "prune-class": "prune{score=class}",
    "prune-entropy-value": "prune{score=entropy-value}",
    "zero-tprune": "zero-tprune",
    "ppt": "ppt",
    "transform": "transform",
    "random": "random",
}
"""Row -> the reducer as ``--tokens`` takes it, without its schedule."""
DRAWN = ("random",)
"""Rows whose reducer draws: one draw says little, so figures are means over several seeds of the draw."""
SCHEDULES = {
    "constant": "schedule=constant",
    "decreasing": "schedule=decreasing",
    "elimination": "schedule=optin,guard=false",
    "optin": "schedule=optin",
    "auto": "schedule=auto",
}
"""Name -> options. ``elimination`` is OPTIN's schedule whatever it does; ``optin`` gives way to the constant one where
it is not clearly better on the calibration data, as the product does."""
LEDGERS = {"weights": "heads,ffn", "tokens": "tokens", "joint": "heads,ffn,tokens"}
"""Row -> what may be pruned. Those with tokens take ToMe with the product's own choice of schedule."""
DEFAULT = "auto"
RECOVERIES = ("none", "auto")
RATIOS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
BATCHES = (1, 32)

Record = dict[str, Any]
FIGURES = ("accuracy", "images", "right", "agreement", "kl")
KEY = ("prune", "tokens", "recover", "ratio", "seed", "samples", "weights")


@dataclass(frozen=True)
class Cell:
    """One thing to measure: options of ``fxprune.compile`` at one ratio.

    row, schedule   what it is called in the tables; ``schedule`` is "" where tokens stay
    """

    row: str
    schedule: str
    prune: str
    tokens: str
    recover: str
    ratio: float
    seed: int = 0

    @property
    def tokens_alone(self) -> bool:
        """Whether nothing but the counts of tokens differs from the dense model."""
        return self.prune == "tokens" and self.recover == "none"

    def record(self, samples: int, weights: str) -> Record:
        """As plain data, with what else belongs to the key."""
        return {**dataclasses.asdict(self), "samples": samples, "weights": weights}


def key(record: Record) -> tuple[Any, ...]:
    """What a measurement is known by."""
    return tuple(record.get(name) for name in KEY)


def add_schedule(reducer: str, schedule: str) -> str:
    """A reducer's text with a schedule in its braces.

    >>> add_schedule("tome", "optin"), add_schedule("prune{score=class}", "constant")
    ('tome{schedule=optin}', 'prune{score=class,schedule=constant}')
    """
    name, _, options = reducer.rstrip("}").partition("{")
    return f"{name}{{{','.join(filter(None, (options, SCHEDULES[schedule])))}}}"


def reducer(row: str, seed: int = 0) -> str:
    """A row's reducer as ``--tokens`` takes it: one that draws, with the seed of its draw.

    >>> reducer("random"), reducer("random", 2), reducer("tome", 2)
    ('random', 'random{seed=2}', 'tome')
    """
    return f"{REDUCERS[row]}{{seed={seed}}}" if row in DRAWN and seed else REDUCERS[row]


def sweep(rows: Sequence[str], schedules: Sequence[str], ratios: Sequence[float], seed: int = 0) -> Iterator[Cell]:
    """Tokens alone, as the methods are: without recovery."""
    for ratio in ratios:
        for row in rows:
            for schedule in schedules:
                yield Cell(row, schedule, "tokens", add_schedule(reducer(row, seed), schedule), "none", ratio, seed)


def ledgers(rows: Sequence[str], recoveries: Sequence[str], ratios: Sequence[float], seed: int = 0) -> Iterator[Cell]:
    """What one budget does with weights, with tokens and with both, recovery on and off."""
    for ratio in ratios:
        for row in rows:
            reduces = "tokens" in LEDGERS[row]
            for recover in recoveries:
                yield Cell(
                    row,
                    DEFAULT if reduces else "",
                    LEDGERS[row],
                    add_schedule("tome", DEFAULT) if reduces else "off",
                    recover,
                    ratio,
                    seed,
                )
