"""Token reduction at equal cost: accuracy against FLOPs and against measured latency, every reducer, every schedule.

    python tools/bench/tokens.py --prepare                   train the model once (about half an hour on one core)
    python tools/bench/tokens.py --out tokens.json           measure what that file does not hold yet
           [--rows tome,ppt] [--schedules constant,optin] [--ratios 0.7,0.5] [--ledgers joint] [--ledger-ratios 0.5]
           [--draws 5] [--timed tome,ppt,joint] [--timed-ratios 0.7,0.5] [--timed-schedules constant,optin]
    python tools/bench/tokens.py --out tokens.json --check   hold the file against the targets, measure nothing

Model     ``model.py``: a ViT with 197 tokens on CIFAR-10 images at 56x56, trained here
Sweep     every reducer of ``cells.REDUCERS`` with every schedule, tokens alone, without recovery
Schedules ToMe's constant and decreasing ones, OPTIN's, and the product's default, which tries all of them on its data
Ledgers   one budget for weights (heads and neurons), for tokens (ToMe, default schedule), for both; recovery on and off
Budget    share of the dense model's multiply-accumulates of one image, everything counted, the stem included
Figures   accuracy on 2000 test images (a record of fewer is judged again, by its counts); also on the held-out train
          images that no method saw; agreement with the dense model and KL divergence from it on some of these; MACs
          predicted, and counted where there is an artefact; tokens that each block's attention takes. A reducer that
          draws at random is the mean of ``--draws`` seeds
Latency   ONNX Runtime on the CPU, batch 1 and 32, dense and reduced interleaved, medians. Realised: the speed-up as a
          share of 1 / (MACs / dense MACs)
Targets   OPTIN's schedule at or above the constant one at every ratio, on test and held-out images: ToMe's, and all
          reducers in their mean, with no cell below by more than two standard errors (the others, and the default
          schedule, are reported beside); the joint plan at or above each kind alone at 0.5; realised at least
          0.85 at batch 32

Results are written after every measurement, so a run may be interrupted; ``--again ROW,..`` measures rows anew. The
plot (``plot.py``) is drawn beside the results where matplotlib is there. Exit code 1 when a target is missed
(``--check``), or when data are missing.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.accuracy.models import CACHE, DATA, LOADERS, fingerprint
from bench.lists import names, numbers
from bench.record import peak_memory, read, write
from bench.tokens.cells import (
    BATCHES,
    DRAWN,
    LEDGERS,
    RATIOS,
    RECOVERIES,
    REDUCERS,
    SCHEDULES,
    Cell,
    Record,
    key,
    ledgers,
    sweep,
)
from bench.tokens.compare import apart, mean_of, of_ledger, of_row, over_reducers, overall, pairs, points
from bench.tokens.model import RECIPE, Split, splits, train_cached
from bench.tokens.plot import plot
from bench.tokens.run import Bench

TIMED, TIMED_RATIOS = ("tome", "ppt", "prune-class-value", "joint"), (0.7, 0.5)
JOINT_AT, REALISED, AT_BATCH, DECIDES = 0.5, 0.85, "32", ("tome",)
JUDGES = 500  # held-out images on which closeness to dense is measured
OURS = ("optin", "auto")  # the first decides


def read_held(path: Path) -> dict[str, Any]:
    """The results file, or an empty one."""
    empty: dict[str, Any] = {"model": {}, "measured": []}
    return {**empty, **read(path)} if path.exists() else empty


class Results:
    """What has been measured so far, on disk after every measurement."""

    def __init__(self, path: Path) -> None:
        held = read_held(path)
        self.path, self.model, self.measured = path, dict(held["model"]), list(held["measured"])

    def drop(self, rows: Sequence[str]) -> None:
        """Forget rows, to measure them anew."""
        self.measured = [r for r in self.measured if r["row"] not in rows]

    def open(self, about: Mapping[str, Any]) -> None:
        """Of which model the measurements are. Those of other weights are forgotten."""
        self.measured = [r for r in self.measured if r["weights"] == about["weights"]]
        self.model = dict(about)

    def save(self, records: Sequence[Record]) -> None:
        """``records`` replace what is there."""
        self.measured = list(records)
        write(self.path, "tokens", **self.content())

    def content(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "ratios": sorted({r["ratio"] for r in self.measured}, reverse=True),
            "seeds": sorted({r["seed"] for r in self.measured}),
            "reducers": REDUCERS,
            "ledgers": LEDGERS,
            "peak_bytes": peak_memory(),
            "measured": self.measured,
        }


def table(content: Mapping[str, Any]) -> str:
    """Accuracy, and the KL divergence in brackets, a block per schedule; the ledgers; latency."""
    records, ratios, model = content["measured"], content["ratios"], content["model"]
    if not model:
        return "nothing was measured"
    head = f"{'':28}" + "".join(f"{r:>16g}" for r in ratios)
    lines = [f"dense: {model['accuracy']:.2f} %, {model['macs'] / 1e6:.1f} M MACs, {model['tokens'][0]} tokens"]
    for schedule in SCHEDULES:
        block = {row: [of_row(records, row, schedule, r) for r in ratios] for row in REDUCERS}
        lines += _block(f"tokens alone, schedule {schedule}", head, block)
    block = {
        f"{row}, recover={recover}": [of_ledger(records, row, recover, r) for r in ratios]
        for row in LEDGERS
        for recover in RECOVERIES
    }
    lines += _block("one budget", head, block)
    lines += [f"failed: {_name(r)}: {r['error']}" for r in records if "error" in r]
    lines += [
        f"{_name(r)}, batch {batch}: {t['dense_ms']:.2f} -> {t['reduced_ms']:.2f} ms, x{t['speedup']:.2f}, "
        f"{t['realised']:.2f} of ideal"
        for r in records
        for batch, t in r.get("latency", {}).items()
    ]
    return "\n".join(lines)


def _block(title: str, head: str, rows: Mapping[str, Sequence[Record | None]]) -> list[str]:
    filled = {name: cells for name, cells in rows.items() if any(cells)}
    if not filled:
        return []
    return [
        "",
        f"{title}: accuracy (KL)",
        head,
        *(
            f"{name:28}"
            + "".join(f"{'-':>16}" if c is None else f"{c['accuracy']:7.2f} ({c['kl']:6.4f})" for c in cells)
            for name, cells in filled.items()
        ),
    ]


def _name(record: Record) -> str:
    return f"{record['row']} {record['schedule']} recover={record['recover']} at {record['ratio']:g}".replace("  ", " ")


def check(records: Sequence[Record]) -> tuple[list[str], list[str], list[str]]:
    """(targets met, targets missed, what was found beside them), a sentence each; what was not measured is missed."""
    met: list[str] = []
    missed: list[str] = []
    beside: list[str] = []
    for row, schedule, ratio in itertools.product(REDUCERS, OURS, RATIOS):
        reached, text = _schedules(records, row, schedule, ratio)
        if row in DECIDES and schedule == OURS[0]:
            (met if reached else missed).append(text)
        else:
            beside.append(text)
    for found, text in (
        *_over_reducers(records, OURS[0]),
        overall(records, OURS[0]),
        _joint(records),
        *_list_realised(records),
    ):
        (met if found else missed).append(text)
    for schedule in OURS[1:]:
        beside += [text for _, text in (*_over_reducers(records, schedule), overall(records, schedule))]
    return met, missed, beside


def _schedules(records: Sequence[Record], row: str, schedule: str, ratio: float) -> tuple[bool, str]:
    both = pairs(records, row, schedule, "constant", ratio)
    ours, theirs = map(mean_of, both)
    if ours is None or theirs is None:
        return False, f"{row} at {ratio:g}: {schedule} and constant were not both measured"
    reached = _is_reached(*both)
    return reached, (
        f"{row} at {ratio:g}: {schedule} {'at or above' if reached else 'below'} constant{_apart(*both)}; "
        f"on test images {ours['accuracy']:.2f} % (KL {ours['kl']:.4f}) and {theirs['accuracy']:.2f} % "
        f"(KL {theirs['kl']:.4f})"
    )


def _over_reducers(records: Sequence[Record], schedule: str) -> list[tuple[bool, str]]:
    """Per ratio: is the schedule at or above the constant one in the mean over all reducers?"""
    found = over_reducers(records, schedule)
    return [
        (
            found[ratio][0] >= 0,
            f"{found[ratio][2]} reducers at {ratio:g}: {schedule} beside constant "
            f"{found[ratio][0]:+.2f} points in their mean, standard error {found[ratio][1]:.2f}",
        )
        if ratio in found and found[ratio][2] == len(REDUCERS)
        else (False, f"all reducers at {ratio:g}: {schedule} and constant were not measured")
        for ratio in RATIOS
    ]


def _is_reached(ones: Sequence[Record], twos: Sequence[Record]) -> bool:
    """Whether ``ones`` are at or above ``twos`` on the images that all were judged on."""
    found = apart(ones, twos)
    return bool(found.mean() >= 0) if found is not None else bool(ones[0]["accuracy"] >= twos[0]["accuracy"])


def _apart(ones: Sequence[Record], twos: Sequence[Record]) -> str:
    """By how much, with the standard error over the images, the further ones too."""
    found = apart(ones, twos)
    if found is None:
        return ""
    by, error = points(found)
    return f": {by:+.2f} points over {found.shape[1]} images, standard error {error:.2f}"


def _joint(records: Sequence[Record]) -> tuple[bool, str]:
    at = f"at {JOINT_AT:g}, with recovery"
    cells = {row: of_ledger(records, row, "auto", JOINT_AT) for row in LEDGERS}
    if any(cell is None for cell in cells.values()):
        return False, f"{at}: joint, weights and tokens were not all measured"
    found = {row: cell for row, cell in cells.items() if cell is not None}
    joint = found.pop("joint")
    best = max(found.values(), key=lambda cell: float(cell["accuracy"]))
    said = ", ".join(f"{row} {cell['accuracy']:.2f} %" for row, cell in found.items())
    reached = _is_reached([joint], [best])
    return reached, (
        f"{at}: joint {joint['accuracy']:.2f} % is {'at or above' if reached else 'not above'} both "
        f"({said}){_apart([joint], [best])}"
    )


def _list_realised(records: Sequence[Record]) -> list[tuple[bool, str]]:
    timed = [r for r in records if AT_BATCH in r.get("latency", {})]
    if not timed:
        return [(False, f"no latency was measured at batch {AT_BATCH}")]
    shares = [(r, float(r["latency"][AT_BATCH]["realised"])) for r in timed]
    return [
        (share >= REALISED, f"{_name(r)}, batch {AT_BATCH}: {share:.3f} of the ideal speed-up, wanted {REALISED:g}")
        for r, share in shares
    ]


def _say(text: str) -> None:
    print(text, flush=True)


def measure(results: Results, args: argparse.Namespace) -> None:
    """Open the model, measure, save as it goes. Raises FileNotFoundError without data."""
    images = LOADERS[RECIPE.data](args.data)
    model, training = train_cached(RECIPE, images, args.cache, _say)
    held, test = splits(RECIPE, images)
    half = len(held.labels) // 2
    if not 0 < args.samples <= half:
        raise ValueError(f"--samples is between 1 and {half}: the other held-out images judge")
    weights = fingerprint(model)
    judge = slice(half, half + JUDGES)
    bench = Bench(
        model,
        weights,
        Split(held.images[:half], held.labels[:half]),
        Split(held.images[judge], held.labels[judge]),
        test,
        args.samples,
        args.cache / "tokens-onnx",
        results.save,
        _say,
        Split(held.images[args.samples :], held.labels[args.samples :]),
        threads=args.threads,
        seconds=args.seconds,
    )
    bench.open()
    results.open(
        {
            "name": RECIPE.name,
            "checkpoint": RECIPE.path(args.cache).name,
            "weights": weights,
            "training": training,
            "evaluated": f"{RECIPE.data} test, {len(test.labels)} images",
            "calibrated": f"{RECIPE.data} train, {args.samples} of {half} held-out images",
            "judged": f"{RECIPE.data} train, {JUDGES} other held-out images",
            "further": f"{RECIPE.data} train, the {len(held.labels) - args.samples} held-out images that no method saw",
            **bench.dense,
        }
    )
    bench.records = results.measured
    results.save(bench.records)
    _say(f"dense: {bench.dense['accuracy']:.2f} %, {bench.dense['macs'] / 1e6:.1f} M MACs")
    drawn = [row for row in args.rows if row in DRAWN]
    cells = {
        key(cell.record(args.samples, weights)): cell
        for cell in (
            *ledgers(args.ledgers, args.recover, args.ledger_ratios, args.seed),
            *sweep(args.rows, args.schedules, args.ratios, args.seed),
            *(
                cell
                for draw in range(1, args.draws)
                for cell in sweep(drawn, args.schedules, args.ratios, args.seed + draw)
            ),
        )
    }
    bench.run(list(cells.values()), {cell: args.batches for cell in cells.values() if is_timed(cell, args)})


def is_timed(cell: Cell, args: argparse.Namespace) -> bool:
    """Whether latency is wanted: of some schedules of a reducer, of a ledger with its recovery."""
    wanted = cell.row in args.timed and cell.ratio in args.timed_ratios and cell.seed == args.seed
    return wanted and (cell.recover == "auto" if cell.row in LEDGERS else cell.schedule in args.timed_schedules)


def report(results: Results, verdict: bool) -> int:
    """Table, plot and, with ``verdict``, the targets; the exit code."""
    content = results.content()
    print(table(content))
    if content["measured"]:
        try:
            print("plot: " + ", ".join(map(str, plot(content, results.path.with_suffix("")))))
        except ImportError:
            print("no plot: matplotlib is not installed")
    if not verdict:
        return 0
    met, missed, beside = check(results.measured)
    for word, texts in (("beside", beside), ("met", met), ("missed", missed)):
        for text in texts:
            print(f"{word + ':':8}{text}")
    return int(bool(missed))


def parser() -> argparse.ArgumentParser:
    """Options."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, default=Path("build/tokens.json"))
    made.add_argument("--data", type=Path, default=DATA, help="folder with cifar10/")
    made.add_argument("--cache", type=Path, default=CACHE, help="folder of the checkpoint and of ONNX files")
    made.add_argument("--prepare", action="store_true", help="train the model and stop")
    made.add_argument("--check", action="store_true", help="hold --out against the targets and stop")
    made.add_argument("--rows", type=names(REDUCERS), default=list(REDUCERS))
    made.add_argument("--schedules", type=names(SCHEDULES), default=list(SCHEDULES))
    made.add_argument("--ratios", type=numbers(float), default=list(RATIOS))
    made.add_argument("--ledgers", type=names(LEDGERS), default=list(LEDGERS))
    made.add_argument("--ledger-ratios", type=numbers(float), default=[JOINT_AT])
    made.add_argument("--recover", type=names(RECOVERIES), default=list(RECOVERIES), help="of the ledgers")
    made.add_argument("--again", type=names((*REDUCERS, *LEDGERS)), default=[], help="rows to measure anew")
    made.add_argument("--timed", type=names((*REDUCERS, *LEDGERS)), default=list(TIMED), help="rows to time")
    made.add_argument("--timed-ratios", type=numbers(float), default=list(TIMED_RATIOS))
    made.add_argument("--timed-schedules", type=names(SCHEDULES), default=["constant", OURS[0]])
    made.add_argument("--batches", type=numbers(int), default=list(BATCHES))
    made.add_argument("--seconds", type=float, default=20.0, help="of timing, per cell and batch size")
    made.add_argument("--samples", type=int, default=256, help="held-out images that methods see")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--draws", type=int, default=5, help="seeds of reducers that draw")
    made.add_argument("--threads", type=int, default=1)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Prepare, check, or measure and report."""
    args = parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.check:
        return report(Results(args.out), verdict=True)
    try:
        if args.prepare:
            _, about = train_cached(RECIPE, LOADERS[RECIPE.data](args.data), args.cache, _say)
            _say(
                f"{RECIPE.path(args.cache)}: test accuracy {100 * about['test_accuracy']:.2f}, "
                f"{about['cpu_seconds']} CPU s"
            )
            return 0
        results = Results(args.out)
        results.drop(args.again)
        measure(results, args)
    except (FileNotFoundError, ValueError) as problem:
        print(problem, file=sys.stderr)
        return 1
    return report(results, verdict=False)
