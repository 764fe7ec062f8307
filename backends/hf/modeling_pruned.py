"""The classes of transformers, with layers of the widths that a pruned model has.

This file stands beside the weights of a pruned model. Its ``config.json`` holds, under ``pruned``, the shape of every
tensor that became smaller, and the numbers that the code of the class reads beside them::

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

The class is transformers' own: it is built as the config says, each layer that was cut gets a weight of its new shape,
and everything after that (loading, ``generate``, training, ``save_pretrained``) is the library's. It needs torch and
transformers alone.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn


def __getattr__(name: str) -> Any:
    """The class of transformers of that name, with pruned layers."""
    import transformers

    found = None if name.startswith("_") else getattr(transformers, name, None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise AttributeError(f"transformers has no model class '{name}'")
    globals()[name] = made = type(name, (Pruned, found), {"__module__": __name__, "__doc__": found.__doc__})
    return made


class Pruned:
    """Put before a class of transformers: what it builds has the shapes of ``config.pruned``."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        said = getattr(config, "pruned", None) or {}
        for name, shape in said.get("shapes", {}).items():
            _resize(self, name, shape)
        for name, numbers in said.get("numbers", {}).items():
            module = _module(self, name)
            if module is not None:
                set_numbers(module, numbers)
        self.tie_weights()  # type: ignore[attr-defined]

    @classmethod
    def is_custom_code(cls) -> bool:
        """False: weights lie on disk under the names that transformers' own class has for them there."""
        return False


def _module(model: Any, name: str) -> Any:
    """The module of that name, or None; a model without its head, or with one, has the same names but for a prefix."""
    prefix = f"{model.base_model_prefix}."
    for one in (name, name.removeprefix(prefix), prefix + name):
        try:
            return model.get_submodule(one)
        except AttributeError:
            continue
    return None


def _resize(model: Any, name: str, shape: list[int]) -> None:
    owner, _, leaf = name.rpartition(".")
    module = _module(model, owner)
    old = getattr(module, leaf, None)
    if not isinstance(old, Tensor) or list(old.shape) == list(shape):
        return
    new = old.detach()[tuple(slice(size) for size in shape)].clone()
    if isinstance(old, nn.Parameter):
        setattr(module, leaf, nn.Parameter(new, requires_grad=old.requires_grad))
    else:
        setattr(module, leaf, new)
    if leaf == "weight":
        state_sizes(module, tuple(shape))


def state_sizes(module: Any, shape: tuple[int, ...]) -> None:
    """The numbers by which a layer says how wide it is, once its weight has another shape."""
    has = vars(module)
    if {"in_features", "out_features"} <= has.keys():
        module.out_features, module.in_features = shape
    elif {"num_embeddings", "embedding_dim"} <= has.keys():
        module.num_embeddings, module.embedding_dim = shape
    elif {"nx", "nf"} <= has.keys():  # a linear layer whose weight lies the other way round
        module.nx, module.nf = shape
    elif {"in_channels", "out_channels", "groups"} <= has.keys():
        depthwise = module.groups == module.out_channels > 1
        module.groups = shape[0] if depthwise else module.groups
        module.out_channels, module.in_channels = shape[0], shape[1] * module.groups
    elif "normalized_shape" in has:
        module.normalized_shape = shape
    elif "num_features" in has:
        module.num_features = shape[0]


def set_numbers(module: Any, numbers: dict[str, int]) -> None:
    """Numbers that the code of a module reads, as ``num_heads`` or ``config.num_attention_heads``: a config is the
    module's own then."""
    for name, value in numbers.items():
        if name.startswith("config."):
            module.config = copy.copy(module.config)
            setattr(module.config, name.removeprefix("config."), value)
        else:
            setattr(module, name, value)
