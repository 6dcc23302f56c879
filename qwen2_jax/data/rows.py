"""One row of a source, and what makes a row unusable."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Document:
    """A text and where it stands; `row` counts from 1: a line, a row of Parquet, a record."""

    text: str
    file: str
    row: int


@dataclass(frozen=True)
class BadRow:
    """A row that gives no document, where it stands, and why."""

    file: str
    row: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.row}: {self.reason}"


class Unusable(ValueError):
    """Why a row gives no document."""


def text_of(value: bytes | str | None, key: str | None = None) -> str:
    """The text of a row, from bytes, a string, or (with `key`) a JSON object's bytes. Raises Unusable."""
    if value is None:
        raise Unusable("null instead of a string")
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise Unusable(f"no UTF-8 at byte {error.start}") from None
    if key is not None:
        value = _field(value, key)
    if not value:
        raise Unusable("the text is empty")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise Unusable(f"a lone surrogate at character {error.start}, which UTF-8 cannot write") from None
    return value


def usable(values: Iterable[Any], text: Callable[[Any], str], row: int) -> Iterator[tuple[int, str | Unusable]]:
    """Number and `text(value)` of each of the rows from number `row` on, or why it has none."""
    for number, value in enumerate(values, start=row):
        try:
            yield number, text(value)
        except Unusable as problem:
            yield number, problem


def _field(line: str, key: str) -> str:
    if not line.strip():
        raise Unusable("an empty line")
    try:
        row: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise Unusable(f"no JSON: {error.msg} at character {error.pos}") from None
    except (ValueError, RecursionError) as error:
        raise Unusable(f"no JSON: {error}") from None
    if not isinstance(row, dict):
        raise Unusable(f"{_kind(row)} instead of a JSON object")
    if key not in row:
        raise Unusable(f"no key {key!r}, only {', '.join(map(repr, row))}"[:200] if row else f"no key {key!r}")
    if not isinstance(row[key], str):
        raise Unusable(f"{key!r} is {_kind(row[key])} instead of a string")
    return row[key]


def _kind(value: Any) -> str:
    kinds = {type(None): "null", bool: "a truth value", int: "a number", float: "a number", list: "a list",
             dict: "an object", str: "a string"}
    return kinds[type(value)]
