"""The models fxprune must work on, at their real sizes, with random weights: what works, and how fast.

    python tools/bench/zoo.py [--only 'swin*'] [--stages capture,size] [--out zoo.json] [--seconds 900]

Every model runs in a process of its own, so that a crash or a memory peak does not end the run. A stage is a function
from a :class:`Subject` to columns: write one, add it to ``STAGES``.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from fxprune.passes.transform.clean import Clean
from fxprune.passes.transform.inline import Inline
from zoo import Built, other_inputs, scramble

from fxprune.capture import capture
from fxprune.pipeline import Pipeline
from fxprune.program import Program
from fxprune.quiet import quiet
from fxprune.surroundings import survive_torchvision

TEXT, WORDS = (2, 64), 200  # example batch and length; token ids below WORDS


# ---------------------------------------------------------------- models


def _timm(name: str) -> Built:
    import timm

    model = timm.create_model(name)
    return model, (torch.randn(2, *model.pretrained_cfg["input_size"]),), {}


def _torchvision(name: str) -> Built:
    import torchvision

    return getattr(torchvision.models, name)(), (torch.randn(2, 3, 224, 224),), {}


def _text(model: str, config: str, mask: bool = False, **sizes: Any) -> Built:
    import transformers

    inputs = {"input_ids": torch.randint(5, WORDS, TEXT)}
    if mask:
        inputs["attention_mask"] = torch.ones(TEXT, dtype=torch.long)
    return getattr(transformers, model)(getattr(transformers, config)(**sizes)), (), inputs


def _image(model: str, config: str, size: int = 224, **sizes: Any) -> Built:
    import transformers

    return getattr(transformers, model)(getattr(transformers, config)(**sizes)), (), {
        "pixel_values": torch.randn(2, 3, size, size)}


def _mask2former() -> Built:
    import transformers

    stages = ["stage1", "stage2", "stage3", "stage4"]
    backbone = transformers.SwinConfig(embed_dim=96, depths=[2, 2, 6, 2], num_heads=[3, 6, 12, 24], out_features=stages)
    config = transformers.Mask2FormerConfig(backbone_config=backbone)
    return transformers.Mask2FormerForUniversalSegmentation(config), (), {"pixel_values": torch.randn(2, 3, 256, 256)}


def _clip() -> Built:
    model, _, inputs = _text("CLIPModel", "CLIPConfig", mask=True)
    return model, (), {**inputs, "pixel_values": torch.randn(2, 3, 224, 224)}


def _whisper() -> Built:
    import transformers

    config = transformers.WhisperConfig(d_model=384, encoder_layers=4, encoder_attention_heads=6, encoder_ffn_dim=1536,
                                        decoder_layers=1, decoder_attention_heads=6, decoder_ffn_dim=1536)
    return transformers.WhisperModel(config).get_encoder(), (), {"input_features": torch.randn(2, 80, 3000)}


_DEBERTA = {"vocab_size": 128100, "hidden_size": 768, "num_hidden_layers": 6, "num_attention_heads": 12,
            "intermediate_size": 3072, "relative_attention": True, "position_buckets": 256,
            "norm_rel_ebd": "layer_norm", "share_att_key": True, "pos_att_type": ["p2c", "c2p"], "type_vocab_size": 0}
_SMOLLM = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
           "num_attention_heads": 9, "num_key_value_heads": 3}
_QWEN = {"vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
         "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True}
_MISTRAL = {"hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 8, "num_attention_heads": 16,
            "num_key_value_heads": 4}

MODELS: dict[str, Callable[[], Built]] = {
    **{name: (lambda name=name: _timm(name)) for name in (  # type: ignore[misc]
        "vit_tiny_patch16_224", "vit_small_patch16_224", "vit_base_patch16_224", "deit_small_patch16_224",
        "deit_tiny_distilled_patch16_224", "deit3_small_patch16_224", "beit_base_patch16_224", "eva02_tiny_patch14_224",
        "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "cait_xxs24_224", "pvt_v2_b0", "mobilevit_s",
        "mixer_s16_224", "convnext_tiny", "resnet18", "resnet50", "vgg16_bn", "efficientnet_b0", "maxvit_tiny_rw_224",
        "vit_small_patch14_dinov2",
    )},
    "torchvision vit_b_16": lambda: _torchvision("vit_b_16"),
    "BERT": lambda: _text("BertForSequenceClassification", "BertConfig", mask=True),
    "RoBERTa": lambda: _text("RobertaForSequenceClassification", "RobertaConfig", mask=True),
    "DistilBERT": lambda: _text("DistilBertForSequenceClassification", "DistilBertConfig", mask=True),
    "ELECTRA": lambda: _text("ElectraForSequenceClassification", "ElectraConfig", mask=True),
    "DeBERTa-v2": lambda: _text("DebertaV2ForSequenceClassification", "DebertaV2Config", mask=True, **_DEBERTA),
    "GPT-2": lambda: _text("GPT2LMHeadModel", "GPT2Config"),
    "OPT": lambda: _text("OPTForCausalLM", "OPTConfig"),
    "Llama": lambda: _text("LlamaForCausalLM", "LlamaConfig", **_SMOLLM),
    "Qwen2": lambda: _text("Qwen2ForCausalLM", "Qwen2Config", **_QWEN),
    "Mistral": lambda: _text("MistralForCausalLM", "MistralConfig", **_MISTRAL),
    "ModernBERT": lambda: _text("ModernBertForSequenceClassification", "ModernBertConfig", mask=True),
    "T5 encoder": lambda: _text("T5EncoderModel", "T5Config", mask=True),
    "HF ViT": lambda: _image("ViTForImageClassification", "ViTConfig"),
    "HF Swin": lambda: _image("SwinForImageClassification", "SwinConfig"),
    "SegFormer": lambda: _image("SegformerForSemanticSegmentation", "SegformerConfig", 512),
    "Mask2Former": _mask2former,
    "CLIP": _clip,
    "Whisper encoder": _whisper,
}


# ---------------------------------------------------------------- stages


@dataclass
class Subject:
    """One model on its way: what earlier stages leave for later ones."""

    name: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    program: Program | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def need(self) -> Program:
        if self.program is None:
            raise RuntimeError("the stage 'capture' has to come first")
        return self.program


def capture_stage(subject: Subject) -> dict[str, Any]:
    """Export, clean and inline: nodes, seconds, and which input sizes stayed open."""
    started = time.perf_counter()
    program = capture(subject.module, subject.args, subject.kwargs, name=subject.name)
    captured = time.perf_counter()
    raw = len(program.graph.nodes)
    subject.program = program = Pipeline((Clean(), Inline())).run(program)
    cleaned = time.perf_counter()
    return {"params M": round(sum(p.numel() for p in subject.module.parameters()) / 1e6, 1), "nodes": raw,
            "clean": len(program.graph.nodes), "capture s": round(captured - started, 1),
            "clean s": round(cleaned - captured, 2), "open": open_sizes(program), "notes": list(program.notes)}


def open_sizes(program: Program) -> str:
    """Shapes of the user inputs, open sizes as letters: ``[a, 3, 224, 224]``."""
    letters: dict[str, str] = {}
    shapes = []
    for node in program.placeholders():
        value = node.meta.get("val")
        if node.name in program.user_inputs and isinstance(value, Tensor):
            sizes = [letters.setdefault(str(s), chr(97 + len(letters))) if not str(s).isdigit() else str(s)
                     for s in value.shape]
            shapes.append(f"[{', '.join(sizes)}]")
    return " ".join(dict.fromkeys(shapes))


def size_stage(subject: Subject) -> dict[str, Any]:
    """Error (max difference / max value) against the module at another batch size and length."""
    program = subject.need()
    args, kwargs = other_inputs(subject.args, subject.kwargs, batch=3, length=TEXT[1] - 21)
    with torch.no_grad():
        expected = outputs(subject.module.eval()(*args, **kwargs))
        got = outputs(program.exported.module()(*args, **kwargs))
    largest = [float(a.abs().max()) for a in expected]
    errors = [float((a - b).abs().max()) for a, b in zip(expected, got, strict=False)]
    return {"size err": max(e / (m or 1) for e, m in zip(errors, largest, strict=False)), "largest": max(largest)}


def outputs(value: Any) -> list[Tensor]:
    return [leaf.float() for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


STAGES: dict[str, Callable[[Subject], dict[str, Any]]] = {"capture": capture_stage, "size": size_stage}


# ---------------------------------------------------------------- running


def examine(name: str, stages: list[str]) -> dict[str, Any]:
    """All columns of one model. A stage that fails gives the column ``error`` and ends the row."""
    torch.manual_seed(0)
    survive_torchvision()
    row: dict[str, Any] = {"model": name}
    with quiet():
        module, args, kwargs = MODELS[name]()
        subject = Subject(name, scramble(module).eval(), args, kwargs)
    for stage in stages:
        try:
            with quiet():
                row |= STAGES[stage](subject)
        except Exception as error:  # a row of the table must tell it, whatever it is
            row["error"] = f"{stage}: {type(error).__name__}: {error}"
            break
    row["peak MB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return row


def examine_apart(name: str, stages: list[str], seconds: float) -> dict[str, Any]:
    """The same in a process of its own."""
    command = [sys.executable, __file__, "--one", name, "--stages", ",".join(stages)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return {"model": name, "error": f"not done after {seconds:.0f} s"}
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return {"model": name, "error": f"exit code {done.returncode}: {last}"}
    row: dict[str, Any] = json.loads(lines[-1])
    return row


def table(rows: list[dict[str, Any]]) -> Any:
    """Rows as a rich table; columns in the order in which they first come up, texts at the end."""
    from rich.table import Table

    last = ("open", "notes", "error")
    columns = [*(c for c in dict.fromkeys(k for row in rows for k in row) if c not in last), *last]
    result = Table(title=f"{sum('error' not in r for r in rows)} of {len(rows)} models without an error")
    for column in columns:
        result.add_column(column, overflow="fold", justify="left" if column in ("model", *last) else "right")
    for row in rows:
        result.add_row(*(text(row.get(column, "")) for column in columns))
    return result


def text(value: Any) -> str:
    if isinstance(value, list):
        return "; ".join(map(str, value))
    if isinstance(value, float):
        return f"{value:.2g}" if abs(value) < 0.01 else f"{value:g}"
    return str(value)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", help="models whose name matches this pattern")
    parser.add_argument("--stages", default=",".join(STAGES), help="comma separated")
    parser.add_argument("--out", type=Path, help="write the rows as JSON, after every model")
    parser.add_argument("--seconds", type=float, default=900, help="time limit for each model")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    stages = options.stages.split(",")
    if options.one:
        print(json.dumps(examine(options.one, stages)))
        return 0
    from rich.console import Console

    console, rows = Console(), []
    names = [name for name in MODELS if fnmatch.fnmatch(name.lower(), options.only.lower())]
    if not names:
        parser.error(f"no model matches {options.only!r}; known: {', '.join(MODELS)}")
    for name in names:
        rows.append(examine_apart(name, stages, options.seconds))
        console.print(" ".join(f"{k}={text(v)}" for k, v in rows[-1].items()), markup=False, highlight=False, soft_wrap=True)
        if options.out:
            options.out.write_text(json.dumps(rows, indent=1))
    console.print(table(rows))
    return int(any("error" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
