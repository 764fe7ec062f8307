"""Measured latencies of one program on one device: what latency budgets are reckoned with, and nothing else.

Groups whose products are alike are one *class* (the feed-forward parts of twelve equal blocks). A row of the table is
the whole lowered program with every group of one class resized to the same count, beside the dense one lowered in the
same way. So fusion, memory traffic and the caches of the whole are in the figure, twelve layers at once lift it above
the noise, and the number of things to lower grows with the kinds of layers rather than with the layers.

Tokens have rows of their own, by reducer: the whole lowered program with tokens gone by a schedule, so that what the
reducing ops cost themselves (matching, sorting) is in the figure as well.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import LoadError
from ..ir.axis import Axis
from ..ir.cost import CostModel, Expression
from ..ir.group import PruneGroup
from ..ir.plan import TokenPlan
from ..ir.program import Program
from ..process.environment import versions

VERSION = 2  # 1 had no token counts: it is read as a table of widths alone
RUNTIMES = ("torch", "onnxruntime")  # versions that a latency depends on
MAX_BYTES = 16 * 2**20
CURE = "measure one: leave `--latency-table` away, or let `fxprune compile MODEL --latency 0.6 ...` write it"


@dataclass(frozen=True)
class Point:
    """The program's latency with every group of a class at ``count`` elements.

    ratio  of the dense latency, median of the rounds' own ratios;  error: standard error of that median, in the same
           unit;  probe: measured to see which multiples the target likes
    """

    count: int
    ratio: float
    error: float = 0.0
    probe: bool = False


@dataclass(frozen=True)
class Curve:
    """A class: ``groups`` groups of ``size`` elements of one ``kind``, and what was measured of it, by count.

    skipped  why it was not measured (``small``: little of the work; ``kind``: not asked for), or "". Its time is then
             taken to follow its MACs
    """

    kind: str
    size: int
    groups: int
    points: tuple[Point, ...] = ()
    skipped: str = ""


@dataclass(frozen=True)
class TokenPoint:
    """The program's latency with all its widths and ``removed`` tokens gone behind each usable site.

    ratio, error  as of :class:`Point`
    """

    removed: tuple[int, ...]
    ratio: float
    error: float = 0.0


@dataclass(frozen=True)
class TokenCurve:
    """One reducer in the program, and what was measured of it.

    tokens  that may go;  protected: those in front of them that may not;  sites: names of the usable ones, in order
    """

    tokens: int
    protected: int
    sites: tuple[str, ...]
    points: tuple[TokenPoint, ...] = ()


@dataclass(frozen=True)
class Setting:
    """What a latency depends on besides the program. batch: samples per call; threads: 0 is the runtime's choice."""

    target: str
    device: str
    batch: int = 1
    threads: int = 0
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class LatencyTable:
    """What was measured of one program in one setting.

    program     fingerprint of the graph, its shapes included and its weights not: checkpoints share a table
    dense_ms    latency of one call of the dense program, lowered in the same way, in milliseconds
    curves      class -> what was measured of it
    tokens      reducer (:func:`reducer_key`) -> what was measured of it
    correction  what the time that a plan saves is multiplied with: learnt from whole plans that were measured
    """

    setting: Setting
    program: str
    dense_ms: float
    curves: Mapping[str, Curve]
    correction: float = 1.0
    date: str = ""
    tokens: Mapping[str, TokenCurve] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"LatencyTable({self.hash[:12]})"

    def __str__(self) -> str:
        one = self.setting
        threads = f"{one.threads} thread{'s' * (one.threads > 1)}" if one.threads else "the runtime's own threads"
        return f"{one.target} on {one.device}, batch {one.batch}, {threads}"

    def to_json(self) -> str:
        """Readable JSON, in a stable order: the same table is the same text."""
        return json.dumps({"fxprune_latency": VERSION, **asdict(self)}, indent=1, sort_keys=True) + "\n"

    @cached_property
    def hash(self) -> str:
        """SHA-256 of its JSON: plans are a function of what this names."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def correct(self, factor: float) -> LatencyTable:
        """With what a plan saves multiplied once more."""
        return replace(self, correction=self.correction * factor)

    def write(self, path: Path) -> None:
        """As JSON, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.partial-{os.getpid()}")
        try:
            aside.write_text(self.to_json(), encoding="utf-8")
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)

    @staticmethod
    def read(path: str | Path) -> LatencyTable:
        """Raises LoadError for a file that is none."""
        path = Path(path)
        try:
            if path.stat().st_size > MAX_BYTES:
                raise ValueError(f"{path.stat().st_size} bytes, the limit is {MAX_BYTES}")
            return LatencyTable.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise LoadError(
                "the table of latencies cannot be read", where=str(path), why=error.strerror or str(error), cure=CURE
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise LoadError(
                "this file is no table of latencies", where=str(path), why=str(error)[:300], cure=CURE
            ) from None

    @staticmethod
    def from_dict(raw: Any) -> LatencyTable:
        """Checked for form; raises ValueError, KeyError or TypeError. A table of version 1 holds widths alone."""
        version = raw["fxprune_latency"]
        if type(version) is not int or not 1 <= version <= VERSION:
            raise ValueError(f"version {version!r}, this fxprune reads 1 to {VERSION}")
        curves = {}
        for name, c in raw["curves"].items():
            points = tuple(Point(**p) for p in c["points"])
            for p in points:
                _number(p.ratio, f"a ratio of {name}")
                _number(p.error, f"an error of {name}")
                if type(p.count) is not int or not 0 <= p.count < c["size"]:
                    raise ValueError(f"a count of {name} is not below its size")
            counts = [p.count for p in points]
            if sorted(set(counts)) != counts:
                raise ValueError(f"the counts of {name} are not ascending")
            curves[str(name)] = Curve(str(c["kind"]), int(c["size"]), int(c["groups"]), points, str(c["skipped"]))
        setting = Setting(**raw["setting"])
        table = LatencyTable(
            setting,
            str(raw["program"]),
            _number(raw["dense_ms"], "dense_ms"),
            curves,
            _number(raw["correction"], "correction"),
            str(raw["date"]),
            {str(k): _token_curve(str(k), c) for k, c in raw["tokens"].items()} if version > 1 else {},
        )
        if not table.dense_ms or not table.correction:
            raise ValueError("a latency and a correction are positive")
        return table

    def check(self, program: Program) -> None:
        """Raise LoadError unless the table knows every prunable group of the program."""
        missing = [
            g.name
            for name, groups in classes(program).items()
            for g in groups
            if name not in self.curves or self.curves[name].size != g.size
        ]
        if missing:
            raise LoadError(
                "the table of latencies is of another program",
                where=str(self),
                why=f"it knows nothing like {', '.join(missing[:3])}",
                cure="use it with the architecture, input shapes and kinds that it was measured for",
            )

    def check_tokens(self, program: Program, plan: TokenPlan) -> None:
        """Raise LoadError unless the table knows what the plan's reducer takes in the program."""
        key, flow = reducer_key(plan.reducer, plan.unmerge), program.need("tokens")
        if key not in self.tokens:
            known = ", ".join(self.tokens)
            raise LoadError(
                f"the table of latencies holds no token counts for '{key}'",
                where=str(self),
                why=f"it knows {known}" if known else "it was measured for widths alone",
                cure=f"{CURE}, with these `--tokens`",
            )
        curve, sites = self.tokens[key], flow.usable
        if curve.sites != tuple(s.name for s in sites) or (sites and curve.tokens + curve.protected != sites[0].tokens):
            raise LoadError(
                "the table of latencies is of another program",
                where=str(self),
                why=f"its {curve.tokens + curve.protected} tokens become fewer behind other attentions",
                cure="use it with the architecture and input shapes that it was measured for",
            )


def reducer_key(reducer: str, unmerge: bool) -> str:
    """What a table calls a reducer: its text with its options, and whether tokens are restored behind it."""
    return f"{reducer}, unmerged" if unmerge else reducer


def _token_curve(name: str, raw: Any) -> TokenCurve:
    sites, tokens, protected = tuple(map(str, raw["sites"])), raw["tokens"], raw["protected"]
    if type(tokens) is not int or type(protected) is not int or tokens < 1 or protected < 0:
        raise ValueError(f"the tokens of {name} are no counts")
    points = []
    for p in raw["points"]:
        removed = tuple(p["removed"])
        if len(removed) != len(sites) or any(type(r) is not int or r < 0 for r in removed) or sum(removed) >= tokens:
            raise ValueError(f"a schedule of {name} does not fit its {len(sites)} sites and {tokens} tokens")
        points.append(
            TokenPoint(removed, _number(p["ratio"], f"a ratio of {name}"), _number(p["error"], f"an error of {name}"))
        )
    return TokenCurve(tokens, protected, sites, tuple(points))


def _number(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{what} is no time")
    return float(value)


def today() -> str:
    """The date, as tables state it."""
    return dt.datetime.now(dt.timezone.utc).date().isoformat()


def setting_of(target: str, device: str, batch: int, threads: int) -> Setting:
    """With the versions of the runtimes that are installed."""
    return Setting(target, device, batch, threads, {k: v for k, v in versions().items() if k in RUNTIMES})


def classes(program: Program, kinds: tuple[str, ...] = ()) -> dict[str, list[PruneGroup]]:
    """Prunable groups by class, in the order of the program: alike are those of one kind and size whose products have
    the same constants and partners. Only those of ``kinds``, if there are any."""
    terms = CostModel(program).terms["flops"]
    users: dict[Axis, list[str]] = {}
    for term in terms:
        for axis in term.axes():
            users.setdefault(axis, []).append(_describe(term, axis))
    found: dict[str, list[PruneGroup]] = {}
    for g in program.need("groups"):
        if g.prunable and g.axis in users and (not kinds or str(g.kind) in kinds):
            about = hashlib.sha256(" + ".join(sorted(users[g.axis])).encode()).hexdigest()
            found.setdefault(f"{g.kind}[{g.size}] {about[:10]}", []).append(g)
    return found


def _describe(term: Expression, own: Axis) -> str:
    """A product as text, its own axis as ``n`` and the others by their sizes."""
    names = sorted("n" if a is own else str(a.size) for a in term.variables)
    sums = sorted("(" + "+".join(_describe(t, own) for t in terms) + ")" for terms in term.sums)
    return "*".join([str(term.constant), *names, *sums])


def fingerprint(program: Program) -> str:
    """Of the ops, their order and the shapes of everything, not of weights."""
    told = hashlib.sha256()
    for node in program.graph.nodes:
        told.update(f"{node.op} {node.target if node.op == 'call_function' else ''} ".encode())
        value = node.meta.get("val")
        shape = getattr(value, "shape", None)
        told.update(f"{None if shape is None else list(map(str, shape))} {getattr(value, 'dtype', '')}\n".encode())
    args, kwargs = program.example_inputs
    told.update(str([list(getattr(t, "shape", ())) for t in program.flatten(args, kwargs)]).encode())
    return told.hexdigest()[:16]


def find_table_path(setting: Setting, program: str) -> Path:
    """Where the table of a program in a setting is kept: below ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    key = hashlib.sha256(json.dumps([asdict(setting), program], sort_keys=True).encode()).hexdigest()
    device = re.sub(r"[^A-Za-z0-9]+", "-", setting.device).strip("-")
    return root / "fxprune" / "latency" / f"{setting.target}-{device}-b{setting.batch}-{key[:16]}.json"
