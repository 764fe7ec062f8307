"""How many samples of the calibration data a run takes, where nobody says."""

from __future__ import annotations

from dataclasses import dataclass

from ..ir.flops import count_macs
from ..ir.program import Program

LEAST, MOST = 128, 1024
EFFORT = 2 * 10**12
"""Multiply-accumulates of one pass over the samples: 128 of a ViT-B at 224 pixels. A count, not a clock, because the
same inputs must give the same plan."""


@dataclass(frozen=True)
class Amount:
    """So many samples at most, and why so many (empty where the caller said it)."""

    samples: int
    why: str = ""


def choose_amount(asked: int | str, dense: Program) -> Amount:
    """What was asked for; of ``auto`` as many as help and cost little.

    More samples help recovery up to about a thousand (MiniLM at 0.3 of its MACs: 78.1 of a held-out test with 128
    sentences, 80.5 with 1024), and every stage runs the model over all of them. So MOST, unless one pass over them
    takes more than EFFORT; LEAST all the same, below which guards cannot tell much.
    """
    if not isinstance(asked, str):
        return Amount(asked)
    macs = count_macs(dense)
    fitting = MOST if macs <= 0 else int(EFFORT // macs)
    if fitting >= MOST:
        return Amount(MOST, f"at most {MOST}: more hardly help")
    if fitting <= LEAST:
        return Amount(LEAST, f"at most {LEAST}, because a sample takes {macs / 1e9:.3g} G multiply-accumulates")
    why = f"because a sample takes {macs / 1e9:.3g} G multiply-accumulates and a pass at most {EFFORT / 1e12:g} T"
    return Amount(fitting, f"at most {fitting}, {why}")
