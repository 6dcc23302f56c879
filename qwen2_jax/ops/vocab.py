"""What touches the vocabulary: embedding rows, next-token log-probabilities, the loss.

[B, T, V] float32 logits are the largest array of a language model (2.3 GiB for one row of 4,096 tokens of the 7B), so
the loss takes a part of them at a time and recomputes it in the backward pass.

The table is `[v, D]`, this device's rows of it: where the vocabulary is split over tensor, each function works on those
and joins the devices' results, so that what comes out is the same on all of them; where rows are spread over fsdp, they
are gathered here (`split.spread`), by the loss a part at a time, so that no device ever holds the whole head.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from qwen2_jax.ops.dot import for_product, matmul
from qwen2_jax.ops.quant import Int8, meaning
from qwen2_jax.shapes import least_divisor
from qwen2_jax.sharding.split import WHOLE, Split

TOKEN_CHUNK = 1024
COLUMNS = 512
"""Of an embedding that is spread over fsdp, gathered at a time: 148 MiB of the 7B's."""


def embed(ids_BT, table_vD, split: Split = WHOLE, *, dtype: Any = None):
    """Rows of the table for the residual stream, [B, t, D] in its dtype; or those that an `Int8` table means, in
    `dtype`. Ids outside the vocabulary are the caller's error: check before.

    The gradient of a row is summed in float32 and rounded once: a bfloat16 sum stops growing at 256 equal terms, which
    the frequent tokens of one batch pass.
    """
    if not split.over:
        return _rows(split.inside(ids_BT), table_vD, split, dtype)
    held = table_vD.shape[0] * split.ax.size(split.spread)
    row_BT = ids_BT - split.ax.index(split.over) * held
    mine_BT = (row_BT >= 0) & (row_BT < held)
    return split.leave(jnp.where(mine_BT[..., None], _rows(row_BT, table_vD, split, dtype), 0))


def _rows(ids_BT, table_vD, split: Split, dtype):
    """Rows of what the devices along `split.spread` hold together. They gather a few columns of it at a time: the
    gradient's float32 sums have the size of what was gathered."""
    if isinstance(table_vD, Int8):
        rows = jax.tree.map(lambda part: jnp.take(part, ids_BT, axis=0, mode="clip"),
                            for_product(table_vD, split.ax, split.spread, dtype))
        return meaning(rows, dtype)
    v, D = table_vD.shape
    if not split.spread or D % COLUMNS:
        return _embed(ids_BT, split.ax.gather(table_vD, split.spread, 0, dtype))
    parts = table_vD.reshape(v, D // COLUMNS, COLUMNS).swapaxes(0, 1)
    columns = lax.map(lambda part: _embed(ids_BT, split.ax.gather(part, split.spread, 0, dtype)), parts)
    return jnp.moveaxis(columns, 0, 2).reshape(*ids_BT.shape, D)


@jax.custom_vjp
def _embed(ids_BT, table_VD):
    return jnp.take(table_VD, ids_BT, axis=0, mode="clip")


def _embed_forward(ids_BT, table_VD):
    return _embed(ids_BT, table_VD), (ids_BT, table_VD[:, :0])      # the table's rows are known by an empty one


def _embed_backward(saved, g_BTD):
    ids_BT, empty_V0 = saved
    sums_VD = jnp.zeros((empty_V0.shape[0], g_BTD.shape[-1]), jnp.float32)
    sums_VD = sums_VD.at[ids_BT].add(g_BTD.astype(jnp.float32), mode="clip")
    return None, sums_VD.astype(empty_V0.dtype)


_embed.defvjp(_embed_forward, _embed_backward)


def logits(x_BtD, table_vD, split: Split = WHOLE):
    """float32 [B, T, V]; of hidden states [R, D], [R, V]."""
    z_BTv = matmul(split.enter(x_BtD), for_product(table_vD, split.ax, split.spread, x_BtD.dtype))
    return split.joined(split.ax.gather_same(z_BTv, split.over, z_BTv.ndim - 1))


class _Seen(NamedTuple):
    """What the logits over part of the vocabulary tell of each row; parts are merged."""

    lse_R: jax.Array
    """Log-sum-exp."""
    picked_R: jax.Array
    """The target's logit, 0 where the target is not of this part."""
    top_R: jax.Array
    first_R: jax.Array
    """The lowest id with the logit `top`."""

    def merged(self, other: _Seen) -> _Seen:
        first_R = jnp.where(self.top_R > other.top_R, self.first_R,
                            jnp.where(self.top_R < other.top_R, other.first_R,
                                      jnp.minimum(self.first_R, other.first_R)))
        return _Seen(jnp.logaddexp(self.lse_R, other.lse_R), self.picked_R + other.picked_R,
                     jnp.maximum(self.top_R, other.top_R), first_R)


def target_logprobs(x_BtD, table_vD, targets_BT, split: Split = WHOLE, *, chunk: int = TOKEN_CHUNK):
    """(log p of each target, log-sum-exp of its logits, is the target the arg-max), each [B, T]; nats, float32.

    Ties count as arg-max only for the lowest id, as numpy and torch choose. No more logits are held than those of
    `chunk` tokens.
    """
    x_BTD, targets_BT = split.enter(x_BtD), split.inside(targets_BT)
    B, T, D = x_BTD.shape
    by_parts = _over_table if split.spread else _over_tokens
    seen = by_parts(x_BTD.reshape(B * T, D), table_vD, targets_BT.reshape(B * T), split, chunk)
    out = seen.picked_R - seen.lse_R, seen.lse_R, seen.first_R == targets_BT.reshape(B * T)
    return tuple(split.joined(o.reshape(B, T)) for o in out)


def _over_tokens(x_RD, table_vD, target_R, split: Split, chunk: int) -> _Seen:
    """All of the table at once, `chunk` tokens at a time."""
    rows, D = x_RD.shape
    chunk = min(chunk, rows)
    pieces = -(-rows // chunk)
    pad = pieces * chunk - rows
    first = split.ax.index(split.over) * table_vD.shape[0]

    def piece(args):
        x_CD, target_C = args
        return _look(x_CD, table_vD, target_C - first, jnp.arange(table_vD.shape[0], dtype=jnp.int32) + first, split)

    args = (jnp.pad(x_RD, ((0, pad), (0, 0))).reshape(pieces, chunk, D),
            jnp.pad(target_R, (0, pad)).reshape(pieces, chunk))
    if pieces == 1:
        return jax.tree.map(lambda o: o[:rows], jax.checkpoint(piece)(jax.tree.map(lambda a: a[0], args)))
    return jax.tree.map(lambda o: o.reshape(-1)[:rows], lax.map(jax.checkpoint(piece), args))


def _over_table(x_RD, table_vD, target_R, split: Split, chunk: int) -> _Seen:
    """All tokens at once, a part of the table at a time: so many rows of each device that spreads it, gathered."""
    ax, v = split.ax, table_vD.shape[0]
    owners, rows = ax.size(split.spread), x_RD.shape[0]
    own = _part(v, -(-rows // chunk))
    parts = -(-v // own)
    own_poD = jax.tree.map(lambda w: jnp.pad(w, ((0, parts * own - v), *((0, 0),) * (w.ndim - 1))).reshape(
        parts, own, *w.shape[1:]), table_vD)
    first = ax.index(split.over) * owners * v
    owner_R, row_R = jnp.divmod(target_R - first, v)
    # Gradients of x add up over the parts, in float32.
    x32_RD = x_RD.astype(jnp.float32)

    @jax.checkpoint
    def part(seen: _Seen, number_and_rows):
        number, own_oD = number_and_rows
        w_gD = for_product(own_oD, ax, split.spread, x_RD.dtype)
        place_R = jnp.where(row_R // own == number, owner_R * own + row_R % own, -1)
        row_o = jnp.arange(own, dtype=jnp.int32) + number * own
        ids_g = (jnp.arange(owners, dtype=jnp.int32)[:, None] * v + row_o[None]).reshape(-1) + first
        held_g = None if v % own == 0 else jnp.tile(row_o < v, owners)
        return seen.merged(_look(x32_RD.astype(x_RD.dtype), w_gD, place_R, ids_g, split, held_g)), None

    lowest = jnp.full(rows, -jnp.inf, jnp.float32)
    nothing = _Seen(lowest, jnp.zeros(rows, jnp.float32), lowest, jnp.zeros(rows, jnp.int32))
    # What is the same along tensor is so after each part as before it.
    alike = [name for name in ax.varying(x_RD) if name not in split.over]
    return lax.scan(part, ax.vary(nothing, alike),
                    (jnp.arange(parts, dtype=jnp.int32), own_poD), unroll=2)[0]


def _part(rows: int, parts: int) -> int:
    """Rows of one of about so many equal parts: of a divisor's where there is one, else the last part is filled up."""
    divisor = least_divisor(rows, parts)
    return rows // divisor if divisor < 2 * parts else -(-rows // parts)


def _look(x_RD, w_vD, row_R, ids_v, split: Split, held_v=None) -> _Seen:
    """The logits of rows `w` of the table, whose ids are `ids_v`, joined over `split.over`; the target is row `row_R`
    of them, or none of them where that is outside. Rows not `held_v` are none of the table's."""
    ax = split.ax
    z_Rv = matmul(x_RD, w_vD)
    if held_v is not None:
        z_Rv = jnp.where(held_v[None], z_Rv, -jnp.inf)
    own_top_R = lax.stop_gradient(z_Rv).max(-1)
    top_R = ax.pmax(own_top_R, split.over)
    lse_R = jnp.log(ax.psum(jnp.exp(z_Rv - top_R[:, None]).sum(-1), split.over)) + top_R
    picked_R = jnp.take_along_axis(z_Rv, row_R[:, None], axis=-1, mode="clip")[:, 0]
    picked_R = ax.psum(jnp.where((row_R >= 0) & (row_R < w_vD.shape[0]), picked_R, 0), split.over)
    # `argmax` is not vectorised on CPU and costs more than the product there.
    first_R = jnp.where(lax.stop_gradient(z_Rv) == top_R[:, None], ids_v[None], jnp.iinfo(jnp.int32).max).min(-1)
    return _Seen(lse_R, picked_R, top_R, -ax.pmax(-first_R, split.over))
