"""Reports: everything is on the page, the page stands alone, names are only names, and the JSON fits its schema."""

from __future__ import annotations

import copy
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support.digits import tiny_vit
from support.reports import SVG, parsed, read, references, words

import fxprune
from fxprune.artifact.artifact import Artifact, load
from fxprune.artifact.compare import again, compare, read_valid
from fxprune.cli.demo import Digits, accuracy
from fxprune.cli.entry import OK, USER_ERROR, main
from fxprune.data.batch import Batch, Calibration
from fxprune.data.held_out import hold_out
from fxprune.data.sources import load_data
from fxprune.driver.judge import AgreementEvaluator, few
from fxprune.errors import LoadError
from fxprune.intake.load import Loaded
from fxprune.ir.cost import CostModel
from fxprune.ir.plan import Choice, CompressionPlan
from fxprune.report import json_schema
from fxprune.report.json_schema import KEYWORDS, problems
from fxprune.report.plots import draw_kept, scatter
from fxprune.report.render import render
from fxprune.report.schema import REPORT
from fxprune.report.scores import decode, encode, rank


@pytest.fixture(scope="module")
def made(reported: Path) -> Path:
    return reported


@pytest.fixture
def report(made: Path) -> dict[str, Any]:
    return read(made)[0]


@pytest.fixture(scope="module")
def page(made: Path) -> str:
    return (made / "report.html").read_text(encoding="utf-8")


# ------------------------------------------------------------ the page


def test_the_page_stands_alone(page: str) -> None:
    root = parsed(page)
    assert all(r.startswith(("data:image/png;base64,", "#")) for r in references(page))
    outside = re.sub(r'xmlns(:\w+)?="http://www\.w3\.org/[\w/]+"|base64,[^"]+', "", page)
    assert not re.search(r"https?:|//[a-z]", outside)
    assert not {e.tag.rpartition("}")[2] for e in root.iter()} & {"script", "link", "iframe", "object", "embed"}
    policy = next(m.get("content") for m in root.iter("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert not any(name.startswith("on") for e in root.iter() for name in e.attrib)


def test_ids_are_unique_and_what_is_referred_to_exists(page: str) -> None:
    ids = [e.get("id") for e in parsed(page).iter() if e.get("id")]
    assert len(ids) == len(set(ids))
    assert {r[1:] for r in references(page) if r.startswith("#")} <= set(ids)


def test_light_and_dark_have_every_colour(page: str) -> None:
    style = re.search(r"<style>(.*?)</style>", page, re.DOTALL)
    assert style
    light, dark = style[1].split("@media (prefers-color-scheme: dark)")
    used = set(re.findall(r"var\(--(\w+)\)", page))
    for side in (light, dark):
        assert used <= set(re.findall(r"--(\w+):", side))
    assert "#0102" not in page  # what matplotlib draws in


def test_every_item_is_on_the_page(page: str, report: dict[str, Any]) -> None:
    text = words(parsed(page))
    cost, agreement = report["cost"], report["agreement"]
    for wanted in (
        "GMACs",
        "parameters",
        "weights and activations",
        "at most 0.5 of the dense flops",
        "accuracy",
        f"{cost['ratio']['flops']:.3f}",
        f"{agreement['steps'][-1]['accuracy']:.4f}",
        "that nothing was decided or fitted on",
        report["pipeline"],
        f"{report['parity']['max_rel']:.1e}",
        "recovered (",
        "candidates of recovery",
        "Frozen, and why",
        "graph output at output",
        "neurons: ",
        "attention heads: ",
        "Tokens behind every attention, by tome",
        "fxprune bench measures it",
        *(f["sha256"] for name, f in report["files"].items() if name != "report.html"),
        *(f"{k} {v}" for k, v in report["versions"].items()),
        *(g["group"] for g in report["pruned"]),
    ):
        assert wanted in text, wanted


def test_drawings_show_the_kept_counts(page: str, report: dict[str, Any]) -> None:
    root = parsed(page)
    figures = [f for f in root.iter("figure") if f.find(f"{SVG}svg") is not None]
    kinds = {g["kind"] for g in report["groups"] if g["searched"]}
    assert {"head", "ffn", "token"} == kinds
    assert len(figures) == 2 * len(kinds - {"token"}) + 2  # bars and heat maps, recovery, tokens
    gone = sum(g["size"] - g["kept"] for g in report["groups"] if g["kind"] == "head")
    heat = next(f for f in figures if "attention heads: trajectory" in words(f))
    crosses = [e for e in heat.iter(f"{SVG}use") if "#ff3b30" in (e.get("style") or "")]
    assert len(crosses) == gone
    assert any(i.get("src", "").startswith("data:image/png") for i in root.iter("img"))


def test_the_page_is_the_same_every_time_and_listed(made: Path, page: str) -> None:
    assert again(made) == again(made)
    assert read(made)[0]["files"]["report.html"]["size_bytes"] == (made / "report.html").stat().st_size
    (made / "report.html").write_text(page + " ")
    try:
        with pytest.raises(LoadError, match="another size"):
            Artifact.read(made)
    finally:
        (made / "report.html").write_text(page, encoding="utf-8")
    assert load(made)(torch.randn(2, 1, 8, 8)).shape == (2, 10)


HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>]]>&amp;$\\frac{1}{$\x00\x1b\ud800‮ {x} 漢字"


def test_names_are_only_names(report: dict[str, Any], made: Path) -> None:
    def poisoned(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: poisoned(v) if k not in ("scores", "order", "curve") else v for k, v in value.items()}
        if isinstance(value, list):
            return [poisoned(v) for v in value]
        return HOSTILE if isinstance(value, str) else value

    bad = poisoned(report)
    bad["files"] = {HOSTILE: next(iter(bad["files"].values()))}
    bad["versions"] = {HOSTILE: HOSTILE}
    bad["latency"] = {
        "predicted_ms": 1.0,
        "achieved_ms": 2.0,
        "layers": [{"name": HOSTILE, HOSTILE: HOSTILE, "predicted_ms": 1.0, "achieved_ms": 1.0}],
    }
    bad["sparsity"] = {
        "pattern": HOSTILE,
        "weights": [{"parameter": HOSTILE, "shape": [4, 4], "tiles": 4, "kept": 2, "density": 0.5}],
    }
    for group in bad["groups"]:
        group["searched"] = True
    html = render(bad, CompressionPlan(), {})
    html.encode("utf-8")
    root = parsed(html)
    assert {e.tag for e in root.iter() if e.tag.rpartition("}")[2] in ("script", "img")} == set()
    assert not any(name.startswith("on") for e in root.iter() for name in e.attrib)
    assert "<script>alert(1)</script>" in words(root)  # as text
    assert "漢字" in words(root)


def test_a_report_without_data_or_scores_is_a_page_too(trained_weights: Any, tmp_path: Path) -> None:
    model = tiny_vit()
    model.load_state_dict(trained_weights)
    plan = CompressionPlan({"blocks.0.mlp.0:ffn": Choice("ffn", 96, tuple(range(48)))})
    fxprune.apply(model.eval(), plan, torch.randn(2, 1, 8, 8), out=tmp_path / "a", on_event=lambda _: None)
    report, _ = read(tmp_path / "a")
    assert problems(report, REPORT) == []
    assert "agreement" not in report
    assert {g["scores"] for g in report["groups"]} == {None}
    for key in ("groups", "memory", "search", "masked", "tokens"):  # older artefacts
        report.pop(key, None)
    assert "neurons: " not in words(parsed(render(report, plan, {})))
    assert "neurons: 144 of 192 stay in 2 groups" in words(parsed((tmp_path / "a" / "report.html").read_text()))


def test_latency_of_a_run_is_shown_where_it_is_there(report: dict[str, Any]) -> None:
    report["latency"] = {
        "dense_ms": 4.0,
        "predicted_ms": 1.9,
        "achieved_ms": 2.0,
        "layers": [{"name": "blocks.0", "predicted_ms": 1.0, "achieved_ms": 1.25}],
    }
    assert problems(report, REPORT) == []
    text = words(parsed(render(report, CompressionPlan(), {})))
    for wanted in ("4.000 ms", "1.900 ms", "2.000 ms", "0.950", "Per layer", "0.500"):
        assert wanted in text
    assert "fxprune bench measures it" not in text
    report["latency"] = {"predicted_ms": 1.9, "achieved_ms": None, "layers": None}
    assert "1.900 ms" in words(parsed(render(report, CompressionPlan(), {})))


def test_a_large_model_makes_a_small_page(report: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)

    def group(i: int, kind: str, size: int) -> dict[str, Any]:
        return {
            **report["groups"][0],
            "group": f"blocks.{i}.mlp.fc1:{kind}",
            "kind": kind,
            "size": size,
            "kept": size // 2,
            "searched": True,
            "order": None,
            "scores": encode(torch.rand(size, generator=generator)),
        }

    report["groups"] = [group(i, kind, size) for i in range(12) for kind, size in (("head", 12), ("ffn", 3072))]
    assert len(json.dumps(report, indent=2)) < 1e6
    assert len(render(report, CompressionPlan(), {})) < 5e5


@pytest.mark.parametrize("values", [[], [0.0, 0.0], [1e-30, 1e30]], ids=["none", "zero", "far apart"])
def test_drawings_of_odd_numbers(values: list[float], report: dict[str, Any]) -> None:
    for step, value in zip(report["recovery"]["steps"], values, strict=False):
        step.update(before=value, after=math.inf)
    for group in report["groups"]:
        group.update(scores=encode(torch.full([group["size"]], values[0] if values else 0.0)), order=None)
    parsed(render(report, CompressionPlan(), {}))
    assert draw_kept("x", [], "#010203", "") == ""
    assert scatter("x", [("none", [])], "a", "b") == ""


# ------------------------------------------------------------ the data


def test_the_report_fits_its_schema_and_the_schema_knows_every_key(report: dict[str, Any]) -> None:
    assert problems(report, REPORT) == []
    assert set(report) <= set(REPORT["properties"])

    def walk(one: dict[str, Any]) -> None:
        assert set(one) <= set(KEYWORDS)
        for inner in (*one.get("properties", {}).values(), one.get("items"), one.get("additionalProperties")):
            if isinstance(inner, dict):
                walk(inner)

    walk(REPORT)
    json.dumps(REPORT)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("cost", "dense", "flops"), "many", "report.cost.dense.flops must be integer, not str"),
        (("groups", 0, "kept"), -1, "report.groups[0].kept must be at least 0"),
        (("fxprune_report",), 1, "report.fxprune_report must be 2"),
        (("agreement", "held_out"), 1, "report.agreement.held_out must be boolean, not int"),
        (("notes",), {}, "report.notes must be array, not dict"),
        (("recovery", "steps", 0, "before"), None, "report.recovery.steps[0].before must be number, not NoneType"),
    ],
)
def test_what_does_not_fit_is_told_with_its_place(report: dict[str, Any], path: Any, value: Any, said: str) -> None:
    bad = copy.deepcopy(report)
    here = bad
    for key in path[:-1]:
        here = here[key]
    here[path[-1]] = value
    assert problems(bad, REPORT) == [said]


def test_missing_keys_and_many_problems(report: dict[str, Any]) -> None:
    del report["pipeline"]
    assert problems(report, REPORT) == ["report.pipeline is missing"]
    assert len(problems({}, REPORT)) == json_schema.MOST
    assert problems({"a": 1}, {"type": "object", "properties": {}, "additionalProperties": False}) == [
        "report.a is not known"
    ]
    assert problems(3, {"enum": [1, 2]}, "x") == ["x must be one of 1, 2"]


def test_scores_reach_the_report(trained_weights: Any, digit_data: Digits, tmp_path: Path) -> None:
    model = tiny_vit()
    model.load_state_dict(trained_weights)
    data = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(digit_data.train_images[:32], digit_data.train_labels[:32]), batch_size=16
    )
    common: dict[str, Any] = {"flops": 0.5, "data": data, "importance": "fisher", "on_event": lambda _: None}
    x = torch.randn(2, 1, 8, 8)
    program = fxprune.plan(model.eval(), x, **common)
    report = fxprune.compile(model, x, **common).report
    found = {g["group"]: g for g in report["groups"]}
    prunable = {g.name: g for g in program.need("groups") if g.prunable}
    assert set(found) == set(prunable)
    for name, scores in program.need("scores").items():
        entry = found[name]
        assert decode(entry["scores"], entry["size"]) == scores.values.float().tolist()
        order = (
            scores.order
            if scores.order is not None
            else torch.argsort(scores.values.double(), descending=True, stable=True)
        )
        assert rank(entry) == order.tolist()
        assert entry["macs"] == prunable[name].macs
        assert entry["kept"] == len(program.need("plan").kept(prunable[name]))
    head = found["blocks.0.attn.qkv:head"]
    assert head["params"] == 3 * (32 + 1) * 8 + 8 * 32  # rows of qkv with bias, columns of proj
    with pytest.raises(LoadError, match="damaged"):
        decode(head["scores"], head["size"] + 1)
    with pytest.raises(LoadError, match="damaged"):
        decode("?!", 4)
    with pytest.raises(LoadError, match="is none"):
        rank({**head, "order": encode(torch.tensor([0.0, 0.0, 1.0, 2.0]))})


def test_agreement_is_measured_on_samples_that_nothing_saw(made: Path, digit_data: Digits) -> None:
    report = read(made)[0]
    told = report["agreement"]
    assert told["held_out"]
    assert told["samples"] == 64
    assert told["steps"][0]["after"] == "tokens reduced"
    assert told["steps"][-1]["after"].startswith("recovered (")
    # the same rows, chosen by hand: those of the draw that come after the 64 of the calibration
    rows = torch.randperm(128, generator=torch.Generator().manual_seed(0))[64:128]
    with torch.no_grad():
        logits = load(made)(digit_data.train_images[rows])
    assert told["steps"][-1]["accuracy"] == pytest.approx(accuracy(logits, digit_data.train_labels[rows]))


def test_held_out_samples_are_none_of_the_others(tmp_path: Path) -> None:
    x = torch.arange(100.0).reshape(100, 1)
    torch.save({"x": x}, tmp_path / "d.pt")
    loaded = Loaded(torch.nn.Linear(1, 1), "m", (torch.zeros(2, 1),), input_names=("x",))

    def rows(data: Any) -> set[float]:
        return set() if data is None else {v for b in data.batches for v in b.args[0].flatten().tolist()}

    for samples, rest in ((60, 40), (90, 10), (100, 0), (128, 0)):
        seen = rows(load_data(tmp_path / "d.pt", loaded, samples=samples, seed=3))
        held = rows(hold_out(tmp_path / "d.pt", loaded, samples=samples, seed=3, count=50))
        assert len(held) == rest
        assert not seen & held
    for source in ([x], list(x.split(7)), x, {"x": x}):  # what can be read again in the same order
        seen, held = (
            rows(load_data(source, loaded, samples=60)),
            rows(hold_out(source, loaded, samples=60, seed=0, count=50)),
        )
        assert (len(seen), len(held)) == (60, 40)
        assert not seen & held
    assert hold_out(iter([x]), loaded, samples=1, seed=0, count=1) is None
    assert hold_out("python:os:getcwd", loaded, samples=1, seed=0, count=1) is None


def test_a_judge_measures_what_it_says(digit_data: Digits) -> None:
    torch.manual_seed(0)
    one, two = tiny_vit().eval(), tiny_vit().eval()
    x, y = digit_data.test_images[:24], digit_data.test_labels[:24]
    dense, other = (fxprune.inspect(m, x[:2], on_event=lambda _: None) for m in (one, two))
    judge = AgreementEvaluator(dense, [Batch((x[:16],), {}, y[:16]), Batch((x[16:],), {}, y[16:])])
    same = judge.of(dense)
    assert same["top1"] == 1.0
    assert same["kl"] == pytest.approx(0.0, abs=1e-12)
    assert same["cosine"] == pytest.approx(1.0)
    assert same["relational"] == pytest.approx(1.0)
    with torch.no_grad():
        a, b = one(x), two(x)
    far = judge.of(other)
    assert far["top1"] == float((a.argmax(1) == b.argmax(1)).double().mean())
    assert far["accuracy"] == accuracy(b, y)
    assert judge.accuracy == accuracy(a, y)
    p, q = (torch.log_softmax(z.double(), 1) for z in (a, b))
    assert far["kl"] == pytest.approx(float((p.exp() * (p - q)).sum(1).mean()), rel=1e-4)
    assert "accuracy" not in AgreementEvaluator(dense, [Batch((x,))]).of(other)


def test_few_samples_for_large_models(digit_data: Digits, monkeypatch: pytest.MonkeyPatch) -> None:
    program = fxprune.inspect(tiny_vit().eval(), torch.randn(2, 1, 8, 8), on_event=lambda _: None)
    data = Calibration((Batch((digit_data.test_images[:50],)), Batch((digit_data.test_images[50:90],))), "here")
    assert [b.size for b in few(program, data)] == [16, 16, 16, 2, 14]
    monkeypatch.setattr("fxprune.driver.judge.WORK", 20 * CostModel(program)().flops)
    assert [b.size for b in few(program, data)] == [16, 4]
    monkeypatch.setattr("fxprune.driver.judge.WORK", 1)
    assert torch.equal(few(program, data)[0].args[0], digit_data.test_images[:8])


# ------------------------------------------------------------ the command


def test_artefacts_side_by_side(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(made), str(made), "--out", str(tmp_path / "c.html"), "--json"]) == OK
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert [a["path"] for a in told["artifacts"]] == [str(made)] * 2
    assert told["page"] == str(tmp_path / "c.html")
    assert "neurons" in err
    html = (tmp_path / "c.html").read_text()
    assert all(r.startswith(("data:", "#")) for r in references(html))
    assert f"{told['artifacts'][0]['cost']['ratio']['flops']:.3f}" in words(parsed(html))
    assert main(["report", str(made), "--out", str(tmp_path / "one.html"), "-q"]) == OK
    assert words(parsed((tmp_path / "one.html").read_text())).startswith(
        words(parsed((made / "report.html").read_text()))[:200]
    )


def test_names_that_are_alike_are_told_apart(made: Path) -> None:
    assert compare([made])["artifacts"][0]["name"] == "small"


def test_bad_requests(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for argv, said in (
        (["report"], "name at least one"),
        (["report", str(tmp_path)], "not an artefact"),
        (["report", str(made), "--out", "x.pdf"], "written as .html"),
    ):
        assert main(argv) == USER_ERROR
        assert said in capsys.readouterr().err
    (tmp_path / "report.json").write_text(json.dumps({**read(made)[0], "notes": "none"}))
    with pytest.raises(LoadError, match="does not fit its schema"):
        read_valid(tmp_path)


def test_the_schema_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "--schema"]) == OK
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(REPORT))
