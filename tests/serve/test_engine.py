"""Slots and compilations: few shapes whatever the requests, memory bounded, interruption between stretches."""

from __future__ import annotations

import random
import signal
import threading
import time

import pytest

import qwen2_jax
from qwen2_jax.serve import engine
from qwen2_jax.serve.programs import Programs
from tests.serve.models import random_prompts


def programs(lm) -> list[str]:
    """Names of the programs that the model has, one a shape; those that only make zeros aside."""
    return sorted(key[0] for key in lm._programs._compiled if key[0] not in ("state", "prompt"))


def test_few_shapes_for_many_requests(checkpoint):
    """40 prompts of 1 to 600 tokens, in one call and in several, with random numbers of new tokens."""
    lm = qwen2_jax.load(checkpoint("dense"))
    choose = random.Random(0)
    prompts = random_prompts(*(choose.randint(1, 600) for _ in range(40)))
    lm.generate(prompts, max_new_tokens=choose.randint(1, 400), temperature=0)
    assert programs(lm) == ["decode", "insert", "prefill", "prefill", "prefill"]
    while prompts:
        some, prompts = prompts[:9 + len(prompts) % 3], prompts[9 + len(prompts) % 3:]
        lm.generate(some, max_new_tokens=choose.randint(1, 400), temperature=choose.random(), top_p=choose.random())
    # Nothing new but the cache of 512 for calls in which all requests are short, and 8 slots for less than nine.
    found = programs(lm)
    assert found.count("prefill") <= 6 and found.count("insert") <= 4 and found.count("decode") <= 4
    assert set(found) == {"prefill", "insert", "decode"}


def test_the_same_shapes_compile_once(checkpoint):
    lm = qwen2_jax.load(checkpoint("dense"))
    lm.generate(random_prompts(5), max_new_tokens=3, temperature=0)
    before = dict(lm._programs._compiled)
    lm.generate(random_prompts(31), max_new_tokens=300, temperature=0.5, top_k=3, seed=1, repetition_penalty=1.1)
    assert lm._programs._compiled == before


def test_compiling_is_said_with_its_time(checkpoint, monkeypatch, no_compilation_cache):
    said = []
    monkeypatch.setattr("qwen2_jax.serve.lm.SAID_SECONDS", 0.0)
    lm = qwen2_jax.load(checkpoint("dense"), notify=said.append)
    lm.generate(random_prompts(5), max_new_tokens=3, temperature=0)
    assert [" ".join(line.split()[:2]) for line in said] == ["compiled prefill", "compiled insert", "compiled decode"]
    assert all(line.endswith(" s") for line in said) and max(float(line.split()[-2]) for line in said) > 0


def test_a_long_cache_gets_fewer_slots(checkpoint, monkeypatch):
    lm = qwen2_jax.load(checkpoint("dense"))
    made = []
    new_state = Programs.new_state
    monkeypatch.setattr(Programs, "new_state",
                        lambda self, slots, tokens: made.append((slots, tokens)) or new_state(self, slots, tokens))
    monkeypatch.setattr(engine, "CACHE_BYTES", 8 * lm._programs.cache_bytes(512))
    assert lm._programs.cache_bytes(512) == 512 * 2 * 2 * 2 * 24 * 4      # keys, values; layers; heads; width; float32
    prompts = random_prompts(*[5] * 9)
    expected = lm.generate(prompts, max_new_tokens=4, temperature=0)
    assert lm.generate(prompts, max_new_tokens=600, temperature=0, stop="\n")     # 1024 slots of cache: one row
    assert made == [(8, 512), (1, 1024)]
    assert [g.token_ids for g in expected] == [
        lm.generate([p], max_new_tokens=4, temperature=0)[0].token_ids for p in prompts]


def test_an_interruption_ends_it_between_stretches_and_the_model_goes_on(load):
    lm = load("dense")
    prompts = random_prompts(*[5] * 3)
    expected = lm.generate(prompts, max_new_tokens=40, temperature=0)
    lm.generate([[5]], max_new_tokens=500, temperature=2.0, seed=0)       # compiled before the clock runs
    # Python drops an interruption that arrives inside of a garbage collector's callback, and JAX has one: then a user
    # presses again.
    over = threading.Event()
    press = threading.Thread(target=lambda: [signal.raise_signal(signal.SIGINT) for _ in range(5)
                                             if not over.wait(1.0)])
    press.start()
    began = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        while time.perf_counter() - began < 10:
            lm.generate([[5]], max_new_tokens=500, temperature=2.0)
    over.set()
    press.join()
    assert lm.generate(prompts, max_new_tokens=40, temperature=0) == expected
