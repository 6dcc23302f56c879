"""Conversations to text and to token ids: ChatML, or the checkpoint's own template."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from qwen2_jax.data.chat_template import render_template
from qwen2_jax.data.chatml import IM_END, IM_START, QWEN2_SYSTEM
from qwen2_jax.data.tokenizer import Tokenizer
from qwen2_jax.errors import UserError

ROLES = ("system", "user", "assistant")  # what ChatML knows without a template
# Noncharacters of Unicode: no text should hold one, and a conversation that does leaves others free.
MARKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]

Message = Mapping[str, Any]


def render_chat(
    messages: Sequence[Message],
    *,
    template: str | None,
    default_system: str | None = None,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    special_tokens: Mapping[str, str] | None = None,
) -> str:
    """The text of a conversation, with the assistant's header behind it when `add_generation_prompt`.

    `messages` are objects with `role` and `content`. With `template` (Jinja source) equal to transformers'
    `apply_chat_template`; without, ChatML. `default_system` is put in front of a conversation that does not begin
    with a system message; None leaves that to the template, and ChatML without one takes Qwen2's (`QWEN2_SYSTEM`;
    Qwen2.5's is `QWEN25_SYSTEM`). `special_tokens` ("eos_token" → text, …) are variables of the template.

    Raises UserError that names the message and the field, or says what the template refused.
    """
    _check_messages(messages, with_template=template is not None)
    if default_system is None and template is None:
        default_system = QWEN2_SYSTEM
    if default_system is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": default_system}, *messages]
    if template is None:
        if tools:
            raise UserError("tools need a chat template that describes them, and this checkpoint has none")
        text = "".join(f"{IM_START}{message['role']}\n{message['content']}{IM_END}\n" for message in messages)
        return text + (f"{IM_START}assistant\n" if add_generation_prompt else "")
    # As transformers does: a field that is null is as good as absent, and templates write "None" for it.
    messages = [{name: value for name, value in message.items() if value is not None} for message in messages]
    return render_template(
        template, messages, tools=tools, add_generation_prompt=add_generation_prompt,
        special_tokens=special_tokens or {},
    )


def chat_token_ids(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    default_system: str | None = None,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    special_in_content: bool = False,
) -> list[int]:
    """Token ids of `render_chat` with the tokenizer's template.

    Control tokens come from the template only: `<|im_end|>` inside a message stays plain characters, so that nobody
    ends a turn by writing it. `special_in_content=True` reads it as the control token, as transformers does.
    """
    template = choose_template(tokenizer.chat_templates, tools)
    options: dict[str, Any] = {
        "template": template, "default_system": default_system, "add_generation_prompt": add_generation_prompt,
        "special_tokens": tokenizer.special_tokens,
    }
    if special_in_content:
        return tokenizer.encode(render_chat(messages, tools=tools, **options))
    _check_messages(messages, with_template=template is not None)
    control = _control_tokens(tokenizer)
    try:
        mark = _free_mark(json.dumps([messages, tools, template, default_system], ensure_ascii=False, default=repr))
        messages, tools = (_broken(part, control, mark) for part in (messages, tools))
    except RecursionError:
        raise UserError("the messages or tools are nested too deeply") from None
    text = render_chat(messages, tools=tools, **options)
    ids: list[int] = []
    for n, part in enumerate(control.split(text)):
        if n % 2:
            ids.append(tokenizer.control_tokens[part])
        elif part:
            ids += tokenizer.encode(part.replace(mark, ""), special=False)
    return ids


def choose_template(templates: Mapping[str, str], tools: Sequence[Mapping[str, Any]] | None) -> str | None:
    """The template for a conversation with or without tools; None when the checkpoint has no template."""
    if tools is not None and "tool_use" in templates:
        return templates["tool_use"]
    if templates and "default" not in templates:
        raise UserError(f"the checkpoint's chat templates have no default: {', '.join(sorted(templates))}")
    return templates.get("default")


def _control_tokens(tokenizer: Tokenizer) -> re.Pattern[str]:
    """Matches a control token, the longest where two begin at one place; a group, so that `split` keeps it."""
    texts = sorted(tokenizer.control_tokens, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, texts)) or '(?!)'})")


def _free_mark(text: str) -> str:
    for mark in MARKS:
        if mark not in text:
            return mark
    raise UserError("the conversation holds all 32 noncharacters from U+FDD0 on: remove them")


def _broken(value: Any, control: re.Pattern[str], mark: str) -> Any:
    """`value` with the mark inside each control token of its texts, so that they are none any more."""
    if isinstance(value, str):
        return control.sub(lambda match: match[0][0] + mark + match[0][1:], value)
    if isinstance(value, Mapping):
        return {name: _broken(item, control, mark) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_broken(item, control, mark) for item in value]
    return value


def _check_messages(messages: Any, *, with_template: bool) -> None:
    if not isinstance(messages, list | tuple):
        raise UserError(f"messages must be a list of objects with role and content, found {type(messages).__name__}")
    if not messages:
        raise UserError("messages is empty: a conversation needs at least one message")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise UserError(f"message {i} must be an object with role and content, found {type(message).__name__}")
        role = message.get("role")
        if not isinstance(role, str) or not role:
            raise UserError(f"message {i}: role must be a text such as 'user', found {role!r}")
        if not with_template and role not in ROLES:
            raise UserError(f"message {i}: role {role!r} needs a chat template: without one use {', '.join(ROLES)}")
        calls = message.get("tool_calls")
        if calls and not with_template:
            raise UserError(f"message {i}: tool_calls need a chat template that describes them")
        content = message.get("content")
        if not isinstance(content, str) and not (content is None and calls and role == "assistant"):
            found = "nothing" if content is None else type(content).__name__
            raise UserError(f"message {i}: content must be a text, found {found}")
