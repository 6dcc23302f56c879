"""The library's calls: forms of input and output, stopping, streaming, what is refused before anything is compiled."""

from __future__ import annotations

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

import qwen2_jax
from qwen2_jax.errors import UserError
from qwen2_jax.serve.lm import Generation
from tests.serve.models import STOP_IDS, TOKENS, VOCAB, random_prompts

GREEDY = dict(temperature=0)


@pytest.fixture
def fresh(checkpoint):
    """A model that has compiled nothing yet."""
    return qwen2_jax.load(checkpoint("dense"))


@pytest.fixture
def edited(checkpoint, tmp_path):
    """`edited("dense", {file: content})`: a copy of the checkpoint with other JSON files; None removes one."""

    def copy(kind: str, files: dict):
        folder = shutil.copytree(checkpoint(kind), tmp_path / "edited", dirs_exist_ok=True)
        for name, content in files.items():
            (folder / name).unlink(missing_ok=True)
            if content is not None:
                (folder / name).write_text(json.dumps(content))
        return folder

    return copy


def compiled(lm) -> list:
    return list(lm._programs._compiled)


# Forms.

def test_logits_of_lists_and_arrays(load):
    lm = load("dense")
    rows = random_prompts(5, 5)
    listed = lm.logits(rows)
    assert isinstance(listed, list) and [a.shape for a in listed] == [(5, VOCAB)] * 2
    for array in (np.array(rows), np.array(rows, np.uint16), lm._programs.params["embed"]["table"][:2, :5].astype(int)):
        found = lm.logits(array)
        assert isinstance(found, np.ndarray) and found.shape == (2, 5, VOCAB) and found.dtype == np.float32
    assert (lm.logits(np.array(rows)) == np.stack(listed)).all()
    assert lm.logits([]) == []
    none = lm.logits(np.zeros((0, 5), int))
    assert isinstance(none, np.ndarray) and none.shape == (0, 5, VOCAB)
    ids = [g.token_ids for g in lm.generate(rows, max_new_tokens=2, **GREEDY)]
    for array in (np.array(rows), jnp.array(rows)):
        assert [g.token_ids for g in lm.generate(array, max_new_tokens=2, **GREEDY)] == ids
    with pytest.raises(UserError, match="prompts must be a text, or a list"):
        lm.generate(np.array(5))


@pytest.mark.parametrize("ids, message", [
    ([[1, 2], []], "row 1 must be a list of at least one token id, found none"),
    ([[1, VOCAB]], f"row 0 holds token id {VOCAB}, outside the model's vocabulary of {VOCAB}"),
    ([[1, -1]], "row 0 holds token id -1"),
    ([[1.5]], "row 0 must hold whole numbers"), ([["a"]], "row 0 must hold whole numbers"),
    ([[True]], "row 0 must hold whole numbers"),
    ([1, 2], "row 0 must be a list of at least one token id"),
    ([[[1], [2, 3]]], "row 0 must be a flat list of token ids"),
    (np.zeros(3, int), r"an array [B, T], found shape (3,)"),
    ([[1] * 1025], "row 0 has 1025 tokens; the model's context is 1024"),
])
def test_ids_that_are_refused(fresh, ids, message):
    with pytest.raises(UserError) as error:
        fresh.logits(ids)
    assert message in str(error.value)
    if not isinstance(ids, np.ndarray):
        with pytest.raises(UserError) as error:
            fresh.generate(ids, max_new_tokens=1)
        assert message.split("; ")[0].replace("row", "prompt").replace("tokens", "prompt tokens") in str(error.value)
    assert not compiled(fresh)


def test_results_are_without_prompt_and_stop_token(load):
    lm = load("dense")
    prompts = random_prompts(*[5] * 8, *[17] * 8)
    found = lm.generate(prompts, max_new_tokens=64, **GREEDY)
    for g, prompt in zip(found, prompts, strict=True):
        assert isinstance(g, Generation) and g.prompt_tokens == len(prompt)
        assert len(g.logprobs) == len(g.token_ids) and all(p <= 0 for p in g.logprobs)
        assert not set(g.token_ids) & set(STOP_IDS)
        assert g.text == lm.tokenizer.decode(g.token_ids, skip_special=True)
        assert g.finish_reason == ("length" if len(g.token_ids) == 64 else "stop")
    assert {g.finish_reason for g in found} == {"length", "stop"}


def test_text_and_ids_are_the_same_prompt(load):
    lm = load("dense")
    text = "import heapq"
    assert lm.generate(text, max_new_tokens=8, **GREEDY) == lm.generate([lm.tokenizer.encode(text)], max_new_tokens=8,
                                                                        **GREEDY)
    assert lm.generate([np.array(lm.tokenizer.encode(text))], max_new_tokens=8, **GREEDY)[0].prompt_tokens > 1


def test_no_new_tokens_compile_nothing(fresh):
    done = []
    found = fresh.generate(["a", "b"], max_new_tokens=0, n=2, on_done=lambda i, g: done.append(i))
    assert found == [Generation("", [], "length", 1, [])] * 4 and sorted(done) == [0, 1, 2, 3]
    assert fresh.generate([], max_new_tokens=5) == []
    assert not compiled(fresh)


# What a request may be.

def test_refused_with_the_numbers_before_compiling(fresh):
    long = [5] * 1000
    with pytest.raises(UserError, match="prompt 1 has 1000 prompt tokens and 25 new ones, 1025 together; the model's"):
        fresh.generate([[5], long], max_new_tokens=25)
    with pytest.raises(UserError, match="prompt 0 is empty"):
        fresh.generate("")
    with pytest.raises(UserError, match="temperature"):
        fresh.generate("a", temperature=float("nan"))
    with pytest.raises(UserError, match="stop strings"):
        fresh.generate("a", stop="")
    with pytest.raises(UserError, match="messages is empty"):
        fresh.chat([])
    assert not compiled(fresh)


def test_truncate_left_keeps_the_end(load):
    lm = load("dense")
    long = random_prompts(1100)[0]
    cut = lm.generate([long], max_new_tokens=4, truncate="left", **GREEDY)[0]
    assert cut.prompt_tokens == 1020
    assert cut == lm.generate([long[-1020:]], max_new_tokens=4, **GREEDY)[0]


def test_million_token_models_are_refused_beyond_the_chunk(load):
    lm = load("chunks")
    assert len(lm.generate(random_prompts(60), max_new_tokens=4, **GREEDY)) == 1
    assert (lm.logits(random_prompts(64))[0] == load("dense").logits(random_prompts(64))[0]).all()
    for ask in (lambda: lm.generate(random_prompts(60), max_new_tokens=5), lambda: lm.logits(random_prompts(65))):
        with pytest.raises(UserError, match=r"dual_chunk_attention_config\.chunk_size"):
            ask()


def test_a_tokenizer_with_more_ids_than_the_model(load):
    """Not clipped in silence: each call that reads a text refuses it."""
    lm = load("small vocabulary")
    outside = next(text for text in ("import", "def ", "heap") if max(lm.tokenizer.encode(text)) >= 300)
    assert lm.tokenizer.vocab_size == TOKENS
    for ask in (lambda: lm.generate(outside), lambda: lm.chat([{"role": "user", "content": outside}]),
                lambda: lm.loglikelihood([("a", outside)])):
        with pytest.raises(UserError, match="outside the model's vocabulary of 300"):
            ask()
    assert not compiled(lm)


def test_likelihoods_that_are_refused_or_cut(load):
    lm = load("dense")
    with pytest.raises(UserError, match="pair 1: the continuation is empty"):
        lm.loglikelihood([("a", "b"), ("a", "")])
    words = "a b " * 600
    with pytest.raises(UserError, match=r"pair 0 without its last token has \d+ tokens; the model's context is 1024"):
        lm.loglikelihood([(words, "c")])
    with pytest.raises(UserError, match="pairs must be a list"):
        lm.loglikelihood(None)
    with pytest.raises(UserError, match="truncate must be"):
        lm.loglikelihood([("a", "b")], truncate="right")
    with pytest.raises(UserError, match="its continuation alone exceeds the context of 1024 tokens"):
        lm.loglikelihood([("a", words)], truncate="left")
    # The continuation's last token is not read: 1024 tokens go before it.
    ids = lm.tokenizer.encode(words + "c")
    logits_TV = lm.logits([ids[-1025:-1]])[0].astype(np.float64)
    logprob = logits_TV[-1, ids[-1]] - np.log(np.exp(logits_TV[-1]).sum())
    assert len(lm.tokenizer.encode(words.rstrip())) == len(ids) - 1
    assert lm.loglikelihood([(words, "c")], truncate="left")[0][0] == pytest.approx(logprob, abs=1e-4)
    done = []
    lm.loglikelihood([("a", "b")] * 20, progress=done.append)
    assert sum(done) == 20 and len(done) > 1 and lm.loglikelihood([]) == []


def test_an_empty_context_is_the_end_of_text_whatever_pads(edited, load):
    lm = load("dense")
    files = {"tokenizer_config.json": {"pad_token": "<|im_end|>"}, "special_tokens_map.json": None}
    padded = qwen2_jax.load(edited("dense", files))
    assert padded.tokenizer.pad_id != lm.tokenizer.pad_id
    assert padded.loglikelihood([("", "import")]) == lm.loglikelihood([("", "import")])


@pytest.mark.parametrize("names", ["new_field", 5])
def test_fields_to_ignore_are_a_list(checkpoint, names):
    with pytest.raises(UserError, match="ignore_fields must be a list of names"):
        qwen2_jax.load(checkpoint("dense"), ignore_fields=names)


# Sampling.

def test_seeds_and_samples(load):
    lm = load("dense")
    draw = dict(max_new_tokens=12, temperature=1.5)
    prompt = random_prompts(6)
    first = lm.generate(prompt, seed=5, **draw)
    assert lm.generate(prompt, seed=5, **draw) == first
    assert lm.generate(prompt, seed=6, **draw) != first
    assert lm.generate(prompt, **draw) != lm.generate(prompt, **draw)
    many = lm.generate([*prompt, [9, 9]], seed=5, n=3, **draw)
    assert many[0] == first[0] and len({tuple(g.token_ids) for g in many}) == 6
    assert [g.prompt_tokens for g in many] == [6, 6, 6, 2, 2, 2]
    # The position is part of the key: nearly uniform draws do not repeat one token.
    uniform = lm.generate(prompt, seed=5, max_new_tokens=12, temperature=1000.0)[0]
    assert len(set(uniform.token_ids)) > 8
    # The same prompt twice is the same request twice.
    twice = lm.generate(prompt * 2, seed=5, **draw)
    assert twice[0] == twice[1]


def test_unset_values_come_from_the_file(edited, load):
    prompt = random_prompts(6)
    greedy = load("dense").generate(prompt, max_new_tokens=12, **GREEDY)
    lm = qwen2_jax.load(edited("dense", {"generation_config.json": {
        "do_sample": True, "temperature": 1.5, "max_new_tokens": 7, "eos_token_id": list(STOP_IDS)}}))
    sampled = lm.generate(prompt, seed=1)
    assert sampled == load("dense").generate(prompt, max_new_tokens=7, temperature=1.5, seed=1)
    assert lm.generate(prompt, max_new_tokens=12, temperature=0) == greedy
    assert sampled[0].token_ids != greedy[0].token_ids[:7]
    assert len(sampled[0].token_ids) <= 7


def test_stop_ids_of_generation_config_go_before_those_of_config(edited, load):
    """As in transformers."""
    prompt = random_prompts(17)
    whole = load("dense").generate(prompt, max_new_tokens=30, **GREEDY)[0].token_ids
    chosen = next(i for i in whole[3:] if whole.index(i) >= 3)
    found = {}
    for name, file in {"generation": {"eos_token_id": chosen}, "neither": {}, "no file": None}.items():
        lm = qwen2_jax.load(edited("dense", {"generation_config.json": file}))
        found[name] = lm.generate(prompt, max_new_tokens=30, **GREEDY)[0]
    assert found["generation"].token_ids == whole[:whole.index(chosen)]
    assert found["generation"].finish_reason == "stop"
    assert found["neither"].token_ids == found["no file"].token_ids == whole


def test_filters_without_a_temperature_are_said_to_do_nothing(checkpoint):
    said = []
    lm = qwen2_jax.load(checkpoint("dense"), notify=said.append)
    lm.generate("a", max_new_tokens=0, top_p=0.5)
    assert len(said) == 1 and "give a temperature to sample" in said[0]
    lm.generate("a", max_new_tokens=0, top_p=0.5, temperature=0)
    lm.generate("a", max_new_tokens=0, top_p=0.5, temperature=1.0)
    lm.generate("a", max_new_tokens=0, repetition_penalty=1.1)
    assert len(said) == 1


# Stopping and streaming.

def test_stop_strings_cut_across_tokens(load):
    lm = load("dense")
    whole = lm.generate(random_prompts(17), max_new_tokens=60, **GREEDY)[0]
    pieces = [lm.tokenizer.decode([i]) for i in whole.token_ids]
    # The end of one token and the beginning of the next.
    at = next(k for k in range(5, len(pieces) - 1) if all(p.isascii() and len(p) > 1 for p in pieces[k:k + 2]))
    stop = pieces[at][-1] + pieces[at + 1][0]
    expected = whole.text[:whole.text.index(stop)]
    found = lm.generate(random_prompts(17), max_new_tokens=60, stop=["never there", stop], **GREEDY)[0]
    assert found.text == expected and found.finish_reason == "stop"
    kept = len(found.token_ids)
    assert found.token_ids == whole.token_ids[:kept] and found.logprobs == whole.logprobs[:kept]
    decode = lm.tokenizer.decode
    assert decode(found.token_ids).startswith(expected) and len(decode(found.token_ids[:-1])) < len(expected)


def test_a_control_token_as_a_stop_string(load):
    """It has no text, yet it stops: Qwen2's base models are asked to stop at <|im_end|> so."""
    lm = load("dense")
    assert lm.tokenizer.token_id("<|im_start|>") == 2
    asked = dict(max_new_tokens=60, temperature=100.0, seed=0, n=32)     # nearly uniform, so that it is said
    whole = lm.generate([[5]], **asked)
    assert any(2 in g.token_ids for g in whole)
    for g, cut in zip(whole, lm.generate([[5]], stop="<|im_start|>", **asked), strict=True):
        if 2 in g.token_ids:
            assert cut.token_ids == g.token_ids[:g.token_ids.index(2)] and cut.finish_reason == "stop"
        else:
            assert cut == g


@pytest.mark.parametrize("stop", [(), ("a", "\n")])
def test_streamed_text_is_the_text(load, stop):
    lm = load("dense")
    pieces: dict[int, list[str]] = {}
    done: dict[int, Generation] = {}

    def heard(i, text):
        assert i not in done and text
        pieces.setdefault(i, []).append(text)

    found = lm.generate(random_prompts(5, 17, 40, 9), max_new_tokens=50, n=2, temperature=1.0, seed=2, stop=stop,
                        on_text=heard, on_done=done.__setitem__)
    assert [done[i] for i in range(8)] == found
    assert ["".join(pieces.get(i, [])) for i in range(8)] == [g.text for g in found]
    assert any(len(p) > 5 for p in pieces.values()) or stop
    assert found == lm.generate(random_prompts(5, 17, 40, 9), max_new_tokens=50, n=2, temperature=1.0, seed=2,
                                stop=stop)
    assert {g.finish_reason for g in found} <= {"stop", "length"}
    assert not stop or all(s not in g.text for g in found for s in stop)


def test_chat_answers_and_stops_at_the_end_of_its_turn(load, edited):
    lm = load("dense")
    messages = [{"role": "user", "content": "héllo"}]
    heard = []
    answer = lm.chat(messages, max_new_tokens=20, on_text=heard.append, **GREEDY)
    assert "".join(heard) == answer.text and answer.prompt_tokens == len(lm.chat_ids(messages))
    assert answer == lm.generate([lm.chat_ids(messages)], max_new_tokens=20, **GREEDY)[0]
    # A model whose files name one token that it says in its answer.
    said = answer.token_ids[2]
    other = qwen2_jax.load(edited("dense", {"generation_config.json": {"eos_token_id": [said, 3]}}))
    stopped = other.chat(messages, max_new_tokens=20, **GREEDY)
    assert stopped.finish_reason == "stop" and stopped.token_ids == answer.token_ids[:answer.token_ids.index(said)]


# Loading.

def test_without_a_tokenizer_there_are_ids_but_no_text(edited, load):
    lm = qwen2_jax.load(edited("dense", dict.fromkeys((
        "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"))))
    found = lm.generate(random_prompts(5), max_new_tokens=12, **GREEDY)[0]
    expected = load("dense").generate(random_prompts(5), max_new_tokens=12, **GREEDY)[0]
    assert found.token_ids == expected.token_ids and found.text == "" and expected.text
    for ask in (lambda: lm.generate("a"), lambda: lm.chat([{"role": "user", "content": "a"}]),
                lambda: lm.loglikelihood([("a", "b")]), lambda: lm.generate([[5]], stop="x"),
                lambda: lm.generate([[5]], on_text=print)):
        with pytest.raises(UserError, match=r"no tokenizer \(tokenizer\.json\)"):
            ask()


@pytest.mark.parametrize("dtype, name", [(None, "float32"), ("bfloat16", "bfloat16"), (np.float32, "float32")])
def test_dtypes(checkpoint, dtype, name):
    lm = qwen2_jax.load(checkpoint("dense"), dtype=dtype)
    assert lm.params["embed"]["table"].dtype.name == name


def test_float16_files_are_held_in_float32(edited, checkpoint):
    config = json.loads((checkpoint("dense") / "config.json").read_text())
    config = {k: v for k, v in config.items() if k != "dtype"} | {"torch_dtype": "float16"}
    lm = qwen2_jax.load(edited("dense", {"config.json": config}))
    assert lm.params["embed"]["table"].dtype.name == "float32"
    for dtype in ("float16", "int8", "nonsense"):
        with pytest.raises(UserError, match=f"dtype '{dtype}' is not supported"):
            qwen2_jax.load(checkpoint("dense"), dtype=dtype)
