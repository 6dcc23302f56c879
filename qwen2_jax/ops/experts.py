"""Mixture of experts: route, sort rows by expert, multiply group by group, add up.

Shape letters: R rows (tokens), k choices a row, E experts, F expert width, D model. A *copy* is one (row, choice) pair,
C = R k of them.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from qwen2_jax.ops.bits import kept_in_loop
from qwen2_jax.ops.dot import matmul
from qwen2_jax.ops.grouped import Copies, collect, in_rounds, of_choices, sorted_copies, spread
from qwen2_jax.ops.grouped_matmul import How, grouped_matmul
from qwen2_jax.ops.quant import Int8
from qwen2_jax.sharding.axes import ONE_DEVICE, Axes

HEADROOM, TILE, SMALLEST_ROUND = 0.5, 512, 4096
"""Copies that one round takes: those of a balanced router and, for one expert, this part more, in whole tiles of the
kernel; below the last, products are bound by reading their weights, and a second round would read them again. What one
expert gets beyond its share, others lack: of n together it is 1/sqrt(n) as much, if they are independent."""
ROW_BLOCK = 16
"""Rows that one product takes in `blocked_experts`: fixed, so that a row's result does not depend on its company."""


class ExpertWeights(NamedTuple):
    gate_EFD: jax.Array | Int8
    up_EFD: jax.Array | Int8
    down_EDF: jax.Array | Int8


class RouterStats(NamedTuple):
    """What the auxiliary loss needs, summed over rows that count; add them over layers and devices before use."""

    assigned_E: jax.Array
    """Copies sent to each expert (a row has k)."""
    probability_E: jax.Array
    """Router probability of each expert, summed over rows."""
    rows: jax.Array
    """Rows counted, times layers once added up."""


def route(x_RD, router_ED, *, top_k: int, normalise: bool):
    """Softmax over all experts, then the largest k → (weights float32 [R, k], experts int32 [R, k], probabilities
    float32 [R, E])."""
    probability_RE = jax.nn.softmax(matmul(x_RD, router_ED), axis=-1)
    weight_Rk, expert_Rk = lax.top_k(probability_RE, top_k)
    if normalise:
        weight_Rk = weight_Rk / weight_Rk.sum(-1, keepdims=True)
    return weight_Rk, expert_Rk, probability_RE


def router_stats(expert_Rk, probability_RE, counts_R) -> RouterStats:
    """Statistics over the rows where `counts_R` (bool) holds."""
    weight_R = counts_R.astype(jnp.float32)
    chosen_RE = jax.nn.one_hot(expert_Rk, probability_RE.shape[-1], dtype=jnp.float32).sum(1)
    # HIGHEST: on TPU a float32 product is otherwise computed from bfloat16 pieces.
    assigned_E, probability_E = (jnp.matmul(weight_R, x_RE, precision=lax.Precision.HIGHEST)
                                 for x_RE in (chosen_RE, probability_RE))
    return RouterStats(assigned_E, probability_E, weight_R.sum())


def load_balancing_loss(stats: RouterStats):
    """E * sum_e f_e P_e over all layers' rows together, as transformers; a balanced router gives k, not 1.

    Fedus et al. 2021 (Switch Transformers), equations 4 to 6, for k choices.
    """
    rows = jnp.maximum(stats.rows, 1)
    return stats.assigned_E.shape[0] * jnp.sum(stats.assigned_E / rows * (stats.probability_E / rows))


def grouped_experts(x_RD, weight_Rk, expert_Rk, w: ExpertWeights, *, ax: Axes = ONE_DEVICE, share: float = 1.0):
    """Sum over choices of weight * SwiGLU expert, float32 [R, D], by grouped products: differentiable, dropless.

    A choice numbered E or more is of an expert that is not here, and adds nothing. `share` is the part of the choices
    that a balanced router sends here: memory is that of a little more, whatever the router does, which then takes time.
    `ax` tells what varies, and the kind of device.
    """
    copies = sorted_copies(expert_Rk, w.gate_EFD.shape[0])
    experts = partial(_experts, How.of(ax, x_RD.dtype))
    size = round_size(expert_Rk.size, w.gate_EFD.shape[0], share)
    return in_rounds(experts, size, copies, x_RD, weight_Rk, w)


def round_size(copies: int, experts: int, share: float) -> int:
    """Copies of a round."""
    balanced = -(-int(copies * share * (1 + HEADROOM / math.sqrt(experts))) // TILE) * TILE
    return min(copies, max(balanced, SMALLEST_ROUND))


def _experts(how: How, copies: Copies, x_RD, weight_Rk, w: ExpertWeights):
    x_CD, sizes_E = spread(x_RD, copies), copies.sizes_E
    gate_CF, up_CF = (grouped_matmul(x_CD, m, sizes_E, how).astype(jnp.float32) for m in (w.gate_EFD, w.up_EFD))
    # Weighted before the last product, whose result the backward pass then does not need.
    h_CF = jax.nn.silu(gate_CF) * up_CF * of_choices(weight_Rk, copies)[:, None]
    return collect(grouped_matmul(h_CF.astype(x_RD.dtype), w.down_EDF, sizes_E, how), copies)


def blocked_experts(x_RD, weight_Rk, expert_Rk, w: ExpertWeights):
    """The same sum for inference on CPU: each expert's rows in blocks of ROW_BLOCK, as many blocks as are in use.

    XLA for CPU turns `ragged_dot` into a product with every expert; this does the work once, and each row's result has
    the same bits whatever else is in the batch. Not reverse-differentiable.
    """
    R, D = x_RD.shape
    k = expert_Rk.shape[1]
    E = w.gate_EFD.shape[0]
    copies = sorted_copies(expert_Rk, E)
    expert_C, sizes_E = expert_Rk.reshape(-1)[copies.copy_C], copies.sizes_E
    blocks_E = -(-sizes_E // ROW_BLOCK)
    last_block_E = jnp.cumsum(blocks_E)
    here_C = expert_C < E
    within_C = jnp.arange(R * k, dtype=jnp.int32) - (jnp.cumsum(sizes_E) - sizes_E)[expert_C]
    capacity = (min(R * k, -(-R * k // ROW_BLOCK) + E)) * ROW_BLOCK
    slot_C = jnp.where(here_C, (last_block_E - blocks_E)[expert_C] * ROW_BLOCK + within_C, capacity)
    x_SD = jnp.zeros((capacity, D), x_RD.dtype).at[slot_C].set(x_RD[copies.row_C], mode="drop")

    def block(i, y_SD):
        e = jnp.searchsorted(last_block_E, i, side="right")
        rows = lax.dynamic_slice_in_dim(x_SD, i * ROW_BLOCK, ROW_BLOCK)
        experts, e = kept_in_loop(w, e) if x_RD.dtype == jnp.bfloat16 else (w, e)
        gate, up, down = jax.tree.map(lambda m: lax.dynamic_index_in_dim(m, e, keepdims=False), experts)
        h = (jax.nn.silu(matmul(rows, gate)) * matmul(rows, up)).astype(x_RD.dtype)
        return lax.dynamic_update_slice_in_dim(y_SD, matmul(h, down), i * ROW_BLOCK, 0)

    y_SD = lax.fori_loop(0, last_block_E[-1], block, jnp.zeros_like(x_SD, jnp.float32))
    return _combine(jnp.where(here_C[:, None], y_SD[slot_C], 0), copies.copy_C, weight_Rk)


def _combine(y_CD, copy_C, weight_Rk):
    """Undo the sort and add each row's k results in order of choice, float32 [R, D]."""
    R, k = weight_Rk.shape
    y_CD = jnp.zeros_like(y_CD).at[copy_C].set(y_CD)
    return jnp.sum(y_CD.reshape(R, k, -1) * weight_Rk[..., None], axis=1)
