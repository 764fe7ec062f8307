"""Models that state what they take: nothing about their inputs has to be guessed."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn


class StatesInputs(nn.Module):
    """A module whose inputs are said where it comes from, such as a file with types, sizes and names.

    examples    inputs that it takes, in the order of its ``forward``; () where none are known
    vocabulary  ids below it are valid wherever it looks something up
    own_names   input of ``forward`` -> what it is called where the module comes from, which need be no word of Python
    """

    examples: tuple[Tensor, ...] = ()
    vocabulary: int = 2

    @property
    def own_names(self) -> Mapping[str, str]:
        """All inputs are called as in ``forward``, unless somebody says otherwise."""
        return {}

    def open_words(self) -> Mapping[str, Mapping[int, str]]:
        """Input of ``forward`` -> dimension -> the word of its open size. Sizes of the same word are equal; a dimension
        that has none is fixed."""
        raise NotImplementedError
