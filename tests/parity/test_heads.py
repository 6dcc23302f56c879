"""Score and reward heads, and the router's balancing loss with padding, equal transformers'."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.qwen2_moe.modeling_qwen2_moe import load_balancing_loss_func

from qwen2_jax.model.decoder import Decoder
from qwen2_jax.model.heads import score
from qwen2_jax.ops.experts import load_balancing_loss
from tests.oracle import random_model, random_rows, tensors, to_params
from tests.parity.cases import BASE, CASES, TOLERANCE

PAD = 7


def padded_rows(cfg):
    """Three rows of different lengths, padded on the right; PAD stands nowhere else."""
    rows = random_rows(cfg, ((24,), (9, -15), (17, -7)))
    ids = np.where(rows.real_BT, np.where(rows.ids_BT == PAD, PAD + 1, rows.ids_BT), PAD)
    return dataclasses.replace(rows, ids_BT=ids.astype(np.int32))


@pytest.mark.parametrize("head, labels", [("score", 1), ("score", 5), ("reward", 1)])
def test_scores_of_the_last_token(head, labels):
    cfg = dataclasses.replace(BASE, head=head, labels=labels, pad_id=PAD)
    model, rows = random_model(cfg), padded_rows(cfg)
    last_B = rows.real_BT.sum(1) - 1
    ids, mask = torch.tensor(rows.ids_BT).long(), torch.tensor(rows.real_BT).long()
    with torch.no_grad():
        if head == "score":
            expected = model(ids, attention_mask=mask).logits.numpy()
        else:
            expected = np.stack([model(ids[b:b + 1, :n + 1])[0, -1].numpy() for b, n in enumerate(last_B)])
    params = to_params(tensors(model), cfg)
    out = Decoder(cfg).apply({"params": params}, rows.ids_BT, segments_BT=rows.segments_BT,
                             positions_BT=rows.positions_BT)
    ours = score(out.x_BTD[jnp.arange(3), last_B], out.head)
    assert ours.shape == expected.shape == (3, labels) and ours.dtype == jnp.float32
    assert np.abs(ours - expected).max() <= TOLERANCE["logits"] * np.abs(expected).max()
    assert expected.std() > 0.1
    # Each parameter of the head matters to the score.
    for name, weight in out.head.items():
        without = score(out.x_BTD[jnp.arange(3), last_B], out.head | {name: jnp.zeros_like(weight)})
        assert np.abs(without - expected).max() > 100 * TOLERANCE["logits"] * np.abs(expected).max(), name


@pytest.mark.parametrize("case", ["experts", "experts_every_second_layer", "experts_but_one_layer"])
@pytest.mark.parametrize("masked", [True, False])
def test_balancing_loss(case, masked):
    """Over all sparse layers' real tokens together; transformers' own mask leaves out the same padding."""
    cfg = CASES[case]
    model, rows = random_model(cfg), padded_rows(cfg)
    ids = torch.tensor(rows.ids_BT).long()
    mask = torch.tensor(rows.real_BT).long() if masked else None
    with torch.no_grad():
        gates = model(ids, attention_mask=mask, output_router_logits=True).router_logits
    expected = load_balancing_loss_func(gates, cfg.moe.experts, cfg.moe.top_k, mask).item()
    segments = rows.segments_BT if masked else None
    out = Decoder(cfg).apply({"params": to_params(tensors(model), cfg)}, rows.ids_BT, segments_BT=segments)
    assert float(load_balancing_loss(out.router)) == pytest.approx(expected, rel=TOLERANCE["logits"])
    assert expected > 1.01 * cfg.moe.top_k      # not balanced: a constant would not do
