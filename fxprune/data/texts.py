"""Texts from ``.csv``, ``.tsv``, ``.jsonl`` and ``.txt``: one or two per sample, with a label or without."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import LoadError
from ..intake.tensors import existing, shorten

SUFFIXES = (".csv", ".tsv", ".jsonl", ".txt")
LABEL_NAMES = ("label", "labels", "y", "target", "targets", "class")
_FIRST = ("text", "sentence", "sentence1", "premise", "question", "question1", "query", "content", "review", "document")
_SECOND = ("text2", "sentence2", "hypothesis", "question2", "answer", "context", "passage", "text_pair")
_NAME_THEM = "call the texts text, or sentence1 and sentence2, and labels label, in the first row"
_LARGEST = 1024**3  # bytes of a text file


@dataclass(frozen=True)
class Texts:
    """Samples of a text file. second and labels are None, or as long as first; labels are as written in the file."""

    first: tuple[str, ...]
    second: tuple[str, ...] | None = None
    labels: tuple[str, ...] | None = None

    def pick(self, indices: Sequence[int]) -> Texts:
        """The samples at ``indices``."""
        return Texts(
            tuple(self.first[i] for i in indices),
            None if self.second is None else tuple(self.second[i] for i in indices),
            None if self.labels is None else tuple(self.labels[i] for i in indices),
        )


def read_texts(path: Path) -> Texts:
    """Texts of a file, by its suffix.

    ``.txt`` has one text a line. ``.csv`` and ``.tsv`` have a header that names a text column (text, sentence,
    premise, question, ...), a second one for pairs (sentence2, hypothesis, context, ...) and a label column; without
    such a header the first column is the text, a column of words after it the second text, and a last column of numbers
    the label. ``.jsonl`` has one object a line with the same names.
    Raises LoadError when the file is damaged, empty or names no text column.
    """
    existing(path)
    size = path.stat().st_size
    if size > _LARGEST:
        raise LoadError("the text file is too large", where=str(path), why=f"{size} bytes", cure="give a part of it")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as failure:
        raise LoadError("the text is not UTF-8", where=str(path), why=str(failure), cure="save it as UTF-8") from None
    except OSError as failure:
        raise LoadError("the file cannot be read", where=str(path), why=failure.strerror or str(failure)) from None
    suffix = path.suffix.lower()
    if suffix == ".txt":
        found = Texts(tuple(line.strip() for line in text.splitlines() if line.strip()))
    elif suffix == ".jsonl":
        found = _from_objects(_json_lines(text, path), path)
    else:
        found = _from_table(_rows(text, path, "\t" if suffix == ".tsv" else _delimiter(text, path)), path)
    if not found.first:
        raise LoadError("the file holds no texts", where=str(path), why="every line is empty")
    return found


def _delimiter(text: str, path: Path) -> str:
    """What parts the cells of a ``.csv``: commas, unless semicolons or tabs alone part every row into as many cells, as
    spreadsheets write it where commas are decimal points."""
    if not _is_table(_rows(text, path, ",")):
        for other in ";\t":
            if other in text and _is_table(_rows(text, path, other)):
                return other
    return ","


def _is_table(rows: list[list[str]]) -> bool:
    widths = {len(row) for row in rows}
    return len(rows) > 1 and len(widths) == 1 and max(widths) > 1


def _texts_and_a_number(columns: Sequence[Sequence[str]]) -> bool:
    *texts, last = columns
    return 1 <= len(texts) <= 2 and all(map(_number, last)) and not any(all(map(_number, text)) for text in texts)


def _rows(text: str, path: Path, delimiter: str) -> list[list[str]]:
    try:
        return [
            row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) if any(c.strip() for c in row)
        ]
    except csv.Error as failure:
        cure = "quote texts that hold the delimiter or line ends, or give a .jsonl"
        raise LoadError("the table cannot be read", where=str(path), why=str(failure), cure=cure) from None


def _from_table(rows: list[list[str]], path: Path) -> Texts:
    if not rows:
        return Texts(())
    header = [cell.strip().lower() for cell in rows[0]]
    if any(cell in _FIRST for cell in header):
        body = rows[1:]
        for number, row in enumerate(body, 2):
            if len(row) != len(header):
                raise LoadError(
                    "a row has another number of columns than the header",
                    where=f"{path}, row {number}",
                    why=f"{len(row)} cells, {len(header)} names",
                    cure="quote texts that hold the delimiter",
                )
        return _from_objects([dict(zip(header, row, strict=True)) for row in body], path)
    if len(header) > 1 and any(name in LABEL_NAMES for name in header):
        raise _no_text_column(path, f"its columns are {shorten(header)}")
    return _without_header(rows, path)


def _no_text_column(path: Path, why: str) -> LoadError:
    return LoadError(
        "the table names no text column",
        where=str(path),
        why=f"{why}; none of them is called {shorten(_FIRST, 4)}",
        cure=_NAME_THEM,
    )


def _without_header(rows: list[list[str]], path: Path) -> Texts:
    """``text``, ``text,number`` or ``text,text,number``: all else needs names."""
    width = len(rows[0])
    for number, row in enumerate(rows, 1):
        if len(row) != width:
            raise LoadError(
                "the rows have different numbers of columns, and there is no header",
                where=f"{path}, row {number}",
                why=f"{len(row)} cells; the first row has {width}",
                cure=f"quote texts that hold the delimiter, or {_NAME_THEM}",
            )
    columns = [tuple(row[i] for row in rows) for i in range(width)]
    *texts, last = columns
    if _texts_and_a_number(columns):
        return Texts(texts[0], texts[1] if len(texts) == 2 else None, tuple(cell.strip() for cell in last))
    if width == 1:
        return Texts(last)
    why = (
        f"its first row is {shorten(cell.strip() for cell in rows[0])}, and they are not one or two texts and a number"
    )
    raise _no_text_column(path, why)


def _json_lines(text: str, path: Path) -> list[Mapping[str, Any]]:
    objects: list[Mapping[str, Any]] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except (ValueError, RecursionError) as failure:
            cure = 'each line is one JSON object, such as {"text": "...", "label": 1}'
            raise LoadError(
                "a line is not JSON", where=f"{path}, line {number}", why=str(failure)[:200], cure=cure
            ) from None
        if isinstance(found, str):
            found = {"text": found}
        if not isinstance(found, dict):
            raise LoadError(
                "a line is no JSON object", where=f"{path}, line {number}", why=f"it is {type(found).__name__}"
            )
        objects.append({str(key).lower(): value for key, value in found.items()})
    return objects


def _from_objects(objects: list[Any], path: Path) -> Texts:
    if not objects:
        return Texts(())
    names = list(objects[0])
    first = next((name for name in _FIRST if name in names), None)
    if first is None:
        raise LoadError(
            "the file names no texts",
            where=str(path),
            why=f"its fields are {shorten(names)}",
            cure=f"name the text {shorten(_FIRST, 4)}",
        )
    # a question may come with a second text called "context"; where there is no text but "question2", it is a pair too
    second = next((name for name in _SECOND if name in names), None)
    label = next((name for name in LABEL_NAMES if name in names), None)
    columns: list[tuple[str, ...] | None] = []
    for name in (first, second, label):
        columns.append(None if name is None else tuple(_cell(o, name, path, i) for i, o in enumerate(objects, 1)))
    assert columns[0] is not None
    return Texts(columns[0], columns[1], columns[2])


def _cell(row: Mapping[str, Any], name: str, path: Path, number: int) -> str:
    value = row.get(name)
    if isinstance(value, bool):
        value = int(value)
    if not isinstance(value, (str, int, float)):
        raise LoadError(
            f"a sample lacks its {name}",
            where=f"{path}, sample {number}",
            why=f"it holds {type(value).__name__}",
            cure="every sample needs the same fields, with texts and numbers in them",
        )
    return str(value)


def _whole(text: str) -> bool:
    return text.strip().lstrip("-").isdecimal()


def _number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def label_numbers(labels: Sequence[str], label2id: Mapping[str, int] | None = None) -> list[int | float]:
    """Labels as numbers: as they are where all are numbers, by the model's ``label2id``, else by sorted order."""
    if all(_whole(label) for label in labels):
        return [int(label) for label in labels]
    if label2id and all(label in label2id for label in labels):
        return [int(label2id[label]) for label in labels]
    try:
        return [float(label) for label in labels]
    except ValueError:
        order = {label: i for i, label in enumerate(sorted(set(labels)))}
        return [order[label] for label in labels]
