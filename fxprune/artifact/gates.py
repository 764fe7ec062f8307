"""Gates: what an artefact must meet before it is delivered. A figure, a limit, and whether it holds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any
from xml.etree import ElementTree as ET

from ..errors import OptionError

PASSED, FAILED, UNFINISHED = "passed", "failed", "unfinished"


@dataclass(frozen=True)
class Limits:
    """What is asked of every target. None asks nothing.

    max_drop        largest fall of the metric below the dense model's, as a difference (0.01 is one point); without
                    labels the share of samples that may disagree with the dense model
    max_kl          largest divergence from the dense model, in nats
    max_latency_ms  largest median latency of one call at batch ``batch``, in milliseconds, on ``threads`` CPU threads
                    (0: the runtime's own choice)
    """

    max_drop: float | None = None
    max_kl: float | None = None
    max_latency_ms: float | None = None
    batch: int = 1
    threads: int = 0

    def __post_init__(self) -> None:
        for name, least in (("max_drop", 0.0), ("max_kl", 0.0), ("max_latency_ms", 0.0)):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= least):
                raise OptionError(
                    "a limit is a number that is not negative", where=f"--{name.replace('_', '-')} {value}"
                )
        if self.batch < 1:
            raise OptionError("a batch size is at least 1", where=f"--batch {self.batch}")
        if self.threads < 0:
            raise OptionError("threads cannot be negative", where=f"--threads {self.threads}")


@dataclass(frozen=True)
class Gate:
    """One figure against its limit.

    name      ``files``, ``parity``, ``data-parity``, ``reference``, ``drop``, ``kl``, ``latency``
    status    ``passed``, ``failed``, or ``unfinished``: it could not be measured, which is never a pass
    measured  the figure, where there is one;  limit: the largest accepted one;  unit: of both
    why       what failed, or why it could not be measured
    """

    name: str
    status: str
    measured: float | None = None
    limit: float | None = None
    unit: str = ""
    why: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def gate(name: str, measured: float, limit: float, unit: str = "", why: str = "") -> Gate:
    """``measured`` against the largest accepted value. What is no number fails.

    >>> gate("drop", 0.004, 0.01).status, gate("drop", float("nan"), 0.01).status
    ('passed', 'failed')
    """
    good = measured <= limit
    return Gate(
        name,
        PASSED if good else FAILED,
        measured if math.isfinite(measured) else None,
        limit,
        unit,
        "" if good else why or f"{measured:.4g} {unit} is above {limit:.4g}".replace("  ", " "),
    )


def worst(statuses: Iterable[str]) -> str:
    """Of a target by its gates, of a delivery by its targets: failed where one is, else unfinished where one is, or
    where there is none at all."""
    found = list(statuses)
    return FAILED if FAILED in found else UNFINISHED if UNFINISHED in found or not found else PASSED


def exit_code(status: str) -> int:
    """0 passed, 3 a gate failed, 4 unfinished: this machine lacks what a target or a gate needs."""
    return {PASSED: 0, FAILED: 3, UNFINISHED: 4}[status]


def junit(name: str, targets: Mapping[str, Sequence[Gate]]) -> bytes:
    """The gates as a JUnit report: a suite per target, a case per gate; unfinished ones are ``skipped``."""
    top = ET.Element("testsuites", name=f"fxprune {name}")
    for target, gates in targets.items():
        counts = {word: str(sum(g.status == word for g in gates)) for word in (FAILED, UNFINISHED)}
        suite = ET.SubElement(
            top,
            "testsuite",
            name=target,
            tests=str(len(gates)),
            failures=counts[FAILED],
            errors="0",
            skipped=counts[UNFINISHED],
        )
        for one in gates:
            case = ET.SubElement(suite, "testcase", classname=f"fxprune.{target}", name=one.name)
            if one.status == FAILED:
                ET.SubElement(case, "failure", message=_printable(one.why))
            elif one.status == UNFINISHED:
                ET.SubElement(case, "skipped", message=_printable(one.why))
            if one.measured is not None:
                text = f"{one.measured:.6g} {one.unit}" + ("" if one.limit is None else f", limit {one.limit:.6g}")
                ET.SubElement(case, "system-out").text = text
    ET.indent(top)
    return ET.tostring(top, encoding="utf-8", xml_declaration=True) + b"\n"


def _printable(text: str) -> str:
    """XML knows no control characters."""
    return "".join(c if c >= " " else " " for c in text)
