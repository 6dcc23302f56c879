"""Rendered conversations against transformers, control tokens in messages, bad messages, hostile templates."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2_jax.data.chat import chat_token_ids, choose_template, render_chat
from qwen2_jax.data.chatml import QWEN2_SYSTEM, QWEN25_SYSTEM, chatml_template
from qwen2_jax.data.tokenizer import Tokenizer
from qwen2_jax.errors import UserError
from tests.data.texts import any_text

# In the manner of Qwen2.5: own default system prompt, tools described in the system message, calls as JSON, answers of
# tools wrapped in user turns; and every feature of the dialect that transformers adds to Jinja.
TOOLS_TEMPLATE = """\
{%- macro close() -%}<|im_end|>{{ '\\n' }}{%- endmacro -%}
{%- set state = namespace(first=true) %}
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content %}
{%- else %}
    {%- set system = 'You are Qwen.' %}
{%- endif %}
<|im_start|>system
{{ system }}
{%- if tools %}

# Tools
    {%- for tool in tools %}
{{ tool | tojson }}
    {%- endfor %}
{{ tools | tojson(indent=2) }}
{%- endif %}
{{- close() }}
{%- for message in messages %}
    {%- if loop.first and message.role == 'system' %}{% continue %}{% endif %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant' }}
        {% generation %}
        {%- if message.content is defined %}{{ '\\n' + message.content }}{% endif %}
        {%- for call in message.tool_calls or [] %}
            {%- set call = call.function if call.function is defined else call %}
            {{- '\\n<tool_call>' + call.name + call.arguments | tojson + '</tool_call>' }}
        {%- endfor %}
        {% endgeneration %}
        {{- close() }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>' + message.content + '</tool_response>' + close() }}
    {%- elif message.role == 'user' %}
        {{- '<|im_start|>user\\n' + message.content | trim + close() }}
    {%- else %}
        {{- raise_exception('no such role: ' + message.role) }}
    {%- endif %}
    {%- set state.first = false %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
{%- if eos_token != '<|im_end|>' %}{{ bos_token }}{% endif %}
"""

FUNCTION = {"name": "weather", "description": "<é> & 'so'", "parameters": {"unit": [1, None]}}
TOOL = {"type": "function", "function": FUNCTION}

END_OF_TEXT_ID, IM_START_ID, IM_END_ID = 1, 2, 3  # of every tokenizer trained here

turn = st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": any_text})
simple_chats = st.lists(turn, min_size=1, max_size=5)
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | any_text
call = st.fixed_dictionaries({"name": st.just("weather"), "arguments": st.dictionaries(any_text, scalars, max_size=3)})
tool_turn = st.one_of(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "tool", "assistant"]), "content": any_text}),
    st.fixed_dictionaries({
        "role": st.just("assistant"), "content": st.none() | any_text,
        "tool_calls": st.lists(call | call.map(lambda c: {"type": "function", "function": c}), min_size=1, max_size=2),
    }),
)
tool_chats = st.lists(tool_turn, min_size=1, max_size=5)


@pytest.fixture(scope="module")
def oracle(qwen2_folder):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(qwen2_folder)


@pytest.fixture(scope="module")
def trained_oracle(trained_folder):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(trained_folder)


@pytest.mark.parity
@settings(deadline=None)
@given(simple_chats, st.booleans())
def test_qwen2_template_as_transformers(qwen2, oracle, messages, prompt):
    expected = oracle.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    with_template = render_chat(messages, template=qwen2.chat_template, add_generation_prompt=prompt)
    built_in = render_chat(messages, template=None, add_generation_prompt=prompt)
    exported = render_chat(messages, template=chatml_template(QWEN2_SYSTEM), add_generation_prompt=prompt)
    assert with_template == built_in == exported == expected
    ids = oracle.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)
    assert chat_token_ids(qwen2, messages, add_generation_prompt=prompt, special_in_content=True) == ids


@pytest.mark.parity
@settings(deadline=None)
@given(tool_chats, st.booleans(), st.booleans())
def test_template_with_tools_as_transformers(trained, trained_oracle, messages, prompt, with_tools):
    tools = [TOOL] if with_tools else None
    expected = trained_oracle.apply_chat_template(
        messages, chat_template=TOOLS_TEMPLATE, tools=tools, tokenize=False, add_generation_prompt=prompt
    )
    assert expected == render_chat(
        messages, template=TOOLS_TEMPLATE, tools=tools, add_generation_prompt=prompt,
        special_tokens=trained.special_tokens,
    )


@settings(deadline=None)
@given(simple_chats)
def test_messages_cannot_write_control_tokens(trained, messages):
    """As many control tokens as ChatML has by itself, and the text is the rendered one to the last character."""
    ids = chat_token_ids(trained, messages)
    turns = len(messages) + (messages[0]["role"] != "system")
    assert [ids.count(i) for i in (END_OF_TEXT_ID, IM_START_ID, IM_END_ID)] == [0, turns + 1, turns]
    assert trained.decode(ids) == render_chat(messages, template=trained.chat_template)


def test_plain_messages_give_the_same_ids_either_way(qwen2):
    messages = [{"role": "user", "content": "What is 12 + 30?\n"}, {"role": "assistant", "content": "42"}]
    assert chat_token_ids(qwen2, messages) == chat_token_ids(qwen2, messages, special_in_content=True)


def test_control_tokens_of_any_alphabet(qwen2_folder, tmp_path):
    """The byte-level alphabet has an é of its own, which stands for a byte that is no text."""
    word = "<|réponse|>"
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).symlink_to(qwen2_folder / name)
    added = {str(i): {"content": text, "special": True} for i, text in
             enumerate(("<|endoftext|>", "<|im_start|>", "<|im_end|>", word), start=151643)}
    template = "{% for m in messages %}" + word + "{{ m.content }}{% endfor %}"
    config = {"added_tokens_decoder": added, "chat_template": template}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.load(tmp_path)
    ids = chat_token_ids(tokenizer, [{"role": "user", "content": f"a{word}b"}])
    assert ids[0] == 151646 and 151646 not in ids[1:] and tokenizer.decode(ids[1:]) == f"a{word}b"


def test_marks_in_messages_survive(trained):
    content = "\ufdd0 <|im_end|> \ufdd1"
    ids = chat_token_ids(trained, [{"role": "user", "content": content}])
    assert content in trained.decode(ids) and ids.count(IM_END_ID) == 2
    with pytest.raises(UserError, match="noncharacters"):
        chat_token_ids(trained, [{"role": "user", "content": "".join(map(chr, range(0xFDD0, 0xFDF0)))}])


def test_messages_nested_too_deeply_are_refused(trained):
    deep: list = []
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(UserError, match="nested too deeply"):
        chat_token_ids(trained, [{"role": "user", "content": "a", "extra": deep}])


def test_default_system_prompts():
    messages = [{"role": "user", "content": "hi"}]
    begins = "<|im_start|>system\n{}<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert render_chat(messages, template=None) == begins.format("You are a helpful assistant.")
    assert render_chat(messages, template=None, default_system=QWEN25_SYSTEM) == begins.format(
        "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    )
    template = chatml_template(QWEN2_SYSTEM)
    assert render_chat(messages, template=template, default_system="Be brief.") == begins.format("Be brief.")
    own = [{"role": "system", "content": "Mine."}, *messages]
    assert render_chat(own, template=None, default_system="Be brief.") == begins.format("Mine.")


def test_choice_among_named_templates():
    named = {"default": "A", "tool_use": "B"}
    assert choose_template(named, None) == "A" and choose_template(named, [TOOL]) == "B"
    assert choose_template({"default": "A"}, [TOOL]) == "A" and choose_template({}, None) is None
    with pytest.raises(UserError, match="no default: rag"):
        choose_template({"rag": "C"}, None)


def test_the_tokenizers_own_template_and_tokens_are_used(trained_folder, tmp_path):
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((trained_folder / file).read_bytes())
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}{{ eos_token }}", encoding="utf-8")
    tokenizer = Tokenizer.load(tmp_path)
    messages = [{"role": "user", "content": "a<|im_end|>"}]
    ids = chat_token_ids(tokenizer, messages)
    assert tokenizer.decode(ids) == "a<|im_end|><|im_end|>" and ids.count(IM_END_ID) == 1


@pytest.mark.parametrize("template", [None, chatml_template(QWEN2_SYSTEM)])
@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ("hi", "messages must be a list of objects with role and content, found str"),
        ({"role": "user"}, "messages must be a list"),
        (None, "messages must be a list"),
        ([], "messages is empty"),
        (["hi"], "message 0 must be an object"),
        ([{"role": "user", "content": "a"}, {"content": "b"}], "message 1: role must be a text"),
        ([{"role": 3, "content": "a"}], "message 0: role must be a text such as 'user', found 3"),
        ([{"role": "user"}], "message 0: content must be a text, found nothing"),
        ([{"role": "user", "content": None}], "message 0: content must be a text, found nothing"),
        ([{"role": "user", "content": ["a"]}], "message 0: content must be a text, found list"),
        ([{"role": "user", "content": None, "tool_calls": [{}]}], "message 0: "),
    ],
)
def test_bad_messages_are_named(trained, messages, said, template):
    with pytest.raises(UserError, match=said):
        render_chat(messages, template=template)
    with pytest.raises(UserError, match=said):
        chat_token_ids(trained, messages)


@pytest.mark.parametrize(
    ("messages", "tools", "said"),
    [
        ([{"role": "critic", "content": "a"}], None, "message 0: role 'critic' needs a chat template"),
        ([{"role": "assistant", "content": "", "tool_calls": [{}]}], None, "message 0: tool_calls need a chat"),
        ([{"role": "user", "content": "a"}], [TOOL], "tools need a chat template"),
    ],
)
def test_what_needs_a_template_says_so(messages, tools, said):
    with pytest.raises(UserError, match=said):
        render_chat(messages, template=None, tools=tools)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ ''.__class__.__mro__ }}", "does what a template may not"),
        ("{{ cycler.__init__.__globals__.os.system('true') }}", "does what a template may not"),
        ("{{ messages.append(1) }}", "does what a template may not"),
        ("{{ '{0.__class__.__mro__}'.format(messages) }}", "does what a template may not"),
        ("{% for i in range(10**9) %}x{% endfor %}", "Range too big"),
        ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "RecursionError"),
        ("{{ raise_exception('only users') }}", "refuses these messages: only users"),
        ("{{ messages[0].content + 1 }}", "fails on these messages: TypeError"),
        ("{{ nothing.at.all }}", "refuses these messages: 'nothing' is undefined"),
        ("line\n{% if %}", "not valid Jinja, line 2"),
        ("{% include 'other' %}", "fails on these messages"),
    ],
)
def test_hostile_and_broken_templates_end_in_a_sentence(template, said):
    with pytest.raises(UserError, match=said):
        render_chat([{"role": "user", "content": "hi"}], template=template)


def test_templates_see_plain_data_only():
    with pytest.raises(UserError, match="holds a value of type object: only what JSON can hold"):
        render_chat([{"role": "user", "content": "hi", "extra": object()}], template="{{ messages[0].extra }}")


def test_dialect_of_transformers():
    messages = [{"role": "user", "content": "<&é>"}]
    assert json.loads(render_chat(messages, template="{{ messages | tojson }}")) == messages
    assert render_chat(messages, template="{{ messages | tojson }}") == '[{"role": "user", "content": "<&é>"}]'
    assert len(render_chat(messages, template="{{ strftime_now('%Y-%m-%d') }}")) == len("2024-06-07")
    loop = "{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}"
    assert render_chat(messages, template=loop) == "01"
