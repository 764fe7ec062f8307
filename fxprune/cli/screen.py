"""What people see: progress, tables and plain words, on stderr."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ..artifact.files import PAGE, REPORT
from ..ir.choice import TOKEN
from ..ir.cost import COUNTED, Cost, CostModel
from ..ir.program import Program
from ..ir.token_flow import describe_tokens
from ..process.ranks import speaks
from ..report.entries import token_sites
from ..report.headline import headline
from ..report.latency import speed_lines
from ..report.op_gaps import gap_lines
from ..report.target_lines import constant_lines, target_lines
from ..report.units import giga, mebi, mega
from .lines import (
    _frozen,
    count_kept,
    frozen_lines,
    gaps_of,
    latency_lines,
    places,
    plain_text,
    sparsity_lines,
    token_lines,
)
from .progress import Progress

if TYPE_CHECKING:
    from rich.table import Table

    from ..artifact.artifact import Artifact
    from ..process.events import Event

WIDTH = 140  # columns where stderr is no terminal
WORTH_TELLING = 0.1  # seconds; shorter stages leave no line behind


class Screen:
    """Progress while a command runs, and its result as tables. Writes to stderr; ``quiet`` leaves warnings only.

    Of several ranks the first one writes, the others are silent.
    """

    def __init__(self, quiet: bool = False) -> None:
        from rich.console import Console

        # Bound to today's stderr: passes that silence noisy libraries swap sys.stderr while they run.
        width = None if sys.stderr.isatty() else WIDTH
        file = sys.stderr if speaks() else io.StringIO()
        self.console = Console(file=file, width=width, soft_wrap=False, highlight=False, emoji=False)
        self.progress = Progress(self.console)
        self.quiet = quiet
        self.status: Any = None
        self.stage = ""
        self.started = 0.0

    def __enter__(self) -> Screen:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _value: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._finish(failed=kind is not None)

    def tell(self, event: Event) -> None:
        """Follow the stages of a run; to be given as ``on_event``."""
        if event.kind == "warning":
            self.console.print(f"[bold yellow]warning[/]  {plain_text(event.text)}", soft_wrap=True)
        elif self.quiet:
            return
        elif event.kind == "note":
            self.console.print(f"[dim]note[/]  {plain_text(event.text)}", soft_wrap=True)
        elif event.kind == "progress":
            self._stop_spinning()  # rich draws one live thing at a time
            self.progress.tell(event.text, event.done, event.total)
        else:
            self._finish()
            self.stage, self.started = event.text, time.perf_counter()
            if self.console.is_terminal:
                self.status = self.console.status(plain_text(event.text))
                self.status.start()

    def _finish(self, failed: bool = False) -> None:
        self.progress.stop()
        self._stop_spinning()
        if self.stage and (failed or time.perf_counter() - self.started >= WORTH_TELLING):
            mark = "[red]x[/]" if failed else "[green]·[/]"
            self.console.print(
                f"{mark} {plain_text(self.stage)}  [dim]{time.perf_counter() - self.started:.1f} s[/]", soft_wrap=True
            )
        self.stage = ""

    def _stop_spinning(self) -> None:
        if self.status is not None:
            self.status.stop()
            self.status = None

    def say(self, lines: Iterable[str]) -> None:
        """Plain lines, as long as they are."""
        for line in () if self.quiet else lines:
            self.console.print(plain_text(line), soft_wrap=True)

    def _print(self, *things: Any) -> None:
        self._finish()
        if not self.quiet:
            for thing in things:
                self.console.print(thing, soft_wrap=isinstance(thing, str))

    # ------------------------------------------------------------ results

    def show_artifact(self, artifact: Artifact) -> None:
        """Dense against compressed, what was left alone and why, where the artefact lies and how to load it."""
        if not speaks():
            return  # another rank lowered it and knows how exact it is
        report, plan = artifact.report, artifact.plan
        before, after = report["cost"]["dense"], report["cost"]["compressed"]
        table = _table("", "dense", "compressed", "ratio")
        first = headline(report)
        if first is not None:
            table.add_row(first.about, "" if first.dense is None else f"{first.dense:.4f}", str(first), "")
        for label, key, show in (("GMACs", "flops", giga), ("parameters", "params", mega), ("weights", "bytes", mebi)):
            share = after[key] / before[key] if before[key] else 1.0
            table.add_row(label, show(before[key]), show(after[key]), f"{share:.3f}")
        for kind, (groups, kept, size) in sorted(count_kept(plan.elements).items()):
            table.add_row(f"{kind} in {groups} cut groups", str(size), str(kept), f"{kept / size:.3f}")
        frozen = [f for f in report.get("frozen", ()) if f["kind"] != TOKEN]
        self._print("", table, *frozen_lines(frozen, short=True), *token_lines(token_sites(report)))
        parity = report["parity"]
        lines = [
            f"checked   largest difference {parity['max_abs']:.1e} to the pruned graph, relative "
            f"{parity['max_rel']:.1e} (tolerance {parity['tolerance']:.0e})"
        ]
        if "masked" in report:
            lines.append(f"          {report['masked']['max_rel']:.1e} relative between slicing and masking")
        lines += [*sparsity_lines(report), *latency_lines(report), *speed_lines(report)]
        notes = (*report.get("notes", ()), *constant_lines(parity))
        lines += [f"[yellow]note[/]      {plain_text(note)}" for note in notes]
        lines += target_lines(report)
        if artifact.path is not None:
            lines += [
                f"[bold]artefact  {plain_text(str(artifact.path))}[/]",
                f"report    {plain_text(str(artifact.path / (PAGE if PAGE in report['files'] else REPORT)))}",
                f"load it   fxprune.load({str(artifact.path)!r})",
            ]
        self._print(*lines, f"[dim]MACs are {COUNTED}[/]")

    def show_plan(self, program: Program, path: str | None) -> None:
        """What a plan keeps, per kind, and what it costs."""
        plan, model = program.need("plan"), CostModel(program)
        dense = model()
        cut = plan.elements
        after = model({g.axis: len(cut[g.name].keep) for g in program.need("groups") if g.name in cut})
        if plan.tokens is not None and "predicted" in plan.about:  # tokens are no part of the dense polynomial
            after = Cost(**plan.about["predicted"])
        table = _table("", "dense", "planned", "ratio")
        for label, key, show in (("GMACs", "flops", giga), ("parameters", "params", mega), ("weights", "bytes", mebi)):
            old, new = dense.metric(key), after.metric(key)
            table.add_row(label, show(old), show(new), f"{new / max(old, 1):.3f}")
        for kind, (groups, kept, size) in sorted(count_kept(cut).items()):
            table.add_row(f"{kind} in {groups} cut groups", str(size), str(kept), f"{kept / size:.3f}")
        where = [f"[bold]plan  {plain_text(path)}[/]"] if path else []
        if plan.blocks:
            effective = plan.about["tiles"]["predicted"]["flops"]
            where.insert(
                0,
                f"zeros     {plan.about['tiles']['pattern']} in {len(plan.blocks)} weights: "
                f"{giga(effective)} GMACs are effective ({effective / max(dense.flops, 1):.3f})",
            )
        told = None if program.tokens is None else describe_tokens(program.tokens, plan.tokens)
        self._print("", table, *frozen_lines(_frozen(program), short=True), *token_lines(told), *where)

    def show_inspection(self, program: Program, graph: str | None) -> None:
        """Every prunable group as a row, frozen ones gathered by their reason."""
        groups, dense = program.need("groups"), CostModel(program)().flops
        table = _table("group", "kind", "size", "kMACs each", "share", "exact", "where", numbers=(2, 3, 4))
        for g in groups:
            if g.prunable:
                table.add_row(
                    plain_text(g.name),
                    str(g.kind),
                    str(g.size),
                    f"{g.macs / 1e3:,.1f}",
                    f"{g.macs * g.size / max(dense, 1):.1%}",
                    "yes" if g.exact else "no",
                    plain_text(places(g)),
                )
        notes = [
            f"[yellow]note[/]  {plain_text(n)}" for n in (*program.notes, *gap_lines(gaps_of(program), "sliceable"))
        ]
        drawn = [f"[bold]graph  {plain_text(graph)}[/]"] if graph else []
        told = None if program.tokens is None else describe_tokens(program.tokens, None)
        self._print(
            f"{plain_text(program.name)}: {giga(dense)} GMACs, {sum(g.prunable for g in groups)} prunable groups",
            table,
            *frozen_lines(_frozen(program)),
            *token_lines(told),
            *notes,
            "[dim]share: of all MACs; groups overlap, so shares add up to more than 1. exact: cutting equals "
            f"masking. MACs are {COUNTED}[/]",
            *drawn,
        )

    def show_bench(self, result: Mapping[str, Any]) -> None:
        """Latency per batch size, interleaved, with spread."""
        table = _table("", "batch", "median ms", "middle half ms", "samples/s", "speed-up")
        for row in result["rows"]:
            for number, (name, t) in enumerate(row["timings"].items()):
                first = next(iter(row["timings"].values()))
                ratio = f"{t['median_ms'] / first['median_ms']:.2f}x" if number else ""
                table.add_row(
                    plain_text(name),
                    str(row["batch"]),
                    f"{t['median_ms']:.3f}",
                    f"{t['q1_ms']:.3f} .. {t['q3_ms']:.3f}",
                    f"{t['per_second']:,.0f}",
                    ratio,
                )
        env = result["environment"]
        self._print(
            "",
            table,
            f"[dim]{plain_text(str(env.get('cpu')))}, {result['threads'] or 'default'} threads; medians "
            "of interleaved rounds; speed-up of the first over the other[/]",
        )

    def show_delivery(self, manifest: Mapping[str, Any], path: str) -> None:
        """Every gate of every target, and what that makes of the delivery."""
        table = _table("target", "gate", "", "measured", "limit", "why", numbers=(3, 4))
        colours = {"passed": "green", "failed": "red", "unfinished": "yellow"}
        for entry in manifest["targets"].values():
            for g in entry["gates"]:
                shown = ["" if g[k] is None else f"{g[k]:.4g}" for k in ("measured", "limit")]
                shown[0] += f" {g['unit']}" if shown[0] and g["unit"] else ""
                table.add_row(
                    plain_text(entry["target"]),
                    g["name"],
                    f"[{colours[g['status']]}]{g['status']}[/]",
                    *shown,
                    plain_text(g["why"]),
                )
        metric, status = manifest["metric"], manifest["status"]
        self._print(
            "",
            table,
            f"dense     {metric['name']} {metric['dense']:.4f} on {metric['samples']} samples",
            f"[bold {colours[status]}]{status}[/]  [bold]{plain_text(str(path))}[/]",
        )

    def show_tuning(self, result: Mapping[str, Any]) -> None:
        """What a table of block timings says."""
        best = result["best"]
        self._print(
            f"{plain_text(result['device'])}: tiles are faster than dense in {result['faster']} of "
            f"{result['cases']} cases; {result['geometric_mean']:.2f}x on average, at best "
            f"{best['ratio']:.2f}x ({best['n']}x{best['k']}, M={best['m']}, tiles {best['pattern']}, density "
            f"{best['density']:g})",
            f"[bold]table  {plain_text(result['table'])}[/]",
        )

    def show_comparison(self, names: Sequence[str], rows: Sequence[Sequence[str]], path: str | None) -> None:
        """Artefacts side by side."""
        table = _table("", *map(plain_text, names))
        for row in rows:
            table.add_row(*map(plain_text, row))
        self._print("", table, *([f"[bold]page  {plain_text(path)}[/]"] if path else []))

    def show_explanation(self, result: Mapping[str, Any], top: int) -> None:
        """Why elements of a group went, and those on either side of the cut."""
        scored = [e for e in result["elements"] if e["score"] is not None]
        cut = next((i for i, e in enumerate(scored) if not e["kept"]), len(scored))
        table = _table("element", "score", "rank", "by score", "", numbers=(0, 1, 2, 3))
        for e in scored[max(0, cut - top) : cut + top]:
            table.add_row(
                str(e["element"]),
                f"{e['score']:.4g}",
                str(e["rank"]),
                str(e["rank_by_score"]),
                "stays" if e["kept"] else "[red]went[/]",
            )
        lines = [f"  {plain_text(line)}" for line in result["because"]]
        self._print(
            f"[bold]{plain_text(result['group'])}[/]  {result['kept']} of {result['size']} stay",
            *lines,
            *([table] if scored and top else []),
        )

    def show_sweep(self, result: Mapping[str, Any], out: str) -> None:
        """Every point of a sweep, and the one that was chosen."""
        times = result["latency"][0]["timings"] if result["latency"] else {}
        measure = result["measure"] or "measure"
        table = _table("ratio", "GMACs", "parameters", measure, "drop", "median ms", "speed-up", "")
        table.add_row(
            "dense",
            giga(result["dense"]["cost"]["flops"]),
            mega(result["dense"]["cost"]["params"]),
            f"{result['dense']['value']:.4f}",
            "",
            f"{times['dense']['median_ms']:.3f}" if times else "",
            "",
            "",
        )
        for p in result["points"]:
            if "infeasible" in p:
                table.add_row(f"{p['ratio']:g}", "out of reach", "", "", "", "", "", "")
                continue
            t = times.get(p["artifact"])
            table.add_row(
                f"{p['ratio']:g}",
                giga(p["cost"]["flops"]),
                mega(p["cost"]["params"]),
                f"{result['dense']['value'] - p['drop']:.4f}",
                f"{p['drop']:.4f}",
                f"{t['median_ms']:.3f}" if t else "",
                f"{times['dense']['median_ms'] / t['median_ms']:.2f}x" if t else "",
                "[green]chosen[/]" if p["artifact"] == result["chosen"] else "",
            )
        told = []
        if result["max_drop"] is not None and result["chosen"] is None:
            told = [f"[yellow]no ratio stays within a drop of {result['max_drop']:g}[/]"]
        judged = result["judged"]
        self._print(
            "",
            table,
            *told,
            f"[bold]page  {plain_text(out)}/sweep.html[/]",
            f"[dim]judged on {judged['samples']} samples that nothing was decided or fitted on; one of them is "
            f"{judged['resolution']:.4f}. MACs are {COUNTED}[/]",
        )

    def show_sensitivity(self, result: Mapping[str, Any]) -> None:
        """Damage per group and per kind, the most sensitive first."""
        shares = result["shares"]
        table = _table("group", *(f"keep {s:g}" for s in shares), f"of the MACs at {shares[-1]:g}")
        rows = sorted(result["groups"], key=lambda g: -g["levels"][-1]["damage"])
        together = [{"group": f"all {k['groups']} of kind {k['kind']}", **k} for k in result["kinds"]]
        for g in [*rows, *together]:
            table.add_row(
                plain_text(g["group"]),
                *(f"{level['damage']:.4g} ({level['kept']})" for level in g["levels"]),
                f"-{g['levels'][-1]['flops_saved'] / max(result['flops'], 1):.3f}",
            )
        self._print(
            "",
            table,
            *frozen_lines(result["frozen"]),
            f"[dim]damage (elements kept): {result['unit']}; {result['samples']} samples, nothing recovered[/]",
        )

    def show_demo(self, result: Mapping[str, Any]) -> None:
        """Dense against compressed on the digits' test split."""
        dense, small = result["dense"], result["compressed"]
        table = _table("ViT on handwritten digits", "dense", "compressed", "ratio")

        def row(label: str, key: str, show: Any, ratio: bool = True) -> None:
            share = f"{small[key] / dense[key]:.3f}" if ratio and dense[key] else ""
            table.add_row(label, show(dense[key]), show(small[key]), share)

        row(f"test accuracy ({result['test_samples']} images)", "accuracy", "{:.2%}".format, ratio=False)
        row("GMACs", "flops", giga)
        row("parameters", "params", mega)
        row("ONNX file", "file_bytes", mebi)
        for batch in result["batches"]:
            row(f"onnxruntime, batch {batch}, median ms", f"latency_ms_{batch}", "{:.3f}".format)
        row("largest |eager - ONNX|", "onnx_max_abs", "{:.1e}".format, ratio=False)
        self._print(
            "",
            table,
            f"criterion {result['importance']}, calibrated on {result['calibration_samples']} "
            "images of the train split; no retraining after pruning",
            f"[bold]artefact  {plain_text(result['artifact'])}[/]",
            f"load it   fxprune.load({result['artifact']!r})",
            f"by hand   {plain_text(result['command'])}",
            f"[dim]MACs are {COUNTED}; {result['threads']} thread(s); {result['seconds']:.0f} s in all, "
            f"{result['training_seconds']:.0f} s of it training[/]",
        )


def _table(*columns: str, numbers: Sequence[int] | None = None) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(columns):
        right = i > 0 if numbers is None else i in numbers
        table.add_column(column, justify="right" if right else "left", overflow="fold")
    return table
