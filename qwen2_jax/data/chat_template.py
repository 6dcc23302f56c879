"""Render a checkpoint's own Jinja chat template. Templates come with downloads, so they run in Jinja's sandbox.

The dialect is that of transformers: `raise_exception`, `strftime_now`, a `tojson` that does not escape HTML, `break`
and `continue`, and `{% generation %}`, which marks the assistant's words.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from qwen2_jax.errors import UserError


def render_template(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool,
    tools: Sequence[Mapping[str, Any]] | None,
    special_tokens: Mapping[str, str],
) -> str:
    """The text that `template` gives for `messages`; UserError when it is invalid, refuses them, or leaves the box."""
    try:
        return _compile(template).render(
            **special_tokens, messages=_plain(messages), tools=_plain(tools), documents=None,
            add_generation_prompt=add_generation_prompt,
        )
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"the chat template is not valid Jinja, line {error.lineno}: {error.message}") from None
    except jinja2.exceptions.SecurityError as error:
        raise UserError(f"the chat template does what a template may not: {error}") from None
    except jinja2.TemplateError as error:
        raise UserError(f"the chat template refuses these messages: {error}") from None
    except Exception as error:  # whatever the template's own expressions raise: TypeError, OverflowError, …
        raise UserError(f"the chat template fails on these messages: {type(error).__name__}: {error}") from None


@lru_cache(maxsize=16)
def _compile(template: str) -> jinja2.Template:
    return _environment().from_string(template)


@lru_cache(maxsize=1)
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class GenerationTag(Extension):
    """`{% generation %} … {% endgeneration %}`: prints what is between."""

    tags = {"generation"}  # noqa: RUF012  # the base class declares a plain set

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _plain(value: Any) -> Any:
    """A copy of plain containers and scalars, so that a template never holds an object with methods of ours."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or type(value) in (str, int, float, bool):
        return value
    kind = type(value).__name__
    raise UserError(f"a message or tool holds a value of type {kind}: only what JSON can hold may be there")
