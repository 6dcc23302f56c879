"""Greedy tokens equal `transformers.generate`, up to ties; log-probabilities and likelihoods equal torch's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qwen2_jax.errors import UserError
from tests.serve.models import STOP_IDS, model, random_prompts

pytestmark = pytest.mark.parity

NEAR_TIE = 1e-4
"""Two largest logits this close may change places: the frameworks' sums are in other orders."""
LOGITS = 1e-4
"""Absolute, for logits of standard deviation 2 in float32."""
NEW = 64


def theirs(kind: str, prompts: list[list[int]], new: int, **settings):
    """(tokens with the stop token, their raw log-probabilities, gaps of the two largest logits) of prompts of one
    length, by transformers."""
    out = model(kind).generate(torch.tensor(prompts), max_new_tokens=new, do_sample=False, output_logits=True,
                               output_scores=True, return_dict_in_generate=True, **settings)
    logits_RTV = torch.stack(out.logits, 1)
    tokens_RT = out.sequences[:, len(prompts[0]):]
    logprobs_RT = torch.log_softmax(logits_RTV, -1).gather(-1, tokens_RT[..., None])[..., 0]
    top_RT2 = torch.stack(out.scores, 1).topk(2).values     # after the processors
    for row, logprobs, gaps in zip(tokens_RT.tolist(), logprobs_RT, top_RT2[..., 0] - top_RT2[..., 1], strict=True):
        end = next((i + 1 for i, t in enumerate(row) if t in STOP_IDS), len(row))
        yield row[:end], logprobs[:end].numpy(), gaps[:end].numpy()


def compare(lm, kind: str, prompts: list[list[int]], new: int = NEW, **settings) -> tuple[list, int]:
    """Our generations, and at how many near ties a row went another way."""
    ours = lm.generate(prompts, max_new_tokens=new, temperature=0, **settings)
    lengths = sorted(set(map(len, prompts)))
    expected = [row for n in lengths for row in theirs(kind, [p for p in prompts if len(p) == n], new, **settings)]
    ties = 0
    assert [len(p) for p in prompts] == sorted(len(p) for p in prompts)
    for g, (tokens, logprobs, gaps) in zip(ours, expected, strict=True):
        stopped = tokens[-1] in STOP_IDS
        tokens = tokens[:-1] if stopped else tokens
        same = next((i for i, (a, b) in enumerate(zip(g.token_ids, tokens, strict=False)) if a != b),
                    min(len(g.token_ids), len(tokens)))
        if g.token_ids == tokens:
            assert g.finish_reason == ("stop" if stopped else "length")
        else:
            ties += 1
            assert gaps[same] < NEAR_TIE, f"differs at token {same}, where the two largest are {gaps[same]} apart"
        np.testing.assert_allclose(g.logprobs[:same], logprobs[:same], atol=LOGITS)
    return ours, ties


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_32_prompts_by_64_tokens(load, kind, capsys):
    prompts = random_prompts(*[5] * 8, *[17] * 8, *[40] * 8, *[90] * 8)
    ours, ties = compare(load(kind), kind, prompts)
    with capsys.disabled():
        print(f"\n{kind}: {len(prompts)} prompts x {NEW} tokens, {ties} rows parted from transformers at a near tie")
    assert ties <= 2, "near ties are rare: so many are a mistake"
    whole = [g for g in ours if len(g.token_ids) == NEW]
    assert len(whole) >= 4 and all(len(set(g.token_ids)) >= 30 for g in whole)
    assert any(g.finish_reason == "stop" and len(g.token_ids) < NEW // 2 for g in ours)
    assert {g.prompt_tokens for g in ours} == {5, 17, 40, 90}


@pytest.mark.parametrize("kind, lengths", [("window", (10, 40, 40)), ("yarn", (10, 100, 100))])
def test_windows_and_yarn(load, kind, lengths):
    """Past the window of 24; YaRN from the first token on, and past its original 128 positions."""
    _, ties = compare(load(kind), kind, random_prompts(*lengths), 40)
    assert ties == 0


@pytest.mark.parametrize("penalty", [1.3, 0.4])
def test_repetition_penalty(load, penalty):
    """Over prompt and output, never padding. Below 1 it is a reward: the padding's id 0 would win sooner or later."""
    prompts = random_prompts(*[5] * 8, *[17] * 8)
    ours, ties = compare(load("dense"), "dense", prompts, 40, repetition_penalty=penalty)
    plain = load("dense").generate(prompts, max_new_tokens=40, temperature=0)
    assert ties == 0 and sum(a.token_ids != b.token_ids for a, b in zip(ours, plain, strict=True)) > 8


def test_yarn_when_long(load):
    """A request that fits the original 128 positions, new tokens included, is left unscaled; a longer one is scaled."""
    prompts = random_prompts(10, 88, 89)
    always, long = (load("yarn", rope_when=when).generate(prompts, max_new_tokens=40, temperature=0)
                    for when in ("always", "long"))
    # The same weights without scaling.
    plain = load("dense").generate(prompts, max_new_tokens=40, temperature=0)
    assert long[0] == plain[0] and long[1] == plain[1] and long[2] == always[2]
    assert always[1] != plain[1] and always[2] != plain[2]
    assert load("yarn", rope_when="long").limits.context == 512
    with pytest.raises(UserError, match="rope_when 'never' is not supported: always, long are"):
        load("dense", rope_when="never")


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_logits(load, kind):
    rows = random_prompts(1, 7, 33, 100)
    found = load(kind).logits(rows)
    for row, ours_TV in zip(rows, found, strict=True):
        with torch.no_grad():
            expected_TV = model(kind)(torch.tensor([row])).logits[0].numpy()
        assert ours_TV.dtype == np.float32 and ours_TV.shape == expected_TV.shape
        np.testing.assert_allclose(ours_TV, expected_TV, atol=LOGITS)


def test_likelihoods(load):
    lm = load("dense")
    pairs = [("import", " os\nimport re"), ("a = ", "b + c"), ("", "def f():"), ("  ", "x"), ("for i in", " range(3)"),
             ("naïve caf", "é"), ("def f(x):\n    return", " x")]
    for (context, continuation), (nats, is_greedy) in zip(pairs, lm.loglikelihood(pairs), strict=True):
        ids = lm.tokenizer.encode(context + continuation)
        if context.strip():
            start = len(lm.tokenizer.encode(context.rstrip()))
        else:
            ids, start = [lm.tokenizer.token_id("<|endoftext|>"), *ids], 1
        with torch.no_grad():
            logprob_TV = torch.log_softmax(model("dense")(torch.tensor([ids])).logits[0].double(), -1)
        expected = sum(logprob_TV[t - 1, ids[t]].item() for t in range(start, len(ids)))
        assert len(ids) > start
        assert nats == pytest.approx(expected, abs=LOGITS)
        assert is_greedy == all(logprob_TV[t - 1].argmax() == ids[t] for t in range(start, len(ids)))


def test_a_greedy_continuation_is_greedy(load):
    """The text that greedy decoding gives, where it is tokenised as it was generated."""
    lm = load("dense")
    encode = lm.tokenizer.encode
    contexts = "import def for in x = return class heap item pos a b c lo hi while if else not None len key".split()
    pairs, sums = [], []
    for context, g in zip(contexts, lm.generate(contexts, max_new_tokens=2, temperature=0), strict=True):
        if g.text and encode(context + g.text) == encode(context) + g.token_ids:
            pairs.append((context, g.text))
            sums.append(sum(g.logprobs))
    assert len(pairs) >= 2
    for (nats, is_greedy), total in zip(lm.loglikelihood(pairs), sums, strict=True):
        assert is_greedy and nats == pytest.approx(total, abs=LOGITS)
