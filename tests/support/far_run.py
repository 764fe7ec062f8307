"""Run by test_devices.py in a process of its own: whole runs on a second device, held against the same runs on the CPU.

    python -m support.far_run CASE ..      prints one JSON object: case -> what came out, or the error

A run that puts a tensor on the CPU beside those of the device ends with an error that names the op.
"""

from __future__ import annotations

import json
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import torch

import fxprune
import support.far_device as far
from fxprune.cli.demo import DigitsViT
from fxprune.ir.placement import place, whole_device
from support import blocks

Made = tuple[torch.nn.Module, list[torch.Tensor]]


def feet() -> Made:
    layers = [torch.nn.Linear(16, 32), torch.nn.GELU(), torch.nn.Linear(32, 16)]
    return torch.nn.Sequential(*layers), [torch.randn(8, 16) for _ in range(4)]


def vit() -> Made:
    return DigitsViT(dim=16, depth=1, heads=2, hidden=32), [torch.randn(8, 1, 8, 8) for _ in range(3)]


def convolutions() -> Made:
    return blocks.ResidualConvolutions(), [torch.randn(8, 3, 16, 16) for _ in range(3)]


def depthwise() -> Made:
    return blocks.Depthwise(), [torch.randn(8, 3, 16, 16) for _ in range(3)]


def words() -> Made:
    return blocks.Tied(), [torch.randint(0, 40, (8, 8)) for _ in range(3)]


CASES: dict[str, tuple[Callable[[], Made], dict[str, Any]]] = {
    "default": (feet, {"flops": 0.5}),
    "magnitude": (feet, {"flops": 0.5, "importance": "l2", "recover": "none"}),
    "convolutions": (convolutions, {"flops": 0.5}),
    "depthwise": (depthwise, {"flops": 0.6}),
    "token ids": (words, {"flops": 0.7}),
    "widths and tuning": (vit, {"flops": 0.5, "recover": "tune{steps=3}", "prune": "heads,ffn,qk,v,width"}),
    "layers": (vit, {"flops": 0.5, "prune": "heads,ffn,layers"}),
    "fisher, rearranged": (vit, {"flops": 0.5, "importance": "fisher", "rearrange": 1, "recover": "scale"}),
    "obs in rounds": (vit, {"flops": 0.5, "importance": "obs", "rounds": 2}),
    "taylor": (vit, {"flops": 0.5, "importance": "taylor", "recover": "refit"}),
    "activation": (vit, {"flops": 0.5, "importance": "activation", "recover": "bias"}),
    "exact, scaled": (vit, {"flops": 0.5, "importance": "trajectory{mode=exact}", "head_scale": "auto"}),
    "tokens": (vit, {"flops": 0.7, "prune": "heads,ffn,tokens", "unmerge": True}),
    "ppt": (vit, {"flops": 0.9, "prune": "tokens", "tokens": "ppt"}),
    "zero-tprune": (vit, {"flops": 0.9, "prune": "tokens", "tokens": "zero-tprune"}),
    "tiles by lsp": (vit, {"flops": 0.5, "blocks": "16x16", "importance": "lsp"}),
    "tiles by obert": (vit, {"flops": 0.5, "blocks": "16x16", "importance": "obert", "recover": "obs"}),
    "tiles by wanda": (vit, {"flops": 0.5, "blocks": "16x16{slice=0.7}", "importance": "wanda"}),
    "two of four": (vit, {"flops": 0.7, "sparse": "2:4"}),
}


def compile_on(case: str, device: str) -> dict[str, Any]:
    """What a case comes to on a device, as plain data; the model is given on the CPU."""
    make, options = CASES[case]
    torch.manual_seed(0)
    model, data = make()
    run = fxprune.compile(model.eval(), data[0][:4].clone(), data=data, device=device, **options)
    out = run.module(data[1])
    return {
        "keep": {name: list(choice.keep) for name, choice in run.plan.elements.items()},
        "devices": sorted({str(t.device) for t in run.module.state_dict().values()}),
        "out": out.detach().flatten()[:64].tolist(),
        "failed": [note for note in run.report["notes"] if "reported" in note],
        "macs": run.report["cost"]["ratio"]["flops"],
    }


def try_mixing() -> dict[str, Any]:
    """What the device itself must do for the rest to mean anything."""
    there, found = torch.ones(3).to(far.NAME), {}
    for name, mixed in {
        "sum": lambda: there + torch.ones(3),
        "index": lambda: there[torch.tensor([0, 1])],
        "product": lambda: torch.eye(3) @ there,
        "where": lambda: there.where(torch.ones(3, dtype=torch.bool), 0.0),
    }.items():
        try:
            mixed()
            found[name] = "mixed"
        except RuntimeError as error:
            found[name] = str(error)
    exported = torch.export.export(torch.nn.Linear(3, 3).to(far.NAME), (torch.ones(2, 3).to(far.NAME),))
    return {"mixed": found, "runs": exported.module()(torch.ones(2, 3).to(far.NAME)).device.type}


def place_and_return() -> dict[str, Any]:
    """A program with a tied weight, there and back."""
    from fxprune.intake.capture import capture

    program = capture(blocks.Tied().eval(), (torch.randint(0, 40, (2, 8)),))
    there = place(program, whole_device(far.NAME))
    back = place(there, program.device)

    def tied(one: Any) -> list[list[str]]:
        seen: dict[int, list[str]] = {}
        for name, tensor in one.tensors.items():
            seen.setdefault(tensor.data_ptr(), []).append(name)
        return sorted(sorted(names) for names in seen.values())

    return {
        "device": str(there.device),
        "still": program.device.type,
        "tied": [tied(program), tied(there), tied(back)],
        "metas": sorted({str(n.meta["val"].device) for n in there.graph.nodes if hasattr(n.meta.get("val"), "device")}),
        "parameters": [type(t).__name__ for t in back.exported.state_dict.values()],
    }


def main() -> None:
    """Run the cases that are named."""
    warnings.simplefilter("ignore")
    found: dict[str, Any] = {}
    for case in sys.argv[1:]:
        try:
            if case in CASES:
                found[case] = {"cpu": compile_on(case, "cpu"), "far": compile_on(case, far.NAME)}
            else:
                found[case] = {"held apart": try_mixing, "placed": place_and_return}[case]()
        except Exception:
            found[case] = {"error": traceback.format_exc()[-3000:]}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
