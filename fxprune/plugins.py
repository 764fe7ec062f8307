"""Plugins: what other packages add through entry points of the group ``fxprune.plugins``, named ``kind.name``::

    [project.entry-points."fxprune.plugins"]
    "criterion.mine" = "mypackage.criterion:Mine"
    "rule.mylib" = "mypackage.rules"

Nothing is looked up before a name is unknown or names are listed, nothing is imported before it is used, and a plugin
that is broken is named where it matters and is in nobody else's way. Built-in names cannot be taken over.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata

from .errors import OptionError

GROUP = "fxprune.plugins"
KINDS = ("backend", "criterion", "reducer", "search", "pass", "kind", "rule")
"""What can be added. A ``rule`` is named after the namespace of the ops it is for (``aten``, ``mylib``), and its value
is a module that registers them when it is imported. A ``kind`` is a pair of passes, see ``registry.KINDS``."""


@dataclass(frozen=True)
class Plugin:
    """One entry point. value: ``module:attribute``;  package: the distribution that offers it, where that is known."""

    kind: str
    name: str
    value: str
    package: str = ""

    def __str__(self) -> str:
        return f"{self.kind}.{self.name} = {self.value}" + (f" (of {self.package})" if self.package else "")


def find_plugins() -> tuple[list[Plugin], list[str]]:
    """(all plugins, what is wrong with entry points that are none). Reads metadata, imports nothing."""
    found, wrong = [], []
    for point in metadata.entry_points(group=GROUP):
        kind, _, name = point.name.partition(".")
        package = getattr(getattr(point, "dist", None), "name", "") or ""
        if kind in KINDS and name:
            found.append(Plugin(kind, name, point.value, package))
        else:
            wrong.append(
                f"{point.name} = {point.value}"
                + (f" (of {package})" if package else "")
                + f": the name must be kind.name, with kind one of {', '.join(KINDS)}"
            )
    return list(dict.fromkeys(found)), wrong


def find(kind: str, name: str) -> Plugin | None:
    """The plugin of that name. Raises OptionError where two packages offer it."""
    hits = {p.value: p for p in find_plugins()[0] if (p.kind, p.name) == (kind, name)}
    if len(hits) > 1:
        raise OptionError(
            f"two packages offer the {kind} '{name}'",
            where=f"entry points of {GROUP}",
            why=" and ".join(map(str, hits.values())),
            cure="uninstall one of them",
        )
    return next(iter(hits.values()), None)


def names(kind: str) -> list[str]:
    """Names that plugins offer."""
    return sorted({p.name for p in find_plugins()[0] if p.kind == kind})


def load_rules(namespace: str) -> str:
    """Import the modules that say they have rules for ops of ``namespace``; "" or why some could not be imported."""
    said = []
    for plugin in find_plugins()[0]:
        if plugin.kind == "rule" and plugin.name == namespace:
            try:
                importlib.import_module(plugin.value.partition(":")[0])
            except Exception as error:  # whatever its code does: the op then simply has no rule
                said.append(f"plugin {plugin} cannot be imported: {error}")
    return "; ".join(said)


def problems(built_in: Sequence[tuple[str, str]] = ()) -> Iterator[str]:
    """Everything that is wrong with the installed plugins, each tried: for ``fxprune doctor``.

    built_in   (kind, name) of what cannot be taken over
    """
    found, wrong = find_plugins()
    yield from wrong
    owners: dict[tuple[str, str], Plugin] = {}
    for plugin in found:
        key = (plugin.kind, plugin.name)
        if key in built_in:
            yield f"{plugin}: fxprune has a {plugin.kind} of this name, which is the one that is used"
        elif plugin.kind != "rule" and key in owners:
            yield f"{plugin}: {owners[key].package or owners[key].value} offers the same name"
        owners.setdefault(key, plugin)
        module, _, attribute = plugin.value.partition(":")
        try:
            loaded = importlib.import_module(module)
            if attribute and not hasattr(loaded, attribute):
                yield f"{plugin}: the module has no '{attribute}'"
        except Exception as error:
            yield f"{plugin}: cannot be imported: {error}"
