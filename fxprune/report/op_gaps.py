"""Ops that are sliced although something about them is not known: what the report says of them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from ..ir.group import PruneGroup

LACKS = {
    "recovery": "cannot be recovered",
    "cost": "is in no budget",
    "importance": "is seen by no criterion that runs the model",
}


def op_gaps(groups: Iterable[PruneGroup], cut: Collection[str]) -> list[dict[str, Any]]:
    """Per op and reason ``{op, lacks, why, nodes, groups}`` of the groups named in ``cut``, in graph order.

    lacks   ``recovery``, ``cost`` or ``importance``
    """
    found: dict[tuple[str, str, str], dict[str, dict[str, None]]] = {}
    for group in groups:
        for use in group.uses if group.name in cut else ():
            for lacks in LACKS:
                why = getattr(use, lacks)
                if why:
                    one = found.setdefault((use.op, lacks, why), {"nodes": {}, "groups": {}})
                    one["nodes"][use.node] = one["groups"][group.name] = None
    return [
        {"op": op, "lacks": lacks, "why": why, **{key: list(names) for key, names in one.items()}}
        for (op, lacks, why), one in found.items()
    ]


def gap_lines(gaps: Iterable[Mapping[str, Any]], done: str = "sliced") -> list[str]:
    """A sentence each. ``done``: ``sliceable`` as long as nothing was cut.

    >>> gap_lines([{"op": "bmm", "lacks": "recovery", "why": "why not", "nodes": ["bmm", "bmm_1"]}])
    ['sliced but cannot be recovered: bmm at bmm, bmm_1 (why not)']
    """
    return [f"{done} but {LACKS[gap['lacks']]}: {gap['op']} at {_some(gap['nodes'])} ({gap['why']})" for gap in gaps]


def _some(names: Sequence[str], many: int = 4) -> str:
    more = f" and {len(names) - many} more" if names[many:] else ""
    return ", ".join(names[:many]) + more
