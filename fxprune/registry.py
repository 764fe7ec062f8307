"""Names -> where they live, imported when asked for. Passes, criteria, searches, reducers, backends and kinds; a line
each.

A package of yours adds to them through an entry point, see :mod:`fxprune.plugins` and ``fxprune help plugins``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
from dataclasses import dataclass
from typing import Any

from . import plugins
from .errors import InternalError, OptionError, find_package, nearest
from .ir.pipeline import Pass
from .ir.spec import build, parse
from .target.backend import Backend

Table = dict[str, str]

BACKENDS: Table = {
    "eager": "fxprune.backends.eager.backend:EagerBackend",
    "onnx": "fxprune.backends.onnx.backend:OnnxBackend",
    "triton": "fxprune.backends.triton.backend:TritonBackend",
    "inductor": "fxprune.backends.inductor.backend:InductorBackend",
    "hf": "fxprune.backends.hf.backend:HfBackend",
    "trt": "fxprune.backends.tensorrt.backend:TensorRTBackend",
}
CRITERIA: Table = {
    "l1": "fxprune.passes.analysis.importance.l1:L1",
    "l2": "fxprune.passes.analysis.importance.l2:L2",
    "activation": "fxprune.passes.analysis.importance.activation:Activation",
    "taylor": "fxprune.passes.analysis.importance.taylor:Taylor",
    "fisher": "fxprune.passes.analysis.importance.fisher:Fisher",
    "trajectory": "fxprune.passes.analysis.importance.trajectory:Trajectory",
    "obs": "fxprune.passes.analysis.importance.obs:Obs",
    "random": "fxprune.passes.analysis.importance.random:Random",
    # of experts
    "reap": "fxprune.passes.analysis.importance.reap:Reap",
    # of layers
    "block-influence": "fxprune.passes.analysis.importance.block_influence:BlockInfluence",
    "finercut": "fxprune.passes.analysis.importance.finercut:FinerCut",
    # of tiles
    "lsp": "fxprune.passes.analysis.importance.lsp:Lsp",
    "wanda": "fxprune.passes.analysis.importance.wanda:Wanda",
    "obert": "fxprune.passes.analysis.importance.obert:Obert",
    "magnitude": "fxprune.passes.analysis.importance.tile_magnitude:TileMagnitude",
}
REDUCERS: Table = {
    "tome": "fxprune.passes.transform.reducers.tome:Tome",
    "prune": "fxprune.passes.transform.reducers.prune:Prune",
    "ppt": "fxprune.passes.transform.reducers.ppt:Ppt",
    "zero-tprune": "fxprune.passes.transform.reducers.zero_tprune:ZeroTprune",
    "transform": "fxprune.passes.transform.reducers.transform:Transforming",
    "random": "fxprune.passes.transform.reducers.random:Random",
}
SEARCHES: Table = {
    "two-class": "fxprune.passes.search.two_class:two_class",
    "lagrangian": "fxprune.passes.search.lagrangian:lagrangian",
    "dynamic": "fxprune.passes.search.dynamic:dynamic",
    "exhaustive": "fxprune.passes.search.exhaustive:exhaustive",
}
PASSES: Table = {
    "propagate-axes": "fxprune.passes.analysis.propagate_axes:PropagateAxes",
    "find-token-sites": "fxprune.passes.analysis.find_token_sites:FindTokenSites",
    "find-groups": "fxprune.passes.analysis.find_groups:FindGroups",
    "score-groups": "fxprune.passes.analysis.score_groups:ScoreGroups",
    "measure-rungs": "fxprune.passes.analysis.measure_rungs:MeasureRungs",
    "refine-scores": "fxprune.passes.analysis.refine_scores:RefineScores",
    "rank-within": "fxprune.passes.analysis.rank_within:RankWithin",
    "find-blocks": "fxprune.passes.analysis.find_blocks:FindBlocks",
    "hold-to-class": "fxprune.backends.hf.hold_to_class:HoldToClass",
    "start-round": "fxprune.passes.analysis.start_round:StartRound",
    "join-rounds": "fxprune.passes.transform.join_rounds:JoinRounds",
    "choose-layers": "fxprune.passes.search.choose_layers:ChooseLayers",
    "plan-tokens": "fxprune.passes.search.plan_tokens:PlanTokens",
    "keep-counts": "fxprune.passes.search.keep_counts:KeepCounts",
    "read-plan": "fxprune.passes.search.read_plan:ReadPlan",
    "search-blocks": "fxprune.passes.search.search_blocks:SearchBlocks",
    "permute-channels": "fxprune.passes.transform.permute_channels:PermuteChannels",
    "recover-blocks": "fxprune.passes.transform.recover_blocks:RecoverBlocks",
    "sparsify-blocks": "fxprune.passes.transform.sparsify_blocks:SparsifyBlocks",
    "search-plan": "fxprune.passes.search.search_plan:SearchPlan",
    "rearrange": "fxprune.passes.search.rearrange:Rearrange",
    "recover": "fxprune.passes.transform.recover:Recover",
    "merge-tokens": "fxprune.passes.transform.merge_tokens:MergeTokens",
    "spell-out-tokens": "fxprune.passes.transform.spell_out_tokens:SpellOutTokens",
    "rotate-width": "fxprune.passes.transform.rotate_width:RotateWidth",
    "slice-axes": "fxprune.passes.transform.slice_axes:SliceAxes",
    "fuse-norms": "fxprune.passes.transform.fuse_norms:FuseNorms",
    "clean": "fxprune.passes.transform.clean:Clean",
    "drop-masks": "fxprune.passes.transform.drop_masks:DropMasks",
    "inline": "fxprune.passes.transform.inline:Inline",
    "unshare": "fxprune.passes.transform.unshare:Unshare",
    "fold-weights": "fxprune.passes.transform.fold_weights:FoldWeights",
    "cast-floats": "fxprune.passes.transform.cast_floats:CastFloats",
    "fold-indices": "fxprune.passes.transform.fold_indices:FoldIndices",
    "unfuse": "fxprune.passes.transform.unfuse:Unfuse",
    "align-heads": "fxprune.passes.transform.align_heads:AlignHeads",
}
KINDS: Table = {
    **dict.fromkeys(
        ("head", "kv", "query", "qk", "v", "qkv", "ffn", "channel", "width", "expert", "other"),
        "find-groups slice-axes",
    ),
    **dict.fromkeys(
        ("attention", "mlp", "layer"),
        "fxprune.passes.analysis.find_layers:FindLayers fxprune.passes.transform.drop_layers:DropLayers",
    ),
    "token": "find-token-sites merge-tokens",
    "block": "find-blocks sparsify-blocks",
}
"""Kind of thing that a search can choose -> the pass that finds it and the one that carries its choice out: names of
passes, or ``module:Class``."""
TABLES = {
    "backend": BACKENDS,
    "criterion": CRITERIA,
    "reducer": REDUCERS,
    "search": SEARCHES,
    "pass": PASSES,
    "kind": KINDS,
}
_WORDS = {
    "backend": ("target", "--target"),
    "kind": ("kind of group", "--prune"),
    "criterion": ("criterion", "--importance"),
    "pass": ("pass", "--pipeline"),
    "reducer": ("token reducer", "--tokens"),
    "search": ("search", "--search"),
}


def names(kind: str) -> list[str]:
    """Every known name of a sort (``backend``, ``criterion``, ``reducer``, ``search``, ``pass``, ``kind``), plugins
    included."""
    return sorted({*TABLES[kind], *plugins.names(kind)})


def lookup(kind: str, name: str) -> Any:
    """The class or function behind ``name``; plugins are asked where fxprune has none. Raises OptionError with the
    nearest name when nobody has, and says which plugin is broken."""
    if name in TABLES[kind] and kind != "kind":
        return _import_built_in(kind, name, TABLES[kind][name])
    plugin = plugins.find(kind, name)
    if plugin is not None:
        return _of_plugin(kind, name, plugin)
    found = _pass_of_a_kind(name) if kind == "pass" else None
    if found is not None:
        return found
    noun, option = _WORDS[kind]
    wrong = plugins.find_plugins()[1]
    raise OptionError(
        f"unknown {noun} '{name}'",
        where=option,
        cure=nearest(name, names(kind)),
        why=f"and a plugin cannot be understood: {wrong[0]}" if wrong else "",
    )


def _import_built_in(kind: str, name: str, path: str) -> Any:
    module, _, attribute = path.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        if (getattr(error, "name", None) or "fxprune").startswith("fxprune"):
            raise InternalError(f"{kind} '{name}' should be at {path}: {error}") from error
        raise OptionError(
            f"the {kind} '{name}' cannot be imported",
            where=path,
            why=str(error),
            cure="install what it needs (`fxprune doctor` lists it)",
        ) from error


def _of_plugin(kind: str, name: str, plugin: plugins.Plugin) -> Any:
    module, _, attribute = plugin.value.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in filter(None, attribute.split(".")):
            found = getattr(found, part)
    except Exception as error:  # whatever the plugin's own code raises when it is imported
        raise OptionError(
            f"the {kind} '{name}' cannot be imported",
            where=str(plugin),
            why=f"{type(error).__name__}: {error}",
            cure="install what it needs, or remove the plugin",
        ) from error
    return _name_plugin(found, kind, name, plugin)


def _name_plugin(found: Any, kind: str, name: str, plugin: plugins.Plugin) -> Any:
    """What a plugin brought under the name of its entry point, whatever its class is called: reports name it so, and
    their pipelines ask for it by that name. Raises OptionError where the class itself states another one."""
    if kind not in ("pass", "criterion", "reducer") or not isinstance(found, type) or not find_package(found):
        return found
    stated = getattr(found, "name", "")
    if not stated:
        found.name = name  # type: ignore[attr-defined]
    elif stated != name:
        raise OptionError(
            f"the {kind} '{name}' calls itself '{stated}'",
            where=str(plugin),
            why="reports would name what nobody finds",
            cure=f'write name = "{name}" in its class, or name the entry point {kind}.{stated}',
        )
    return found


@dataclass(frozen=True)
class KindPasses:
    """What a kind is made of.

    find    puts what there is of it among the program's groups (``find-token-sites``: into its token flow)
    apply   carries out what the plan says of it
    """

    find: type[Pass]
    apply: type[Pass]


def kind(name: str) -> KindPasses:
    """The passes of a kind of thing that a search can choose. Raises OptionError with the nearest name."""
    if name in KINDS:
        find, apply = (
            _import_built_in("kind", name, part) if ":" in part else lookup("pass", part)
            for part in KINDS[name].split()
        )
    else:
        found = lookup("kind", name)
        find, apply = found if isinstance(found, tuple) and len(found) == 2 else (None, None)
    if not all(isinstance(one, type) and issubclass(one, Pass) for one in (find, apply)):
        raise OptionError(
            f"'{name}' is not a kind",
            where=f"--prune {name}",
            why="a kind is two passes: (the one that finds, the one that applies)",
        )
    return KindPasses(find, apply)


def brings_passes(kind: str) -> bool:
    """Whether the passes of a kind come with it: of a plugin's, and of one whose line in ``KINDS`` says where they are.
    True also for a word that is none: :func:`kind` says so."""
    return ":" in KINDS.get(kind, ":")


def load_kinds() -> list[KindPasses]:
    """What the kinds that bring their passes are made of; one that is broken is in nobody else's way."""
    found = []
    for name in (*filter(brings_passes, KINDS), *plugins.names("kind")):
        with contextlib.suppress(OptionError):
            found.append(kind(name))
    return found


def _pass_of_a_kind(slug: str) -> type[Pass] | None:
    """The pass of that name that comes with a kind."""
    return next((p for one in load_kinds() for p in (one.find, one.apply) if p.slug() == slug), None)


def backend(name: str, **options: Any) -> Backend:
    """The backend called ``name`` with its options. Raises OptionError on an unknown name or option."""
    cls = _backend_class(name)
    known = [f.name for f in dataclasses.fields(cls) if f.repr]  # the others are what a run knows of its source
    for option in options:
        if option not in known:
            raise OptionError(
                f"the target '{name}' has no option '{option}'",
                cure=nearest(option, known) if known else "it has no options",
            )
    return cls(**options)


def _backend_class(name: str) -> type[Backend]:
    cls: Any = lookup("backend", name)
    if not (isinstance(cls, type) and issubclass(cls, Backend) and dataclasses.is_dataclass(cls)):
        raise OptionError(
            f"'{name}' is not a backend",
            where=f"--target {name}",
            why=f"{cls!r} is not a dataclass derived from fxprune.Backend",
        )
    found: type[Backend] = cls
    return found


def reducer(text: str, where: str = "--tokens") -> Any:
    """The token reducer that ``tome{option=value}`` names. Raises OptionError with the nearest name."""
    name, given = parse(text, where)
    return build(lookup("reducer", name), given, f"token reducer '{name}'", where)


def target(text: str, **more: Any) -> Backend:
    """The backend of ``--target``: a name, with options as ``trt{dtype=fp16}``; ``more`` options are set on top.

    Raises OptionError on an unknown name or option, or a value of another type.
    """
    name, options = parse(text, "--target")
    made = build(_backend_class(name), options, f"the target '{name}'", "--target")
    chosen = {f.name: getattr(made, f.name) for f in dataclasses.fields(made) if f.repr}
    return backend(name, **{**chosen, **more})
