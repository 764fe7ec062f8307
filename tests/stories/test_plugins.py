"""The package that `fxprune help plugins` shows: its files are the page's, and every piece of it is run."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.digits import tiny_vit
from support.token_models import TokenViT, scrambled
from torch import Tensor, nn

import fxprune
from fxprune import OptionError, plugins, registry
from fxprune.cli import doctor
from fxprune.cli.help import page
from fxprune.errors import PluginError
from fxprune.passes.analysis.walk import RULES
from fxprune.report.entries import token_sites

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(__file__).parents[1] / "plugin" / "fxprune_example"
SHAPE = "2x1x8x8"


def shown(text: str) -> str:
    """The indented blocks of the page, as they would lie in a file."""
    return "\n".join(line.removeprefix("    ") for line in text.splitlines())


def entry_points(text: str) -> dict[str, str]:
    """The entries of the TOML that a page shows."""
    table = re.search(r"\[project\.entry-points\.\"fxprune\.plugins\"\]\n((?:\s*\".*\n)+)", text)
    assert table
    return dict(re.findall(r"\"(.+?)\" = \"(.+?)\"", table[1]))


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The package on sys.path, with the metadata that pip would write from the page's TOML."""
    site = tmp_path_factory.mktemp("site")
    info = site / "fxprune_example-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fxprune-example\nVersion: 1.0\n")
    lines = [f"{name} = {value}" for name, value in entry_points(page("plugins")).items()]
    (info / "entry_points.txt").write_text("[fxprune.plugins]\n" + "\n".join(lines) + "\n")
    sys.path[:0] = [str(site), str(PACKAGE.parent)]
    importlib.invalidate_caches()
    yield site
    for path in (str(site), str(PACKAGE.parent)):
        sys.path.remove(path)
    importlib.invalidate_caches()


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda p: p.stem)
def test_the_page_shows_the_file_as_it_is(path: Path) -> None:
    if path.stem != "__init__":
        assert path.read_text(encoding="utf-8").rstrip() in shown(page("plugins"))


def test_the_readme_shows_entry_points_of_the_page() -> None:
    stated = entry_points((ROOT / "README.md").read_text(encoding="utf-8"))
    assert stated.items() <= entry_points(page("plugins")).items()
    assert {name.partition(".")[0] for name in stated} >= {"criterion", "rule", "reducer", "backend"}


def test_every_kind_of_plugin_is_in_the_example() -> None:
    assert {name.partition(".")[0] for name in entry_points(page("plugins"))} == set(plugins.KINDS)


def test_names_of_plugins_are_listed(installed: Path) -> None:
    for kind, name in (
        ("criterion", "first"),
        ("reducer", "crop"),
        ("search", "even"),
        ("backend", "mydevice"),
        ("pass", "say-hello"),
    ):
        assert name in registry.names(kind)
        assert name not in registry.TABLES[kind]


def test_a_criterion_of_a_plugin_decides(installed: Path) -> None:
    made = fxprune.compile(tiny_vit().eval(), SHAPE, flops=0.6, importance="first")
    assert made.report["importance"] == "first"
    for choice in made.plan.choices.values():
        assert choice.keep == tuple(range(len(choice.keep))), "the first elements stay"


def test_a_search_of_a_plugin_decides_how_many(installed: Path) -> None:
    made = fxprune.compile(tiny_vit().eval(), SHAPE, flops=0.6, search="even")
    assert made.plan.about["method"] == "even"
    assert made.report["cost"]["ratio"]["flops"] <= 0.6
    kept = {len(c.keep) for c in made.plan.choices.values() if c.kind == "ffn"}
    assert len(kept) == 1, "the same share everywhere"


def test_a_search_that_exceeds_the_budget_is_an_error(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("fxprune_example.search")
    monkeypatch.setattr(module, "even", lambda ladders, terms, limit: [one.top for one in ladders])
    with pytest.raises(OptionError, match="exceeds the budget"):
        fxprune.compile(tiny_vit().eval(), SHAPE, flops=0.6, search="even")
    monkeypatch.setattr(module, "even", lambda ladders, terms, limit: [0])
    with pytest.raises(OptionError, match="no rung per ladder"):
        fxprune.compile(tiny_vit().eval(), SHAPE, flops=0.6, search="even")


class Twisted(nn.Module):
    """A feed-forward layer whose activation is an op of the plugin's library."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        twisted: Tensor = self.down(torch.ops.fxprune_example.twist(self.up(x)))
        return twisted


@pytest.fixture
def unknown(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The op is there, nobody has asked for its rule yet."""
    importlib.import_module("fxprune_example.ops")
    for name in ("twist", "dense"):
        monkeypatch.delitem(RULES, f"fxprune_example::{name}", raising=False)
    monkeypatch.delitem(sys.modules, "fxprune_example.rules", raising=False)


def why_frozen() -> str:
    return next(g.frozen for g in fxprune.inspect(Twisted(), torch.randn(2, 16)).need("groups") if "up:" in g.name)


def test_an_op_rule_of_a_plugin_opens_what_was_frozen(unknown: None) -> None:
    with pytest.MonkeyPatch.context() as without:
        without.setattr(plugins, "find_plugins", lambda: ([], []))
        assert "no axis rule for fxprune_example.twist" in why_frozen()
    made = fxprune.compile(Twisted(), torch.randn(2, 16), flops=0.5)
    assert len(made.plan.choices["up:ffn"].keep) == 32
    assert "fxprune_example.rules" in sys.modules


def test_a_token_reducer_of_a_plugin_exports(installed: Path, tmp_path: Path) -> None:
    model, x = scrambled(TokenViT(depth=2)), torch.randn(2, 3, 32, 32)
    made = fxprune.compile(model, x, tokens="crop:r=3", target="onnx", out=tmp_path / "small")
    assert made.report["tokens"]["reducer"] == "crop"
    assert sum(site["removed"] for site in token_sites(made.report)["sites"]) >= 3
    assert made.report["parity"]["max_rel"] < 1e-4


def test_a_backend_of_a_plugin_writes_and_is_verified(installed: Path, tmp_path: Path) -> None:
    made = fxprune.compile(tiny_vit().eval(), SHAPE, flops=0.5, target="mydevice", out=tmp_path / "small")
    assert made.report["payload"] == "model.mine.pt2"
    assert made.report["parity"]["max_abs"] == 0
    assert all(len(c.keep) % 4 == 0 for c in made.plan.choices.values() if c.kind == "ffn")


def test_a_pass_of_a_plugin_runs_in_a_pipeline(installed: Path) -> None:
    text = (
        "propagate-axes,find-groups,say-hello{to=you},score-groups{criterion=first},search-plan{budget=flops=0.6},"
        "slice-axes"
    )
    made = fxprune.compile(tiny_vit().eval(), SHAPE, pipeline=text)
    assert "hello, you" in made.report["notes"]
    assert "say-hello{to=you}" in made.report["pipeline"]


def test_a_pass_of_a_plugin_that_breaks_something_is_named_as_the_plugins(
    installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody is sent to fxprune's tracker with it."""
    module = importlib.import_module("fxprune_example.say_hello")
    monkeypatch.setattr(module.SayHello, "run", lambda self, program: program.but(groups=program.groups * 2))
    text = "propagate-axes,find-groups,say-hello,score-groups,search-plan{budget=flops=0.6},slice-axes"
    with pytest.raises(PluginError, match="after 'say-hello': two groups share a name") as caught:
        fxprune.compile(tiny_vit().eval(), SHAPE, pipeline=text)
    assert "fxprune_example.say_hello:SayHello" in caught.value.where
    assert "report it to the authors of fxprune_example" in caught.value.cure


class Doubled(nn.Module):
    """A residual feed-forward layer whose second matrix the plugin's op multiplies by."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.weight, self.norm = nn.Linear(16, 64), nn.Parameter(torch.randn(16, 64) / 8), nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        doubled: Tensor = self.norm(x + torch.ops.fxprune_example.dense(torch.relu(self.up(x)), self.weight))
        return doubled


def test_a_product_of_a_plugin_is_sliced_counted_and_recovered(unknown: None) -> None:
    x = torch.randn(64, 16)
    made = fxprune.compile(Doubled().eval(), x, data=[x] * 4, flops=0.5, recover="ridge", importance="activation")
    assert made.report["gaps"] == []
    assert made.report["cost"]["ratio"]["flops"] <= 0.5
    (step,) = made.report["recovery"]["steps"]
    assert step["parameter"] == "weight"
    assert step["after"] < step["before"]


def points(monkeypatch: pytest.MonkeyPatch, *found: plugins.Plugin) -> None:
    monkeypatch.setattr(plugins, "find_plugins", lambda: (list(found), []))


def test_a_broken_rule_is_the_reason_that_is_given(unknown: None, monkeypatch: pytest.MonkeyPatch) -> None:
    points(monkeypatch, plugins.Plugin("rule", "fxprune_example", "no_such_module", "broken-package"))
    why = why_frozen()
    assert "broken-package" in why
    assert "no_such_module" in why


def test_whatever_a_plugin_raises_is_told_and_disturbs_nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "explosive.py").write_text("raise RuntimeError('the moon is full')")
    monkeypatch.syspath_prepend(str(tmp_path))
    points(monkeypatch, plugins.Plugin("backend", "mine", "explosive:Mine", "its-package"))
    with pytest.raises(OptionError, match="the moon is full") as caught:
        registry.backend("mine")
    assert "its-package" in caught.value.where
    assert registry.backend("eager").name == "eager"


def test_a_class_that_is_no_backend_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    points(monkeypatch, plugins.Plugin("backend", "mine", "builtins:dict"))
    with pytest.raises(OptionError, match="not a backend"):
        registry.backend("mine")


def test_doctor_tries_every_plugin(monkeypatch: pytest.MonkeyPatch, installed: Path) -> None:
    assert [p for p in doctor.examine("eager")["problems"] if "fxprune_example" in p] == []
    assert any("fxprune_example" in p for p in doctor.examine("eager")["plugins"])
    monkeypatch.setattr(
        plugins,
        "find_plugins",
        lambda: (
            [
                plugins.Plugin("backend", "onnx", "json:loads", "taker"),
                plugins.Plugin("search", "a", "json:nothing", "one"),
                plugins.Plugin("search", "a", "json:loads", "two"),
                plugins.Plugin("rule", "x", "no_such_module", "three"),
            ],
            ["strange = x: the name must be kind.name"],
        ),
    )
    told = list(plugins.problems([("backend", "onnx")]))
    assert len(told) == 5
    for words in ("taker", "no 'nothing'", "one offers the same", "no_such_module", "strange"):
        assert any(words in line for line in told), words
