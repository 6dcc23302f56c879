"""ChatML as Qwen2 writes it: control tokens, default system prompts, and the chat template for models trained here."""

from __future__ import annotations

END_OF_TEXT = "<|endoftext|>"  # separates documents, and pads
IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, IM_START, IM_END)  # in the order of Qwen2's ids, 151643 and following

QWEN2_SYSTEM = "You are a helpful assistant."
QWEN25_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."


def chatml_template(default_system: str) -> str:
    """Jinja source that renders what `chat.render_chat` renders without a template."""
    system = f"{IM_START}system\\n{default_system}{IM_END}\\n"
    return (
        "{%- if messages[0]['role'] != 'system' -%}{{ '" + system + "' }}{%- endif -%}"
        "{%- for message in messages -%}"
        "{{ '" + IM_START + "' + message['role'] + '\\n' + message['content'] + '" + IM_END + "\\n' }}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '" + IM_START + "assistant\\n' }}{%- endif -%}"
    )
