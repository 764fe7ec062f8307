"""What a class can say: which whole numbers of its config move which dimensions of which weights.

Found by building the class on the meta device with one number changed, and comparing all shapes. Nothing about any
class is written down.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from ...intake.pooling import SentenceEncoder
from ...ir.agreement import seeded
from ...process.silence import quiet

Path = tuple[str, ...]
Place = tuple[str, int]
"""A dimension of a weight: (name in the state dict, position)."""
Shapes = Mapping[str, tuple[int, ...]]
MOST_BUILDS = 400


@dataclass(frozen=True)
class Number:
    """A number of a config, and what it moves.

    path    where it stands: ("text_config", "intermediate_size");  value: as it is, or is by default
    moves   the dimensions that change with it
    """

    path: Path
    value: int
    moves: frozenset[Place]


@dataclass(frozen=True)
class KnownClass:
    """A class with its config: what it builds for other numbers.

    cls   config -> model
    """

    cls: Callable[[Any], Any]
    config: Any

    @staticmethod
    def of(model: nn.Module) -> KnownClass:
        """That of a loaded model."""
        return KnownClass(model.rebuilt if isinstance(model, SentenceEncoder) else type(model), model.config)

    def change(self, numbers: Mapping[Path, int]) -> Any:
        """A config with these numbers, as it is read from a file: it may refuse them."""
        config = copy.deepcopy(self.config)
        for path, value in numbers.items():
            part = config
            for name in path[:-1]:
                part = getattr(part, name)
            setattr(part, path[-1], value)
        return type(config).from_dict(config.to_dict())

    def shapes(self, numbers: Mapping[Path, int]) -> Shapes | None:
        """Shapes of the state dict that the class builds with these numbers; None where it does not build."""
        try:
            with torch.device("meta"), quiet():
                made = self.cls(self.change(numbers))
        except Exception:  # whatever the class says of such numbers
            return None
        return {name: tuple(t.shape) for name, t in made.state_dict().items()}

    def build(self, numbers: Mapping[Path, int], tensors: Mapping[str, Tensor]) -> Any:
        """The model that the class builds with these numbers, with these weights. Raises whatever the class says."""
        with seeded(0), quiet():
            made: Any = self.cls(self.change(numbers))
        made.load_state_dict(dict(tensors), assign=True)
        made.tie_weights()
        return made.eval()

    def candidates(self, sizes: Sequence[int]) -> Iterator[tuple[Path, int]]:
        """(path, value) of every whole number; for entries without a value each of ``sizes`` that it may stand for."""
        for path, value in _entries(self.config, ()):
            if type(value) is int and value > 1:
                yield path, value
            elif value is None:
                yield from ((path, size) for size in sizes)


def numbers_of(known: KnownClass, sizes: Sequence[int]) -> tuple[Number, ...]:
    """The numbers of the config that dimensions of weights depend on.

    sizes   that an entry without a value may have by default (``n_inner``)
    """
    whole = known.shapes({})
    if whole is None:
        return ()
    found: dict[Path, Number] = {}
    for path, value in itertools.islice(known.candidates(sizes), MOST_BUILDS):
        if path in found or known.shapes({path: value}) != whole:
            continue
        for other in (value // 2, 2 * value):
            moves = _find_changed(whole, known.shapes({path: other}))
            if moves:
                found[path] = Number(path, value, moves)
                break
    return tuple(found.values())


def numbers_for_shapes(known: KnownClass, numbers: Sequence[Number], shapes: Shapes) -> Iterator[dict[Path, int]]:
    """Every choice of numbers with which the class builds exactly ``shapes``, the fewest first: wider heads and more of
    them may have the same shapes, so what the class then computes must tell."""
    whole = known.shapes({}) or {}
    scaled: dict[Path, int] = {}
    for number in numbers:
        ratios = {Fraction(shapes[name][i], whole[name][i]) for name, i in number.moves if name in shapes}
        for ratio in ratios - {Fraction(1)}:
            if (number.value * ratio).denominator == 1 and len(ratios) == 1:
                scaled[number.path] = int(number.value * ratio)
    for count in range(len(scaled) + 1):
        for chosen in itertools.islice(itertools.combinations(scaled.items(), count), MOST_BUILDS):
            if known.shapes(dict(chosen)) == dict(shapes):
                yield dict(chosen)


def _find_changed(whole: Shapes, other: Shapes | None) -> frozenset[Place]:
    """The dimensions that changed; none where there are other weights, or with other ranks."""
    if other is None or other.keys() != whole.keys() or any(len(other[n]) != len(s) for n, s in whole.items()):
        return frozenset()
    return frozenset((n, i) for n, shape in whole.items() for i, size in enumerate(shape) if other[n][i] != size)


def _entries(part: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    """Entries of a config and of those inside it."""
    for name, value in sorted(vars(part).items()):
        if name.startswith("_"):
            continue
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            yield from _entries(value, (*path, name))
        else:
            yield (*path, name), value
