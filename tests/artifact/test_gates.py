"""Gates: a figure that is no number fails, and what was not measured never passes."""

from __future__ import annotations

import math
from xml.etree import ElementTree as ET

import pytest

from fxprune.artifact.evidence import fail_gate
from fxprune.artifact.gates import FAILED, PASSED, UNFINISHED, Gate, Limits, exit_code, gate, junit, worst
from fxprune.errors import MissingDevice, OptionError, VerifyError


def test_a_gate_holds_up_to_its_limit_and_fails_for_what_is_no_number() -> None:
    assert gate("drop", 0.01, 0.01).status == PASSED
    assert gate("drop", -0.2, 0.01).status == PASSED
    for bad in (0.0101, math.inf, math.nan):
        one = gate("drop", bad, 0.01, "top1")
        assert one.status == FAILED
        assert one.why
    assert gate("drop", math.nan, 0.01).measured is None  # JSON has no NaN


def test_failed_beats_unfinished_beats_passed_and_nothing_is_no_pass() -> None:
    assert worst([PASSED, PASSED]) == PASSED
    assert worst([PASSED, UNFINISHED]) == UNFINISHED
    assert worst([UNFINISHED, FAILED, PASSED]) == FAILED
    assert worst([]) == UNFINISHED
    assert [exit_code(s) for s in (PASSED, FAILED, UNFINISHED)] == [0, 3, 4]


def test_a_missing_device_leaves_a_gate_unfinished_and_anything_else_fails_it() -> None:
    assert fail_gate("target", MissingDevice("no GPU")).status == UNFINISHED
    assert fail_gate("parity", VerifyError("it differs", why="by much")).why == "it differs; by much"


@pytest.mark.parametrize(
    "wrong", [{"max_drop": -0.1}, {"max_latency_ms": math.nan}, {"max_kl": math.inf}, {"batch": 0}, {"threads": -1}]
)
def test_limits_that_make_no_sense_are_errors(wrong: dict[str, float]) -> None:
    with pytest.raises(OptionError, match="="):
        Limits(**wrong)  # type: ignore[arg-type]


def test_the_junit_report_counts_and_escapes() -> None:
    gates = [gate("drop", 0.5, 0.01, "top1"), gate("parity", 1e-7, 1e-4), Gate("target", UNFINISHED, why="a < b\x00")]
    top = ET.fromstring(junit("model & co", {"onnx": gates}))
    suite = top.find("testsuite")
    assert suite is not None
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("3", "1", "1")
    assert [c.get("name") for c in suite] == ["drop", "parity", "target"]
    skipped = suite.find("testcase[@name='target']/skipped")
    assert skipped is not None
    assert skipped.get("message") == "a < b "
