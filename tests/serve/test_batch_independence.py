"""A request's tokens and their log-probabilities are the same, to the last bit, in whatever company it runs."""

from __future__ import annotations

import itertools

import pytest

from qwen2_jax.serve.engine import Engine
from qwen2_jax.serve.scheduler import Request, Sampling
from tests.serve.models import STOP_IDS, random_prompts

LENGTHS = (3, 40, 70, 130, 5, 9, 33, 20)    # two widths of prefill, both in several chunks
NEW = 50
GREEDY = dict(temperature=0)
SAMPLED = dict(temperature=1.0, top_p=0.9, top_k=50, repetition_penalty=1.1, seed=3)
ALL = list(itertools.product(("dense", "moe"), ("float32", "bfloat16")))
TWO = [("dense", "float32"), ("moe", "bfloat16")]     # for tests that compile more


@pytest.fixture(params=ALL, ids=" ".join)
def lm(request, load):
    kind, dtype = request.param
    return load(kind, dtype=dtype)


@pytest.mark.parametrize("settings", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_batches_of_any_size_and_order(lm, settings):
    prompts = random_prompts(*LENGTHS)

    def run(order):
        return dict(zip(order, lm.generate([prompts[i] for i in order], max_new_tokens=NEW, **settings), strict=True))

    together = run(range(8))
    assert any(g.finish_reason == "stop" and len(g.token_ids) < NEW - 5 for g in together.values())
    assert sum(len(set(g.token_ids)) for g in together.values()) > 100
    for order in [[3, 1, 0, 2, 7, 6, 5, 4], [6, 2, 3], [4, 1], *([i] for i in range(8))]:
        for i, alone in run(order).items():
            assert alone == together[i], f"prompt {i} in {order}"


@pytest.mark.parametrize("lm", TWO, ids=" ".join, indirect=True)
def test_a_long_neighbour_and_refilled_slots(lm):
    """36 samples take 32 slots, the rest are admitted as those end; one needs a cache of twice the length."""
    prompts = random_prompts(*LENGTHS)
    crowd = lm.generate([*prompts, *random_prompts(600, seed=1)], max_new_tokens=NEW, n=4, **SAMPLED)
    assert crowd[:32:4] == lm.generate(prompts, max_new_tokens=NEW, **SAMPLED)


def test_samples_of_one_prompt(lm):
    prompts = random_prompts(*LENGTHS)[:3]
    many = lm.generate(prompts, max_new_tokens=NEW, n=3, **SAMPLED)
    for i, prompt in enumerate(prompts):
        mine = many[3 * i:3 * i + 3]
        assert len({tuple(g.token_ids) for g in mine}) == 3
        assert lm.generate([prompt], max_new_tokens=NEW, n=2, **SAMPLED) == mine[:2]


def test_neighbours_with_other_settings(load):
    """One row's filters are off while another's are on: the engine takes settings per request."""
    lm = load("dense")
    engine = Engine(lm._programs, most_slots=32)
    kinds = (Sampling(), Sampling(temperature=1.0), Sampling(temperature=0.7, top_k=5),
             Sampling(temperature=1.3, top_p=0.8), Sampling(temperature=1.0, repetition_penalty=1.3))
    requests = [Request(prompt_ids=tuple(prompt), max_new_tokens=10 + 5 * i, sampling=sampling, seed=i)
                for i, (prompt, sampling) in enumerate(zip(random_prompts(*LENGTHS), kinds, strict=False))]

    def run(requests):
        found = {}
        engine.run(requests, stop_ids=STOP_IDS, on_tokens=lambda *_: False, on_done=found.__setitem__)
        return [found[sample] for sample in sorted(found)]

    together = run(requests)
    assert [run([request]) for request in requests] == [[output] for output in together]


@pytest.mark.parametrize("lm", TWO, ids=" ".join, indirect=True)
def test_logits_and_likelihoods(lm):
    prompts = [p[:30] for p in random_prompts(*LENGTHS)]
    together = lm.logits(prompts)
    for i, prompt in enumerate(prompts):
        assert (lm.logits([prompt])[0] == together[i]).all()
    pairs = [("import", " os\nimport re"), ("a = ", "b + c"), ("", "def f():"), ("for i in", " range(3)")]
    assert [lm.loglikelihood([pair])[0] for pair in pairs] == lm.loglikelihood(pairs)
