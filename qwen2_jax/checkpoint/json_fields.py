"""Typed access to a JSON object that somebody else wrote: every refusal names the field and what was found."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen2_jax.errors import UserError

REQUIRED: Any = object()


class Fields:
    """The fields of one JSON object. A null counts as absent; an absent field without a default is refused.

    `prefix` goes before each name in a message: "rope_scaling." for a nested object.
    """

    def __init__(self, data: Mapping[str, Any], prefix: str = ""):
        self.data = data
        self.prefix = prefix

    def has(self, name: str) -> bool:
        return self.data.get(name) is not None

    def whole(self, name: str, default: Any = REQUIRED) -> Any:
        return self._typed(name, default, is_whole, "a whole number")

    def number(self, name: str, default: Any = REQUIRED) -> Any:
        value = self._typed(name, default, is_number, "a finite number")
        return value if value is None else float(value)

    def flag(self, name: str, default: Any = REQUIRED) -> Any:
        return self._typed(name, default, lambda value: isinstance(value, bool), "true or false")

    def text(self, name: str, default: Any = REQUIRED) -> Any:
        return self._typed(name, default, lambda value: isinstance(value, str), "a string")

    def object(self, name: str, default: Any = REQUIRED) -> Any:
        return self._typed(name, default, lambda value: isinstance(value, dict), "an object")

    def list_of(self, kind: type, name: str, default: Any = REQUIRED) -> Any:
        """A list of strings (`kind` is `str`) or of whole numbers (`int`), as a tuple."""
        is_kind, noun = (is_whole, "whole numbers") if kind is int else (lambda v: isinstance(v, kind), "strings")
        value = self._typed(name, default, lambda v: isinstance(v, list) and all(map(is_kind, v)), f"a list of {noun}")
        return value if value is None else tuple(value)

    def refuse(self, name: str, needed: str) -> UserError:
        """The error for a field whose value is not one of those supported."""
        return UserError(f"{self.prefix}{name} is {shown(self.data.get(name))}; supported: {needed}")

    def _typed(self, name: str, default: Any, check: Any, needed: str) -> Any:
        value = self.data.get(name)
        if value is None:
            if default is REQUIRED:
                raise UserError(f"{self.prefix}{name} is missing; needed: {needed}")
            return default
        if not check(value):
            raise UserError(f"{self.prefix}{name} must be {needed}, found {shown(value)}")
        return value


class Leftovers:
    """What becomes of the fields that nothing reads. `notes` collects those that were passed over, for one warning.

    A field that is null or false asks for nothing: it is passed over. Any other may change the numbers: it is refused,
    unless its name (with the prefix of its object) is in `ignore`.
    """

    def __init__(self, ignore: Collection[str] = ()):
        self.ignore = ignore
        self.notes: list[str] = []
        self._found: set[str] = set()

    def missed(self) -> list[str]:
        """Names to ignore that no object had: a misspelling, perhaps."""
        return [name if name.isprintable() else shown(name) for name in sorted(set(self.ignore) - self._found)]

    def sort(self, fields: Fields, *, used: Collection[str], inert: Collection[str] = ()) -> None:
        """Deal with every field outside `used`. Those in `inert` are known, and have no effect beside the others.

        Raises:
          UserError: the first field that is unknown, not null or false, and not ignored.
        """
        for key in sorted(fields.data.keys() - set(used)):
            name, value = fields.prefix + key, fields.data[key]
            asked = name in self.ignore
            name = name if name.isprintable() else shown(name)
            if asked:
                self._found.add(fields.prefix + key)
                self.notes.append(f"{name} is ignored, as asked")
            elif key in inert:
                if value is not None:
                    self.notes.append(f"{name} has no effect here")
            elif value is None or value is False:
                self.notes.append(f"unknown field {name} ({shown(value)}) has no effect")
            else:
                raise UserError(f"unknown field {name} is {shown(value)}, which may change the model's numbers; "
                                f"remove it, or pass --ignore-field {name}")


def is_whole(value: object) -> bool:
    """An int of 64 bits; a longer one is no size, position or id."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def is_number(value: object) -> bool:
    """A finite int or float that a float64 can hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def shown(value: object) -> str:
    """A value as JSON on one line, cut to what fits a message."""
    text = json.dumps(value, default=repr)
    return text if len(text) <= 80 else f"{text[:77]}..."


def disagreement(name: str, value: object, other: str, other_value: object) -> UserError:
    """The error for one fact that a file states twice, differently."""
    return UserError(f"{name} is {shown(value)} but {other} is {shown(other_value)}; make them equal")


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
      UserError: the file cannot be read, is not JSON, names a key twice, or holds something other than an object.
    """
    try:
        value = json.loads(path.read_bytes(), object_pairs_hook=_unique)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except RecursionError as error:
        raise UserError(f"{path} is not usable JSON: it is nested too deeply") from error
    except ValueError as error:     # also text that is not Unicode, and numbers of thousands of digits
        raise UserError(f"{path} is not valid JSON: {error}") from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object, found {shown(value)}")
    return value


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in found if names.count(name) > 1)
        raise UserError(f"the key {shown(twice)} stands there twice; keep one of them")
    return found
