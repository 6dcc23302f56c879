"""Logits, hidden states, loss and gradients equal transformers', float32, over a table of odd shapes."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen2_jax.model.cache import cache_slots, empty_cache
from qwen2_jax.model.decoder import Decoder
from qwen2_jax.model.params import stack, unstack
from qwen2_jax.ops.vocab import logits
from tests.oracle import answer, random_model, random_rows, tensors, to_params
from tests.parity.cases import BASE, CASES, TOLERANCE, assert_close, errors, gradient_error, our_answer

SAME_PROGRAM = 2e-5
"""Gradients of one program compiled in two ways, relative: sums are fused, and so ordered, otherwise."""


@pytest.mark.parametrize("case", CASES)
def test_forward_and_gradients(oracle, case):
    _, params, rows, reference = oracle(case)
    assert_close(errors(our_answer(CASES[case], params, rows), reference, rows.real_BT))


@pytest.mark.parametrize("case", CASES)
def test_prefill_and_decode(oracle, case):
    """The first tokens at once, the rest one by one through the cache, past the window; rows at slots of their own."""
    cfg = CASES[case]
    _, params, rows, reference = oracle(case)
    T = rows.ids_BT.shape[1]
    spans = [span for span in rows.spans() if span[1].stop == T]
    lengths_B, prompts_B = np.array([at.stop - at.start for _, at in spans], np.int32), np.array([9, 13], np.int32)
    ids = np.zeros((2, T), np.int32)
    expected = np.zeros((2, T, cfg.vocab), np.float32)
    for b, (row, at) in enumerate(spans):
        ids[b, :lengths_B[b]] = rows.ids_BT[row, at]
        expected[b, :lengths_B[b]] = reference.logits_BTV[row, at]
    decoder = Decoder(cfg, train=False)

    @jax.jit
    def step(params, ids_BT, cache, start):
        out = decoder.apply({"params": params}, ids_BT, cache=cache, start=start)
        return logits(out.x_BTD, out.head["table"]), out.cache

    cache = empty_cache(cfg, 2, cache_slots(T), jnp.float32, stacked=True)
    prefill, cache = step(params, ids[:, :prompts_B.max()], cache, jnp.int32(0))
    ours = np.zeros_like(expected)
    for b, n in enumerate(prompts_B):
        ours[b, :n] = prefill[b, :n]
    for i in range(T - prompts_B.min()):
        at_B = np.minimum(prompts_B + i, lengths_B - 1)     # a row that has ended writes its last token again
        now, cache = step(params, ids[[0, 1], at_B][:, None], cache, jnp.asarray(at_B))
        ours[[0, 1], at_B] = now[:, 0]
    assert np.abs(ours - expected).max() <= TOLERANCE["logits"] * expected.std()


@pytest.mark.parametrize("case", ["grouped_query", "experts_every_second_layer"])
@pytest.mark.parametrize("fields", [dict(remat="full"), dict(remat="dots"), dict(stacked=False),
                                    dict(stacked=False, remat="full")], ids=str)
def test_the_same_model_in_another_form(oracle, case, fields):
    """Remat policies and layouts change neither values nor gradients."""
    cfg = CASES[case]
    _, params, rows, reference = oracle(case)
    ours = our_answer(cfg, params if fields.get("stacked", True) else unstack(params, cfg), rows, **fields)
    ours = dataclasses.replace(ours, grads=jax.tree.map(np.asarray, stack(ours.grads, cfg)))
    assert_close(errors(ours, reference, rows.real_BT))
    plain = our_answer(cfg, params, rows)
    assert gradient_error(ours.grads, plain.grads) <= SAME_PROGRAM


def test_yarn_when_long():
    """Below the original length plain RoPE, above it YaRN: padding does not make a row long, a cache is told."""
    yarn = CASES["yarn_4x"]
    plain = dataclasses.replace(yarn, rope=dataclasses.replace(yarn.rope, kind="default"))
    cfg = dataclasses.replace(yarn, rope=dataclasses.replace(yarn.rope, when="long"))
    params = to_params(tensors(random_model(yarn)), yarn)
    layout = ((12, 12), (24,), (16, -8), (-8, 16))
    rows = random_rows(cfg, layout)
    ours = our_answer(cfg, params, rows).logits_BTV
    expected = {kind.rope.kind: answer(random_model(kind), kind, rows).logits_BTV for kind in (plain, yarn)}
    for b, kind in enumerate(("default", "yarn", "default", "default")):
        real_T = rows.real_BT[b]
        assert np.abs(ours - expected[kind])[b, real_T].max() <= TOLERANCE["logits"] * expected[kind].std()
        other = expected["yarn" if kind == "default" else "default"]
        assert np.abs(ours - other)[b, real_T].max() > 100 * TOLERANCE["logits"] * other.std()

    ids = rows.ids_BT[1:2]
    for long, kind in ((False, plain), (True, yarn)):
        start, cache = jnp.int32(0), empty_cache(cfg, 1, cache_slots(24), jnp.float32, stacked=True)
        out = Decoder(cfg).apply({"params": params}, ids, cache=cache, start=start, long_B=jnp.array([long]))
        found = np.asarray(logits(out.x_BTD, out.head["table"]))[0]
        reference = expected[kind.rope.kind][1]
        assert np.abs(found - reference).max() <= TOLERANCE["logits"] * reference.std()
    with pytest.raises(ValueError, match="which rows are long"):
        Decoder(cfg).apply({"params": params}, ids, cache=cache, start=start)


def test_configs_of_the_table_differ_from_the_base():
    assert sum(cfg == BASE for cfg in CASES.values()) == 1
