"""Calibration data: a few batches of model inputs, with labels or without."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Mapping, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from ..errors import FxpruneError, LoadError
from ..intake.arrange import as_tensors
from ..intake.example_inputs import BATCH, failure, vocabulary
from ..intake.forward import float_type
from ..intake.huggingface import load_tokenizer, token_limit
from ..intake.images import list_pictures
from ..intake.load import Loaded
from ..intake.rehearsal import first_line
from ..intake.tensors import SUFFIXES as TENSOR_SUFFIXES
from ..intake.tensors import read_tensors
from ..process.silence import quiet
from . import texts
from .batch import Batch, Calibration
from .fit import finish, is_constant, match, picture_input
from .items import LABEL_NAMES, batches_of, first_samples

if TYPE_CHECKING:
    from torch.utils.data import Dataset

_KINDS = (
    "a .npz, .pt or .safetensors of tensors, a folder of pictures, texts as .csv, .tsv, .jsonl or .txt, "
    "or python:module:function"
)
_LONGEST = 512  # tokens; longer texts are truncated, as the models' own training did


def load_data(
    spec: str | Path | Calibration | Iterable[Any] | Dataset[Any],
    loaded: Loaded,
    *,
    samples: int = 128,
    batch: int = 32,
    seed: int = 0,
    skip: int = 0,
) -> Calibration:
    """At most ``samples`` samples of ``spec``, in batches of ``batch``, as ``loaded`` takes its inputs.

    spec   a ``.npz``, ``.pt`` or ``.safetensors`` of tensors under the names of the model's inputs (or x, images, ...),
           labels under label, labels, y, target or targets; uint8 pictures [N, H, W, C] or [N, C, H, W] are normalised;
           a folder of pictures, one sub-folder per class or none;
           ``.csv``, ``.tsv``, ``.jsonl`` or ``.txt`` texts, with the tokenizer of the model's folder;
           ``python:module:function``, which imports the module and calls the function (it runs that code) and takes
           what it returns as an iterable;
           in Python, a DataLoader, a Dataset, or any iterable of tensors or arrays, (inputs, labels), dicts or Batch;
           or a Calibration.
    seed   which samples are taken of a file that holds more
    skip   take those that come after so many, in the same draw: ``samples=64, skip=128`` shares none with
           ``samples=128``. Only for what can be read twice

    Without example inputs in ``loaded``, shapes are taken as they come. Raises LoadError for data that is missing,
    empty, of another shape or type than the model's inputs, or not finite.
    """
    from torch.utils.data import Dataset

    for name, value in (("samples", samples), ("batch", batch)):
        if value < 1:
            raise LoadError(f"{name} must be at least 1", where=f"--{name} {value}", why="no data would be left")
    if isinstance(spec, Calibration):
        if not spec.batches:
            raise _empty(spec.origin)
        return spec
    draw = _Draw(samples, seed, skip)
    if isinstance(spec, str) and spec.startswith("python:"):
        return _from_iterable(_call(spec), loaded, spec, _Draw(samples, seed), batch)
    if isinstance(spec, (str, Path)):
        return _from_path(Path(spec), loaded, draw, batch)
    if not isinstance(spec, Iterable | Dataset) or isinstance(spec, nn.Module):
        raise LoadError(f"a {type(spec).__name__} is no data", why="it cannot be iterated", cure=f"give {_KINDS}")
    return _from_iterable(spec, loaded, type(spec).__name__, draw, batch)


def generate(
    inputs: Loaded | tuple[tuple[Any, ...], Mapping[str, Any]], samples: int = 128, seed: int = 0, batch: int = 32
) -> Calibration:
    """Made-up inputs in the shapes and types of the example inputs, for criteria that want data when there is none.

    Floats are normal, ids uniform below the vocabulary (where only example tensors are known: in their range), and a
    tensor that is constant in the example, such as a mask of ones, stays so. Where the model itself fails on such ids
    (they are tied to its pictures), whole rows of the example are taken. ``generated`` is True: whatever is computed
    from these says nothing about real data.
    """
    known = inputs if isinstance(inputs, Loaded) else None
    args, kwargs = (inputs.args, inputs.kwargs) if isinstance(inputs, Loaded) else inputs
    leaves, structure = pytree.tree_flatten((tuple(args), dict(kwargs)))
    names = [f"input_{i}" for i in range(len(leaves))] if known is None else known.input_names
    below = 0 if known is None else vocabulary(known.model)
    if not leaves:
        raise LoadError(
            "inputs cannot be made up", why="no example inputs are known", cure="give `--input` or `--data`"
        )

    def draw_batch(generator: torch.Generator, size: int, tied: bool) -> Batch:
        order = torch.randint(2**31, (size,), generator=generator) if tied else None
        values = [_like(v, n, size, below, generator, order) for n, v in zip(names, leaves, strict=True)]
        return Batch(*pytree.tree_unflatten(values, structure))

    tied = known is not None and not _runs(known.model, draw_batch(_generator(seed), BATCH, False))
    generator = _generator(seed)
    sizes = [min(batch, samples - start) for start in range(0, samples, batch)]
    rows = ", rows of the example" if tied else ""
    batches = tuple(draw_batch(generator, size, tied) for size in sizes)
    return Calibration(batches, f"generated inputs{rows}, seed {seed}", generated=True)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _runs(model: nn.Module | ExportedProgram, batch: Batch) -> bool:
    """Whether the model computes something from these inputs; an exported program may take another batch only."""
    if isinstance(model, nn.Module):
        return failure(model, batch.args, dict(batch.kwargs)) is None
    return True


def _like(example: Any, name: str, size: int, below: int, generator: torch.Generator, order: Tensor | None) -> Any:
    """``size`` rows that look like the example's; ``order`` says which of them, where its ids are taken as they are."""
    if not isinstance(example, Tensor) or example.dim() == 0:
        return example
    shape = (size, *example.shape[1:])
    if is_constant(example):
        return example.reshape(-1)[:1].expand(shape).clone()
    if example.dtype.is_floating_point or example.dtype.is_complex:
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(example.dtype).to(example.device)
    if order is not None:
        return example[order % len(example)]
    if example.dtype is torch.bool:
        return (torch.rand(shape, generator=generator) < 0.5).to(example.device)
    low, high = int(example.min()), int(example.max()) + 1
    if name.endswith("ids") and below > 2:  # only ids index the vocabulary; positions and types keep their own range
        low, high = min(low, 0), max(high, below)
    return torch.randint(low, high, shape, generator=generator).to(example.dtype).to(example.device)


# --- where samples come from -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Draw:
    """Which rows of a source are taken: ``samples`` of a seeded order, after ``skip`` of it."""

    samples: int
    seed: int
    skip: int = 0

    def rows(self, count: int) -> Tensor:
        """Row numbers of ``count``, ascending."""
        if count <= self.samples and not self.skip:
            return torch.arange(count)
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(count, generator=generator) if count > self.skip else torch.arange(0)
        return order[self.skip : self.skip + self.samples].sort().values


def _from_path(path: Path, loaded: Loaded, draw: _Draw, batch: int) -> Calibration:
    suffix = path.suffix.lower()
    if path.is_dir():
        return _from_pictures(path, loaded, draw, batch)
    if suffix in texts.SUFFIXES:
        return _from_texts(path, loaded, draw, batch)
    if suffix in TENSOR_SUFFIXES:
        found = read_tensors(path)
        return _from_tensors(found, loaded, str(path), draw, batch)
    if not path.exists():
        raise LoadError(
            "there is no such data", where=str(path), why="no file or folder has this name", cure=f"give {_KINDS}"
        )
    raise LoadError(
        "this is no kind of data file", where=str(path), why=f"its suffix is '{path.suffix}'", cure=f"give {_KINDS}"
    )


def _from_tensors(found: dict[str, Tensor], loaded: Loaded, origin: str, draw: _Draw, batch: int) -> Calibration:
    label_name = next((n for n in LABEL_NAMES if n in found and n not in loaded.input_names), None)
    tensors = {k: v for k, v in found.items() if k != label_name}
    labels = found[label_name] if label_name else None
    counts = {k: v.shape[0] if v.dim() else 0 for k, v in found.items()}
    if not tensors or min(counts.values()) == 0:
        raise _empty(origin)
    inputs = match(tensors, loaded, origin)
    everything = {**inputs, "labels": labels} if labels is not None else dict(inputs)
    lengths = {k: v.shape[0] for k, v in everything.items() if isinstance(v, Tensor)}
    if len(set(lengths.values())) != 1:
        why = ", ".join(f"{k} has {n}" for k, n in lengths.items())
        raise LoadError("the tensors have different numbers of samples", where=origin, why=why)
    chosen = draw.rows(next(iter(lengths.values())))
    batches = []
    for rows in _split(chosen, batch):
        part = {k: v[rows] for k, v in inputs.items()}
        batches.append(Batch(*finish(part, None if labels is None else labels[rows], loaded, origin)))
    return Calibration(tuple(batches), origin)


def _from_pictures(folder: Path, loaded: Loaded, draw: _Draw, batch: int) -> Calibration:
    if loaded.image is None:
        raise LoadError(
            "the model takes no pictures",
            where=str(folder),
            why=f"its inputs are {_shapes(loaded)}",
            cure="give data of the kind the model takes: texts, or tensors as .npz",
        )
    pictures, classes = list_pictures(folder)
    chosen = draw.rows(len(pictures))
    known = _label2id(loaded)
    numbers = None if classes is None else texts.label_numbers(classes, known)
    name = picture_input(loaded)
    batches = []
    for rows in _split(chosen, batch):
        pixels = torch.stack([loaded.image.open(pictures[int(i)]) for i in rows])
        labels = None if numbers is None else torch.tensor([numbers[int(i)] for i in rows])
        batches.append(Batch(*finish({name: pixels}, labels, loaded, str(folder))))
    assumed = "; ImageNet's mean and std are assumed" if loaded.image.assumed else ""
    return Calibration(tuple(batches), str(folder) + assumed)


def _from_texts(path: Path, loaded: Loaded, draw: _Draw, batch: int) -> Calibration:
    if loaded.tokenizer is None:
        raise LoadError(
            "texts need a tokenizer",
            where=str(path),
            why=f"{loaded.name} did not come from a Hugging Face folder that holds one",
            cure="tokenizer.save_pretrained(folder) beside the model, or give token ids as .npz",
        )
    found = texts.read_texts(path)
    found = found.pick(draw.rows(len(found.first)).tolist())
    numbers = None if found.labels is None else torch.tensor(texts.label_numbers(found.labels, _label2id(loaded)))
    tokenizer = load_tokenizer(loaded.tokenizer)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    limit = token_limit(getattr(loaded.model, "config", None), min(_LONGEST, tokenizer.model_max_length or _LONGEST))
    limit = min(limit, getattr(loaded.model, "longest", None) or limit)  # a sentence encoder's own
    batches, unmasked = [], False
    for rows in _split(torch.arange(len(found.first)), batch):
        part = found.pick(rows.tolist())
        try:
            with quiet():
                encoded = tokenizer(
                    list(part.first),
                    None if part.second is None else list(part.second),
                    padding=True,
                    truncation=True,
                    max_length=limit,
                    return_tensors="pt",
                )
        except Exception as failure:
            raise LoadError("the texts cannot be tokenised", where=str(path), why=first_line(failure)) from None
        wanted = {k: v for k, v in encoded.items() if not loaded.input_names or k in loaded.input_names}
        mask = encoded.get("attention_mask")
        unmasked |= "attention_mask" not in wanted and isinstance(mask, Tensor) and not bool(mask.all())
        batches.append(Batch(*finish(wanted, None if numbers is None else numbers[rows], loaded, str(path))))
    about = "; the model takes no attention_mask, so padding counts as text" if unmasked else ""
    return Calibration(tuple(batches), str(path) + about)


def _call(spec: str) -> Iterable[Any]:
    """What the function of ``python:module:function`` returns. This runs the user's own code."""
    parts = spec.split(":")
    if len(parts) != 3 or not parts[2].isidentifier() or not all(p.isidentifier() for p in parts[1].split(".")):
        raise LoadError("the function is not understood", where=spec, cure="write python:package.module:function")
    sys.path.insert(0, str(Path.cwd()))  # as python -m has it; the installed command does not
    try:
        function = getattr(importlib.import_module(parts[1]), parts[2])
        result = function()
    except FxpruneError:
        raise
    except Exception as failure:
        raise LoadError(
            "the data function failed", where=spec, why=first_line(failure), cure="it is called without arguments"
        ) from failure
    finally:
        sys.path.remove(str(Path.cwd()))
    if not isinstance(result, Iterable):
        why = f"it returned a {type(result).__name__}"
        raise LoadError(
            "the data function returned no batches", where=spec, why=why, cure="return an iterable of batches"
        )
    return result


def _from_iterable(
    source: Iterable[Any] | Dataset[Any], loaded: Loaded, origin: str, draw: _Draw, batch: int
) -> Calibration:
    from torch.utils.data import DataLoader, Dataset, Subset

    if isinstance(source, Calibration):
        return source
    if isinstance(source, Dataset):  # samples, not batches
        if isinstance(source, Sized):
            source, draw = Subset(source, draw.rows(len(source)).tolist()), _Draw(draw.samples, draw.seed)
        return _from_iterable(DataLoader(source, batch_size=batch), loaded, origin, draw, batch)
    whole: Any = None
    if isinstance(source, Tensor | np.ndarray | Mapping):
        whole = as_tensors(source, float_type(loaded.model), origin)
    if isinstance(whole, Tensor):
        return _from_tensors({"x": whole}, loaded, origin, draw, batch)
    if isinstance(whole, Mapping):
        tensors = {str(k): v for k, v in whole.items() if isinstance(v, Tensor)}
        if not tensors:
            raise _empty(origin)
        return _from_tensors(tensors, loaded, origin, draw, batch)
    batches = batches_of(source, loaded, origin, draw.samples, draw.seed, draw.skip)
    if not batches:
        raise _empty(origin)
    return Calibration(tuple(batches), origin)


def _label2id(loaded: Loaded) -> Mapping[str, int] | None:
    return getattr(getattr(loaded.model, "config", None), "label2id", None)


def _split(rows: Tensor, batch: int) -> list[Tensor]:
    return [part for part in rows.split(batch) if len(part)]


def _empty(origin: str) -> LoadError:
    return LoadError("the data is empty", where=origin, why="it holds no samples", cure=f"give {_KINDS}")


def _shapes(loaded: Loaded) -> str:
    return ", ".join(f"{n} {list(v.shape)}" for n, v in loaded.inputs.items() if isinstance(v, Tensor)) or "unknown"


def example_from(calibration: Calibration, count: int = BATCH) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs from the first samples of the data, for a model that does not say what its inputs look like."""
    first = first_samples(calibration.batches[0], count)
    return first.args, dict(first.kwargs)
