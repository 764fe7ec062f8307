"""A small artefact that has everything a report can show, and ways to read its page."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import torch

import fxprune
from fxprune.artifact.artifact import Artifact
from fxprune.cli.demo import Digits
from fxprune.ir.plan import CompressionPlan
from support.digits import tiny_vit

SVG = "{http://www.w3.org/2000/svg}"


def compiled(weights: dict[str, torch.Tensor], data: Digits, out: Path, **more: Any) -> Artifact:
    """The digits' ViT at 0.5 with data on disk, of which 64 samples are left over."""
    model = tiny_vit()
    model.load_state_dict(weights)
    file = out.parent / "data.pt"
    torch.save({"images": data.train_images[:128], "labels": data.train_labels[:128]}, file)
    options: dict[str, Any] = {"flops": 0.5, "data": file, "samples": 64, "out": out, **more}
    return fxprune.compile(model.eval(), torch.randn(2, 1, 8, 8), on_event=lambda _: None, **options)


def parsed(html: str) -> ET.Element:
    """The page as XML: raises where it is not well-formed."""
    assert html.startswith("<!DOCTYPE html>\n")
    return ET.fromstring(html.removeprefix("<!DOCTYPE html>\n"))


def words(root: ET.Element) -> str:
    """All its text, outside of styles."""
    return " ".join(t for e in root.iter() if not e.tag.endswith("style") for t in (e.text, e.tail) if t)


def references(html: str) -> Iterator[str]:
    """Everything that a browser might fetch."""
    for element in parsed(html).iter():
        for name, value in element.attrib.items():
            if name.rpartition("}")[2] in ("src", "href", "data", "action", "srcset", "poster", "background"):
                yield value
            yield from re.findall(r"url\(([^)]*)\)", value)
        if element.tag.endswith("style"):
            yield from re.findall(r"(?:url\(|@import)\s*([^);]*)", element.text or "")


def read(path: Path) -> tuple[dict[str, Any], CompressionPlan]:
    """Report and plan of an artefact."""
    return json.loads((path / "report.json").read_text()), CompressionPlan.read(path / "plan.json")
