"""Names: found lazily, misspelt ones answered with the nearest, clashes with both owners."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune import registry
from fxprune.errors import OptionError
from fxprune.extend import Analysis, Criterion, Program, prunable
from fxprune.ir.group import LAYERS
from fxprune.passes.analysis.score_groups import criterion
from fxprune.registry import backend, lookup, names
from fxprune.target.backend import Backend


def test_backends_are_made_by_name_with_their_options() -> None:
    assert backend("eager").name == "eager"
    assert backend("onnx", opset=20).opset == 20
    assert {"eager", "onnx"} <= set(names("backend"))


@pytest.mark.parametrize(
    ("kind", "wrong", "right"),
    [("backend", "onxx", "onnx"), ("criterion", "tailor", "taylor"), ("pass", "slice-axis", "slice-axes")],
)
def test_a_misspelt_name_is_answered_with_the_nearest(kind: str, wrong: str, right: str) -> None:
    with pytest.raises(OptionError, match=f"did you mean '{right}'") as caught:
        lookup(kind, wrong)
    assert wrong in caught.value.what
    assert caught.value.exit_code == 2


def test_an_unknown_option_of_a_backend() -> None:
    with pytest.raises(OptionError, match="did you mean 'opset'"):
        backend("onnx", opsett=18)
    with pytest.raises(OptionError, match="no option 'opset'"):
        backend("eager", opset=18)


def test_every_built_in_name_is_there() -> None:
    for sort, table in registry.TABLES.items():
        for name in table:
            if sort == "kind":
                made = registry.kind(name)
                assert registry.brings_passes(name) == (name in map(str, LAYERS))
                assert [lookup("pass", one.slug()) for one in (made.find, made.apply)] == [made.find, made.apply]
            else:
                assert callable(lookup(sort, name)), name


def plugins(monkeypatch: pytest.MonkeyPatch, *points: tuple[str, str]) -> None:
    found = [metadata.EntryPoint(name, value, "fxprune.plugins") for name, value in points]
    others = metadata.entry_points  # libraries that are imported meanwhile ask for points of their own

    def points(**asked: str) -> Any:
        return found if asked.get("group") == "fxprune.plugins" else others(**asked)

    monkeypatch.setattr(metadata, "entry_points", points)


def test_a_plugin_joins(monkeypatch: pytest.MonkeyPatch) -> None:
    plugins(monkeypatch, ("backend.again", "fxprune.backends.eager.backend:EagerBackend"))
    assert isinstance(backend("again"), Backend)
    assert "again" in names("backend")
    assert "again" not in names("criterion")


class Whatever(Criterion):
    """A criterion whose class says nothing of its name."""

    unit = "none"

    def scores(self, program: Program, data: object, seed: int) -> dict[str, Tensor]:
        return {g.name: torch.ones(g.size) for g in prunable(program)}


@dataclass(frozen=True)
class Unlike(Analysis):
    loud: bool = False

    def run(self, program: Program) -> Program:
        return program


@pytest.fixture
def anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that are given to classes here are taken back."""
    monkeypatch.setattr(Whatever, "name", "", raising=False)
    monkeypatch.setattr(Unlike, "name", "")


def test_classes_of_plugins_may_be_called_as_they_like(monkeypatch: pytest.MonkeyPatch, anew: None) -> None:
    """Names come from entry points: reports, and pipelines that are read back, use them."""
    plugins(monkeypatch, ("criterion.even", f"{__name__}:Whatever"), ("pass.look-on", f"{__name__}:Unlike"))
    assert str(criterion("even")) == "even"
    look = lookup("pass", "look-on")
    assert str(look(loud=True)) == "look-on{loud=true}"
    made = fxprune.compile(
        nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8)),
        torch.randn(2, 8),
        pipeline="propagate-axes,look-on,find-groups,score-groups{criterion=even},search-plan{budget=flops=0.6},slice-axes",
    )
    assert made.report["importance"] == "even"
    assert ",look-on,find-groups" in made.report["pipeline"]
    assert "score-groups{criterion=even}" in made.report["pipeline"]


def test_classes_of_ours_may_be_called_as_they_like() -> None:
    """Where a name lies is written out: nothing is made of it."""
    for sort, table in registry.TABLES.items():
        assert sort == "kind" or all(":" in place for place in table.values()), sort
    assert lookup("criterion", "magnitude").__name__ == "TileMagnitude"
    for name in registry.CRITERIA:
        assert lookup("criterion", name).name == name
    for name in registry.PASSES:
        assert lookup("pass", name).slug() == name


def test_a_class_that_states_another_name_than_its_entry_point_is_refused(
    monkeypatch: pytest.MonkeyPatch, anew: None
) -> None:
    plugins(monkeypatch, ("criterion.one", f"{__name__}:Whatever"), ("criterion.two", f"{__name__}:Whatever"))
    assert lookup("criterion", "one").name == "one"
    with pytest.raises(OptionError, match="the criterion 'two' calls itself 'one'") as caught:
        lookup("criterion", "two")
    assert "criterion.one" in caught.value.cure


def test_two_owners_of_one_name_are_both_named_to_whoever_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    plugins(monkeypatch, ("backend.mine", "one.place:Mine"), ("backend.mine", "other.place:Mine"))
    assert backend("eager").name == "eager", "in nobody else's way"
    with pytest.raises(OptionError, match="two packages offer the backend 'mine'") as caught:
        backend("mine")
    assert "one.place:Mine" in caught.value.why
    assert "other.place:Mine" in caught.value.why


def test_a_built_in_name_cannot_be_taken_over(monkeypatch: pytest.MonkeyPatch) -> None:
    plugins(monkeypatch, ("backend.onnx", "other.place:Onnx"))
    assert type(backend("onnx")).__module__ == "fxprune.backends.onnx.backend"


def test_a_plugin_that_is_broken_or_misnamed(monkeypatch: pytest.MonkeyPatch) -> None:
    plugins(monkeypatch, ("backend.gone", "no_such_package.x:Y"))
    with pytest.raises(OptionError, match="cannot be imported") as caught:
        backend("gone")
    assert "no_such_package" in caught.value.where
    assert backend("eager").name == "eager", "in nobody else's way"
    plugins(monkeypatch, ("onnx2", "x:Y"))
    assert "eager" in names("backend")
    with pytest.raises(OptionError, match=r"onnx2 = x:Y.*kind\.name"):
        backend("onnx2")


def test_plugins_are_not_looked_up_before_a_name_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    def unexpected(**_: object) -> list[object]:
        raise AssertionError("entry points were read")

    monkeypatch.setattr(metadata, "entry_points", unexpected)
    for kind, table in registry.TABLES.items():
        if kind == "kind":  # those of fxprune bring no passes of their own
            assert not registry.brings_passes(next(iter(table)))
        else:
            lookup(kind, next(iter(table)))


def test_looking_up_names_imports_no_backend() -> None:
    code = (
        "import sys, fxprune.registry as r; r.names('backend');"
        "assert not {'onnx', 'onnxruntime', 'onnxscript', 'fxprune.backends.onnx'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_what_a_backend_knows_of_the_source_is_no_option_of_it() -> None:
    with pytest.raises(OptionError, match="no option 'folder'") as refused:
        registry.backend("onnx", folder=".")
    assert "names" not in refused.value.cure.split("known:")[-1]
