"""The text IR, quoted: a reviewer sees what a rewrite does."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.laws import ALL_KINDS, analysed, random_plan, sliced

from fxprune.ir.pipeline import Pipeline
from fxprune.ir.printer import to_text
from fxprune.passes.analysis.find_groups import FindGroups
from fxprune.passes.analysis.propagate_axes import PropagateAxes

GOLDEN = Path(__file__).parents[1] / "golden"
BLOCKS = ["gated_ffn", "attention_matmul", "gqa_repeat", "rotary", "shuffle", "transposed_weights", "group_norm"]


@pytest.mark.parametrize("name", BLOCKS)
def test_golden(name: str, request: pytest.FixtureRequest) -> None:
    """Axes of the dense block with a plan, and the block after slicing. Rewrite with ``--golden``."""
    program = analysed(name)
    plan = random_plan(program, ALL_KINDS, 0.5, seed=0)
    result = Pipeline((PropagateAxes(), FindGroups())).run(sliced(program, plan))
    text = f"{to_text(program.but(plan=plan))}\n-- sliced\n\n{to_text(result)}"
    path = GOLDEN / f"{name}.txt"
    if request.config.getoption("--golden"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


def test_a_plan_is_quoted_on_the_line_that_makes_the_axis() -> None:
    program = analysed("gated_ffn")
    text = to_text(program.but(plan=random_plan(program, ALL_KINDS, 0.5, seed=0)))
    assert "ffn: " in text
    assert "{keep " in text


def test_parameters_are_listed_on_request() -> None:
    program = analysed("gated_ffn")
    assert "%x = input" in to_text(program)
    assert len(to_text(program, inputs=True).splitlines()) > len(to_text(program).splitlines())


def test_a_program_without_facts_prints_its_shapes() -> None:
    text = to_text(analysed("gated_ffn").without_facts())
    assert "linear(" in text
    assert "24]" in text
