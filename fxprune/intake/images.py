"""Pictures as a model wants them: resized, cropped, scaled and normalised the way its own preprocessing says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import LoadError
from .tensors import shorten

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}  # PIL's numbers


@dataclass(frozen=True)
class ImagePreprocess:
    """How a picture becomes a model input.

    size            (channels, height, width) in pixels
    mean, std       per channel, of values scaled to 0..1
    interpolation   nearest, bilinear, bicubic, lanczos, box or hamming
    crop            the shorter side is resized to size/crop, then the middle is cut out; None squeezes the whole
                    picture into the size
    assumed         True when the model says nothing and ImageNet's values are taken
    """

    size: tuple[int, int, int]
    mean: tuple[float, ...] = _IMAGENET_MEAN
    std: tuple[float, ...] = _IMAGENET_STD
    interpolation: str = "bicubic"
    crop: float | None = 0.875
    assumed: bool = False

    def normalise(self, pixels: Tensor) -> Tensor:
        """uint8 pixels [batch, channels, height, width] to float32 model inputs of the same shape."""
        mean = torch.tensor(self.mean, dtype=torch.float32).view(1, -1, 1, 1)
        std = torch.tensor(self.std, dtype=torch.float32).view(1, -1, 1, 1)
        return (pixels.to(torch.float32) / 255 - mean) / std

    def open(self, path: Path) -> Tensor:
        """One picture as uint8 pixels [channels, height, width] of this size. Raises LoadError if it is damaged."""
        from PIL import Image

        channels, height, width = self.size
        method = getattr(Image.Resampling, self.interpolation.upper(), Image.Resampling.BICUBIC)
        try:
            with Image.open(path) as opened:
                picture: Any = opened.convert("L" if channels == 1 else "RGB")
        except Exception as failure:  # PIL raises OSError, SyntaxError, DecompressionBombError, struct.error, ...
            raise LoadError(
                "the picture cannot be read",
                where=str(path),
                why=f"{type(failure).__name__}: {failure}",
                cure="remove it from the folder, or save it again",
            ) from None
        if self.crop is None:
            picture = picture.resize((width, height), method)
        else:
            scale = max(height / self.crop / picture.height, width / self.crop / picture.width)
            resized = (max(width, round(picture.width * scale)), max(height, round(picture.height * scale)))
            picture = picture.resize(resized, method)
            left, top = (resized[0] - width) // 2, (resized[1] - height) // 2
            picture = picture.crop((left, top, left + width, top + height))
        pixels = torch.from_numpy(np.array(picture, dtype=np.uint8))
        return pixels.unsqueeze(0) if channels == 1 else pixels.permute(2, 0, 1).contiguous()


def fit_channels(values: Any, channels: int, default: tuple[float, ...]) -> tuple[float, ...]:
    """Numbers for each channel: as given, repeated if there is one, averaged if they do not fit."""
    try:
        numbers = tuple(float(v) for v in values) if isinstance(values, (list, tuple)) else (float(values),)
    except (TypeError, ValueError):
        numbers = default
    if not numbers or len(numbers) == channels:
        return numbers or default
    return (sum(numbers) / len(numbers),) * channels


def from_timm(cfg: Mapping[str, Any], size: tuple[int, int, int]) -> ImagePreprocess:
    """Preprocessing by a timm ``pretrained_cfg``."""
    crop = float(cfg.get("crop_pct") or 0.875)
    return ImagePreprocess(
        size,
        fit_channels(cfg.get("mean"), size[0], _IMAGENET_MEAN),
        fit_channels(cfg.get("std"), size[0], _IMAGENET_STD),
        str(cfg.get("interpolation") or "bicubic"),
        None if cfg.get("crop_mode") == "squash" else crop,
    )


def assume_preprocess(size: tuple[int, int, int]) -> ImagePreprocess:
    """ImageNet's preprocessing, for a model that says nothing about its own."""
    mean, std = (
        fit_channels(_IMAGENET_MEAN, size[0], _IMAGENET_MEAN),
        fit_channels(_IMAGENET_STD, size[0], _IMAGENET_STD),
    )
    return ImagePreprocess(size, mean, std, assumed=True)


def read_preprocessor(folder: Path) -> dict[str, Any]:
    """The ``preprocessor_config.json`` of a Hugging Face folder, or {}. Raises LoadError if it is damaged."""
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as failure:
        raise LoadError("the preprocessing description cannot be read", where=str(path), why=str(failure)) from None
    return found if isinstance(found, dict) else {}


def preprocessor_size(preprocessor: Mapping[str, Any]) -> tuple[int, int] | None:
    """(height, width) in pixels that a Hugging Face preprocessor makes, or None."""
    names = ("crop_size", "size") if preprocessor.get("do_center_crop") else ("size",)
    for name in names:
        size = preprocessor.get(name)
        if isinstance(size, int) and size > 0:
            return size, size
        if isinstance(size, Mapping):
            sides = [size.get("height"), size.get("width")]
            if all(isinstance(side, int) and side > 0 for side in sides):
                return sides[0], sides[1]  # type: ignore[return-value]
            edge = size.get("shortest_edge")
            if isinstance(edge, int) and edge > 0:
                return edge, edge
    return None


def from_preprocessor(preprocessor: Mapping[str, Any], size: tuple[int, int, int]) -> ImagePreprocess:
    """Preprocessing by a Hugging Face ``preprocessor_config.json``; ``size`` is what the model takes."""
    if not preprocessor:
        return assume_preprocess(size)
    crop = None
    edge = preprocessor.get("size")
    edge = edge.get("shortest_edge") if isinstance(edge, Mapping) else edge
    if preprocessor.get("do_center_crop") and isinstance(edge, int) and edge > 0:
        crop = min(1.0, size[1] / edge)
    plain = preprocessor.get("do_normalize") is False
    return ImagePreprocess(
        size,
        (0.0,) * size[0] if plain else fit_channels(preprocessor.get("image_mean"), size[0], _IMAGENET_MEAN),
        (1.0,) * size[0] if plain else fit_channels(preprocessor.get("image_std"), size[0], _IMAGENET_STD),
        _RESAMPLE.get(preprocessor.get("resample", 2), "bilinear"),
        crop,
    )


def list_pictures(folder: Path) -> tuple[list[Path], list[str] | None]:
    """Pictures in a folder and the class of each: the name of its sub-folder, or None when there are no sub-folders.

    Sorted by name, so that the same folder always gives the same list. Raises LoadError if there is no picture.
    """
    try:
        classes = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
        pictures = [(p, c.name) for c in classes for p in sorted(c.rglob("*")) if p.suffix.lower() in IMAGE_SUFFIXES]
        loose = [p for p in sorted(folder.iterdir()) if p.is_file() and p.suffix.lower() in IMAGE_SUFFIXES]
    except OSError as failure:
        raise LoadError("the folder cannot be read", where=str(folder), why=failure.strerror or str(failure)) from None
    if pictures:
        return [p for p, _ in pictures], [c for _, c in pictures]
    if loose:
        return loose, None
    raise LoadError(
        "the folder holds no pictures",
        where=str(folder),
        why=f"no file ends in {shorten(sorted(IMAGE_SUFFIXES), 20)}",
        cure="give a folder of pictures, or of one sub-folder per class",
    )
