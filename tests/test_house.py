"""The house rules that a reader may rely on: floors, names, sizes, packaging, a quick and light import."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import networkx as nx
import pytest

import fxprune
from fxprune import extend
from fxprune.ir.pipeline import Pass, Pipeline
from fxprune.process.deprecation import DEPRECATED, number

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(p for folder in ("fxprune", "passes", "backends") for p in (ROOT / folder).rglob("*.py"))
TOOLS = sorted((ROOT / "tools").rglob("*.py"))
CODE = [*SOURCES, *sorted((ROOT / "tests").rglob("*.py")), *TOOLS]
LONGEST, LONGEST_TEST = 400, 470  # lines of a file
LONGEST_BODY, PARAMETERS = 60, 12  # lines of a function without its docstring; the public entry points may take more
ENTRIES = {
    "compile",
    "plan",
    "apply",
    "export",
    "lower",
    "sweep",
    "measure_sensitivity",
    "build_report",
    "block_sparse",
}

# Rooms, ground floor first: a module imports from its own room and from those before it. Written nowhere else but in
# the rooms' ruff.toml, which say the same in the editor.
# fmt: off
ROOMS = (
    "errors", "process", "surroundings", "ops", "ir", "report", "intake", "data", "target", "plugins", "registry",
    "passes", "backends", "testing", "request", "artifact", "driver", "workflows", "__init__", "extend", "dynamo",
    "cli", "__main__",
)
# fmt: on
HEAVY = {
    "timm",
    "transformers",
    "torchvision",
    "onnx",
    "onnxscript",
    "onnx_ir",
    "onnxruntime",
    "sklearn",
    "scipy",
    "PIL",
    "networkx",
    "rich",
    "pandas",
    "matplotlib",
    "tensorrt",
    "tensorrt_rtx",
    "torch_tensorrt",
}


def module_name(path: Path) -> str:
    """``passes/analysis/walk.py`` -> ``fxprune.passes.analysis.walk``."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] != "fxprune":
        parts.insert(0, "fxprune")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[tuple[int, str, bool]]:
    """(line, absolute module, inside a function or under TYPE_CHECKING) of every import of a file."""
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]

    def walk(node: ast.AST, lazy: bool) -> Iterator[tuple[int, str, bool]]:
        for child in ast.iter_child_nodes(node):
            inside = lazy or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                inside = True
            if isinstance(child, ast.Import):
                yield from ((child.lineno, alias.name, inside) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = package[: len(package) - child.level + 1] if child.level else []
                module = ".".join([*base, *filter(None, [child.module])])
                if child.level and not child.module:
                    yield from ((child.lineno, f"{module}.{alias.name}", inside) for alias in child.names)
                else:
                    yield child.lineno, module, inside
            yield from walk(child, inside)

    yield from walk(ast.parse(path.read_text(encoding="utf-8")), False)


def room(module: str) -> str:
    """``fxprune.ir.axis`` -> ``ir``; the facade is the room ``__init__``."""
    return [*module.split("."), "__init__"][1]


def arrows() -> nx.DiGraph:
    """Module -> module for every import of the package, those inside functions and under TYPE_CHECKING included."""
    known = {module_name(p) for p in SOURCES}
    graph = nx.DiGraph()
    for path in SOURCES:
        here = module_name(path)
        for line, module, _ in imports(path):
            while module not in known and "." in module:
                module = module.rpartition(".")[0]
            if module in known and module != here:
                graph.add_edge(here, module, line=line)
    return graph


def names(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_every_module_has_a_room() -> None:
    assert {room(module_name(p)) for p in SOURCES} == set(ROOMS)


def test_imports_point_down_the_rooms() -> None:
    for one, other, line in arrows().edges(data="line"):
        here, there = room(one), room(other)
        assert ROOMS.index(there) <= ROOMS.index(here), f"{one}:{line}: {here} lies below {there} ({other})"
        if here == there and here in ("passes", "backends"):  # verbs of a kind, and each target: among themselves
            parts = {".".join(m.split(".")[:3]) for m in (one, other)} - {f"fxprune.{here}"}
            assert len(parts) == 1, f"{one}:{line} imports {other}: parts of {here} never import each other"


def test_no_circle_of_imports() -> None:
    circles = [sorted(part) for part in nx.strongly_connected_components(arrows()) if len(part) > 1]
    assert circles == []


def test_rooms_say_what_they_are_in_one_line() -> None:
    for folder in sorted(p for p in (ROOT / "fxprune").iterdir() if (p / "__init__.py").exists()):
        text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""
        assert text.splitlines()[:1], folder
        assert text.splitlines()[0].endswith("."), folder


def test_the_editor_bans_the_rooms_above() -> None:
    """Ruff knows each room's banned imports from the ruff.toml in it: exactly the rooms above, each with a cure."""
    tomllib = pytest.importorskip("tomllib")
    rooms = [r for r in ROOMS if (ROOT / "fxprune" / r).is_dir()]
    for name in rooms:
        told = tomllib.loads((ROOT / "fxprune" / name / "ruff.toml").read_text(encoding="utf-8"))
        banned = told.get("lint", {}).get("flake8-tidy-imports", {}).get("banned-api", {})
        above = [r for r in ROOMS[ROOMS.index(name) + 1 :] if not r.startswith("__")]
        assert list(banned) == [f"fxprune.{r}" for r in above], name
        assert all(one["msg"] for one in banned.values())


def test_ruff_names_the_way_out_of_an_upward_import(tmp_path: Path) -> None:
    text = "def late() -> None:\n    from ..driver import api  # noqa: F401\n"
    command = [sys.executable, "-m", "ruff", "check", "--select", "TID251", "--stdin-filename", "fxprune/ir/made_up.py"]
    run = subprocess.run([*command, "-"], cwd=ROOT, input=text, capture_output=True, text=True)
    assert run.returncode == 1, run.stderr
    assert "fxprune.driver" in run.stdout
    assert "a stage returns values" in run.stdout


@pytest.mark.parametrize("path", SOURCES, ids=names)
def test_heavy_packages_are_imported_inside_functions(path: Path) -> None:
    for line, module, lazy in imports(path):
        assert lazy or module.partition(".")[0] not in HEAVY, f"{path}:{line} imports {module} at the top"


@pytest.mark.parametrize("path", CODE, ids=names)
def test_files_are_short(path: Path) -> None:
    most = LONGEST if path in SOURCES else LONGEST_TEST
    assert len(path.read_text(encoding="utf-8").splitlines()) <= most


@pytest.mark.parametrize("path", SOURCES, ids=names)
def test_functions_are_short_and_take_few_parameters(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            text = ast.get_docstring(node, clean=False)
            told = 0 if text is None else text.count("\n") + 1
            assert (node.end_lineno or 0) - node.body[0].lineno + 1 - told <= LONGEST_BODY, f"{path}: {node.name}"
            several = len([*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs])
            assert several <= PARAMETERS or node.name in ENTRIES, f"{path}: {node.name} takes {several}"


@pytest.mark.parametrize("path", SOURCES, ids=names)
def test_what_is_frozen_holds_no_list_that_others_append_to(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef) and any("frozen=True" in ast.unparse(d) for d in node.decorator_list):
            kept = [ast.unparse(f) for f in node.body if isinstance(f, ast.AnnAssign)]
            assert not [one for one in kept if "default_factory=list" in one], f"{path}: {node.name}"


@pytest.mark.parametrize("path", SOURCES, ids=names)
def test_names_say_something(path: Path) -> None:
    words = set(path.stem.split("_"))
    assert not words & {"utils", "util", "helpers", "helper", "common", "base", "misc"}, path
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef):
            assert not re.search(r"(Config|Manager|Context|Registry)$", node.name), f"{path}: {node.name}"


# fmt: off
IRREGULAR = {
    "begun", "bent", "born", "borne", "bought", "bound", "brought", "built", "caught", "chosen", "dealt", "done",
    "drawn", "driven", "fed", "felt", "foretold", "forgotten", "found", "given", "gone", "gotten", "grown", "heard",
    "held", "hidden", "hung", "kept", "known", "laid", "lain", "led", "left", "lent", "lost", "made", "meant",
    "met", "paid", "proven", "risen", "said", "seen", "sent", "shaken", "shown", "shrunk", "sold", "sought",
    "spent", "spoken", "spun", "stood", "struck", "stuck", "swept", "taken", "taught", "thought", "thrown", "told",
    "torn", "understood", "won", "worn", "written",
}
# What reads as the value that it is, or as a clause of ``with``, and names that 0.1.0 promised.
ADJECTIVES = {
    "deprecated", "grouped_mm", "kept", "kept_index", "kept_total", "left_to_right", "masked", "masked_run", "reduced",
    "renamed", "seeded", "unchanged", "untouched",
}
# fmt: on
NO_PARTICIPLES = {"bed", "embed", "exceed", "feed", "need", "proceed", "seed", "shed", "speed", "succeed"}


@pytest.mark.parametrize("path", [*SOURCES, *TOOLS], ids=names)
def test_a_function_is_named_by_a_verb_that_acts(path: Path) -> None:
    """No name begins with a participle (``told``, ``divided_by``), but a property's, which is read like a field."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.strip("_") not in ADJECTIVES:
            first = node.name.strip("_").partition("_")[0]
            participle = first in IRREGULAR or (first.endswith("ed") and first not in NO_PARTICIPLES)
            field = any(ast.unparse(d).endswith("property") for d in node.decorator_list)
            assert field or not participle, f"{path}:{node.lineno}: {node.name} names what came out, not what it does"


@pytest.mark.parametrize("path", SOURCES, ids=names)
def test_nothing_evaluates_text_or_starts_a_shell(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        assert called not in {"eval", "exec", "os.system", "os.popen"}, f"{path}:{node.lineno} calls {called}"
        assert not any(k.arg == "shell" for k in node.keywords), f"{path}:{node.lineno} asks for a shell"


@pytest.mark.parametrize("path", SOURCES, ids=names)
def test_public_things_are_documented(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), f"{path} has no docstring"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            if path.parent.name in ("rules", "translations") and node.decorator_list:
                continue  # an op's rule, or its translation: the op is named in its decorator
            assert ast.get_docstring(node), f"{path}:{node.lineno} {node.name} has no docstring"


def test_packages_listed_equal_the_folders() -> None:
    tomllib = pytest.importorskip("tomllib")
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folders = {module_name(p) for p in SOURCES if p.name == "__init__.py"}
    assert set(setup["packages"]) == folders
    for path in SOURCES:
        assert (path.parent / "__init__.py").exists(), f"{path.parent} would vanish from the wheel"


def passes() -> list[type[Pass]]:
    found = []
    for name in (module_name(p) for p in SOURCES if p.is_relative_to(ROOT / "passes")):
        for _, thing in inspect.getmembers(importlib.import_module(name), inspect.isclass):
            if thing.__module__ == name and issubclass(thing, Pass) and not inspect.isabstract(thing):
                found.append(thing)
    return found


@pytest.mark.parametrize("cls", passes(), ids=lambda c: c.__name__)
def test_a_pass_is_one_frozen_class_in_the_file_of_its_name(cls: type[Pass]) -> None:
    assert cls.__module__.rpartition(".")[2] == cls.slug().replace("-", "_")
    assert dataclasses.is_dataclass(cls)
    assert cls.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert cls.kind in {"analysis", "search", "transform"}
    assert cls.__module__.split(".")[2] == cls.kind
    assert not issubclass(cls, Pipeline)


def test_the_folders_cannot_be_imported_a_second_time() -> None:
    for folder in ("passes", "backends"):
        run = subprocess.run([sys.executable, "-c", f"import {folder}"], cwd=ROOT, capture_output=True, text=True)
        assert run.returncode != 0
        assert f"import 'fxprune.{folder}'" in run.stderr


PUBLIC = """
Analysis Artifact Backend Batch Budget BudgetInfeasible Calibration CaptureError Choice CompressionPlan Cost
CostModel Event FxpruneError FxpruneWarning ImportanceScores InternalError Kind LoadError Lowered LoweringError
NothingToPrune OptionError Pass Pipeline PlanError Program PruneGroup Search Transform UnsupportedOp VerifyError apply
compile inspect load load_hf lower plan"""


SCREEN = 80  # lines


def test_the_public_api_fits_on_a_screen() -> None:
    assert len((ROOT / "fxprune" / "__init__.py").read_text(encoding="utf-8").splitlines()) <= SCREEN


def test_versions_agree_and_nothing_outlives_its_deprecation() -> None:
    stated = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert stated
    assert fxprune.__version__ == stated[1]
    releases = re.findall(r"^## (\S+)", (ROOT / "fxprune" / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert releases[0] == stated[1], "the changelog's first release is this one"
    assert releases == sorted(releases, key=number, reverse=True)
    for path in SOURCES:  # what is deprecated registers when it is imported
        if "__main__" not in path.name:
            importlib.import_module(module_name(path))
    assert [str(d) for d in DEPRECATED if d.over(fxprune.__version__)] == []


def test_the_public_api_is_what_it_was() -> None:
    assert sorted(fxprune.__all__) == sorted(PUBLIC.split())
    for name in PUBLIC.split():
        assert getattr(fxprune, name) is not None


def test_no_module_bears_the_name_of_a_public_function() -> None:
    modules = {module_name(p) for p in SOURCES}
    for name in fxprune.__all__:
        assert f"fxprune.{name}" not in modules


def test_one_line_brings_all_that_a_plugin_needs() -> None:
    """The plugin of the tests, which is the one of ``fxprune help plugins``, imports from ``fxprune.extend`` alone."""
    for path in sorted((ROOT / "tests" / "plugin").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "fxprune":
                assert node.module == "fxprune.extend", f"{path}:{node.lineno}"
    assert sorted(set(extend.__all__)) == sorted(extend.__all__)
    for name in extend.__all__:
        assert getattr(extend, name) is not None


IMPORT = """
import sys, time
import torch
before = set(sys.modules)
started = time.process_time()
import fxprune
seconds = time.process_time() - started
print(seconds)
print(*sorted({m.partition(".")[0] for m in set(sys.modules) - before}))
print(torch.cuda.is_initialized())
"""


def test_import_is_quick_and_light(tmp_path: Path) -> None:
    best = float("inf")
    # with byte code, as an installed package has it, whatever this environment says of writing it
    env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    env["PYTHONPYCACHEPREFIX"] = str(tmp_path)
    for _ in range(4):  # the best of three, of the processor's time: this machine has other work
        command = [sys.executable, "-c", IMPORT]
        run = subprocess.run(command, cwd=ROOT.parent, capture_output=True, text=True, check=True, env=env)
        seconds, packages, cuda = run.stdout.splitlines()
        assert not (HEAVY | {"sympy"}) & set(packages.split())
        assert cuda == "False"
        best = min(best, float(seconds))
        if best < 0.3:
            break
    assert best < 0.3


def test_no_two_test_files_share_a_name() -> None:
    """Folders of tests are no packages: of two files of one name only the first is collected."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
