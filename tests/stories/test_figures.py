"""The figures of the README and of the help pages are those of the JSON in tools/bench/results."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from bench.record import read
from fxprune.cli.help import page

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "tools" / "bench" / "results"
README = (ROOT / "README.md").read_text(encoding="utf-8")

# how a table calls a row -> its name in accuracy.json
ROWS = {
    "fxprune compile --data (the default)": "default",
    "trajectory, recovery (plain plan)": "optin-recover",
    "the same, tuned": "optin-tune",
    "OBS, recovery": "obs-recover",
    "trajectory alone": "optin",
    "PTF: Fisher, rearrangement, scales": "ptf-tuned",
    "Fisher alone": "ptf",
    "Taylor": "taylor",
    "L2 magnitude": "l2",
    "random": "random",
    "Torch-Pruning, Taylor (sees labels)": "torch-pruning-taylor",
    "Torch-Pruning, L2": "torch-pruning-l2",
}
TABLES = {  # how a table of `fxprune help results` begins -> the task, decimals
    "MiniLM on STS-B dev": ("minilm-stsb", 2),
    "digits, small ViT": ("vit-digits", 1),
    "digits, small ResNet": ("cnn-digits", 1),
    "CIFAR-10 (12 000": ("vit-cifar", 1),
    "CIFAR-10 (the same)": ("cnn-cifar", 1),
}


def results(name: str) -> dict[str, Any]:
    return read(RESULTS / f"{name}.json")


def rows_of(text: str, start: str) -> tuple[str, list[list[str]]]:
    """(the first line, the cells of the others) of the indented table that begins with ``start``."""
    lines = text[text.index(f"    {start}") :].split("\n\n")[0].splitlines()
    return lines[0], [re.split(r"  +", line.strip()) for line in lines]


def check(cell: str, found: dict[str, Any] | None, decimals: int, where: str) -> None:
    """The mean, and (1) or (2) where seeds are fewer than three and the seed matters."""
    assert found is not None, f"{where} was not measured"
    number, _, seeds = cell.partition("(")
    assert float(number) == pytest.approx(found["mean"], abs=0.5 * 10**-decimals + 1e-6), where
    if seeds:
        assert len(found["seeds"]) == int(seeds.rstrip(")")), where


@pytest.mark.parametrize("start", TABLES)
def test_accuracy_of_the_help_page(start: str) -> None:
    task, decimals = TABLES[start]
    accuracy = results("accuracy")
    first, rows = rows_of(page("results"), start)
    dense = re.search(r"dense ([\d.]+)", first)
    assert dense is not None
    assert float(dense[1]) == pytest.approx(accuracy["tasks"][task]["dense"], abs=0.5 * 10**-decimals + 1e-6)
    ratios = rows[0][1:]
    assert len(rows) >= 6
    for name, *cells in rows[1:]:
        assert len(cells) == len(ratios), name
        for ratio, cell in zip(ratios, cells, strict=True):
            found = accuracy["summary"][task][ROWS[name]].get(ratio)
            if cell == "-":
                assert found is None, f"{task}, {name}, {ratio} was measured"
            else:
                check(cell, found, decimals, f"{task}, {name}, {ratio}")


REAL = {  # a line of the README's table of real models -> the task
    "MPNet-base, STS-B dev, Spearman x 100": "mpnet-stsb",
    "DINOv2 ViT-S/14, CIFAR-10 by a linear probe, 2000 images": "dinov2-cifar10",
    "EfficientNet-Lite0, 250 photographs": "lite0-imagenet",
}


def test_real_models_of_the_readme() -> None:
    found = results("real")
    table = README[README.index("| share of MACs | dense |") :].split("\n\n")[0].splitlines()
    ratios = [cell.strip() for cell in table[0].strip("|").split("|")[2:]]
    measured = {task for task, rows in found["summary"].items() if rows}
    assert {REAL[line.split("|")[1].strip()] for line in table[2:]} == measured
    assert all(m["samples"] == 128 for m in found["measured"])
    for line in table[2:]:
        name, dense, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        about = found["tasks"][REAL[name]]
        figure, error = dense.split(" ± ")
        assert float(figure) == pytest.approx(about["dense"], abs=0.0051)
        assert float(error) == pytest.approx(about["error"], abs=0.0501)
        for ratio, cell in zip(ratios, cells, strict=True):
            cut = found["summary"][REAL[name]]["default"].get(ratio)
            if cell == "-":
                assert cut is None, f"{name}, {ratio} was measured"
            else:
                check(cell.replace(" ¹", "(1)"), cut, 2, f"{name}, {ratio}")


def test_accuracy_of_the_readme() -> None:
    summary = results("accuracy")["summary"]
    table = README[README.index("| MiniLM, share of MACs |") :].split("\n\n")[0].splitlines()
    ratios = [cell.strip() for cell in table[0].strip("|").split("|")[1:]]
    assert len(table) >= 6
    for line in table[2:]:
        name, *cells = [cell.strip(" *") for cell in line.strip("|").split("|")]
        for ratio, cell in zip(ratios, cells, strict=True):
            found = summary["minilm-stsb"][ROWS[name]].get(ratio)
            if cell == "-":
                assert found is None, f"{name}, {ratio} was measured"
            else:
                check(cell.replace(" ¹", "(1)").replace(" ²", "(2)"), found, 2, f"{name}, {ratio}")
    for task, words in (
        ("vit-digits", "small ViT on digits"),
        ("cnn-digits", "small ResNet on digits"),
        ("vit-cifar", "small ViT on CIFAR-10"),
        ("cnn-cifar", "small ResNet on CIFAR-10"),
    ):
        line = next(line for line in README.splitlines() if line.startswith(f"| {words}"))
        found = re.search(r"plain plan ([\d.]+) and ([\d.]+); Torch-Pruning ([\d.]+) and ([\d.]+)", line)
        assert found is not None
        wanted = [
            summary[task][row][r]["mean"] for row in ("optin-recover", "torch-pruning-taylor") for r in ("0.5", "0.3")
        ]
        assert [float(f) for f in found.groups()] == pytest.approx(wanted, abs=0.0501)


def test_tokens_of_the_help_page() -> None:
    alone = [m for m in results("tokens")["measured"] if m["prune"] == "tokens" and m["recover"] == "none"]
    cells: dict[tuple[str, str, float], list[Any]] = {}
    for m in alone:  # ToMe's default alone is a ledger's row as well; random has several draws
        cells.setdefault(("tome" if m["row"] == "tokens" else m["row"], m["schedule"], m["ratio"]), []).append(m)
    by = {cell: {f: sum(m[f] for m in found) / len(found) for f in ("accuracy", "kl")} for cell, found in cells.items()}
    assert {len(found) for cell, found in cells.items() if cell[1] != "auto"} == {1, 5}
    named = {"elimination alone": "elimination", "auto (default)": "auto"}
    _, rows = rows_of(page("tokens"), "schedule   ")
    for name, *figures in rows[1:]:
        for ratio, cell in zip(rows[0][1:], figures, strict=True):
            found = by["tome", named.get(name, name), float(ratio)]
            value, kl = cell.rstrip(")").split(" (")
            assert float(value) == pytest.approx(found["accuracy"], abs=0.00501), (name, ratio)
            assert float(kl) == pytest.approx(found["kl"], abs=6e-5), (name, ratio)
    _, rows = rows_of(page("tokens"), "reducer   ")
    for name, *figures in rows[1:]:
        for ratio, cell in zip(rows[0][1:], figures, strict=True):
            found = by[name.replace(", ", "-"), "auto", float(ratio)]
            value, kl = cell.rstrip(")").split(" (")
            assert float(value) == pytest.approx(found["accuracy"], abs=0.0501)
            assert float(kl) == pytest.approx(found["kl"], abs=6e-4)


def test_one_budget_of_the_tokens_page_and_the_readme() -> None:
    rows = ("weights", "tokens", "joint")
    by = {m["row"]: m for m in results("tokens")["measured"] if m["row"] in rows and m["recover"] == "auto"}
    test, kl = [f"{by[r]['accuracy']:.2f}" for r in rows], [f"{by[r]['kl']:.4f}".lstrip("0") for r in rows]
    more = [f"{by[r]['further']['accuracy']:.2f}" for r in rows]
    assert {by[r]["further"]["images"] for r in rows} == {1744}
    text = " ".join(page("tokens").split())
    assert (
        f"weights alone {test[0]} ({kl[0]}), tokens alone {test[1]} ({kl[1]}), both on one ledger {test[2]} "
        f"({kl[2]}); on the 1744 held-out images {more[0]}, {more[1]} and {more[2]}."
    ) in text
    without = {
        m["row"]: m
        for m in results("tokens")["measured"]
        if m["row"] in rows and m["recover"] == "none" and m["ratio"] == 0.5
    }
    plain = [f"{without[r]['accuracy']:.2f} ({without[r]['kl']:.4f})".replace("(0.", "(.") for r in rows]
    assert f"Without recovery: {plain[0]}, {plain[1]} and {plain[2]}, so it helps" in text
    assert all(without[r]["kl"] > by[r]["kl"] and without[r]["accuracy"] < by[r]["accuracy"] for r in rows)
    assert (
        f"weights {test[0]}, tokens {test[1]}, both on one ledger {test[2]}; on 1744 more images {', '.join(more)} |"
    ) in README


def test_latency_of_the_tokens_page() -> None:
    by = {
        (m["row"], m["ratio"]): m["latency"]["32"]
        for m in results("tokens")["measured"]
        if m["schedule"] == "constant" and "latency" in m
    }
    _, rows = rows_of(page("tokens"), "faster, batch 32")
    assert len(rows) == 9
    for name, *cells in rows[1:]:
        for ratio, cell in zip(rows[0][1:], cells, strict=True):
            found = by[name.replace(", ", "-"), float(ratio)]
            assert cell == f"{found['speedup']:.2f} ({found['realised']:.2f})", (name, ratio)


def test_tiles_of_the_help_page() -> None:
    named = {
        "lsp, recovered (the default)": "lsp+recover",
        "lsp, the paper's allocation, recovered": "lsp-paper+recover",
        "the same without the power term": "lsp-no-power+recover",
        "obert, recovered": "obert+recover",
        "lsp scores, the same share everywhere, recovered": "uniform+recover",
        "magnitude, recovered": "magnitude+recover",
        "lsp, not recovered": "lsp",
    }
    by = {
        (m["row"], m["tile"], m["ratio"]): m["figure"]
        for m in results("blocks")["measured"]
        if m["task"] == "vit-digits"
    }
    text = page("tiles")
    lines = text[text.index("    lsp, recovered") :].split("\n\n")[0].splitlines()
    assert len(lines) == len(named)
    for name, *cells in (re.split(r"  +", line.strip()) for line in lines):
        for ratio, cell in zip((0.75, 0.6, 0.5, 0.4, 0.3), cells, strict=True):
            assert float(cell) == pytest.approx(by[named[name], "32x32", ratio], abs=0.0501), (name, ratio)
    for tile in ("16x16", "64x64"):
        stated = re.search(rf"{tile}[^(\d]*(?:\(|: )([\d., ]+)\)", text)
        assert stated is not None
        assert [float(f) for f in stated[1].split(",")] == pytest.approx(
            [by["lsp+recover", tile, r] for r in (0.75, 0.6, 0.5, 0.4, 0.3)], abs=0.0501
        )


@pytest.mark.parametrize(
    ("task", "samples", "title"), [("minilm-stsb", 256, "MiniLM on STS-B"), ("vit-cifar", 512, "ViT on CIFAR-10")]
)
def test_tiles_of_larger_models(task: str, samples: int, title: str) -> None:
    by = {
        (m["row"], m["tile"]): m["figure"]
        for m in results("blocks")["measured"]
        if (m["task"], m["samples"], m["ratio"]) == (task, samples, 0.5)
    }
    text = page("tiles")
    head, *lines = text[text.index(f"    {title}") :].split("\n\n")[0].splitlines()
    tiles = re.findall(r"\d+x\d+", head)
    assert tiles == ["16x16", "16x32", "32x16", "32x32", "64x64"]
    assert f"dense {results('blocks')['tasks'][task]['dense']:.1f}" in head
    rows = ("lsp+recover", "lsp-paper+recover", "lsp-no-power+recover", "uniform+recover", "magnitude+recover", "lsp")
    assert len(lines) == len(rows)
    for row, line in zip(rows, lines, strict=True):
        figures = re.findall(r"\d+\.\d", line)
        assert [float(f) for f in figures] == pytest.approx([by[row, tile] for tile in tiles], abs=0.0501), row


def test_what_is_said_of_the_tool_itself() -> None:
    text = " ".join(page("results").split())
    zoo, whole, costs = results("zoo"), results("whole"), results("compile")
    memory = next(r for r in results("memory")["measured"] if r["layers"] == 22 and not r["samples"])
    ratios = [r for model in zoo["rows"] for r in model["ratios"]]
    worst = max(r[k] for r in ratios for k in ("error", "other") if r.get(k) is not None)
    assert f"{len(zoo['rows'])} models" in text
    assert f"to {worst:.1e} relative".replace("e-0", "e-") in text
    onnx = f"{max(r['onnx'] for r in ratios if r.get('onnx') is not None):.1e}".replace("e-0", "e-")
    assert f"ONNX agrees to {onnx}" in text
    assert f"ONNX to {onnx}" in README
    missed = sum(not r.get("reached") for r in ratios)
    assert f"{missed} of the {len(ratios)} budgets" in text
    assert f"{memory['peak_bytes'] / 2**30:.1f} GiB, {memory['times_the_model']:.1f} times" in text
    assert f"{memory['peak_bytes'] / 2**30:.1f} GiB: {memory['times_the_model']:.1f} times" in README
    peaks = [f"{run['peak_bytes'] / 2**30:.1f}" for run in whole["runs"]]
    assert f"peak memory {peaks[0]} and {peaks[1]} GiB" in text
    assert f"| {whole['runs'][1]['seconds']:.0f} s, {peaks[1]} GiB |" in README
    assert f"{costs['compile'][0]['total_s']:.1f} s, peak memory {costs['compile'][0]['peak_over_model']:.1f}" in text
    assert f"{costs['imports']['median_s']:.2f} s" in text or f"{costs['imports']['median_s']:.3f} s" in text


def test_latency() -> None:
    measured = results("latency")["measured"]
    shares = {
        (m["model"], m["target"], m["batch"], m["ratio"]): m["realised"] for m in measured if m["part"] == "shares"
    }
    words = {
        "BERT-base": "bert_base",
        "DeiT-B": "deit_base",
        "DeiT-S": "deit_small",
        "DeiT-Ti": "deit_tiny",
        "ResNet-50": "resnet50",
    }
    runs = (("onnx", 1), ("onnx", 8), ("onnx", 32), ("inductor", 8))
    columns = [(*run, ratio) for run in runs for ratio in (0.75, 0.5, 0.35)]
    _, rows = rows_of(page("results"), "realised share, at ")
    assert len(rows) == 1 + len(words)
    for name, *cells in rows[1:]:
        for column, cell in zip(columns, cells, strict=True):
            found = shares.get((words[name.split(",")[0]], *column))
            assert cell == ("-" if found is None else f"{found:.2f}"), (name, column)
    line = next(line for line in README.splitlines() if line.startswith("| realised share"))
    for word, share in re.findall(r"([A-Z][\w-]+) ([\d.]+)(?=,| \|)", line.split("|")[2] + "|"):
        assert share == format(shares[words[word], "onnx", 8, 0.5], ".2f")
    text = " ".join(page("results").split())
    budgets = {(m["model"], m["ratio"]): m for m in measured if m["part"] == "budgets"}
    _, rows = rows_of(page("results"), "asked for  ")
    assert len(rows) == 1 + 4
    for name, *cells in rows[1:]:
        for ratio, cell in zip(rows[0][1:], cells, strict=True):
            assert cell == f"{budgets[words[name], float(ratio)]['achieved']:.3f}", (name, ratio)
    assert f"at worst {100 * max(abs(m['miss']) for m in budgets.values()):.1f} % from what was asked for" in text
    for one in measured:
        if one["part"] == "plans":
            ours, theirs = (100 * one[f"{by}_plan"]["accuracy"] for by in ("latency", "flops"))
            assert f"{ours:.1f} and {theirs:.1f} %" in text


def test_memory_of_large_models() -> None:
    text = " ".join(page("results").split())
    told = {
        (22, "eager", 0): "peak memory {gib:.1f} GiB, {times:.1f} times the model",
        (6, "onnx", 0): "timed beside the dense model: {gib:.1f} GiB, {times:.2f} times",
        (2, "onnx", 0): "With 2 of them: {gib:.1f} GiB, {times:.2f} times, of which PyTorch, transformers and "
        "onnxruntime themselves take {libraries:.1f} GiB",
        (22, "eager", 4): "--memory 2GiB all 22 layers take {gib:.1f} GiB, {times:.2f} times beside that budget",
        (4, "eager", 16): "4 layers with 16 sentences {gib:.1f} GiB, {times:.2f} times",
    }
    held = {(r["layers"], r["target"], r["samples"]): r for r in results("memory")["measured"]}
    for cell, said in told.items():
        one = held[cell]
        libraries = one.get("libraries_bytes", 0)
        assert (
            said.format(gib=one["peak_bytes"] / 2**30, times=one["times_without_caches"], libraries=libraries / 2**30)
            in text
        )
        assert one["times_without_caches"] - libraries / one["weights_bytes"] < 3
        assert one["target"] == "eager" or one["timed"]


def test_choices_on_few_samples() -> None:
    found = {s["how"]: s for s in results("few")["summary"] if s["task"] == "all"}
    text = " ".join(page("methods").split())
    guard, folds = (f"{100 * found[how]['regret']:.0f} %" for how in ("guard", "folds"))
    assert f"over {found['guard']['plans']} plans at 32 and 64 samples what it took was {guard} farther" in text
    assert f"best candidate, {folds} when five candidates" in text
    assert round(found["folds"]["seconds"] / found["guard"]["seconds"]) == 3
