"""What a fresh process does with a folder that came home: load it with the class, run it, generate.

    python fresh.py FOLDER WORK

Nothing of fxprune is imported. ``WORK/ask.json`` says what to do, ``inputs.safetensors`` holds the inputs; the outputs
go to ``outputs.safetensors`` and words to ``told.json``.
"""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TOKENS = 8
CLOSE = 1e-5
"""Largest difference of embeddings, relative to the largest number in them."""
TIE = 1e-3
"""Two tokens whose logits differ by no more than this share of the largest one are as good as each other."""


def prove(folder: str, work: Path) -> None:
    """Load the folder, run it on all inputs, generate with and without a cache; write what came out."""
    asked = json.loads((work / "ask.json").read_text(encoding="utf-8"))
    for script in asked["prepare"]:
        runpy.run_path(script)["survive_torchvision"]()
    import torch
    from safetensors.torch import load_file, save_file

    model = _whole(folder, asked).eval()
    for part in (model.config, *vars(model.config).values()):  # a cache is an output that the graph has not
        if getattr(part, "use_cache", None):
            part.use_cache = False
    given, made = load_file(work / "inputs.safetensors"), {}
    runs = [
        {name: given[f"{number}.{name}"] for name in asked["inputs"] if f"{number}.{name}" in given}
        for number in range(asked["runs"])
    ]
    with torch.no_grad():
        for number, inputs in enumerate(runs):
            found = torch.utils._pytree.tree_leaves(model(**inputs))
            for place, value in enumerate(t for t in found if isinstance(t, torch.Tensor)):
                made[f"{number}.{place}"] = value.detach().clone().contiguous()
    save_file(made, work / "outputs.safetensors")
    told: dict[str, Any] = {"generate": generate(model, runs[0])}
    told["encode"] = encode(folder, asked["dense"], model, runs[0]) if asked.get("pooling") else ""
    told["alone"] = not any(m.startswith("fxprune") for m in sys.modules)
    (work / "told.json").write_text(json.dumps(told), encoding="utf-8")


def _whole(folder: str, asked: dict[str, Any]) -> Any:
    """The model, with what modules.json puts behind it where the pruned graph holds that too."""
    if not asked.get("pooling"):
        return _load(folder, asked)
    read = runpy.run_path(asked["pooling"])["read_encoder"]
    return read(Path(folder), lambda inside: _load(str(inside), asked))


def _load(folder: str, asked: dict[str, Any]) -> Any:
    import torch
    import transformers
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    if asked["auto"]:
        return getattr(transformers, asked["auto"]).from_pretrained(
            folder, trust_remote_code=True, local_files_only=True, dtype=torch.float32
        )
    cls: Any = get_class_from_dynamic_module(asked["class"], folder, local_files_only=True)
    return cls.from_pretrained(folder, local_files_only=True, dtype=torch.float32)


def generate(model: Any, inputs: Mapping[str, Any]) -> str:
    """``equal`` where greedy decoding with and without a cache gives the same tokens, ``no`` where the class does not
    generate; else what is wrong."""
    can = getattr(model, "can_generate", None)
    if can is None or not can():
        return "no"
    given = {name: value for name, value in inputs.items() if not name.startswith("decoder_")}
    how = {
        "max_new_tokens": TOKENS,
        "do_sample": False,
        "num_beams": 1,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    try:
        one, two = (model.generate(**given, **how, use_cache=cache) for cache in (True, False))
    except Exception as error:  # whatever the class says
        return f"failed: {type(error).__name__}: {error}"[:400]
    for step, (a, b) in enumerate(zip(one.logits, two.logits, strict=False)):
        first, second = a.argmax(-1), b.argmax(-1)
        for row in (first != second).nonzero().flatten().tolist():
            gap = (b[row, first[row]] - b[row, second[row]]).abs()
            if gap > TIE * b[row].abs().max():
                return f"differs: token {step + 1} of row {row} with a cache is not the one without"
        if bool((first != second).any()):
            break  # equally good tokens: the texts part here
    return "equal"


def encode(folder: str, dense: str, model: Any, inputs: Mapping[str, Any]) -> str:
    """``equal`` where sentence-transformers makes of the folder what ``model`` computes, ``not compared: why`` where it
    is not installed or loads the ``dense`` folder neither; else what is wrong."""
    import torch

    try:
        from sentence_transformers import SentenceTransformer
    except Exception as error:  # whatever its packages say
        return f"not compared: {type(error).__name__}: {error}"[:400]
    try:
        other = SentenceTransformer(folder, trust_remote_code=True, local_files_only=True, device="cpu")
    except Exception as error:  # whatever the library says
        said = f"{type(error).__name__}: {error}"[:400]
        try:
            SentenceTransformer(dense, local_files_only=True, device="cpu")
        except Exception:
            return f"not compared: {said}"
        return f"differs: it loads the dense folder and not this one ({said})"
    given = {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}
    with torch.no_grad():
        want = model(**given)["sentence_embedding"]
        got = other.float()(dict(given))["sentence_embedding"]
    gap = float((got - want).abs().max() / want.abs().max().clamp(min=1e-12)) if got.shape == want.shape else 1.0
    return "equal" if gap <= CLOSE else f"differs: by {gap:.1e}, relative"


if __name__ == "__main__":
    prove(sys.argv[1], Path(sys.argv[2]))
