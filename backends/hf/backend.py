"""A folder for transformers: the pruned model as its own class, with generate, a cache, Trainer and save_pretrained."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ...errors import LoweringError, OptionError
from ...intake.archive import read_program
from ...intake.companions import copy_companions
from ...intake.huggingface import switch_cache_off
from ...intake.load import Loaded
from ...intake.pooling import MODULES, transformer_folder
from ...ir.agreement import TOLERANCE
from ...ir.pipeline import Pass
from ...ir.program import Program
from ...ir.rebuild import copy_graph, rebuild
from ...process.silence import quiet
from ...target.backend import Backend, Lowered, Runner
from ...target.parity import eager, inputs_that_run
from . import modeling_pruned
from .config_numbers import KnownClass, numbers_for_shapes, numbers_of
from .fit import ClassState, Numbers, find_config_refusal, input_names, numbers_for, state_of
from .folder import CODE, SourceFolder, need_folder
from .hold_to_class import HoldToClass
from .load import load_whole
from .prove import LIMIT, prove_in_fresh_process

LAYOUTS = ("uniform", "free")


@dataclass(frozen=True)
class HfBackend(Backend):
    """The folder that the model came from, with smaller weights: config, tokenizer and every small file as they were.

    layout   ``uniform``: one number of config.json says the count for all layers, and whatever reads such folders reads
             this one · ``free``: every layer has widths of its own. config.json states them, and ``modeling_pruned.py``
             beside it builds the class so (``trust_remote_code=True``); ``fxprune.load_hf`` needs no code of a folder
    """

    layout: str = LAYOUTS[0]
    source: SourceFolder | None = field(default=None, repr=False, compare=False)

    name: ClassVar[str] = "hf"
    suffix: ClassVar[str] = ".safetensors"
    tolerance: ClassVar[Any] = {**TOLERANCE, torch.float32: LIMIT}
    requires: ClassVar[Sequence[tuple[str, str]]] = (("transformers", "pip install 'fxprune[transformers]'"),)
    packages: ClassVar[Sequence[str]] = ("transformers", "safetensors")
    any_graph: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise OptionError(
                f"hf has no layout '{self.layout}'", where=f"--target {self.name}", cure=f"hf{{layout={LAYOUTS[0]}}}"
            )

    def with_source(self, source: Loaded) -> HfBackend:
        return dataclasses.replace(self, source=SourceFolder.of(source))

    def limits(self, kinds: Sequence[str] = ()) -> tuple[Pass, ...]:
        return (HoldToClass(self.layout, tuple(kinds)),)

    def storable(self, program: Program) -> Program:
        """Weights in the values that the folder's dtype can hold: a bf16 folder comes back bf16."""
        source = self.source
        if source is None:
            return program
        state, changed = dict(program.exported.state_dict), False
        for name, value in state.items():
            dtype = source.dtype_of(name)
            if not value.is_floating_point() or dtype.itemsize >= value.dtype.itemsize:
                continue
            rounded = value.detach().to(dtype).to(value.dtype)
            if not torch.equal(rounded, value):
                _check_range(name, rounded, dtype)
                trained = isinstance(value, torch.nn.Parameter)
                state[name] = torch.nn.Parameter(rounded, value.requires_grad) if trained else rounded
                changed = True
        if not changed:
            return program
        exported = program.exported
        return program.but(exported=rebuild(exported, copy_graph(exported), state_dict=state))

    def lower(self, program: Program, directory: Path) -> Lowered:
        source = need_folder(self.source)
        state = state_of(program, source.model)
        names = input_names(program, source.model)
        changes = _uniform(program, source, state) if self.layout == "uniform" else _free(program, source, state)
        left_out = copy_companions(source.path, directory)
        weights = _write_weights(source, state, directory, program.tensors)
        source.write_config(directory, changes)
        if self.layout == "free":
            for place in {directory, source.own(directory)}:  # sentence-transformers looks at the root
                (place / CODE).write_bytes(Path(str(modeling_pruned.__file__)).read_bytes())
        payload = weights[0]  # of the transformer
        about = {"class": source.class_name, "layout": self.layout, "dtype": str(source.dtype).removeprefix("torch.")}
        notes = (f"files not copied, above 64 MiB or with odd names: {', '.join(left_out)}",) if left_out else ()
        return Lowered(
            payload, tuple(weights), _runner(directory, names), notes=notes, about=about, runtime="transformers"
        )

    def prove(self, program: Program, lowered: Lowered, seed: int = 0) -> Lowered:
        """The folder once more in a process of its own, with transformers alone; and generation with its cache."""
        source = need_folder(self.source)
        found = prove_in_fresh_process(program, _folder_of(lowered.payload), source, seed)
        return dataclasses.replace(lowered, about={**lowered.about, "fresh_process": found})

    def load(self, payload: Path) -> Runner:
        folder = _folder_of(payload)
        args, kwargs = read_program(folder / "model.pt2").example_inputs or ((), {})
        return _runner(folder, [*map(str, range(len(args))), *kwargs])


def _folder_of(payload: Path) -> Path:
    """The folder that a transformer's weights belong to: theirs, or the one whose modules.json names it."""
    above = (f for f in payload.parents if (f / MODULES).is_file() and f / transformer_folder(f) == payload.parent)
    return next(above, payload.parent)


def _runner(folder: Path, names: Sequence[str]) -> Runner:
    """The folder's class in float32, as the program takes its inputs."""
    model = load_whole(folder)
    switch_cache_off(model.config)

    def run(flat: Sequence[Any]) -> list[Any]:
        given = {name: value for name, value in zip(names, flat, strict=True) if value is not None}
        args = [value for name, value in given.items() if name.isdecimal()]
        with torch.no_grad():
            made = model(*args, **{name: value for name, value in given.items() if not name.isdecimal()})
        return [leaf for leaf in pytree.tree_leaves(made) if isinstance(leaf, Tensor)]

    return run


def _free(program: Program, source: SourceFolder, state: ClassState) -> dict[str, Any]:
    """What config.json says besides, where every layer has widths of its own."""
    pruned = {
        "shapes": {own: list(shape) for name, shape in state.shapes.items() if (own := source.in_class(name))},
        "numbers": {
            own: dict(said)
            for name, said in _numbers(program, source, state).items()
            if (own := source.in_class(name)) is not None
        },
    }
    code = {name: f"{CODE.removesuffix('.py')}.{cls}" for name, cls in source.autos().items()}
    return {"auto_map": code, "pruned": pruned}


def _uniform(program: Program, source: SourceFolder, state: ClassState) -> dict[str, Any]:
    """The numbers of config.json that change, with the parts that they stand in. Raises LoweringError where no numbers
    say these shapes."""
    known, own = KnownClass.of(source.model), source.model.state_dict()
    sizes = sorted({size for name in state.shapes for size in own[name].shape})
    shapes = {name: tuple(tensor.shape) for name, tensor in state.tensors.items()}
    if not state.shapes:
        return {}
    flat, _ = inputs_that_run(program, eager(program.exported))
    said = numbers_for_shapes(known, numbers_of(known, sizes), shapes)
    found = next((one for one in said if not find_config_refusal(program, known, one, state, flat)), None)
    if found is None:
        raise LoweringError(
            f"no numbers of {type(source.model.config).__name__} say the widths of this plan",
            where="--target hf",
            why="its layers differ from each other, and one number speaks for all of them",
            cure="`--target hf{layout=free}` takes any widths; a plan made with `--target hf` has uniform ones",
        )
    return source.with_numbers(found)


def _numbers(program: Program, source: SourceFolder, state: ClassState) -> Numbers:
    """The numbers that the class's code needs. Raises LoweringError where it cannot compute what the program does."""
    flat, want = inputs_that_run(program, eager(program.exported))
    numbers, wrong = numbers_for(program, source.model, state, flat, want)
    if numbers is None:
        raise LoweringError(
            f"{source.class_name} cannot take what was cut",
            where="--target hf",
            why=wrong,
            cure="compile with `--target hf` from the start, which freezes what the class cannot say; or "
            "`--target eager` for this plan",
        )
    return numbers


def _write_weights(source: SourceFolder, state: ClassState, directory: Path, read: Container[str]) -> list[Path]:
    """The weights as the library writes them, in the dtypes of the source; the index first where there are shards.

    read   what the graph reads
    """
    by_value: dict[int, Tensor] = {}
    stored = {}
    for name, value in state.tensors.items():
        if id(value) not in by_value and value.data_ptr() not in by_value:
            dtype = source.dtype_of(name) if value.is_floating_point() else value.dtype
            by_value[value.data_ptr()] = value.to(dtype).contiguous()
        stored[name] = by_value[value.data_ptr()]
    model = source.transformer
    kept = dict(vars(model.config))
    own = {at: t for name, t in stored.items() if (at := source.in_class(name)) and not _absent(name, source, read)}
    with tempfile.TemporaryDirectory(dir=directory, prefix=".weights-") as aside, quiet():
        model.save_pretrained(aside, state_dict=own)
        made = [p for p in sorted(Path(aside).iterdir()) if ".safetensors" in p.name]
        paths = [path.rename(source.own(directory) / path.name) for path in made]
    vars(model.config).update(kept)
    paths = sorted(paths, key=lambda path: (path.suffix != ".json", path.name))
    return [*paths, *source.write_stages(directory, stored)]


def _absent(name: str, source: SourceFolder, read: Container[str]) -> bool:
    """Whether a tensor of a sentence encoder is one that neither the folder has nor the embedding needs: a pooler."""
    return source.encoder is not None and name not in read and name not in source.dtypes


def _check_range(name: str, rounded: Tensor, dtype: torch.dtype) -> None:
    if not bool(rounded.isfinite().all()):
        raise LoweringError(
            f"the weight '{name}' does not fit into {str(dtype).removeprefix('torch.')}",
            where="--target hf",
            why="recovery made it larger than the folder's dtype can hold",
            cure="`--recover none`, or a folder in float32 or bfloat16",
        )
