"""Windows cover each pair once, with context; and their sum is the document's probability."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2_jax.errors import UserError
from qwen2_jax.model.decoder import Decoder, init_params
from qwen2_jax.sharding.mesh import make_mesh
from qwen2_jax.train.evaluate import Evaluate, make_evaluation, windows
from qwen2_jax.train.losses import NextTokenLoss


@given(lengths=st.lists(st.integers(0, 90), max_size=6), row_length=st.integers(1, 24), data=st.data())
def test_windows_score_each_pair_once(lengths, row_length, data):
    stride = data.draw(st.integers(1, row_length))
    scored = []
    for window in windows(lengths, row_length, stride):
        assert 0 <= window.start <= window.counted < window.stop <= window.start + row_length
        if window.counted:
            assert window.counted - window.start >= row_length - stride, "too little context"
        scored += [(window.document, pair) for pair in range(window.counted, window.stop)]
    assert scored == [(d, pair) for d, tokens in enumerate(lengths) for pair in range(tokens - 1)]


def exact_nll(cfg, params, tokens, context):
    """nats of tokens[1:], each given up to `context` tokens before it, one at a time from whole logits."""

    @jax.jit
    def logits(ids):
        out = Decoder(cfg).apply({"params": params}, ids)
        return out.x_BTD @ out.head["table"].T

    total = 0.0
    for i in range(1, len(tokens)):
        row = np.zeros((1, context), np.int32)
        seen = tokens[max(0, i - context):i]
        row[0, :len(seen)] = seen
        z = np.asarray(logits(row)[0, len(seen) - 1], np.float64)
        total += np.log(np.exp(z).sum()) - z[tokens[i]]
    return total


@pytest.mark.parametrize("mesh", [None, "data=4"])
def test_nll_of_short_documents_is_exact(dense, mesh):
    rng = np.random.default_rng(5)
    documents = [rng.integers(0, dense.vocab, n) for n in (16, 1, 9, 2, 13, 0)]
    params = init_params(dense, jax.random.key(4))
    evaluate = make_evaluation(NextTokenLoss(model=dense), documents, row_length=16, stride=8, batch_size=4,
                               mesh=make_mesh(mesh))
    nll, count = evaluate(params)
    assert count == 15 + 8 + 1 + 12
    assert nll == pytest.approx(sum(exact_nll(dense, params, d, 16) for d in documents), rel=1e-5)


def test_stride_1_gives_each_token_a_full_context(dense):
    tokens = np.random.default_rng(6).integers(0, dense.vocab, 21)
    params = init_params(dense, jax.random.key(4))
    evaluate = make_evaluation(NextTokenLoss(model=dense), [tokens], row_length=8, stride=1, batch_size=4)
    assert evaluate(params)[0] == pytest.approx(exact_nll(dense, params, tokens, 8), rel=1e-5)


def test_a_stride_beyond_the_row_is_refused():
    with pytest.raises(UserError, match="between 1 and the row length 8, found 9"):
        windows([20], 8, 9)


def test_the_hook_evaluates_now_and_then():
    class State:
        params = "weights"

    reports = []
    hook = Evaluate(str.upper, lambda *report: reports.append(report), every=2)
    for step in range(1, 6):
        if hook.due(step, last=False):
            hook.after_step(step, State)
    assert reports == [(2, "WEIGHTS"), (4, "WEIGHTS")]
