"""What touches the vocabulary: embedding rows, next-token log-probabilities, the loss.

[B, T, V] float32 logits are the largest array of a language model (2.3 GiB for one row of 4,096 tokens of the 7B), so
the loss takes tokens a chunk at a time and recomputes each chunk's logits in the backward pass.

Where the vocabulary is split over tensor, the table is `[v, D]`, this device's rows: each function works on those and
joins the devices' results, so that what comes out is the same on all of them.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from qwen2_jax.ops.dot import matmul
from qwen2_jax.sharding.split import WHOLE, Split

TOKEN_CHUNK = 1024


def embed(ids_BT, table_vD, split: Split = WHOLE):
    """Rows of the table for the residual stream, [B, t, D] in its dtype. Ids outside the vocabulary are the caller's
    error: check before.

    The gradient of a row is summed in float32 and rounded once: a bfloat16 sum stops growing at 256 equal terms, which
    the frequent tokens of one batch pass.
    """
    if not split.over:
        return _embed(split.inside(ids_BT), table_vD)
    row_BT, mine_BT = _own_rows(ids_BT, table_vD, split)
    return split.leave(jnp.where(mine_BT[..., None], _embed(row_BT, table_vD), 0))


def _own_rows(ids, table_vD, split: Split):
    """(rows of this device's piece of the table, are they the ones asked for)."""
    row = ids - split.ax.index(split.over) * table_vD.shape[0]
    return row, (row >= 0) & (row < table_vD.shape[0])


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


def logits(x_BtD, table_vD, split: Split = WHOLE):
    """float32 [B, T, V]; of hidden states [R, D], [R, V]."""
    z_BTv = matmul(split.enter(x_BtD), table_vD)
    return split.joined(split.ax.gather_same(z_BTv, split.over, z_BTv.ndim - 1))


def target_logprobs(x_BtD, table_vD, targets_BT, split: Split = WHOLE, *, chunk: int = TOKEN_CHUNK):
    """(log p of each target, log-sum-exp of its logits, is the target the arg-max), each [B, T]; nats, float32.

    Ties count as arg-max only for the lowest id, as numpy and torch choose.
    """
    ax, x_BTD, targets_BT = split.ax, split.enter(x_BtD), split.inside(targets_BT)
    B, T, D = x_BTD.shape
    rows = B * T
    chunk = min(chunk, rows)
    pieces = -(-rows // chunk)
    pad = pieces * chunk - rows
    x = jnp.pad(x_BTD.reshape(rows, D), ((0, pad), (0, 0))).reshape(pieces, chunk, D)
    targets = jnp.pad(targets_BT.reshape(rows), (0, pad)).reshape(pieces, chunk)

    @jax.checkpoint
    def piece(x_CD, target_C):
        z_Cv = matmul(x_CD, table_vD)
        row_C, mine_C = _own_rows(target_C, table_vD, split)
        top_C = ax.pmax(lax.stop_gradient(z_Cv).max(-1), split.over)
        lse_C = jnp.log(ax.psum(jnp.exp(z_Cv - top_C[:, None]).sum(-1), split.over)) + top_C
        own_C = jnp.take_along_axis(z_Cv, row_C[:, None], axis=-1, mode="clip")[:, 0]
        picked_C = ax.psum(jnp.where(mine_C, own_C, 0), split.over)
        # On CPU `argmax` is not vectorised and costs more than the product; comparing costs a tenth of it.
        later_Cv = jnp.arange(z_Cv.shape[-1], dtype=row_C.dtype)[None] >= row_C[:, None]
        behind_Cv = (z_Cv < picked_C[:, None]) | ((z_Cv == picked_C[:, None]) & later_Cv)
        beaten_C = ax.psum((~behind_Cv.all(-1)).astype(jnp.int32), split.over)
        return picked_C - lse_C, lse_C, beaten_C == 0

    if pieces == 1:
        out = piece(x[0], targets[0])
    else:
        out = lax.map(lambda args: piece(*args), (x, targets))
    return tuple(split.joined(o.reshape(-1)[:rows].reshape(B, T)) for o in out)
