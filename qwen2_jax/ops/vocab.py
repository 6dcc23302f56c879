"""What touches the vocabulary: embedding rows, next-token log-probabilities, the loss.

[B, T, V] float32 logits are the largest array of a language model (2.3 GiB for one row of 4,096 tokens of the 7B), so
the loss takes tokens a chunk at a time and recomputes each chunk's logits in the backward pass.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from qwen2_jax.ops.dot import matmul

TOKEN_CHUNK = 1024


def embed(ids_BT, table_VD):
    """Rows of the table, [B, T, D] in its dtype. Ids outside the vocabulary are the caller's error: check before.

    The gradient of a row is summed in float32 and rounded once: a bfloat16 sum stops growing at 256 equal terms, which
    the frequent tokens of one batch pass.
    """
    return _embed(ids_BT, table_VD)


@jax.custom_vjp
def _embed(ids_BT, table_VD):
    return jnp.take(table_VD, ids_BT, axis=0, mode="clip")


def _embed_forward(ids_BT, table_VD):
    return _embed(ids_BT, table_VD), (ids_BT, table_VD)


def _embed_backward(saved, g_BTD):
    ids_BT, table_VD = saved
    sums_VD = jnp.zeros_like(table_VD, jnp.float32).at[ids_BT].add(g_BTD.astype(jnp.float32), mode="clip")
    return None, sums_VD.astype(table_VD.dtype)


_embed.defvjp(_embed_forward, _embed_backward)


def logits(x_xD, table_VD):
    """float32 [..., V]."""
    return matmul(x_xD, table_VD)


def target_logprobs(x_BTD, table_VD, targets_BT, *, chunk: int = TOKEN_CHUNK):
    """(log p of each target, log-sum-exp of its logits, is the target the arg-max), each [B, T]; nats, float32.

    Ties count as arg-max only for the lowest id, as numpy and torch choose.
    """
    B, T, D = x_BTD.shape
    rows = B * T
    chunk = min(chunk, rows)
    pieces = -(-rows // chunk)
    pad = pieces * chunk - rows
    x = jnp.pad(x_BTD.reshape(rows, D), ((0, pad), (0, 0))).reshape(pieces, chunk, D)
    targets = jnp.pad(targets_BT.reshape(rows), (0, pad)).reshape(pieces, chunk)

    @jax.checkpoint
    def piece(x_CD, target_C):
        z_CV = logits(x_CD, table_VD)
        lse_C = jax.nn.logsumexp(z_CV, axis=-1)
        picked_C1 = jnp.take_along_axis(z_CV, target_C[:, None], axis=-1, mode="clip")
        # On CPU `argmax` is not vectorised and costs more than the product; comparing costs a tenth of it.
        later_CV = jnp.arange(z_CV.shape[-1], dtype=target_C.dtype)[None] >= target_C[:, None]
        behind_CV = (z_CV < picked_C1) | ((z_CV == picked_C1) & later_CV)
        return picked_C1[:, 0] - lse_C, lse_C, behind_CV.all(-1)

    if pieces == 1:
        out = piece(x[0], targets[0])
    else:
        out = lax.map(lambda args: piece(*args), (x, targets))
    return tuple(o.reshape(-1)[:rows].reshape(B, T) for o in out)
