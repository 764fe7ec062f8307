"""Load a model from whatever it was saved as, without running code that came with it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from ..errors import FxpruneError, LoadError
from ..ir.proof import Link
from . import archive, images
from .evaluation import unwrap
from .forward import leaf_names, parameter_names
from .given_inputs import INPUT_CURE, read_inputs, to_device
from .images import ImagePreprocess
from .model_args import read_model_args
from .own_description import derive_inputs, timm_cfg
from .pickles import load_pickle
from .refusals import refuse_quantised
from .rehearsal import first_line
from .sentences import load_sentences
from .tensors import AVERAGED, TORCH_SUFFIXES, existing, find_weights, kind_of, shorten
from .timm_models import load_timm

_SOURCES = "a model.pt, a .pt2, a model.onnx, a Hugging Face folder, an fxprune artefact or timm:NAME"


@dataclass(frozen=True)
class Loaded:
    """A model ready to be captured, and what is known about its inputs.

    args, kwargs   example inputs: as they were given, else of batch 2 (as carried by the file for a ``.pt2``)
    image          how a picture becomes an input, for models that take [batch, channels, height, width]
    tokenizer      the folder whose tokenizer makes the model's token ids
    folder         the Hugging Face folder the model came from
    input_names    a name for each leaf of (args, kwargs), in order: that of the input, or its key within a container
    free           input -> the dimensions that may have any size, once the model is captured
    notes          what the user must know: random weights, unused weights, changed precision
    proof          how near the module is to the file that it was made of
    """

    model: nn.Module | ExportedProgram
    name: str
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    image: ImagePreprocess | None = None
    tokenizer: Path | None = None
    folder: Path | None = None
    input_names: tuple[str, ...] = ()
    free: Mapping[str, frozenset[int]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    proof: tuple[Link, ...] = ()

    @property
    def inputs(self) -> dict[str, Any]:
        """Example inputs by name, in the order of ``input_names``."""
        return dict(zip(self.input_names, self.leaves, strict=True))

    @property
    def leaves(self) -> list[Any]:
        """Example inputs, those inside containers as well."""
        return list(pytree.tree_leaves((self.args, dict(self.kwargs))))

    def fill(self, leaves: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs) in the structure of the example inputs, with other ``leaves``."""
        args, kwargs = pytree.tree_unflatten(list(leaves), pytree.tree_structure((self.args, dict(self.kwargs))))
        return args, kwargs

    def with_inputs(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Loaded:
        """The same model with these example inputs, under the names that its ``forward`` gives them."""
        names = leaf_names(parameter_names(self.model), args, kwargs)
        return replace(self, args=tuple(args), kwargs=dict(kwargs), input_names=names)


def load(
    source: nn.Module | ExportedProgram | str | os.PathLike[str],
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    input: str | os.PathLike[str] | Sequence[Any] | Mapping[str, Any] | Tensor | None = None,
    trust_pickle: bool = False,
    need_inputs: bool = True,
    model_args: str | Mapping[str, Any] | None = None,
) -> Loaded:
    """Load ``source``, and find example inputs for it.

    source        a module or exported program; a path to what ``torch.save(model)`` or ``torch.export.save`` wrote, to
                  an ONNX file, a Hugging Face folder or an fxprune artefact; or ``timm:NAME``
    checkpoint    weights for ``timm:NAME``: .pt, .pth or .safetensors
    input         example inputs: ``"1x3x224x224"``, ``"1x128:int64"``, a file of tensors, or tensors. Without it the
                  model's own description is asked (timm's and Hugging Face's configs), then its first layer
    trust_pickle  run whatever code a pickled file contains
    model_args    how ``timm:NAME`` is built (``"img_size=384,num_classes=0"`` or a dict), or entries of a config.json
    need_inputs   raise where no example inputs are known; False leaves them empty, for data to provide them

    Never uses the network. Raises LoadError with what, where, why and cure.
    """
    loaded = _open(source, checkpoint, trust_pickle, read_model_args(model_args))
    try:
        _check_weights(loaded)
        return _describe(_with_inputs(loaded, input, need_inputs))
    except FxpruneError:
        raise
    except Exception as failure:
        if not isinstance(source, (str, os.PathLike)):
            raise
        raise LoadError(
            "the model in the file is damaged", where=str(source), why=first_line(failure), cure="save it again"
        ) from failure


def _open(
    source: Any, checkpoint: str | os.PathLike[str] | None, trust_pickle: bool, built: Mapping[str, Any]
) -> Loaded:
    if isinstance(source, str) and source.startswith("timm:"):
        model, notes = load_timm(source.removeprefix("timm:"), checkpoint, trust_pickle=trust_pickle, options=built)
        return Loaded(model, source.removeprefix("timm:"), notes=notes)
    if checkpoint is not None:
        raise LoadError(
            "a checkpoint needs an architecture",
            where=f"--checkpoint {checkpoint}",
            why=f"{source if isinstance(source, (str, os.PathLike)) else type(source).__name__} brings its own weights",
            cure="timm:NAME `--checkpoint FILE`; for other models put the weights into the module before saving it",
        )
    if built and not isinstance(source, (str, os.PathLike)):
        raise _refuse_options(type(source).__name__)
    if isinstance(source, nn.Module):
        if isinstance(source, torch.jit.ScriptModule):
            raise LoadError(
                "a TorchScript module cannot be exported",
                where=type(source).__name__,
                why="its Python code is gone",
                cure="pass the original nn.Module",
            )
        return Loaded(unwrap(source), type(unwrap(source)).__name__)
    if isinstance(source, ExportedProgram):
        return Loaded(source, "exported")
    if not isinstance(source, (str, os.PathLike)):
        raise LoadError(
            f"a {type(source).__name__} is no model",
            why="a module, an exported program, a path or timm:NAME is expected",
            cure=f"give {_SOURCES}" + ("" if not isinstance(source, Mapping) else "; a state dict has no architecture"),
        )
    return _open_path(Path(source), trust_pickle, built)


def _open_path(path: Path, trust_pickle: bool, built: Mapping[str, Any]) -> Loaded:
    if path.is_dir():
        return _open_folder(path, trust_pickle, built)
    if built and path.exists():
        raise _refuse_options(str(path))
    if not path.exists() and not path.suffix:
        raise LoadError(
            "there is no such model",
            where=str(path),
            why="no file or folder has this name, and nothing is fetched from the network",
            cure=f"give {_SOURCES} (models by timm name: timm:{path.name})",
        )
    existing(path)
    suffix = kind_of(path)
    if suffix == ".pt2":
        return Loaded(archive.read_program(path, trust=trust_pickle), path.stem)
    if suffix == ".safetensors":
        raise _state_dict_alone(path)
    if suffix == ".onnx":
        return _open_onnx(path)
    if suffix not in TORCH_SUFFIXES:
        raise LoadError(
            "this is no kind of model file",
            where=str(path),
            why=f"its suffix is '{path.suffix}'",
            cure=f"give {_SOURCES}",
        )
    found = load_pickle(path, modules=True, trust_pickle=trust_pickle)
    notes: tuple[str, ...] = ()
    if isinstance(found, Mapping) and not isinstance(found, nn.Module):  # {"model": module, "epoch": 3}
        found, notes = _module_in(found)
    if isinstance(found, nn.Module):
        model = unwrap(found)
        try:
            model.eval()
        except Exception as failure:
            raise LoadError("the pickled module is damaged", where=str(path), why=repr(failure)) from None
        return Loaded(model, path.stem, notes=notes)
    if find_weights(found) is not None:
        raise _state_dict_alone(path)
    raise LoadError(
        "the file holds no model",
        where=str(path),
        why=f"it holds a {type(found).__name__}",
        cure="torch.save(model, path) saves the module itself; torch.export.save a program that needs no class",
    )


def _open_onnx(path: Path) -> Loaded:
    from .huggingface import tokenizer_folder
    from .onnx.load import open_onnx

    found = open_onnx(path)
    return Loaded(
        found.module, path.stem, tokenizer=tokenizer_folder(path.parent), notes=found.notes, proof=found.proof
    )


def _module_in(checkpoint: Mapping[Any, Any]) -> tuple[Any, tuple[str, ...]]:
    """The module that a checkpoint holds, averaged weights first, and which one it is where there are several; the
    checkpoint itself where there is none, or no telling which."""
    modules = {str(k): v for k, v in checkpoint.items() if isinstance(v, nn.Module)}
    averaged = [k for k in modules if AVERAGED.search(k)]
    if len(modules) == 1:
        return next(iter(modules.values())), ()
    if len(averaged) != 1 or len(modules) != 2:
        return checkpoint, ()
    other = next(k for k in modules if k != averaged[0])
    return modules[averaged[0]], (f"the file holds modules under {averaged[0]} and {other}: {averaged[0]} taken",)


def _open_folder(folder: Path, trust_pickle: bool, built: Mapping[str, Any]) -> Loaded:
    if (folder / "model.pt2").is_file():
        if built:
            raise _refuse_options(str(folder))
        program = archive.read_program(folder / "model.pt2", trust=trust_pickle)
        return Loaded(program, folder.name)
    found = load_sentences(folder, built)
    if found is not None:
        model, own, tokenizer, notes = found
        return Loaded(model, folder.resolve().name, tokenizer=tokenizer, folder=own, notes=notes)
    raise LoadError(
        "the folder holds no model",
        where=str(folder),
        why="neither config.json (Hugging Face) nor model.pt2 (fxprune artefact) is in it",
        cure=f"give {_SOURCES}",
    )


def _refuse_options(where: str) -> LoadError:
    return LoadError(
        "the model is built already",
        where=where,
        why="`--model-args` say how a model is built by its name (timm:NAME) or by a config.json",
        cure="leave `--model-args` away, or build the model with them before saving it",
    )


def _state_dict_alone(path: Path) -> LoadError:
    return LoadError(
        "the file holds weights alone, and no architecture to put them in",
        where=str(path),
        why="a state dict names tensors; it does not say which model computes with them",
        cure=f"give the architecture: timm:NAME with `--checkpoint {path}`, or a Hugging Face folder with config.json "
        "beside the weights; in Python, load them into the module and pass that",
    )


def _check_weights(loaded: Loaded) -> None:
    """Raise LoadError for weights that are not numbers: every score and comparison after them would be meaningless."""
    model = loaded.model
    if isinstance(model, nn.Module):
        refuse_quantised(model, loaded.name)
    if isinstance(model, ExportedProgram):
        parameters, others = dict(model.named_parameters()), {**dict(model.named_buffers()), **model.constants}
    else:
        parameters, others = dict(model.named_parameters()), dict(model.named_buffers())
    try:
        meta = [name for name, value in parameters.items() if value.is_meta]
        bad = [name for name, value in parameters.items() if _floats(value) and not bool(torch.isfinite(value).all())]
        # buffers may hold -inf on purpose (attention masks), never NaN
        bad += [name for name, value in others.items() if _floats(value) and bool(torch.isnan(value).any())]
    except Exception as failure:
        raise LoadError("the model's weights cannot be read", where=loaded.name, why=repr(failure)[:300]) from None
    if meta:
        raise LoadError(
            "the model has no weights",
            where=f"{loaded.name}: {shorten(meta)}",
            why="they are on the meta device",
            cure="load the weights before passing the model",
        )
    if bad:
        raise LoadError(
            "the model's weights are not finite numbers",
            where=f"{loaded.name}: {shorten(bad)}",
            why="they hold NaN or infinity",
            cure="training diverged, or the file is damaged: take an earlier checkpoint",
        )


def _floats(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_meta and value.dtype.is_floating_point and value.numel() > 0


def _with_inputs(loaded: Loaded, given: Any, needed: bool) -> Loaded:
    model = loaded.model
    if given is None:
        args, kwargs = derive_inputs(model, loaded.folder)
    else:
        args, kwargs, notes = read_inputs(model, given, loaded.name, loaded.folder)
        loaded = replace(loaded, notes=(*loaded.notes, *notes))
    if not args and not kwargs and needed:
        raise LoadError(
            "the model does not say what its inputs look like",
            where=loaded.name,
            why=f"its forward takes ({', '.join(parameter_names(model))})",
            cure=INPUT_CURE,
        )
    return loaded.with_inputs(*to_device(model, args, kwargs))


def _describe(loaded: Loaded) -> Loaded:
    """Add how pictures are preprocessed, for a model whose one floating input looks like pictures."""
    pictures = [
        t
        for t in loaded.leaves
        if isinstance(t, Tensor) and t.dim() == 4 and t.dtype.is_floating_point and t.shape[1] in (1, 3)
    ]
    if len(pictures) != 1:
        return loaded
    shape = pictures[0].shape
    size = (int(shape[1]), int(shape[2]), int(shape[3]))
    cfg = timm_cfg(loaded.model)
    if cfg:
        return replace(loaded, image=images.from_timm(cfg, size))
    if loaded.folder is not None:
        return replace(loaded, image=images.from_preprocessor(images.read_preprocessor(loaded.folder), size))
    return replace(loaded, image=images.assume_preprocess(size))
