"""What comes in, what is written, and what the command line alone has."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from .table import COMMANDS, DECIDING, MODELS, REQUIRED, Titles, names, option

_MODEL = "model.pt, model.pt2, a Hugging Face folder, or timm:NAME"


@dataclass(frozen=True)
class Source:
    """The model, and how it is loaded."""

    TITLES: ClassVar[Titles] = {"": "loading", "lower": "the dense model, to be timed beside the result", "bench": ""}

    model: Any = option(None, "MODEL", _MODEL, MODELS, place="1", title="")
    checkpoint: str | os.PathLike[str] | None = option(
        None,
        "FILE",
        "weights for timm:NAME (.pt, .pth, .safetensors)",
        f"{MODELS} lower",
        at={"bench": {"help": "weights for --against"}},
    )
    model_args: str | Mapping[str, Any] | None = option(
        None,
        "NAME=VALUE,..",
        "how timm:NAME is built (img_size=384,in_chans=1,num_classes=0), or entries of a folder's config.json",
        f"{MODELS} lower",
        at={"lower": {"help": "how --against is built"}, "bench": {"help": "how --against is built"}},
    )
    example_inputs: Any = option(
        None,
        "SHAPE|FILE",
        "example inputs: 1x3x224x224, or a file of tensors",
        MODELS,
        flag="input",
        at={
            "lower": {"help": "example inputs (default: as the artefact's)"},
            "bench": {"help": "example inputs for --against"},
        },
    )
    trust_pickle: bool = option(
        False,
        "",
        "run whatever code the pickle holds: only for files whose author you trust",
        MODELS,
        at={door: {"help": "allow --against to run code from its pickle"} for door in ("lower", "bench")},
    )


@dataclass(frozen=True)
class Screen:
    """What the command line alone has: files of options, and who reads the result."""

    TITLES: ClassVar[Titles] = {"": "output"}

    config: str | None = option(
        None,
        "FILE",
        "options from a TOML file with the same names, or from a report.json (default: fxprune.toml, if it is here)",
        f"{MODELS} bench",
        title="",
        python="",
    )
    json: bool = option(False, "", "print the result as JSON on stdout", COMMANDS, python="")
    quiet: bool = option(
        False, "", "no progress and no tables; warnings and errors stay", COMMANDS, python="", short="q"
    )
    debug: bool = option(False, "", "show the traceback of an error", COMMANDS, python="")


@dataclass(frozen=True)
class Writing:
    """What is written, and where."""

    TITLES: ClassVar[Titles] = dict.fromkeys(("plan", "lower", "export", "report", "tune", "demo", "doctor"), "") | {
        "": "artefact"
    }

    target: str = option(
        "eager",
        "NAME",
        "{targets}, with options as 'trt{dtype=fp16}' (default: {default})",
        f"{DECIDING} apply",
        at={
            "lower": {
                "default": None,
                "help": "{targets}, with options as 'trt{dtype=fp16}' (default: what it was made for)",
            },
            "export": {
                "name": "targets",
                "default": REQUIRED,
                "unsaid": ("onnx",),
                "metavar": "NAME,..",
                "help": "one or more (default: {default})",
                "parse": names,
            },
            "tune": {"default": "triton", "help": "triton or onnx (default: {default})"},
            "doctor": {"default": None, "help": "look at this target alone; exit code 4 when it lacks something"},
        },
    )
    out: str | os.PathLike[str] | None = option(
        None,
        "DIR",
        "where the artefact goes (default: fxprune-out/<model>-<target>)",
        "compile apply",
        at={
            "plan": {"unsaid": "plan.json", "metavar": "FILE", "help": "where to write the plan (default: {default})"},
            "sweep": {"default": REQUIRED, "unsaid": None},
            "lower": {"help": "where the result goes (default: it replaces ARTIFACT)"},
            "export": {"default": REQUIRED, "help": "where the delivery goes, a subfolder per target"},
            "report": {"metavar": "FILE", "help": "write a page (.html) that needs nothing else"},
            "tune": {"metavar": "FILE", "help": "where the table goes (default: kept under the device's name)"},
            "demo": {"default": REQUIRED, "unsaid": "fxprune-out/demo", "help": "where to write (default: {default})"},
        },
    )
    fast: bool = option(
        False,
        "",
        "every check, but neither the timing of the result (as --seconds 0) nor its page, which `fxprune report DIR "
        "--out FILE` draws later",
        "compile apply",
    )
