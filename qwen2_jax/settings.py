"""Frozen dataclasses as settings: listed with their meaning, changed by `name=value` texts, compared field by field.

A name is a path through nested dataclasses, like `optimizer.peak`; items of a tuple of dataclasses are numbered, like
`data.sources.0.weight`. Standard library only.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import inspect
import itertools
import json
import math
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from qwen2_jax.errors import UserError

KIND = "class"
"""Key of the plain form that says which dataclass it is: a word that no field can be called."""
NOTHING = "none"


@dataclass(frozen=True)
class Setting:
    """One field that can be set."""

    name: str
    type: str
    """As a person would write it: `int`, `float or none`, `full | attention | dots | none`."""
    value: Any
    help: str


def settings(instance: Any, prefix: str = "") -> Iterator[Setting]:
    """Every field of a dataclass, those of the dataclasses in it included, in the order of their declaration."""
    helps = _helps(type(instance))
    for field in dataclasses.fields(instance):
        name, value = prefix + field.name, getattr(instance, field.name)
        if dataclasses.is_dataclass(value):
            yield from settings(value, name + ".")
        elif isinstance(value, tuple) and value and all(map(dataclasses.is_dataclass, value)):
            for i, item in enumerate(value):
                yield from settings(item, f"{name}.{i}.")
        else:
            yield Setting(name, _described(_types(type(instance))[field.name]), value, helps.get(field.name, ""))


def with_settings(instance: Any, assignments: Sequence[str]) -> Any:
    """A copy with `name=value` texts applied, all at once, so that fields that must agree may change together.

    Raises UserError: an unknown name (with the nearest), a name twice, a value of another type, or one that the
    dataclass refuses.
    """
    changes: dict[str, Any] = {}
    for text in assignments:
        name, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"a setting is written name=value, found '{text}'")
        if name in changes:
            raise UserError(f"{name} is set twice")
        changes[name] = value
    return _changed(instance, changes, "", instance)


def _changed(instance: Any, changes: Mapping[str, str], prefix: str, whole: Any) -> Any:
    here: dict[str, Any] = {}
    below: dict[str, dict[str, str]] = {}
    kinds = _types(type(instance))
    for name, text in changes.items():
        first, dot, rest = name.partition(".")
        if first not in kinds:
            raise UserError(f"there is no setting '{prefix}{name}'{_near(prefix + name, whole)}")
        if dot:
            below.setdefault(first, {})[rest] = text
        else:
            here[first] = _read(text, kinds[first], prefix + first, getattr(instance, first))
    for first, inner in below.items():
        value, path = here.get(first, getattr(instance, first)), f"{prefix}{first}."
        if dataclasses.is_dataclass(value):
            here[first] = _changed(value, inner, path, whole)
        elif isinstance(value, tuple) and all(map(dataclasses.is_dataclass, value)):
            here[first] = _items_changed(value, inner, path, whole)
        else:
            raise UserError(f"there is no setting '{path}{next(iter(inner))}'{_near(path, whole)}")
    return dataclasses.replace(instance, **here)


def _items_changed(items: tuple, changes: Mapping[str, str], prefix: str, whole: Any) -> tuple:
    numbered: dict[int, dict[str, str]] = {}
    for name, text in changes.items():
        number, _, rest = name.partition(".")
        if not (number.isascii() and number.isdecimal() and int(number) < len(items) and rest):
            raise UserError(f"there is no setting '{prefix}{name}'{_near(prefix + name, whole)}")
        numbered.setdefault(int(number), {})[rest] = text
    return tuple(_changed(item, numbered[i], f"{prefix}{i}.", whole) if i in numbered else item
                 for i, item in enumerate(items))


def plain(instance: Any) -> Any:
    """JSON's form of a dataclass; `from_plain` reads it back equal. Floats come back bit-equal."""
    if dataclasses.is_dataclass(instance):
        found = {field.name: plain(getattr(instance, field.name)) for field in dataclasses.fields(instance)}
        return {KIND: type(instance).__name__} | found
    return [plain(item) for item in instance] if isinstance(instance, tuple) else instance


def from_plain(found: Any, kind: Any, where: str = "") -> Any:
    """What `plain` wrote, as `kind` (a dataclass or any type of a field). Raises UserError naming the field `where`
    something does not fit."""
    options = _options(kind)
    if isinstance(found, dict):
        classes = [option for option in options if dataclasses.is_dataclass(option)]
        chosen: Any = next((c for c in classes if getattr(c, "__name__", "") == found.get(KIND)), None)
        if chosen is None:
            raise UserError(f"{where or 'it'} must be one of {', '.join(map(_described, options))}, found "
                            f"{json.dumps(found)[:80]}")
        kinds = _types(chosen)
        if unknown := found.keys() - kinds.keys() - {KIND}:
            raise UserError(f"there is no setting '{_join(where, min(unknown))}'")
        return chosen(**{name: from_plain(value, kinds[name], _join(where, name))
                         for name, value in found.items() if name != KIND})
    if isinstance(found, list):
        inner = next((typing.get_args(option)[0] for option in options if typing.get_origin(option) is tuple), None)
        if inner is None:
            raise UserError(f"{where} must be {_described(kind)}, found a list")
        return tuple(from_plain(item, inner, f"{where}.{i}") for i, item in enumerate(found))
    if not any(_holds(option, found) for option in options):
        raise UserError(f"{where} must be {_described(kind)}, found {json.dumps(found)}")
    return found


def differences(before: Any, after: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Name → (before, after) of each field in which two plain forms differ."""
    if isinstance(before, dict) and isinstance(after, dict):
        found: dict[str, tuple[Any, Any]] = {}
        for name in [*before, *(name for name in after if name not in before)]:
            found |= differences(before.get(name), after.get(name), _join(prefix, name))
        return found
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        return {name: pair for i, (a, b) in enumerate(zip(before, after, strict=True))
                for name, pair in differences(a, b, _join(prefix, str(i))).items()}
    return {} if before == after and type(before) is type(after) else {prefix: (before, after)}


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _read(text: str, kind: Any, name: str, before: Any = None) -> Any:
    """The value of a field from its text. The name of a dataclass stands for one with what `before` shares with it."""
    options = _options(kind)
    if type(None) in options and text.lower() == NOTHING:
        return None
    for option in options:
        if typing.get_origin(option) is Literal:
            for choice in typing.get_args(option):
                if str(choice) == text:
                    return choice
        elif typing.get_origin(option) is tuple and not dataclasses.is_dataclass(typing.get_args(option)[0]):
            inner = typing.get_args(option)[0]
            if text.lstrip().startswith("["):       # a list in JSON, for texts with commas
                return from_plain(_json(text, name), kind, name)
            return tuple(_read(item.strip(), inner, name) for item in text.split(",") if item.strip())
        elif dataclasses.is_dataclass(option) and getattr(option, "__name__", "") == text:
            return _another(option, before, name)
        elif (read := _READERS.get(option)) and (value := read(text)) is not None:
            return value
    raise UserError(f"{name} must be {_described(kind)}, found '{text}'")


def _json(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{name} begins with [ and is no list in JSON: {error}") from None


def _another(option: Any, before: Any, name: str) -> Any:
    shared = _types(option).keys() & (_types(type(before)).keys() if dataclasses.is_dataclass(before) else set())
    try:
        return option(**{field: getattr(before, field) for field in shared})
    except TypeError:
        raise UserError(f"{name}={option.__name__} needs values that have no default: write it in the experiment's "
                        "file") from None


def _bool(text: str) -> bool | None:
    return {"true": True, "false": False, "1": True, "0": False}.get(text.lower())


def _int(text: str) -> int | None:
    try:
        return int(text.replace("_", ""))
    except ValueError:
        pass
    value = _float(text)     # 1e6
    return int(value) if value is not None and math.isfinite(value) and value.is_integer() else None


def _float(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


_READERS: dict[Any, Any] = {bool: _bool, int: _int, float: _float, str: str}


def _holds(option: Any, value: Any) -> bool:
    if typing.get_origin(option) is Literal:
        return value in typing.get_args(option)
    if option is float:
        return isinstance(value, float | int) and not isinstance(value, bool)
    return isinstance(option, type) and type(value) is option


def _options(kind: Any) -> tuple[Any, ...]:
    return typing.get_args(kind) if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union \
        else (kind,)


def _described(kind: Any) -> str:
    def one(option: Any) -> str:
        if option is type(None):
            return NOTHING
        if typing.get_origin(option) is Literal:
            return " | ".join(map(str, typing.get_args(option)))
        if typing.get_origin(option) is tuple:
            return f"{_described(typing.get_args(option)[0])}, …"
        return {str: "text", bool: "true | false"}.get(option, getattr(option, "__name__", str(option)))

    return " or ".join(map(one, _options(kind)))


def _near(name: str, whole: Any) -> str:
    known = [setting.name for setting in settings(whole)]
    matches = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    last = name.rpartition(".")[2]
    matches += [k for k in known if last and k.rpartition(".")[2] == last and k not in matches]
    return f"; did you mean {' or '.join(matches[:3])}?" if matches else "; `--help` lists all"


@functools.lru_cache(maxsize=64)
def _types(cls: type) -> dict[str, Any]:
    """Field → type, with annotations that are texts evaluated where the class stands."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


@functools.lru_cache(maxsize=64)
def _helps(cls: type) -> dict[str, str]:
    """Field → the text under its declaration, in the class or in one that it extends."""
    inherited: dict[str, str] = {}
    for base in reversed(cls.__bases__):
        inherited |= _helps(base) if dataclasses.is_dataclass(base) else {}
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, SyntaxError):      # a class without a source file
        return inherited
    body = typing.cast(ast.ClassDef, tree.body[0]).body
    return inherited | {
        field.target.id: " ".join(text.value.value.split()) for field, text in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant) and isinstance(text.value.value, str)}
