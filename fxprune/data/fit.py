"""Make data fit a model: under the names of its inputs, in their types, with everything they need."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import LoadError
from ..intake.closed_sizes import openable
from ..intake.images import ImagePreprocess
from ..intake.load import Loaded
from ..intake.tensors import shorten


def is_constant(tensor: Tensor) -> bool:
    """True if every element is the same, as in a mask of ones."""
    return tensor.numel() > 0 and bool((tensor == tensor.reshape(-1)[0]).all())


def match(tensors: dict[str, Tensor], loaded: Loaded, where: str) -> dict[str, Tensor]:
    """Tensors under the names of the model's inputs. A single one belongs to a single input whatever it is called."""
    names = loaded.input_names
    if not names:
        return tensors
    found = {name: tensors[name] for name in names if name in tensors}
    if not found and len(tensors) == 1:
        return {_main_input(loaded): next(iter(tensors.values()))}
    if not found and len(names) == 1:
        usual = ("x", "input", "inputs", "images", "image", "pixel_values", "data", "features", "input_ids")
        name = next((n for n in usual if n in tensors), None)
        found = {names[0]: tensors[name]} if name else {}
    if not found:
        raise LoadError(
            "the data does not say which input it is",
            where=where,
            why=f"it holds {shorten(tensors)}; the model takes {', '.join(names)}",
            cure=f"name the tensors {', '.join(names)}, and labels 'labels'",
        )
    return found


def _main_input(loaded: Loaded) -> str:
    """The one input that data must give: the rest are masks and the like, constant in the example."""
    varying = [n for n, v in loaded.inputs.items() if isinstance(v, Tensor) and not is_constant(v)]
    return varying[0] if varying else loaded.input_names[0]


def picture_input(loaded: Loaded) -> str:
    """The name of the input that takes pictures, or "x"."""
    names = [n for n, v in loaded.inputs.items() if isinstance(v, Tensor) and v.dim() == 4]
    return names[0] if names else "x"


def finish(
    tensors: Mapping[str, Any], labels: Tensor | None, loaded: Loaded, where: str
) -> tuple[tuple[Any, ...], dict[str, Any], Tensor | None]:
    """A checked batch in the structure of the example inputs."""
    if labels is not None and labels.dim() > 0:
        first = next(v for v in tensors.values() if isinstance(v, Tensor))
        if labels.shape[0] != first.shape[0]:
            why = f"{labels.shape[0]} labels, {first.shape[0]} samples"
            raise LoadError("labels and inputs differ in number", where=where, why=why)
        if labels.dtype.is_floating_point and not bool(torch.isfinite(labels).all()):
            raise LoadError("the labels hold NaN or infinity", where=where, cure="remove those samples")
        if not labels.dtype.is_floating_point:
            labels = labels.to(torch.int64)
            labels = labels.squeeze(1) if labels.dim() == 2 and labels.shape[1] == 1 else labels
    examples = loaded.inputs
    if not examples:
        lone = len(tensors) == 1
        return (tuple(tensors.values()) if lone else ()), ({} if lone else dict(tensors)), labels
    fitted = {
        name: _fit(value, examples[name], name, loaded.image, where, loaded.free.get(name, frozenset()))
        for name, value in tensors.items()
    }
    values = []
    for name, example in examples.items():
        values.append(fitted[name] if name in fitted else _fill(name, example, fitted, where))
    return *loaded.fill(values), labels


def _fit(
    value: Tensor, example: Any, name: str, image: ImagePreprocess | None, where: str, free: frozenset[int]
) -> Tensor:
    """``value`` with the example's type, after checking that its shape is one the model takes.

    free  dimensions that may have any size, beside the batch and those of ids and masks
    """
    if not isinstance(example, Tensor):
        return value
    if value.dtype in (torch.uint8,) and example.dtype.is_floating_point and example.dim() == 4 and image is not None:
        value = _pixels(value, image, name, where)
    floating = example.dtype.is_floating_point
    if value.dtype.is_floating_point != floating or value.dtype.is_complex != example.dtype.is_complex:
        raise LoadError(
            f"'{name}' has the wrong type",
            where=where,
            why=f"it is {value.dtype}, the model takes {example.dtype}",
            cure="convert it: floats for pictures and features, whole numbers for ids",
        )
    if not _shape_fits(value, example, free):
        swapped = value.dim() == 4 and example.dim() == 4 and value.shape[3] == example.shape[1] != value.shape[1]
        raise LoadError(
            f"'{name}' has the wrong shape",
            where=where,
            why=f"it is {list(value.shape)}, the model takes [batch{''.join(f', {n}' for n in example.shape[1:])}]",
            cure="put the channels second: [batch, channels, height, width]"
            if swapped
            else "resize it, or give `--input`",
        )
    if floating and not bool(torch.isfinite(value).all()):
        rows = (~torch.isfinite(value)).reshape(value.shape[0], -1).any(1).nonzero().flatten().tolist()
        raise LoadError(
            f"'{name}' holds NaN or infinity",
            where=where,
            why=f"in samples {shorten(map(str, rows))} of the batch",
            cure="remove those samples",
        )
    return value.to(example.dtype).to(example.device)


def _shape_fits(value: Tensor, example: Tensor, free: frozenset[int]) -> bool:
    """The batch is free, and so are the lengths of token ids and their masks: what is too long is cut later."""
    if value.dim() != example.dim() or value.dim() == 0:
        return False
    free |= {0} if example.dtype.is_floating_point else set(openable(example)) | {0}
    return all(a == b or i in free for i, (a, b) in enumerate(zip(value.shape, example.shape, strict=True)))


def _pixels(value: Tensor, image: ImagePreprocess, name: str, where: str) -> Tensor:
    channels, height, width = image.size
    if value.dim() == 3 and channels == 1:
        value = value.unsqueeze(1)
    if value.dim() == 4 and tuple(value.shape[1:]) != image.size and value.shape[3] == channels:
        value = value.permute(0, 3, 1, 2)
    if value.dim() != 4 or tuple(value.shape[1:]) != image.size:
        raise LoadError(
            f"'{name}' holds pictures of another size",
            where=where,
            why=f"it is {list(value.shape)}, the model takes {channels} channels of {height}x{width} pixels",
            cure="give the pictures as files in a folder: those are resized and cropped as the model was trained",
        )
    return image.normalise(value)


def _fill(name: str, example: Any, given: Mapping[str, Tensor], where: str) -> Any:
    """An input that the data lacks: the constant it has in the example, in the shape of what was given."""
    if not isinstance(example, Tensor):
        return example
    if is_constant(example) and given:
        partner = next((t for t in given.values() if t.dim() == example.dim() == 2), None)
        first = next(iter(given.values()))
        shape = tuple(partner.shape) if partner is not None else (first.shape[0], *example.shape[1:])
        return example.reshape(-1)[:1].expand(shape).clone()
    if name == "decoder_input_ids" and given:  # what the decoder has said so far: the example's, for every sample
        return example[:1].expand(next(iter(given.values())).shape[0], *example.shape[1:]).clone()
    raise LoadError(
        f"the data lacks the input '{name}'",
        where=where,
        why=f"it gives {', '.join(given) or 'nothing'}",
        cure=f"add a tensor named '{name}'",
    )
