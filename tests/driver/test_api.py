"""The tool from Python: budgets met, plans that carry over, models left alone, errors early, training afterwards."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.digits import tiny_vit
from torch import Tensor, nn

import fxprune
from fxprune.cli.demo import Digits, DigitsViT, accuracy
from fxprune.errors import (
    BudgetInfeasible,
    FxpruneError,
    InternalError,
    LoweringError,
    NothingToPrune,
    OptionError,
    PlanError,
    VerifyError,
)
from fxprune.process.events import Event, FxpruneWarning
from fxprune.request.goal import kinds_of

SHAPE = "2x1x8x8"


def test_compile_meets_the_budget_and_reports_what_it_did(trained: DigitsViT, tmp_path: Path) -> None:
    events: list[Event] = []
    artifact = fxprune.compile(trained, SHAPE, flops=0.5, out=tmp_path / "small", on_event=events.append)
    report = artifact.report
    assert 0.45 < report["cost"]["ratio"]["flops"] <= 0.5
    assert report["budget"] == {"metric": "flops", "amount": 0.5, "relative": True}
    assert report["parity"]["ok"]
    assert report["masked"]["max_rel"] < report["masked"]["tolerance"]
    assert report["importance"] == "l2"
    assert report["seed"] == 0
    assert {entry["kind"] for entry in report["pruned"]} <= {"head", "ffn"}
    assert all(entry["why"] for entry in report["frozen"])
    assert [r["name"] for r in report["passes"]][-1] == "propagate-axes"
    assert "find-groups" in report["pipeline"]
    assert json.loads((tmp_path / "small" / "report.json").read_text()) == report
    stages = [e.text for e in events if e.kind == "stage"]
    assert stages[:2] == ["load DigitsViT", "capture the graph"]
    assert stages[-1] == "lower to eager, verify and save"
    assert not [e for e in events if e.kind == "warning"]


def test_what_load_gives_back_computes_the_same(trained: DigitsViT, tmp_path: Path, digit_data: Digits) -> None:
    artifact = fxprune.compile(trained, SHAPE, params=0.6, out=tmp_path / "small")
    images = digit_data.test_images[:5]
    torch.testing.assert_close(fxprune.load(tmp_path / "small")(images), artifact.module(images))
    assert sum(p.numel() for p in artifact.module.parameters()) <= 0.6 * sum(p.numel() for p in trained.parameters())


@pytest.mark.parametrize("metric", ["flops", "params", "bytes"])
def test_every_metric_can_be_the_budget(trained: DigitsViT, metric: str) -> None:
    report = fxprune.compile(trained, SHAPE, **{metric: 0.7}).report  # type: ignore[arg-type]
    assert 0.6 < report["cost"]["ratio"][metric] <= 0.7


def test_an_amount_can_be_the_budget(trained: DigitsViT) -> None:
    assert fxprune.compile(trained, SHAPE, params="15k").report["cost"]["compressed"]["params"] <= 15_000


def test_the_callers_model_is_left_alone(trained: DigitsViT) -> None:
    before, form = copy.deepcopy(trained.state_dict()), trained.train()
    artifact = fxprune.compile(trained, SHAPE, flops=0.5)
    assert form.training
    assert trained.patch.weight.requires_grad
    with torch.no_grad():
        for parameter in artifact.module.parameters():
            parameter.add_(1.0)
    for name, tensor in trained.state_dict().items():
        assert torch.equal(tensor, before[name]), f"{name} is shared with the result"


def test_same_inputs_same_plan(trained: DigitsViT, digit_data: Digits) -> None:
    data = {"images": digit_data.train_images[:48], "labels": digit_data.train_labels[:48]}
    batches = [(data["images"][i : i + 16], data["labels"][i : i + 16]) for i in (0, 16, 32)]
    plans = [fxprune.plan(trained, SHAPE, flops=0.5, data=batches).need("plan").to_json() for _ in range(2)]
    assert plans[0] == plans[1]
    about = json.loads(plans[0])["about"]
    assert about["criterion"] == "trajectory"  # the default when there is data
    assert about["samples"] == 48


def test_random_scores_follow_the_seed(trained: DigitsViT) -> None:
    def choose(seed: int) -> Any:
        return fxprune.plan(trained, SHAPE, flops=0.5, importance="random", seed=seed).need("plan").choices

    assert choose(1) == choose(1)
    assert choose(1) != choose(2)


def test_generated_inputs_are_told_loudly(trained: DigitsViT) -> None:
    with pytest.warns(FxpruneWarning, match="generated inputs"):
        artifact = fxprune.compile(trained, SHAPE, flops=0.6, importance="taylor")
    assert artifact.report["data"]["generated"]
    assert any("generated inputs" in note for note in artifact.report["notes"])


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"last_hidden_state": self.down(self.up(x).relu())}


def test_an_encoder_does_without_labels_it_cannot_predict() -> None:
    """Texts with similarity scores are good texts for a sentence encoder, which has no head for the scores."""
    torch.manual_seed(0)
    data = [(torch.randn(4, 3, 8), torch.rand(4)) for _ in range(2)]
    with pytest.warns(FxpruneWarning, match="labels .* are left out"):
        artifact = fxprune.compile(Encoder(), (torch.randn(2, 3, 8),), flops=0.5, data=data)
    assert artifact.report["importance"] == "trajectory"
    assert not artifact.report["data"]["labelled"]


class DropsAlways(Encoder):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"y": self.down(nn.functional.dropout(self.up(x), 0.5, training=True))}


def test_a_model_that_draws_random_numbers_is_told_so() -> None:
    with pytest.raises(VerifyError, match=r"random numbers in evaluation \(dropout\)"):
        fxprune.compile(DropsAlways(), (torch.randn(4, 3, 8),), flops=0.5)


def test_labels_that_do_not_fit_a_classifier_are_a_mistake(trained: DigitsViT, digit_data: Digits) -> None:
    with pytest.raises(FxpruneError, match="out of range"):
        fxprune.plan(
            trained, SHAPE, flops=0.5, importance="fisher", data=[(digit_data.train_images[:4], torch.full((4,), 77))]
        )


# ------------------------------------------------------------ plan and apply


def test_a_plan_is_applied_from_its_file_and_equals_compile(trained: DigitsViT, tmp_path: Path) -> None:
    program = fxprune.plan(trained, SHAPE, flops=0.5, out=tmp_path / "plan.json")
    assert program.plan is not None
    applied = fxprune.apply(trained, tmp_path / "plan.json", SHAPE)
    compiled = fxprune.compile(trained, SHAPE, flops=0.5)
    assert applied.plan.choices == compiled.plan.choices
    x = torch.randn(3, 1, 8, 8)
    torch.testing.assert_close(applied.module(x), compiled.module(x), rtol=0, atol=0)


def test_a_plan_fits_another_checkpoint_of_the_same_architecture(trained: DigitsViT) -> None:
    plan = fxprune.plan(trained, SHAPE, flops=0.5).need("plan")
    other = tiny_vit()
    artifact = fxprune.compile(other, SHAPE, plan=plan)
    assert artifact.report["masked"]["max_rel"] < 1e-4
    kept = plan.choices["blocks.0.mlp.0:ffn"].keep
    torch.testing.assert_close(
        artifact.module.state_dict()["blocks.0.mlp.0.weight"], other.state_dict()["blocks.0.mlp.0.weight"][list(kept)]
    )


def test_a_plan_does_not_fit_another_architecture(trained: DigitsViT) -> None:
    plan = fxprune.plan(trained, SHAPE, flops=0.5).need("plan")
    with pytest.raises(PlanError, match="another architecture"):
        fxprune.apply(DigitsViT(dim=32, depth=2, heads=2, hidden=64), plan, SHAPE)


def test_an_empty_plan_changes_nothing_bit_for_bit(trained: DigitsViT) -> None:
    artifact = fxprune.apply(trained, fxprune.CompressionPlan(), SHAPE)
    x = torch.randn(4, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(artifact.module(x), trained(x))
    assert artifact.report["cost"]["ratio"] == {"flops": 1.0, "params": 1.0, "bytes": 1.0}


def test_inspect_finds_heads_and_neurons(trained: DigitsViT) -> None:
    program = fxprune.inspect(trained, SHAPE, freeze="blocks.0.*")
    groups = {g.name: g for g in program.need("groups")}
    assert groups["blocks.1.attn.qkv:head"].size == 4
    assert groups["blocks.1.mlp.0:ffn"].size == 96
    assert groups["blocks.0.mlp.0:ffn"].frozen == "asked to freeze 'blocks.0.*'"
    assert groups["patch:width"].exact is False


# ------------------------------------------------------------ steering


def test_prune_chooses_the_kinds(trained: DigitsViT) -> None:
    report = fxprune.compile(trained, SHAPE, flops=0.7, prune="ffn").report
    assert {entry["kind"] for entry in report["pruned"]} == {"ffn"}


def test_frozen_layers_keep_their_size(trained: DigitsViT) -> None:
    plan = fxprune.plan(trained, SHAPE, flops=0.75, freeze=["blocks.1.*"]).need("plan")
    assert plan.choices
    assert all(name.startswith("blocks.0.") for name in plan.choices)


def test_neurons_come_in_aligned_counts(trained: DigitsViT) -> None:
    def counts(align: int | None) -> list[int]:
        plan = fxprune.plan(trained, SHAPE, flops=0.5, align=align).need("plan")
        return [len(c.keep) for c in plan.choices.values() if c.kind == "ffn"]

    assert sum(n % 8 != 0 for n in counts(None)) <= 1, "what whole steps leave of a budget may be filled by finer ones"
    assert all(n % 16 == 0 for n in counts(16))


@pytest.mark.parametrize(
    ("words", "kinds"),
    [
        ("heads,ffn", ["head", "kv", "ffn"]),
        ("channel", ["channel"]),
        (["ffn", fxprune.Kind.QK], ["ffn", "qk"]),
        ("neuronz", ["neuronz"]),  # SearchPlan names the nearest kind
    ],
)
def test_kinds_by_the_names_people_use(words: Any, kinds: list[str]) -> None:
    assert [str(k) for k in kinds_of(words)] == kinds


# ------------------------------------------------------------ what goes wrong


@pytest.mark.drawn(6)
@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({}, OptionError, "exactly one budget"),
        ({"flops": 0.5, "params": 0.5}, OptionError, "exactly one budget"),
        ({"flops": 0}, OptionError, "must be positive"),
        ({"flops": -1}, OptionError, "must be positive"),
        ({"flops": 1.5}, OptionError, "at most 1"),
        ({"flops": "half"}, OptionError, "not a budget"),
        ({"flops": float("nan")}, OptionError, "not a budget"),
        ({"flops": 0.5, "plan": fxprune.CompressionPlan()}, OptionError, "not both"),
        ({"flops": 0.5, "target": "onx"}, OptionError, "did you mean 'onnx'"),
        ({"flops": 0.5, "importance": "fischer"}, OptionError, "did you mean 'fisher'"),
        ({"flops": 0.5, "prune": "neuronz"}, OptionError, "unknown kind"),
        ({"flops": 0.5, "align": 0}, OptionError, "align must be"),
        ({"flops": 0.5, "floor": 2.0}, OptionError, "share between 0 and 1"),
        ({"flops": 0.5, "data": []}, FxpruneError, "empty|no data|no batch"),
        ({"flops": 0.01}, BudgetInfeasible, "reachable"),
        ({"flops": 0.5, "freeze": ["*"]}, NothingToPrune, "nothing in this model"),
        ({"flops": 0.5, "example_inputs": "2x3x8x8"}, FxpruneError, "does not accept"),
    ],
)
def test_requests_that_cannot_be_met(options: dict[str, Any], kind: type[Exception], text: str, tmp_path: Path) -> None:
    with pytest.raises(kind, match=f"(?s){text}"):
        fxprune.compile(tiny_vit(), **{"example_inputs": SHAPE, "out": tmp_path / "out", **options})
    assert not list(tmp_path.iterdir())


def test_wrong_names_are_told_before_the_work_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("the model was captured first")

    monkeypatch.setattr("fxprune.intake.capture.capture", never)
    for wrong in ({"target": "onx"}, {"importance": "fischer"}, {"prune": "neuronz"}, {"align": 0}):
        with pytest.raises(OptionError):
            fxprune.compile(tiny_vit(), SHAPE, flops=0.5, **wrong)  # type: ignore[arg-type]


def test_a_directory_of_somebody_else_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("ten years of work")
    with pytest.raises(OptionError, match="left alone"):
        fxprune.compile(tiny_vit(), SHAPE, flops=0.5, out=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("failure", [LoweringError("no such op"), KeyboardInterrupt()])
def test_a_failure_while_lowering_leaves_the_old_artefact(
    failure: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = tiny_vit(), tmp_path / "out"
    fxprune.compile(model, SHAPE, flops=0.7, out=out)
    before = {p.name: p.read_bytes() for p in out.iterdir()}

    def fail(_self: object, _program: object, directory: Path) -> None:
        (directory / "model.pt2").write_bytes(b"half")
        raise failure

    monkeypatch.setattr("fxprune.backends.eager.backend.EagerBackend.lower", fail)
    with pytest.raises(type(failure)):
        fxprune.compile(model, SHAPE, flops=0.5, out=out)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_bug_in_a_pass_carries_the_pipeline_that_reproduces_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(_self: object, _program: object) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("fxprune.passes.transform.slice_axes.SliceAxes.run", wrong)
    with pytest.raises(InternalError, match=r"oops(?s:.*)pipeline  clean,.*search-plan\{budget=flops=0.5\},slice-axes"):
        fxprune.compile(tiny_vit(), SHAPE, flops=0.5)


def test_wrong_slicing_is_caught_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fxprune.passes.transform import slice_axes

    def scramble(program: Any, keep: Any, made_by: str) -> Any:
        return resize(program, {axis: (index + 1) % axis.size for axis, index in keep.items()}, made_by)

    resize = slice_axes.resize
    monkeypatch.setattr(slice_axes, "resize", scramble)
    with pytest.raises(InternalError, match="the dense graph with masks and the sliced one differ"):
        fxprune.compile(tiny_vit(), SHAPE, flops=0.5, out=tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_module_without_inputs_says_what_to_give() -> None:
    class Odd(nn.Module):
        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            return left @ right

    with pytest.raises(FxpruneError, match=r"(?s)what its inputs look like.*example_inputs="):
        fxprune.compile(Odd(), flops=0.5)


# ------------------------------------------------------------ afterwards


def test_the_pruned_module_fine_tunes_on_digits(trained: DigitsViT, digit_data: Digits, tmp_path: Path) -> None:
    artifact = fxprune.compile(trained, SHAPE, flops=0.5, importance="random", seed=1)
    module = artifact.module
    images, labels = digit_data.test_images, digit_data.test_labels
    with torch.no_grad():
        pruned = accuracy(module(images), labels)
    optimiser = torch.optim.AdamW(module.parameters(), lr=3e-3)
    for _ in range(3):
        for index in torch.randperm(len(digit_data.train_labels)).split(32):
            loss = nn.functional.cross_entropy(module(digit_data.train_images[index]), digit_data.train_labels[index])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    with torch.no_grad():
        tuned = accuracy(module(images), labels)
        logits = module(images)
    assert pruned < 0.7  # random scores do hurt
    assert tuned > max(0.75, pruned + 0.1)
    artifact.save(tmp_path / "tuned")
    with torch.no_grad():
        torch.testing.assert_close(fxprune.load(tmp_path / "tuned")(images), logits)


def test_a_batch_of_any_size_runs(trained: DigitsViT) -> None:
    module = fxprune.compile(trained, SHAPE, flops=0.5).module
    x = torch.randn(7, 1, 8, 8)
    with torch.no_grad():
        whole = module(x)
        assert whole.shape == (7, 10)
        torch.testing.assert_close(whole, torch.cat([module(x[i : i + 1]) for i in range(7)]), rtol=1e-4, atol=1e-4)


def test_width_of_queries_and_values_is_cut_apart_and_the_plan_applies_again(trained: DigitsViT) -> None:
    """A fused qkv is unfused when its widths are asked for, and again when the plan is applied."""
    images = torch.randn(2, 1, 8, 8)
    small = fxprune.compile(trained, images, flops=0.9, prune="qk,v", align=1)
    assert {c.kind for c in small.plan.choices.values()} <= {"qk", "v"}
    again = fxprune.apply(trained, small.plan, images)
    assert torch.equal(again.module(images), small.module(images))
