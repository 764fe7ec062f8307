"""Folders of sentence-transformers, written by hand as the library writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from fxprune.process.libraries import survive_torchvision
from support.hf_models import BIDIRECTIONAL

OLD = "sentence_transformers.models."
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "a", "the", "very"]
WIDTH = BIDIRECTIONAL["hidden_size"]


def sentence_folder(
    folder: Path,
    modes: Sequence[str] = ("mean",),
    dense: Sequence[Mapping[str, Any]] = (),
    normalize: bool = True,
    inside: str = "",
    side: str = "right",
) -> Path:
    """The folder of a tiny BERT with pooling, projections of these configs and normalisation behind it.

    inside   where the transformer lies in it;  side: on which its tokenizer pads
    """
    survive_torchvision()
    import transformers

    torch.manual_seed(0)
    own = folder / inside
    own.mkdir(parents=True)
    (own / "vocab.txt").write_text("\n".join(WORDS))
    transformers.BertTokenizer(str(own / "vocab.txt"), padding_side=side).save_pretrained(own)
    transformers.BertModel(transformers.BertConfig(**BIDIRECTIONAL)).save_pretrained(own)
    (own / "sentence_bert_config.json").write_text('{"max_seq_length": 16, "do_lower_case": false}')
    listed = [("Transformer", inside)]
    _add(folder, listed, "Pooling", {"word_embedding_dimension": WIDTH, "pooling_mode": list(modes)})
    width = WIDTH * len(modes)
    for said in dense:
        place = _add(folder, listed, "Dense", {"in_features": width, **said})
        width, state = said["out_features"], {"linear.weight": 0.2 * torch.randn(said["out_features"], width)}
        if said.get("bias", True):
            state["linear.bias"] = torch.randn(width)
        save_file(state, place / "model.safetensors")
    if normalize:
        _add(folder, listed, "Normalize", None)
    entries = [{"idx": n, "name": str(n), "path": p, "type": OLD + kind} for n, (kind, p) in enumerate(listed)]
    (folder / "modules.json").write_text(json.dumps(entries))
    return folder


def _add(folder: Path, listed: list[tuple[str, str]], kind: str, said: Mapping[str, Any] | None) -> Path:
    place = f"{len(listed)}_{kind}"
    listed.append((kind, place))
    (folder / place).mkdir()
    if said is not None:
        (folder / place / "config.json").write_text(json.dumps(said))
    return folder / place


def tokens() -> dict[str, torch.Tensor]:
    """Three texts of 2 to 7 tokens, padded behind."""
    ids = torch.randint(5, len(WORDS), (3, 7), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(7) < torch.tensor([[7], [2], [4]])).long()
    return {"input_ids": ids * mask, "attention_mask": mask}
