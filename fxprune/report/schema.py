"""The schema of ``report.json``, as JSON Schema (draft 2020-12). ``fxprune report --schema`` prints it."""

from __future__ import annotations

from typing import Any

from .entries import VERSION
from .scores import ENCODING


def _object(about: str, required: str = "", more: Any = True, **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "description": about,
        "required": required.split(),
        "properties": properties,
        "additionalProperties": more,
    }


def _list(about: str, items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "description": about, "items": items}


def _one(kind: str | list[str], about: str, **more: Any) -> dict[str, Any]:
    return {"type": kind, "description": about, **more}


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    return {**schema, "type": [schema["type"], "null"]}


_COUNT = {"type": "integer", "minimum": 0}
_NUMBER = {"type": "number"}
_TEXT = {"type": "string"}
_COST = _object(
    "flops in multiply-accumulates of one sample, parameters, bytes of parameters and buffers",
    "flops params bytes",
    flops=_COUNT,
    params=_COUNT,
    bytes=_COUNT,
)
_MEMORY = _object("bytes", "weights activations", weights=_COUNT, activations=_COUNT)
_PARITY = _object(
    "the target's file against the pruned graph, run at several sizes",
    "max_abs max_rel tolerance ok tried",
    max_abs=_NUMBER,
    max_rel=_NUMBER,
    tolerance=_NUMBER,
    ok={"type": "boolean"},
    tried={"type": "array"},
    skipped={"type": "array"},
    unsteady=_COUNT,
    rounded=_one("number", "a difference beyond the tolerance that is rounding: the pruned graph is as far from fp64"),
    runtime=_one("string", "what ran the file"),
    constant={"type": "array", "items": _TEXT, "description": "outputs that were the same for every input"},
    versions=_object("package -> version, when it was lowered", more=_TEXT),
)
_FIGURES = _object(
    "the outputs after a step against the dense ones",
    "after",
    after=_TEXT,
    top1=_one("number", "share with the dense model's largest logit"),
    kl=_one("number", "mean KL(dense || this) of class probabilities, nats"),
    cosine=_one("number", "mean cosine between the outputs of both"),
    relational=_one("number", "Spearman correlation of how similar samples are, dense against this"),
    accuracy=_one("number", "share of samples whose largest logit is their label"),
)
_GROUP = _object(
    "one thing that a search could choose: a group of the dense model, a part of its graph, the tokens behind an "
    "attention, the tiles of a weight",
    "group kind size kept granularity floor macs params parameters criterion unit comparable scores order",
    group=_TEXT,
    kind=_TEXT,
    searched=_one("boolean", "whether the search might cut groups of this kind"),
    size=_COUNT,
    kept=_COUNT,
    granularity=_one("integer", "kept counts are multiples of it, or the size", minimum=1),
    floor=_one("integer", "the smallest count the search might choose", minimum=0),
    exact=_one("boolean", "cutting equals masking"),
    macs=_one(["integer", "null"], "multiply-accumulates of one element; null where they are not known", minimum=0),
    params=_one("integer", "parameters of one element"),
    parameters=_list("what it reaches", _TEXT),
    criterion=_one(["string", "null"], "that scored it"),
    unit=_one(["string", "null"], "of one unit of score"),
    comparable=_one("boolean", "scores of different groups share the unit"),
    scores=_one(["string", "null"], f"[size], {ENCODING}; null without scores"),
    order=_one(["string", "null"], f"[size] elements, the last to be removed first, {ENCODING}; null: by score"),
    curve=_one(
        ["string", "null"],
        f"[size + 1] what the k first of the order are worth together, {ENCODING}; null: the sum of their scores",
    ),
    protected=_one("integer", "tokens in front that stay, and are not counted", minimum=0),
    removed=_one("integer", "tokens that go at this attention", minimum=0),
    pattern=_one("string", "of tiles"),
    shape=_list("outputs and inputs of the weight", _COUNT),
    density=_one("number", "share of its entries that are in tiles that stay"),
)
_NUMBER_OR_NULL = {"type": ["number", "null"]}
_LATENCY = _object(
    "predicted and measured latency, where the budget was one, or a table was at hand",
    "",
    predicted_ms=_NUMBER,
    achieved_ms=_one(["number", "null"], "of the plan, before recovery"),
    dense_ms=_NUMBER,
    delivered=_object(
        "the delivered file, after recovery",
        "achieved_ms ratio error rounds met",
        achieved_ms=_NUMBER,
        ratio=_NUMBER,
        error=_NUMBER,
        rounds=_COUNT,
        met=_one(["boolean", "null"], "within 5 % of the budget; null without one"),
    ),
    layers=_list("per layer, with its own figures", {"type": "object"}),
    tokens=_or_null(
        _object(
            "what fewer tokens do beside the products that layers tell of",
            "ops_ms between_ms follow",
            ops_ms=_object("site -> milliseconds that its reducing op takes", more=_NUMBER),
            between_ms=_one("number", "what goes with tokens between products, against dense"),
            follow=_one("number", "share of the products' time that goes with the rows"),
        )
    ),
)
_MEASURED = _object(
    "latency of the target's file beside the dense model's, lowered in the same way and timed in turns",
    "target device versions date rows why",
    target=_TEXT,
    device=_TEXT,
    date=_TEXT,
    versions=_object("package -> version", more=_TEXT),
    why=_one(["string", "null"], "why nothing was measured, or no dense figure"),
    rows=_list(
        "by batch size and threads; dense figures are null where no dense model was at hand",
        _object(
            "milliseconds of one call, medians",
            "batch threads dense_ms compressed_ms ratio error speedup realised rounds by",
            batch=_one("integer", "samples per call", minimum=1),
            threads=_one("integer", "CPU threads; 0: the runtime's own choice", minimum=0),
            dense_ms=_NUMBER_OR_NULL,
            compressed_ms=_NUMBER,
            ratio=_one(["number", "null"], "compressed over dense, median of the rounds' own ratios"),
            error=_one(["number", "null"], "standard error of the ratio"),
            speedup=_NUMBER_OR_NULL,
            realised=_one(["number", "null"], "speed-up over dense MACs / compressed MACs"),
            rounds=_COUNT,
            by=_one("string", "the command that measured it"),
        ),
    ),
)

REPORT: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "report.json of an fxprune artefact",
    **_object(
        "what was done to a model, what the result costs, and how exact it is",
        "fxprune_report name target versions seed budget pipeline passes cost inputs outputs pruned frozen notes "
        "parity payload files",
        fxprune_report=_one("integer", "version of this format", const=VERSION),
        name=_TEXT,
        target=_TEXT,
        versions=_object("package -> version", more=_TEXT),
        seed=_one("integer", "of everything random"),
        budget=_or_null(
            _object(
                "what was asked for",
                "metric amount relative",
                metric=_TEXT,
                amount=_NUMBER,
                relative={"type": "boolean"},
            )
        ),
        pipeline=_one("string", "text that replays the passes"),
        passes=_list(
            "what each pass changed, measured",
            _object(
                "nodes and tensors",
                "name text seconds added removed edited resized",
                name=_TEXT,
                text=_TEXT,
                seconds=_NUMBER,
                added=_COUNT,
                removed=_COUNT,
                edited=_COUNT,
                resized=_COUNT,
            ),
        ),
        cost=_object(
            "before and after",
            "dense compressed ratio counted",
            dense=_COST,
            compressed=_COST,
            ratio=_object("compressed over dense", more=_NUMBER),
            counted=_TEXT,
        ),
        inputs=_list(
            "of the program", _object("a tensor", "name dtype shape", name=_TEXT, dtype=_TEXT, shape={"type": "array"})
        ),
        outputs=_list("names", _TEXT),
        pruned=_list(
            "what was cut",
            _object("a group", "group kind size kept", group=_TEXT, kind=_TEXT, size=_COUNT, kept=_COUNT),
        ),
        frozen=_list(
            "what must keep its size",
            _object("a group", "group kind size why", group=_TEXT, kind=_TEXT, size=_COUNT, why=_TEXT),
        ),
        gaps=_list(
            "ops that were sliced although something is not known of them",
            _object(
                "an op and what it lacks",
                "op lacks why nodes groups",
                op=_TEXT,
                lacks=_one("string", "recovery, cost or importance"),
                why=_TEXT,
                nodes=_list("of the dense graph", _TEXT),
                groups=_list("that were cut", _TEXT),
            ),
        ),
        notes=_list("what the user should know", _TEXT),
        parity=_or_null(_PARITY),
        payload=_one(["string", "null"], "the target's main file"),
        lowering=_object("what the backend has to say"),
        options=_object("everything that was asked for, by the names of the command line"),
        target_options=_object("options of the target that are not the default"),
        unfinished=_or_null(
            _object(
                "what this machine lacked",
                "missing finish",
                missing=_list("what", _TEXT),
                finish=_one("string", "the command that finishes where it is there"),
            )
        ),
        files=_object(
            "every file but this one", more=_object("", "sha256 size_bytes", sha256=_TEXT, size_bytes=_COUNT)
        ),
        masked=_object("slicing against masking", "max_rel tolerance", max_rel=_NUMBER, tolerance=_NUMBER),
        proof={
            "type": "array",
            "description": "the chain from the user's module to the sliced graph: in each link both forms were run",
            "items": _object(
                "two forms that agree",
                "compared max_rel tolerance tried",
                compared=_TEXT,
                max_rel=_NUMBER,
                tolerance=_NUMBER,
                tried={"type": "array"},
                rounded=_one("number", "a larger difference that is rounding: the model is as far from fp64"),
            ),
        },
        importance=_one(["string", "null"], "the criterion"),
        data=_or_null(
            _object(
                "calibration",
                "origin samples labelled generated",
                origin=_TEXT,
                samples=_COUNT,
                labelled={"type": "boolean"},
                generated={"type": "boolean"},
                held_out=_one("number", "share of the samples that was held back, and is not counted"),
                amount=_one("string", "why so many were asked for, where nobody said how many"),
            )
        ),
        search=_object("how the plan was found"),
        groups=_list("what could be chosen, what of it stayed, and the scores", _GROUP),
        memory=_object(
            "an estimate for one sample", "dense compressed counted", dense=_MEMORY, compressed=_MEMORY, counted=_TEXT
        ),
        agreement=_object(
            "outputs against the dense model's, after every step that changes them",
            "samples held_out origin steps",
            samples=_COUNT,
            held_out=_one("boolean", "nothing was decided or fitted on these samples"),
            origin=_TEXT,
            chance=_one(["number", "null"], "share of the dense model's most frequent answer"),
            dense_accuracy=_one(["number", "null"], "of the dense model, where the data has class labels"),
            steps=_list("in order", _FIGURES),
            cross_fitted=_object(
                "the chosen recovery on samples that its fits had not seen, where no others are held out",
                "samples folds cosine",
                samples=_COUNT,
                folds=_COUNT,
                top1=_NUMBER,
                kl=_NUMBER,
                cosine=_NUMBER,
            ),
        ),
        recovery=_or_null(
            _object(
                "what was fitted, see Recovery in passes/transform/recovery/record.py",
                "method asked steps guard",
                method=_TEXT,
                asked=_TEXT,
                guard=_object("candidates, and what each is worth on held-out samples", more=_object("", more=_NUMBER)),
                rejected=_object("why", more=_TEXT),
                chosen=_one(["string", "null"], "the best"),
                held_out=_COUNT,
                samples=_COUNT,
                steps=_list(
                    "layers",
                    _object(
                        "weighted mean squared error",
                        "parameter before after",
                        parameter=_TEXT,
                        before=_NUMBER,
                        after=_NUMBER,
                    ),
                ),
            )
        ),
        sparsity=_object("zeros inside weights, and what they save"),
        tokens=_object(
            "how tokens become fewer", "reducer", reducer=_one(["string", "null"], "by what"), picture=_TEXT
        ),
        latency=_or_null(_LATENCY),
        measured=_or_null(_MEASURED),
        earlier=_list(
            "other targets that the same program was lowered to before",
            _object(
                "a target as on the command line",
                "target payload parity",
                target=_TEXT,
                payload=_one(["string", "null"], "its main file, which is no longer here"),
                parity=_or_null(_PARITY),
                measured=_or_null(_MEASURED),
            ),
        ),
    ),
}
