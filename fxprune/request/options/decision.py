"""What is decided on, by what, and what a search may not cross."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ...ir.group import Kind
from ..limits import Align, Floor, per_pattern, whole
from .table import DECIDING, REQUIRED, SEARCHING, Titles, make_list_parser, number_or_word, option, whole_or_auto

_MULTIPLES = "neurons and channels in multiples of N (default: 8); '*.ffn=32' for some of them; may be repeated"
_FXPRUNE_COMPILE = "torch.compile prunes heads, neurons and channels; fxprune.compile also tokens and tiles"
_OF_IT = "samples of it (default: {default})"
_A_PLAN = "what `fxprune plan` wrote"

if TYPE_CHECKING:
    from ...passes.analysis.find_groups import FindGroups


@dataclass(frozen=True)
class Decision:
    """What is decided on, by what, and how what stays is repaired."""

    TITLES: ClassVar[Titles] = {
        "": "decision",
        "sensitivity": "sensitivity",
        "lower": "data",
        "export": "recovery",
        "verify": "",
        "apply": "artefact",
        "demo": "",
    }

    data: Any = option(
        None,
        "DATA",
        "calibration data: .npz, .pt or .safetensors of tensors, an image folder, .csv/.jsonl/.txt text, or "
        "python:module:function; labels optional",
        "compile plan",
        at={
            "dynamo": {
                "help": "calibration data of the whole model, not of a part behind a graph break; without any, the "
                "inputs of the first call are used, with a warning"
            },
            "sweep": {"default": REQUIRED, "unsaid": None},
            "sensitivity": {"default": REQUIRED, "help": "as in compile; labels are not used"},
            "export": {"help": "calibration data for it"},
            "lower": {
                "help": "calibration data, for targets that look at it: 'trt{dtype=fp16}' checks that float16 holds "
                "every value on it"
            },
            "verify": {
                "help": "the data that the delivery was judged by, where it does not carry all of it: .npz, .pt or "
                ".safetensors of tensors, or python:module:function"
            },
        },
    )
    samples: int | str = option(
        "auto",
        "N|auto",
        "samples of it; auto: 1024, or as many of 128 and more as a pass over them costs little (default: {default})",
        f"{SEARCHING} lower",
        parse=whole_or_auto,
        at={
            "dynamo": {"default": 128, "metavar": "N", "help": _OF_IT, "parse": int},
            "lower": {"default": 128, "metavar": "N", "help": _OF_IT, "parse": int},
            "sensitivity": {"default": 64, "metavar": "N", "help": _OF_IT, "parse": int},
            "export": {"default": 256, "title": "gates", "metavar": "N", "help": _OF_IT, "parse": int},
        },
    )
    memory: float | str | None = option(
        None,
        "N",
        "what caches of calibration may take together, such as 8GiB; recovery sees what fits",
        f"{SEARCHING} sensitivity",
    )
    shares: tuple[float, ...] = option(
        (0.75, 0.5, 0.25),
        "S,S",
        "what is kept (default: {default})",
        "sensitivity",
        parse=make_list_parser("shares", "shares", "0.75,0.5,0.25", float, -float("inf")),
    )
    importance: str | None = option(
        None,
        "NAME",
        "trajectory, fisher, taylor, obs, activation, l1, l2 or random, also with options: 'trajectory{mode=exact}' "
        "(default: trajectory with data, l2 without)",
        SEARCHING,
        in_passes=True,
        at={
            "sensitivity": {
                "default": "trajectory",
                "help": "criterion that says which elements stay (default: {default})",
            },
            "dynamo": {"help": "a criterion of groups, also with options (default: trajectory)"},
        },
    )
    rounds: int = option(
        1, "N", "score, cut a part, score again, N times (default: {default})", SEARCHING, in_passes=True, parse=int
    )
    head_scale: float | str = option(
        1,
        "X|auto",
        "factor on what heads are worth against neurons; auto tries a few (default: {default})",
        SEARCHING,
        in_passes=True,
        parse=number_or_word,
    )
    members: str = option(
        "auto",
        "HOW",
        "which neurons stay, once it is known how many: by their scores, by obs, or auto: obs when there is recovery, "
        "and for channels whichever is nearer to dense once it is repaired",
        SEARCHING,
        in_passes=True,
    )
    rearrange: int = option(
        0,
        "N",
        "rounds of choosing members again by what they do together; needs --importance fisher (default: none)",
        SEARCHING,
        in_passes=True,
        parse=int,
    )
    prune: str | Sequence[str | Kind] | None = option(
        None,
        "KINDS",
        "kinds to prune: heads, ffn, channels, qk, v, width, layers, tokens, blocks (default: heads,ffn,channels; with "
        "--data also qk,v,width where these are found to help)",
        SEARCHING,
        in_passes=True,
        at={door: {"help": "kinds (default: heads,ffn,channels)"} for door in ("sensitivity", "dynamo", "plan")},
    )
    search: str = option(
        "auto",
        "NAME",
        "two-class, dynamic, lagrangian or exhaustive (default: {default}, the first that is exact)",
        SEARCHING,
        in_passes=True,
    )
    pipeline: str | None = option(
        None,
        "PASSES",
        "the passes themselves, as report.json states them, in place of the options that decide: "
        "'propagate-axes,find-groups,score-groups{criterion=l2},search-plan{budget=flops=0.5}'",
        "compile plan",
        at={
            "sweep": {"refused": "a pipeline states the passes of one ratio"},
            "dynamo": {"refused": "a pipeline states the passes of one graph"},
        },
    )
    tokens: str | None = option(
        None,
        "HOW",
        "how image tokens become fewer: tome, prune, ppt, zero-tprune, transform or random, as the budget asks, or "
        "tome:r=13, ppt:r=50@3,6,9; with options as 'tome{schedule=constant}'; off (default: off, tome with --prune "
        "tokens)",
        DECIDING,
        in_passes=True,
        at={"dynamo": {"refused": _FXPRUNE_COMPILE}},
    )
    unmerge: bool = option(
        False, "", "give every token back where a head or the output needs it", DECIDING, in_passes=True
    )
    blocks: str | None = option(
        None,
        "TILE",
        "zero tiles of so many outputs x inputs inside weights, until --flops is met: 32x32, with options as "
        "'32x32{slice=0.7,allocation=lsp}'; --importance lsp, magnitude, wanda or obert",
        "compile plan",
        in_passes=True,
        at={
            "sweep": {"refused": "how much slicing takes before tiles is another question at every ratio"},
            "dynamo": {"refused": _FXPRUNE_COMPILE},
        },
    )
    sparse: str | None = option(
        None,
        "2:4",
        "zero two of every four inputs, after slicing to the budget",
        "compile plan",
        in_passes=True,
        at={"sweep": {"refused": "2:4 takes the same share at every ratio"}, "dynamo": {"refused": _FXPRUNE_COMPILE}},
    )
    seed: int = option(
        0,
        "N",
        "of all that is random (default: {default})",
        f"{SEARCHING} apply sensitivity",
        parse=int,
        at={
            "export": {"title": "gates", "help": "of which samples (default: {default})"},
            "demo": {"help": "of split, training and search (default: {default})"},
        },
    )
    held_out: float | None = option(
        None,
        "SHARE",
        "share of --data that nothing is decided or fitted on, as a sweep holds it back: the report compares on it "
        "(default: a fifth where --samples are 160 or more and --data holds no others; 0: none)",
        "compile plan",
        title="",
        parse=float,
    )
    plan: Any = option(
        None,
        "FILE",
        "apply this plan.json instead of searching one; with --pipeline: what its read-plan takes",
        "compile",
        title="",
        at={
            "apply": {"default": REQUIRED, "help": _A_PLAN},
            "export": {"default": REQUIRED, "help": _A_PLAN},
            "dynamo": {"help": "apply this plan, or the file it lies in, and search nothing: no data is read"},
        },
    )
    recover: str | None = option(
        None,
        "HOW",
        "fit what stays to the dense model on the data: auto, ridge, refit, bias, scale, tune or none (default: auto "
        "with data, none without)",
        "compile dynamo",
        title="",
        in_passes=True,
        at={
            "sweep": {"help": "as in compile (default: auto)"},
            "export": {
                "title": "recovery",
                "help": "fit what stays, as `fxprune compile` does (default: auto with --data, else none)",
            },
        },
    )


@dataclass(frozen=True)
class Limits:
    """What a search may not cross, see :func:`fxprune.compile`.

    align    a number, or ``PATTERN=N``, or several of both; None, or no plain number: the target's choice
    floor    a share, or ``PATTERN=SHARE``, or several of both
    freeze   globs of parameters or groups that keep their size

    A pattern is a glob of a group's name or of a module above it, or a kind (see ``FindGroups``).
    """

    TITLES: ClassVar[Titles] = {"": "limits", "apply": ""}

    align: Align = option(
        None,
        "N|PATTERN=N",
        "neurons and channels in multiples of N (default: 8); auto: what the target is measured to like; '*.ffn=32' "
        "for some of them; may be repeated",
        DECIDING,
        repeated=True,
        in_passes=True,
        at={
            "apply": {"default": 1, "help": "refuse counts that are no multiples (default: every count goes)"},
            "inspect": {"help": _MULTIPLES},
            "sensitivity": {"help": _MULTIPLES},
            "dynamo": {"help": _MULTIPLES},
        },
    )
    floor: Floor = option(
        None,
        "SHARE|PATTERN=SHARE",
        "smallest share of neurons or channels that stays per layer (default: 0.1, and less where the budget is out of "
        "reach otherwise); 'blocks.*.mlp=0.3' or heads=0.5 for some; may be repeated",
        f"{SEARCHING} inspect sensitivity",
        repeated=True,
        in_passes=True,
    )
    allow_empty: bool = option(
        False, "", "no floors: whole branches may go", f"{SEARCHING} inspect sensitivity", in_passes=True
    )
    freeze: Sequence[str] = option(
        (),
        "GLOB",
        "parameters or groups to leave alone, e.g. 'blocks.0.*'; may be repeated",
        f"{SEARCHING} inspect sensitivity",
        repeated=True,
        in_passes=True,
    )

    def find_groups(self, granularity: int, whole_steps: bool = False) -> FindGroups:
        """The pass that knows them; with ``whole_steps`` no search takes finer ones. Raises OptionError for values out
        of range."""
        from ...passes.analysis.find_groups import ALIGN, FindGroups

        align, aligns = per_pattern(self.align, "--align")
        floor, floors = per_pattern(self.floor, "--floor")
        usual = None if granularity == ALIGN and not whole_steps else granularity
        return FindGroups(
            align=usual if align is None else whole(align, "--align"),
            floor=floor,
            allow_empty=self.allow_empty,
            freeze=(self.freeze,) if isinstance(self.freeze, str) else tuple(self.freeze),
            aligns=aligns,
            floors=floors,
        )
