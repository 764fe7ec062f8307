"""Whisper base on spoken digits: an encoder-decoder, judged by the words it writes."""

from __future__ import annotations

import copy
import io
import re
import struct
import tarfile
import wave
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from bench.accuracy.tasks import Forward, Missing, analyse, of_module
from bench.accuracy.weights import Weights
from fxprune.data import Batch, Calibration

PROMPT, END, WRITTEN = (50258, 50259, 50359, 50363), 50257, 4  # start, English, transcribe, no times; tokens at most
WIDTH, LAYERS, HEADS, VOCABULARY = 512, 6, 8, 51865
JUDGED = 120  # recordings; the others calibrate
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TYPES = (torch.float32, torch.int8, torch.int16, torch.int32, torch.float16)


class Transcriber(nn.Module):
    """Log-mel spectrograms [batch, 80, 3000] and the tokens so far -> logits of the next tokens."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_features: Tensor, decoder_input_ids: Tensor) -> dict[str, Tensor]:
        out = self.model(input_features=input_features, decoder_input_ids=decoder_input_ids, use_cache=False)
        return {"logits": out.logits}


class Speech:
    """Whisper base, 6 + 6 layers of 512, on isolated digits of 8 kHz: recordings of 120 that are written as said.

    The dense model decodes greedily. A smaller one is run once on what the dense one wrote: where all its next tokens
    are the same, greedy decoding would have written the same. Words that it gets right in another way do not count.
    Calibration: other recordings of the same speakers, with what the dense model wrote.
    """

    name, metric, labelled, samples = "whisper-digits", "words right, percent", False, 60

    def __init__(self, weights: Weights, about: dict[str, Any], data: Path, align: int) -> None:
        from tokenizers import Tokenizer

        from fxprune.process.libraries import survive_torchvision

        survive_torchvision()
        self.model = Transcriber(_build(weights.path)).eval()
        self.tokenizer = Tokenizer.from_file(str(weights.folder / "tokenizer.json"))
        sounds, said = _recordings(data)
        self.features, self.ids = sounds, _decode(of_module(self.model), sounds)
        right = [self._word(ids) == word for ids, word in zip(self.ids, said, strict=True)]
        order = torch.randperm(len(sounds), generator=torch.Generator().manual_seed(0))
        self.judged, self.others, self.right = order[:JUDGED], order[JUDGED:], torch.tensor(right)
        self.program = analyse(self.model, self._batch(self.others[:2]), "whisper-base", align)
        self.about = about

    def _batch(self, rows: Tensor) -> Batch:
        return Batch((), {"input_features": self.features[rows], "decoder_input_ids": self.ids[rows, :-1]})

    def _word(self, ids: Tensor) -> str:
        written = self.tokenizer.decode(ids[len(PROMPT) :].tolist()).strip().lower()
        word = re.sub("[^a-z0-9]", "", written)
        return WORDS[int(word)] if word.isdigit() and len(word) == 1 else word

    def example(self) -> Batch:
        return self._batch(self.others[:1])

    def calibration(self, samples: int, seed: int, labels: bool = False) -> Calibration:
        chosen = self.others[torch.randperm(len(self.others), generator=torch.Generator().manual_seed(seed))[:samples]]
        return Calibration(tuple(map(self._batch, chosen.split(4))), f"spoken_digits, {len(chosen)} recordings")

    @torch.no_grad()
    def accuracy(self, forward: Forward) -> float:
        kept = []
        for rows in self.judged.split(4):
            said = forward(self._batch(rows)).argmax(-1)[:, len(PROMPT) - 1 :]
            wanted = self.ids[rows, len(PROMPT) :]
            ended = (wanted == END).int().cumsum(1) - (wanted == END).int() > 0  # behind the end nothing is read
            kept.append(((said == wanted) | ended).all(1) & self.right[rows])
        return 100 * float(torch.cat(kept).double().mean())

    def eager(self) -> nn.Module:
        return copy.deepcopy(self.model)

    def losses(self, model: nn.Module, samples: int, seed: int) -> Iterator[Tensor]:
        for batch in self.calibration(samples, seed).batches:
            logits = model(**batch.kwargs)["logits"][:, len(PROMPT) - 1 :]
            yield functional.cross_entropy(logits.flatten(0, 1), logits.detach().argmax(-1).flatten())


@torch.no_grad()
def _decode(forward: Forward, features: Tensor) -> Tensor:
    """What a model writes greedily, behind the prompt, ended by END. [recordings, prompt + WRITTEN]"""
    written = []
    for part in features.split(4):
        ids = torch.tensor([PROMPT]).expand(len(part), -1)
        for _ in range(WRITTEN):
            logits = forward(Batch((), {"input_features": part, "decoder_input_ids": ids}))
            now = logits[:, -1].argmax(-1)
            now = torch.where(ids[:, -1] == END, END, now)
            ids = torch.cat([ids, now[:, None]], 1)
        written.append(ids)
    return torch.cat(written)


def _recordings(data: Path) -> tuple[Tensor, list[str]]:
    """(log-mel spectrograms [n, 80, 3000], what is said), each with half a second of silence on either side."""
    import numpy as np
    from scipy.signal import resample_poly
    from transformers import WhisperFeatureExtractor

    path = data / "spoken_digits" / "wav.tar"
    if not path.exists():
        raise Missing(f"the recordings are not at {path}: give the folder that holds spoken_digits/ with --data")
    extract: Any = WhisperFeatureExtractor(feature_size=80)
    features, words = [], []
    with tarfile.open(path) as archive:
        for member in sorted(archive.getmembers(), key=lambda m: m.name):
            if not member.name.endswith(".wav"):
                continue
            file = archive.extractfile(member)
            assert file is not None
            with wave.open(io.BytesIO(file.read())) as sound:
                samples = np.frombuffer(sound.readframes(sound.getnframes()), np.int16).astype(np.float32) / 32768
            silence = np.zeros(4000, np.float32)
            wide = resample_poly(np.concatenate([silence, samples, silence]), 2, 1).astype(np.float32)
            features.append(extract(wide, sampling_rate=16000, return_tensors="pt").input_features)
            words.append(WORDS[int(Path(member.name).name[0])])
    return torch.cat(features), words


def _build(path: Path) -> nn.Module:
    """Whisper base as transformers builds it, with the weights of a CTranslate2 file."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        encoder_layers=LAYERS,
        decoder_layers=LAYERS,
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS,
        encoder_ffn_dim=4 * WIDTH,
        decoder_ffn_dim=4 * WIDTH,
        decoder_start_token_id=PROMPT[0],
        eos_token_id=END,
        pad_token_id=END,
        bos_token_id=END,
    )
    model: nn.Module = WhisperForConditionalGeneration(config).eval()
    model.load_state_dict(_rename_tensors(_read(path)), strict=True)
    return model


def _rename_tensors(held: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """CTranslate2's tensors by transformers' names: q, k and v of one matrix apart, no bias of keys."""
    found = {
        f"model.encoder.conv{i}.{kind}": held[f"encoder/conv{i}/{kind}"] for i in (1, 2) for kind in ("weight", "bias")
    }
    found["model.decoder.embed_tokens.weight"] = found["proj_out.weight"] = held["decoder/embeddings/weight"]
    for side in ("encoder", "decoder"):
        found[f"model.{side}.embed_positions.weight"] = held[f"{side}/position_encodings/encodings"]
        _norm(found, held, f"{side}/layer_norm", f"model.{side}.layer_norm")
        for i in range(LAYERS):
            here, there = f"{side}/layer_{i}", f"model.{side}.layers.{i}"
            _norm(found, held, f"{here}/self_attention/layer_norm", f"{there}.self_attn_layer_norm")
            _norm(found, held, f"{here}/ffn/layer_norm", f"{there}.final_layer_norm")
            _linears(found, held, f"{here}/self_attention/linear_0", [f"{there}.self_attn.{n}_proj" for n in "qkv"])
            _linears(found, held, f"{here}/self_attention/linear_1", [f"{there}.self_attn.out_proj"])
            for j in (0, 1):
                _linears(found, held, f"{here}/ffn/linear_{j}", [f"{there}.fc{j + 1}"])
            if side == "decoder":
                _norm(found, held, f"{here}/attention/layer_norm", f"{there}.encoder_attn_layer_norm")
                _linears(found, held, f"{here}/attention/linear_0", [f"{there}.encoder_attn.q_proj"])
                _linears(found, held, f"{here}/attention/linear_1", [f"{there}.encoder_attn.{n}_proj" for n in "kv"])
                _linears(found, held, f"{here}/attention/linear_2", [f"{there}.encoder_attn.out_proj"])
    return found


def _norm(found: dict[str, Tensor], held: Mapping[str, Tensor], here: str, there: str) -> None:
    found[f"{there}.weight"], found[f"{there}.bias"] = held[f"{here}/gamma"], held[f"{here}/beta"]


def _linears(found: dict[str, Tensor], held: Mapping[str, Tensor], here: str, there: list[str]) -> None:
    """One matrix that several layers share, row block by row block."""
    for kind in ("weight", "bias"):
        for name, part in zip(there, held[f"{here}/{kind}"].chunk(len(there)), strict=True):
            if kind == "weight" or not name.endswith(".k_proj"):
                found[f"{name}.{kind}"] = part.clone()


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors of a CTranslate2 model file of version 4 or later, as fp32. Raises ValueError for another one."""
    found: dict[str, Tensor] = {}
    with path.open("rb") as file:

        def number(form: str) -> int:
            return int(struct.unpack("<" + form, file.read(struct.calcsize("<" + form)))[0])

        def word() -> str:
            return file.read(number("H"))[:-1].decode()

        if (version := number("I")) < 4:
            raise ValueError(f"{path.name} is of version {version}")
        word(), number("I")  # the specification and its revision
        for _ in range(number("I")):
            name, rank = word(), number("B")
            shape = [number("I") for _ in range(rank)]
            dtype, size = TYPES[number("B")], number("I")
            found[name] = torch.frombuffer(bytearray(file.read(size)), dtype=dtype).reshape(shape).float()
    return found
