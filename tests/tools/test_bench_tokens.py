"""tools/bench/tokens.py without its model: cells and keys, that it resumes, its targets, table, picture, and recipe."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import drawing
from support.token_models import TokenViT, scrambled
from torch import Tensor, nn

import fxprune
from bench.accuracy.models import Images
from bench.tokens import run as tokens_run
from bench.tokens import tokens
from bench.tokens.cells import LEDGERS, RATIOS, RECOVERIES, REDUCERS, SCHEDULES, add_schedule, key, ledgers, sweep
from bench.tokens.compare import pack_bits
from bench.tokens.model import Recipe, Stage, crop, mix, splits, train_cached
from bench.tokens.plot import against_dense, plot
from bench.tokens.run import closeness, name_of
from bench.tokens.sweep import Sweep
from bench.tokens.tokens import check, table
from fxprune.errors import OptionError

DENSE = {"accuracy": 80.0, "macs": 1000, "counted": 1000, "tokens": [17, 17], "weights": "w"}


def records(optin: float = 78.0, constant: float = 77.0, joint: float = 79.0, realised: float = 0.9) -> list[Any]:
    """All that the targets ask for."""
    figures = {"optin": optin, "constant": constant, "decreasing": 70.0, "auto": optin}
    found = [
        {
            **cell.record(64, "w"),
            "accuracy": joint if cell.row == "joint" else figures.get(cell.schedule, 75.0),
            "agreement": 90.0,
            "kl": 0.1,
            "macs": int(1000 * cell.ratio),
            "share": cell.ratio,
            "seconds": 1.0,
        }
        for cell in (*sweep(list(REDUCERS), SCHEDULES, RATIOS), *ledgers(list(LEDGERS), RECOVERIES, [0.5]))
    ]
    for record in found:
        record |= {"images": 1000, "right": pack_bits(torch.arange(1000) < round(10 * record["accuracy"]))}
        if record["row"] == "joint" and record["recover"] == "auto":
            record["latency"] = {
                b: {"dense_ms": 10.0, "reduced_ms": 5.5, "speedup": 1.8, "realised": realised} for b in ("1", "32")
            }
    return found


def test_cells_have_keys_of_their_own() -> None:
    cells = [*sweep(list(REDUCERS), SCHEDULES, RATIOS), *ledgers(list(LEDGERS), RECOVERIES, RATIOS)]
    made = [cell.record(64, "w") for cell in cells]
    keys = {key(r) for r in made}
    # tokens alone without recovery is ToMe of the sweep, and is measured once
    assert len(keys) == len(cells) - len(RATIOS) == 8 * 5 * 6 + 6 * 6 - 6
    assert len({name_of(r) for r in made}) == len(made)
    first = made[0]
    assert key({**first, "accuracy": 1.0, "seconds": 3}) == key(first)
    for changed in ({"samples": 65}, {"weights": "v"}, {"ratio": 0.55}, {"recover": "auto"}, {"tokens": "off"}):
        assert key({**first, **changed}) != key(first)
    assert json.loads(json.dumps(first)) == first


def test_schedules_go_into_the_braces() -> None:
    assert add_schedule("ppt", "decreasing") == "ppt{schedule=decreasing}"
    assert add_schedule("prune{score=class}", "optin") == "prune{score=class,schedule=optin}"
    assert add_schedule("tome", "elimination") == "tome{schedule=optin,guard=false}"
    (drawn,) = sweep(["random"], ["constant"], [0.5], seed=2)
    assert (drawn.tokens, drawn.seed) == ("random{seed=2,schedule=constant}", 2), "another seed is another draw"


@pytest.mark.parametrize(
    ("changed", "met", "missed"),
    [
        ({}, 15, 0),
        ({"optin": 77.0}, 15, 0),
        ({"optin": 76.9}, 3, 12),
        ({"optin": 76.0}, 2, 13),
        ({"joint": 77.9}, 14, 1),
        ({"realised": 0.84}, 14, 1),
    ],
)
def test_targets(changed: dict[str, float], met: int, missed: int) -> None:
    found = check(records(**changed))
    assert tuple(map(len, found[:2])) == (met, missed), found
    assert len(found[2]) == 7 * 6 + 8 * 6 + 6 + 1, "other reducers and the default schedule are reported beside"


def test_what_was_not_measured_is_missed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tokens.main(["--out", str(tmp_path / "nothing.json"), "--check"]) == 1
    said = capsys.readouterr().out
    assert "missed: tome at 0.4: optin and constant were not both measured" in said
    assert "missed: no latency was measured at batch 32" in said
    assert "nothing was measured" in said


def test_the_table() -> None:
    failed = {**records()[0], "ratio": 0.1}
    del failed["accuracy"]
    failed["error"] = "the budget is too small"
    text = table(
        {
            "model": DENSE,
            "ratios": [0.9, 0.5],
            "measured": [*(r for r in records() if r["row"] != "zero-tprune"), failed],
        }
    )
    assert "dense: 80.00 %, 0.0 M MACs, 17 tokens" in text
    assert "tokens alone, schedule optin" in text
    assert "78.00 (0.1000)" in text
    assert "joint, recover=auto" in text
    assert "zero-tprune" not in text, "rows that were not measured take no line"
    assert "failed: tome constant recover=none at 0.1: the budget is too small" in text
    assert "joint auto recover=auto at 0.5, batch 32: 10.00 -> 5.50 ms, x1.80, 0.90 of ideal" in text


def test_the_picture_compares_with_dense_on_the_same_images() -> None:
    found = against_dense(
        [{"accuracy": 79.0, "images": 60}, {"accuracy": 79.0, "images": 30}], {"accuracy": 80.0, "images": 60}
    )
    assert [r["accuracy"] for r in found] == [-1.0]


def test_the_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    paths = plot({"model": DENSE, "measured": records()}, tmp_path / "picture")
    assert [p.suffix for p in paths] == [".png", ".svg"]
    assert all(p.stat().st_size > 1000 for p in paths)


class Classifier(nn.Module):
    """images [batch, 3, 4, 4] -> logits [batch, 10]"""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(48, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(images.flatten(1))


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A bench whose product call hands back the dense model and whose clock is no clock."""
    import fxprune
    from fxprune.ir.plan import CompressionPlan

    torch.manual_seed(0)
    model, images = Classifier().eval(), torch.randn(60, 3, 4, 4)
    split = tokens_run.Split(images, model(images).argmax(1))
    artifact = fxprune.apply(model, CompressionPlan(), images[:2], on_event=lambda _: None)
    calls: list[Any] = []

    def reduced(model: nn.Module, example: Tensor, cell: Any, *_: Any) -> Any:
        calls.append(cell)
        if cell.ratio < 0.2:
            raise OptionError("the budget is too small")
        return artifact, ["a warning"]

    monkeypatch.setattr(tokens_run, "reduce", reduced)

    def planned(_: Any, cell: Any) -> Any:
        calls.append(cell)
        if cell.ratio < 0.2:
            raise OptionError("the budget is too small")
        return (lambda batch: model(*batch.args)), 240, [17, 12]

    def stated(model: nn.Module, example: Tensor, cell: Any, removed: Any, out: Path) -> Any:
        calls.append(removed)
        return SimpleNamespace(report={"cost": {"compressed": {"flops": 240}}})

    def of_counts(_: Any, cell: Any, tokens: Any, macs: int) -> Any:
        calls.append((cell, tokens, macs))
        return lambda batch: model(*batch.args)

    monkeypatch.setattr(tokens_run.Sweep, "plan", planned)
    monkeypatch.setattr(tokens_run.Sweep, "of_counts", of_counts)
    monkeypatch.setattr(tokens_run.Sweep, "count_removed", lambda *_: [5, 0])
    monkeypatch.setattr(tokens_run, "state_counts", stated)
    monkeypatch.setattr(tokens_run, "dense_onnx", lambda *_: Path("dense"))
    monkeypatch.setattr(tokens_run, "payload", lambda path: path)
    monkeypatch.setattr(tokens_run, "time_pair", lambda *_: {"dense_ms": 2.0, "reduced_ms": 1.0, "speedup": 2.0})
    made = tokens_run.Bench(model, "w", split, split, split, 32, tmp_path, lambda _: None, lambda _: None)
    made.open()
    return SimpleNamespace(made=made, calls=calls)


def test_it_measures_nothing_twice(bench: Any) -> None:
    cell, hopeless = ledgers(["joint"], ["auto"], [0.5, 0.1])
    bench.made.run([cell, hopeless], {})
    first, failed = bench.made.records
    assert bench.made.dense["accuracy"] == first["accuracy"] == 100
    assert (first["agreement"], first["kl"], first["share"]) == (100, 0, 1)
    assert first["macs"] == first["counted"] == 480
    assert first["notes"] == ["a warning"]
    assert "latency" not in first
    assert "the budget is too small" in failed["error"]

    bench.calls.clear()
    bench.made.run([cell], {})
    assert not bench.calls
    bench.made.run([cell], {cell: (1, 32)})
    assert len(bench.calls) == 1, "only the latency was missing"
    later = bench.made.records[-1]
    assert later["accuracy"] == first["accuracy"]
    assert set(later["latency"]) == {"1", "32"}
    assert later["latency"]["32"]["realised"] == 2
    bench.made.run([cell], {cell: (1, 32)})
    bench.made.run([dataclasses.replace(cell, seed=1)], {})
    assert len(bench.calls) == 2, "another seed is another cell"


def test_tokens_alone_are_measured_without_an_artefact(bench: Any) -> None:
    one, other, hopeless = (*sweep(["tome", "random"], ["optin"], [0.5]), *sweep(["tome"], ["optin"], [0.1]))
    bench.made.run([one, other, hopeless], {})
    first, second, failed = bench.made.records
    assert (first["accuracy"], first["macs"], first["share"], first["tokens_per_block"]) == (100, 240, 0.5, [17, 12])
    assert (first["images"], second["images"]) == (60, 60)
    assert "the budget is too small" in failed["error"]
    bench.calls.clear()
    bench.made.run([one, other], {})
    assert not bench.calls
    bench.made.run([one], {one: (32,)})
    assert bench.calls == [[5, 0]], "its counts are known: nothing is searched for to take its time"
    later = bench.made.records[-1]
    assert (later["accuracy"], later["tokens_per_block"]) == (100, [17, 12])
    assert later["latency"]["32"]["speedup"] == 2
    bench.calls.clear()
    (twin,) = sweep(["tome"], ["constant"], [0.5])
    bench.made.run([twin], {twin: (32,)})
    assert bench.calls == [twin], "the same counts by another schedule are the same model: neither judged nor timed"
    assert bench.made.records[-1]["latency"] == later["latency"]


def test_records_of_fewer_images_are_judged_again_by_their_counts(bench: Any) -> None:
    (cell,) = sweep(["random"], ["optin"], [0.5])
    bench.made.run([cell], {})
    (record,) = bench.made.records
    record |= {"images": 30, "accuracy": 12.0}
    bench.calls.clear()
    bench.made.run([cell], {})
    assert bench.calls == [(cell, [17, 12], 240)], "nothing is searched for"
    (again,) = bench.made.records
    assert (again["images"], again["accuracy"]) == (60, 100)


def test_further_images_are_judged_where_they_are_missing(bench: Any) -> None:
    one, twin, joint = (*sweep(["tome"], ["optin", "constant"], [0.5]), *ledgers(["joint"], ["none"], [0.5]))
    bench.made.run([one], {})
    assert "further" not in bench.made.records[0]
    bench.made.further = dataclasses.replace(bench.made.test, labels=(bench.made.test.labels + 1) % 10)
    bench.calls.clear()
    bench.made.run([one, twin, joint], {})
    assert bench.calls == [(one, [17, 12], 240), twin, joint], "by its counts; its twin is the same model"
    first, second, third = bench.made.records
    assert first["accuracy"] == 100
    assert first["further"] == second["further"]
    assert (first["further"]["accuracy"], first["further"]["images"]) == (0, 60)
    assert third["further"] == first["further"], "of its artefact"
    bench.calls.clear()
    bench.made.run([one, twin, joint], {})
    assert not bench.calls


def test_counts_are_found_again_from_what_a_record_holds() -> None:
    from fxprune.data import Batch

    torch.manual_seed(0)
    model, images = scrambled(TokenViT(depth=2)), torch.randn(4, 3, 32, 32)
    one = Sweep(model, images[:2], [Batch((images,))])
    for cell in sweep(drawing.of(["random"], ["tome", "random"]), ["constant", "optin"], [0.6]):
        run, macs, tokens = one.plan(cell)
        removed = one.count_removed(cell, tokens, macs)
        assert [a - b for a, b in itertools.pairwise(tokens)] == removed[:-1]
        batch = Batch((images,))
        assert torch.equal(one.of_counts(cell, tokens, macs)(batch), run(batch))
        made = fxprune.compile(
            model,
            images[:2],
            tokens=f"{cell.row}:r={','.join(map(str, removed))}",
            recover="none",
            on_event=lambda _: None,
        )
        assert made.report["cost"]["compressed"]["flops"] == macs


def test_closeness() -> None:
    one, two = torch.tensor([[0.0, 1.0], [3.0, 0.0]]), torch.tensor([[1.0, 0.0], [3.0, 0.0]])
    assert closeness(one, one) == {"agreement": 100, "kl": 0}
    p, q = one[0].softmax(-1), two[0].softmax(-1)
    found = closeness(one, two)
    assert found["agreement"] == 50
    assert found["kl"] == pytest.approx(float((p * (p / q).log()).sum()) / 2, abs=1e-5)


def recipe(**changes: Any) -> Any:
    from fxprune.process.libraries import survive_torchvision

    survive_torchvision()
    pytest.importorskip("timm")
    made = Recipe(
        "tiny",
        sizes={"patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2},
        batch=8,
        held=8,
        stages=(Stage(8, 2, 1e-3, 0.7, mix=0.5), Stage(16, 1, 1e-3, 0.8, fused=True)),
        bf16=False,
    )
    return dataclasses.replace(made, **changes)


def pictures() -> Any:
    generator = torch.Generator().manual_seed(0)
    return Images(
        torch.randn(40, 3, 32, 32, generator=generator),
        torch.arange(40) % 10,
        torch.randn(10, 3, 32, 32, generator=generator),
        torch.arange(10),
    )


def test_training_goes_on_where_it_stopped(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop_at(count: int) -> Any:
        said: list[str] = []

        def say(text: str) -> None:
            said.append(text)
            if len(said) == count:
                raise Stop

        return say

    whole, about = train_cached(recipe(), pictures(), tmp_path / "whole", lambda _: None)
    for _ in range(3):
        with pytest.raises(Stop):
            train_cached(recipe(), pictures(), tmp_path / "parts", stop_at(1))
    again, _ = train_cached(recipe(), pictures(), tmp_path / "parts", lambda _: None)
    assert [p.name for p in (tmp_path / "parts").iterdir()] == [recipe().path().name]
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True))
    assert about["hash"] == recipe().hash
    assert len(about["epoch_seconds"]) == 2
    assert whole.pos_embed.shape[1] == 17
    assert recipe(decay=0.1).path() != recipe().path()
    train_cached(recipe(), pictures(), tmp_path / "parts", lambda _: pytest.fail("trained again"))


def test_held_out_images_are_no_part_of_training() -> None:
    held, test = splits(recipe(), pictures())
    assert held.images.shape == (8, 3, 16, 16)
    assert held.labels.tolist() == [2, 3, 4, 5, 6, 7, 8, 9]
    assert len(test.labels) == 10


def test_augmentation() -> None:
    generator = torch.Generator().manual_seed(0)
    flat = torch.arange(4.0)[:, None, None, None].expand(4, 3, 32, 32)
    made = crop(flat, Stage(12, 1, 0.1, 0.5), generator)
    assert made.shape == (4, 3, 12, 12)
    torch.testing.assert_close(made, flat[:, :, :12, :12])
    both, share = mix(flat.contiguous(), generator)
    assert float((both != flat).float().mean()) == pytest.approx(share)
    ramp = torch.linspace(0, 1, 32).expand(64, 1, 32, 32)
    steps = crop(ramp, Stage(32, 1, 0.1, 0.5), generator).diff(dim=3)[:, 0, 16, 16]
    assert (steps > 0).any(), "some stay"
    assert (steps < 0).any(), "some are mirrored"
