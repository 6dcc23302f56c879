"""Rotary embedding in `config.json`: three spellings in, all of them out.

transformers 4 and older vLLM read `rope_theta` beside `rope_scaling`, whose kind is `rope_type` or, before, `type`.
transformers 5 writes `rope_parameters`, theta and kind in one object, and still reads the others. What is missing is
filled in as `transformers.modeling_rope_utils` of 5.23 does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from qwen2_jax.checkpoint.json_fields import REQUIRED, Fields, Leftovers, disagreement
from qwen2_jax.config import RopeConfig, RopeWhen
from qwen2_jax.errors import UserError

# What each kind reads. transformers ignores the others with a warning, and so does this.
SCALING_FIELDS = {
    "default": (),
    "linear": ("factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
             "mscale_all_dim", "truncate"),
}
ANY_KIND = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
ALL_FIELDS = (*ANY_KIND, *SCALING_FIELDS["yarn"])

HF_NAME = {"theta": "rope_theta", "kind": "rope_type", "original_max_position": "original_max_position_embeddings"}


def read_rope(top: Fields, leftovers: Leftovers, *, max_position: int, when: RopeWhen) -> RopeConfig:
    """The rotary embedding of a `config.json`, whose spellings must agree.

    Raises:
      UserError: an unknown kind or field, a wrong type or value, a missing theta, spellings that disagree.
    """
    # An empty object says nothing, to transformers too.
    objects = [Fields(top.object(name), f"{name}.") for name in ("rope_scaling", "rope_parameters")
               if top.data.get(name) not in (None, {})]
    theta = _agreed("rope_theta", Fields.number, [top, *objects])
    if theta is None:
        raise UserError("rope_theta is missing; needed: a finite number, here or in rope_parameters")
    spelled = []
    for fields in objects:
        kind = _kind(fields)
        leftovers.sort(fields, used={*ANY_KIND, *SCALING_FIELDS[kind]}, inert=ALL_FIELDS)
        length = _agreed("original_max_position_embeddings", Fields.whole, [top, fields])
        spelled.append(_scaling(fields, kind, theta=theta, max_position=max_position, length=length, when=when))
    for other, fields in zip(spelled[1:], objects[1:], strict=True):
        _need_equal(spelled[0], objects[0], other, fields)
    return spelled[0] if spelled else RopeConfig(theta=theta)


def write_rope(rope: RopeConfig) -> dict[str, Any]:
    """The fields of `config.json` that hold the rotary embedding, in the spellings of transformers 4 and 5.

    `rope.when` is a choice of the running program, which no other program knows: it is not written.
    """
    scaling: dict[str, Any] = {"rope_type": rope.kind}
    if rope.kind != "default":
        scaling["factor"] = rope.factor
        if rope.original_max_position is not None:
            scaling["original_max_position_embeddings"] = rope.original_max_position
    if rope.kind == "yarn":
        # Defaults stay unsaid: older releases warn about names they do not know.
        standard = RopeConfig(theta=rope.theta)
        for name in ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"):
            if getattr(rope, name) != getattr(standard, name):
                scaling[name] = getattr(rope, name)
    return {
        "rope_theta": rope.theta,
        "rope_scaling": None if rope.kind == "default" else scaling | {"type": rope.kind},
        "rope_parameters": scaling | {"rope_theta": rope.theta},
    }


def _kind(fields: Fields) -> str:
    new, old = fields.text("rope_type", None), fields.text("type", None)
    if new is not None and old is not None and new != old:
        raise disagreement(f"{fields.prefix}rope_type", new, f"{fields.prefix}type", old)
    kind = new or old
    if kind is None:
        # transformers 5 takes plain RoPE here, transformers 4 fails in the model: better to ask.
        stated = sorted(set(SCALING_FIELDS["yarn"]) & {name for name in fields.data if fields.has(name)})
        if stated:
            raise UserError(f"{fields.prefix}rope_type is missing beside {fields.prefix}{stated[0]}; "
                            f"needed: one of {', '.join(SCALING_FIELDS)}")
        return "default"
    if kind not in SCALING_FIELDS:
        raise fields.refuse("rope_type" if new else "type", f"rope_type {', '.join(SCALING_FIELDS)}")
    return kind


def _scaling(
    fields: Fields, kind: str, *, theta: float, max_position: int, length: int | None, when: RopeWhen,
) -> RopeConfig:
    if fields.number("partial_rotary_factor", 1.0) != 1.0:
        raise fields.refuse("partial_rotary_factor", "1, every dimension of a head is rotated")
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind == "linear":
        factor = fields.number("factor")
        return RopeConfig(theta=theta, kind="linear", factor=factor, original_max_position=length, when=when)
    length = max_position if length is None else length
    # As transformers: a factor of null means the ratio of the two lengths, a beta of null or 0 its default, an mscale
    # of 0 none; but a `truncate` of null means false.
    ratio = max_position / length if length > 0 else REQUIRED
    return RopeConfig(
        theta=theta, kind="yarn", original_max_position=length, when=when,
        factor=fields.number("factor", ratio if "factor" in fields.data else REQUIRED),
        attention_factor=_positive(fields, "attention_factor"),
        beta_fast=fields.number("beta_fast", None) or 32.0,
        beta_slow=fields.number("beta_slow", None) or 1.0,
        mscale=_positive(fields, "mscale", zero_is_none=True),
        mscale_all_dim=_positive(fields, "mscale_all_dim", zero_is_none=True),
        truncate=fields.flag("truncate", "truncate" not in fields.data),
    )


def _positive(fields: Fields, name: str, *, zero_is_none: bool = False) -> float | None:
    value = fields.number(name, None)
    if value == 0 and zero_is_none:
        return None
    if value is not None and value <= 0:
        raise fields.refuse(name, "numbers above 0")
    return value


def _agreed(name: str, read: Callable[[Fields, str], Any], holders: Sequence[Fields]) -> Any:
    """The one value of a field in all the objects that state it; None where none does."""
    stated = [(f"{fields.prefix}{name}", read(fields, name)) for fields in holders if fields.has(name)]
    for other, value in stated[1:]:
        if value != stated[0][1]:
            raise disagreement(*stated[0], other, value)
    return stated[0][1] if stated else None


def _need_equal(rope: RopeConfig, fields: Fields, other: RopeConfig, other_fields: Fields) -> None:
    for field in dataclasses.fields(RopeConfig):
        a, b = getattr(rope, field.name), getattr(other, field.name)
        if a != b:
            name = HF_NAME.get(field.name, field.name)
            raise disagreement(fields.prefix + name, a, other_fields.prefix + name, b)
