"""What a family of models is, and how those of each library are built, tiny and at their real sizes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.process.libraries import survive_torchvision
from fxprune.process.silence import quiet

Built = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
WORDS = 60
TEXT = (2, 64)  # example batch and length at real size


@dataclass(frozen=True)
class Family:
    """One architecture: ``tiny`` is exported in about a second; ``real`` are its models at the sizes that people use,
    by the names of the table that tools/bench/zoo.py makes. Weights are random."""

    tiny: Callable[[], Built]
    real: Mapping[str, Callable[[], Built]] = field(default_factory=dict)


@dataclass(frozen=True)
class Scale:
    """Example inputs: texts of ``text`` ids from ``least`` below ``words``, square images of ``image`` pixels."""

    text: tuple[int, int]
    least: int
    words: int
    image: int


TINY, REAL = Scale((2, 9), 3, WORDS, 32), Scale(TEXT, 5, 200, 224)


def timm_family(name: str, size: int = 32, *real: str, **options: Any) -> Family:
    """``options`` make ``name`` tiny, at images of ``size``; ``real`` are names as they are."""
    return Family(lambda: _make_timm(name, size, num_classes=10, **options), {n: real_timm(n) for n in real})


def real_timm(name: str) -> Callable[[], Built]:
    return lambda: _make_timm(name)


def _make_timm(name: str, size: int = 0, **options: Any) -> Built:
    survive_torchvision()
    with quiet():
        import timm

    model: Any = timm.create_model(name, **options)
    shape = (3, size, size) if size else model.pretrained_cfg["input_size"]
    return model, (torch.randn(2, *shape),), {}


def vit_family(name: str, *real: str, **options: Any) -> Family:
    return timm_family(name, 32, *real, img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, **options)


def build_vgg() -> Built:
    survive_torchvision()
    from timm.models.vgg import VGG

    model = VGG([8, 8, "M", 16, "M", 24, "M"], num_classes=10, norm_layer=nn.BatchNorm2d, mlp_ratio=0.01)
    return model, (torch.randn(2, 3, 64, 64),), {}


def build_mixer() -> Built:
    survive_torchvision()
    from timm.models.mlp_mixer import MlpMixer

    model = MlpMixer(10, img_size=32, patch_size=8, num_blocks=2, embed_dim=32)
    return model, (torch.randn(2, 3, 32, 32),), {}


def build_maxvit() -> Built:
    survive_torchvision()
    from timm.models.maxxvit import MaxxVit, MaxxVitCfg, MaxxVitConvCfg, MaxxVitTransformerCfg

    config = MaxxVitCfg(
        embed_dim=(24, 48),
        depths=(1, 1),
        block_type=("M", "M"),
        stem_width=(16, 24),
        conv_cfg=MaxxVitConvCfg(),
        transformer_cfg=MaxxVitTransformerCfg(dim_head=8, window_size=(4, 4)),
    )
    return MaxxVit(config, img_size=32, num_classes=10), (torch.randn(2, 3, 32, 32),), {}


def hf_family(
    model: str,
    config: str,
    inputs: str,
    tiny: Mapping[str, Any],
    name: str,
    real: Mapping[str, Any] | None = None,
    *,
    tiny_model: str = "",
    tiny_inputs: str = "",
    image: int = REAL.image,
) -> Family:
    """``model`` and ``config`` are class names of transformers, ``tiny`` the fields that make it so; ``real`` those of
    the model ``name`` of the table, where they are not the defaults. ``tiny_*``: what tests take in place of it."""

    def build_tiny() -> Built:
        module = _make_hf(tiny_model or model, config, tiny)
        size = getattr(module.config, "image_size", None) or TINY.image
        return module, (), INPUTS[tiny_inputs or inputs](module.config, replace(TINY, image=size))

    def build_real() -> Built:
        module = _make_hf(model, config, real or {})
        return module, (), INPUTS[inputs](module.config, replace(REAL, image=image))

    return Family(build_tiny, {name: build_real})


def _make_hf(model: str, config: str, sizes: Mapping[str, Any]) -> Any:
    survive_torchvision()
    with quiet():
        import transformers

        logging.getLogger("transformers").setLevel(logging.ERROR)
        return getattr(transformers, model)(getattr(transformers, config)(**sizes))


def build_mask2former(image: int, backbone: Mapping[str, Any], **sizes: Any) -> Callable[[], Built]:
    def build() -> Built:
        survive_torchvision()
        with quiet():
            from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

            stages = ["stage1", "stage2", "stage3", "stage4"]
            config = Mask2FormerConfig(backbone_config=SwinConfig(**backbone, out_features=stages), **sizes)
            module = Mask2FormerForUniversalSegmentation(config)
        return module, (), {"pixel_values": torch.randn(2, 3, image, image)}

    return build


def encoders_of(whole: Family) -> Family:
    """The family of the encoders of ``whole``."""

    def encoder(build: Callable[[], Built]) -> Callable[[], Built]:
        def built() -> Built:
            model, args, kwargs = build()
            return model.get_encoder(), args, kwargs

        return built

    return Family(encoder(whole.tiny), {name: encoder(one) for name, one in whole.real.items()})


def _tokens(_: Any, scale: Scale) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(scale.least, scale.words, scale.text)}


def _tokens_and_mask(config: Any, scale: Scale) -> dict[str, Tensor]:
    return {**_tokens(config, scale), "attention_mask": torch.ones(*scale.text, dtype=torch.long)}


def _pixels(_: Any, scale: Scale) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, scale.image, scale.image)}


def _both(config: Any, scale: Scale) -> dict[str, Tensor]:
    return {**_tokens_and_mask(config, scale), **_pixels(config, scale)}


def _sound(config: Any, _: Scale) -> dict[str, Tensor]:
    return {"input_features": torch.randn(2, config.num_mel_bins, 2 * config.max_source_positions)}


INPUTS: dict[str, Callable[[Any, Scale], dict[str, Tensor]]] = {
    "text": _tokens,
    "masked": _tokens_and_mask,
    "image": _pixels,
    "both": _both,
    "sound": _sound,
}


def real_torchvision(name: str) -> Callable[[], Built]:
    def build() -> Built:
        survive_torchvision()
        import torchvision

        return getattr(torchvision.models, name)(), (torch.randn(2, 3, 224, 224),), {}

    return build
