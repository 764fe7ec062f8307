"""The way home: what was pruned is again a model of its class."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.hf_models import FAMILIES, saved, tiny
from torch import nn

import fxprune
from fxprune.backends.hf import fresh, prove
from fxprune.errors import LoweringError, OptionError, VerifyError

pytest.importorskip("transformers")
FREE, UNIFORM = "hf{layout=free}", "hf"
HEADS = {"llama", "qwen3", "mistral", "gemma2", "vit", "clip", "t5"}
GENERATES = {"llama", "qwen3", "mistral", "gemma2", "phi3", "gpt2", "opt", "gpt-neox", "t5", "whisper"}


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The proof in this process: a new one takes seconds to import what is imported here."""
    from transformers import dynamic_module_utils

    def run(command: Sequence[str], **_: Any) -> subprocess.CompletedProcess[str]:
        fresh.prove(command[-2], Path(command[-1]))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(prove.subprocess, "run", run)


def ids(model: Any, batch: int = 3, length: int = 11) -> dict[str, torch.Tensor]:
    made = torch.randint(3, 99, (batch, length))
    return {"input_ids": made, "attention_mask": torch.ones_like(made)}


@pytest.mark.drawn(2)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_comes_home(family: str, tmp_path: Path, here: None) -> None:
    from safetensors.torch import load_file

    made = fxprune.compile(
        str(saved(family, tmp_path / "dense")), params=0.8, target=FREE, out=tmp_path / "small", seconds=0
    )
    assert {one["kind"] for one in made.report["pruned"]} & {"head", "kv"}
    assert "ffn" in {one["kind"] for one in made.report["pruned"]}
    found = made.report["lowering"]["fresh_process"]
    assert found["max_rel"] <= prove.LIMIT
    assert len(found["sizes"]) == 2
    assert found["generate"] == ("equal" if family in GENERATES else "no")
    model = fxprune.load_hf(tmp_path / "small")
    assert type(model).__name__ == FAMILIES[family][0]
    written = load_file(tmp_path / "small" / "model.safetensors")
    assert sum(t.numel() for t in written.values()) < sum(p.numel() for p in tiny(family).parameters())


@pytest.mark.drawn(2)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_comes_home_with_one_count_for_all_layers(family: str, tmp_path: Path, here: None) -> None:
    """The stock class loads the folder strictly; no code lies beside it."""
    import transformers

    dense = saved(family, tmp_path / "dense")
    made = fxprune.compile(str(dense), params=0.85, target=UNIFORM, out=tmp_path / "small", seconds=0)
    found = made.report["lowering"]["fresh_process"]
    assert found["max_rel"] <= prove.LIMIT
    assert found["generate"] == ("equal" if family in GENERATES else "no")
    cut = [one["kind"] for one in made.report["pruned"]]
    assert "ffn" in cut
    assert ({"kv", "head"} & set(cut) != set()) <= (family in HEADS)
    said, was = (json.loads((path / "config.json").read_text()) for path in (tmp_path / "small", dense))
    changed = {key for key in said if said[key] != was.get(key)}
    assert changed
    assert all(type(said[key]) is int for key in changed)
    assert said.keys() >= was.keys()
    assert not list((tmp_path / "small").glob("*.py"))
    cls = getattr(transformers, FAMILIES[family][0])
    _, info = cls.from_pretrained(tmp_path / "small", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_one_number_ties_the_heads_of_all_layers(tmp_path: Path, here: None) -> None:
    """Heads and KV heads are two numbers that move as one; which heads stay differs by layer, how many does not."""
    dense = str(saved("qwen3", tmp_path / "dense"))
    made = fxprune.compile(dense, flops=0.6, target=UNIFORM, out=tmp_path / "small", seconds=0, prune="heads")
    counts = {len(c.keep) for c in made.plan.elements.values()}
    said = json.loads((tmp_path / "small" / "config.json").read_text())
    assert len(made.plan.elements) == 2
    assert counts == {said["num_key_value_heads"]} == {said["num_attention_heads"] // 2}
    uneven = made.plan.with_elements(dict(list(made.plan.elements.items())[:1]))
    with pytest.raises(LoweringError, match="no numbers of Qwen3Config say the widths"):
        fxprune.apply(dense, uneven, target=UNIFORM, out=tmp_path / "odd", seconds=0)


def test_the_folder_is_the_original_with_smaller_weights(tmp_path: Path) -> None:
    """A process of its own proves it, and what the class does with it is what the graph does."""
    dense = saved("llama", tmp_path / "dense", lambda m: m.to(torch.bfloat16))
    (dense / "tokenizer_config.json").write_bytes(b'{"a":\t1}')
    (dense / "1_Pooling").mkdir()
    (dense / "1_Pooling" / "config.json").write_bytes(b"{}\r\n")
    (dense / "modeling_own.py").write_text("raise SystemExit('code of the folder was run')")
    config = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModelForCausalLM": "modeling_own.X"}}))
    out = tmp_path / "small"
    quiet: Any = {"flops": 0.7, "target": FREE, "out": out, "seconds": 0, "on_event": lambda _: None}
    made = fxprune.compile(str(dense), **quiet)
    assert made.report["lowering"]["fresh_process"]["generate"] == "equal"
    for name in ("tokenizer_config.json", "1_Pooling/config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (dense / name).read_bytes()
        assert name in made.report["files"]
    assert not (out / "modeling_own.py").exists()
    said = json.loads((out / "config.json").read_text())
    assert {k: v for k, v in said.items() if k not in ("pruned", "auto_map")} == config
    model = fxprune.load_hf(out)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert (out / "model.safetensors").stat().st_size < (dense / "model.safetensors").stat().st_size
    model, inputs = fxprune.load_hf(out, dtype=torch.float32), ids(made)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, made.module(**inputs)["logits"], rtol=0, atol=1e-6)
    again = fxprune.compile(str(dense), **quiet)  # replaced as a whole
    assert again.plan == made.plan


def test_it_saves_trains_and_loads_as_a_base_model(tmp_path: Path, here: None) -> None:
    import transformers

    out = tmp_path / "small"
    plan = fxprune.plan(str(saved("llama", tmp_path / "dense")), flops=0.7, target=FREE).plan
    assert plan is not None
    fxprune.apply(str(tmp_path / "dense"), plan, target=FREE, out=out, seconds=0)
    model, inputs = fxprune.load_hf(out), ids(None)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())
    auto = transformers.AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    auto.save_pretrained(tmp_path / "again")
    two = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
    bare = transformers.AutoModel.from_pretrained(out, trust_remote_code=True)
    with torch.no_grad():
        assert torch.equal(two(**inputs).logits, model(**inputs).logits)
        hidden = model(**inputs, output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(bare(**inputs).last_hidden_state, hidden)


def test_what_the_class_cannot_say_is_frozen(tmp_path: Path) -> None:
    dense = str(saved("llama", tmp_path / "dense"))
    program = fxprune.plan(dense, flops=0.9, target=FREE, prune="qk,ffn")
    assert {g.kind for g in program.need("groups") if g.frozen.startswith("LlamaForCausalLM cannot say it")} == {"qk"}
    assert program.need("plan").kinds == ("ffn",)


def test_a_whole_branch_goes_only_where_the_class_can_do_without(tmp_path: Path, here: None) -> None:
    dense = str(saved("gpt2", tmp_path / "dense"))
    made = fxprune.compile(
        dense, flops=0.3, target=FREE, out=tmp_path / "small", seconds=0, allow_empty=True, prune="heads,ffn"
    )
    assert made.report["lowering"]["fresh_process"]["generate"] == "equal"


def test_the_pipeline_of_the_report_makes_the_same_plan(tmp_path: Path) -> None:
    dense = str(saved("phi3", tmp_path / "dense"))
    made = fxprune.plan(dense, flops=0.7, target=FREE)
    text = str(made.need("plan").about["pipeline"])
    assert "hold-to-class" in text
    again = fxprune.plan(dense, target=FREE, pipeline=text)
    assert again.need("plan").elements == made.need("plan").elements


def test_a_folder_that_does_not_compute_the_same_is_not_published(
    tmp_path: Path, here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = str(saved("llama", tmp_path / "dense"))

    def generate(model: Any, _: Any) -> str:
        return "differs: token 1" if hasattr(model.config, "pruned") else "equal"

    monkeypatch.setattr(fresh, "generate", generate)
    with pytest.raises(VerifyError, match="does not generate as its class does"):
        fxprune.compile(dense, flops=0.7, target=FREE, out=tmp_path / "small", seconds=0)
    assert not (tmp_path / "small").exists()


def test_it_needs_a_folder_and_all_tokens(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 8))
    with pytest.raises(LoweringError, match="came from no Hugging Face folder"):
        fxprune.compile(model, torch.randn(2, 8), flops=0.5, target=FREE)
    with pytest.raises(OptionError, match="cannot reduce tokens"):
        fxprune.compile(model, torch.randn(2, 8), flops=0.5, target=FREE, tokens="tome")
    with pytest.raises(OptionError, match="no layout 'odd'"):
        fxprune.compile(model, torch.randn(2, 8), flops=0.5, target="hf{layout=odd}")


def test_an_artefact_is_lowered_beside_the_folder_it_came_from(tmp_path: Path, here: None) -> None:
    dense = str(saved("llama", tmp_path / "dense"))
    fxprune.compile(dense, flops=0.7, target=FREE, out=tmp_path / "small", seconds=0)
    fxprune.lower(tmp_path / "small", target="eager", out=tmp_path / "graph", seconds=0)
    with pytest.raises(LoweringError, match="came from no Hugging Face folder"):
        fxprune.lower(tmp_path / "graph", target=FREE, out=tmp_path / "home", seconds=0)
    made = fxprune.lower(tmp_path / "graph", target=FREE, against=dense, out=tmp_path / "home", seconds=0)
    assert made.report["lowering"]["class"] == "LlamaForCausalLM"
