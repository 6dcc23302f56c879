"""Mixture of experts: route, sort rows by expert, multiply group by group, add up.

Shape letters: R rows (tokens), k choices a row, E experts, F expert width, D model. A *copy* is one (row, choice) pair,
C = R k of them.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from qwen2_jax.ops.bits import kept_in_loop
from qwen2_jax.ops.dot import PRODUCT, matmul

ROW_BLOCK = 16
"""Rows that one product takes in `blocked_experts`: fixed, so that a row's result does not depend on its company."""


class ExpertWeights(NamedTuple):
    gate_EFD: jax.Array
    up_EFD: jax.Array
    down_EDF: jax.Array


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


def grouped_experts(x_RD, weight_Rk, expert_Rk, w: ExpertWeights):
    """Sum over choices of weight * SwiGLU expert, float32 [R, D], by `lax.ragged_dot`: differentiable, dropless.

    A choice numbered E is of an expert that is not here, and adds nothing.
    """
    order_C, expert_C, token_C = _sorted_copies(expert_Rk)
    E = w.gate_EFD.shape[0]
    sizes_E = jnp.bincount(expert_C, length=E + 1)[:E].astype(jnp.int32)
    x_CD = x_RD[token_C]
    h_CF = jax.nn.silu(_ragged(x_CD, w.gate_EFD, sizes_E)) * _ragged(x_CD, w.up_EFD, sizes_E)
    y_CD = _ragged(h_CF.astype(x_RD.dtype), w.down_EDF, sizes_E)
    # What `ragged_dot` leaves in rows of no group is not said to be zero.
    return _combine(jnp.where((expert_C < E)[:, None], y_CD, 0), order_C, weight_Rk)


def blocked_experts(x_RD, weight_Rk, expert_Rk, w: ExpertWeights):
    """The same sum for inference on CPU: each expert's rows in blocks of ROW_BLOCK, as many blocks as are in use.

    XLA for CPU turns `ragged_dot` into a product with every expert; this does the work once, and each row's result has
    the same bits whatever else is in the batch. Not reverse-differentiable.
    """
    R, D = x_RD.shape
    k = expert_Rk.shape[1]
    E = w.gate_EFD.shape[0]
    order_C, expert_C, token_C = _sorted_copies(expert_Rk)
    sizes_E = jnp.bincount(expert_C, length=E + 1)[:E].astype(jnp.int32)
    blocks_E = -(-sizes_E // ROW_BLOCK)
    last_block_E = jnp.cumsum(blocks_E)
    here_C = expert_C < E
    within_C = jnp.arange(R * k, dtype=jnp.int32) - (jnp.cumsum(sizes_E) - sizes_E)[expert_C]
    capacity = (min(R * k, -(-R * k // ROW_BLOCK) + E)) * ROW_BLOCK
    slot_C = jnp.where(here_C, (last_block_E - blocks_E)[expert_C] * ROW_BLOCK + within_C, capacity)
    x_SD = jnp.zeros((capacity, D), x_RD.dtype).at[slot_C].set(x_RD[token_C], mode="drop")

    def block(i, y_SD):
        e = jnp.searchsorted(last_block_E, i, side="right")
        rows = lax.dynamic_slice_in_dim(x_SD, i * ROW_BLOCK, ROW_BLOCK)
        experts, e = kept_in_loop(w, e) if x_RD.dtype == jnp.bfloat16 else (w, e)
        gate, up, down = (lax.dynamic_index_in_dim(m, e, keepdims=False) for m in experts)
        h = (jax.nn.silu(matmul(rows, gate)) * matmul(rows, up)).astype(x_RD.dtype)
        return lax.dynamic_update_slice_in_dim(y_SD, matmul(h, down), i * ROW_BLOCK, 0)

    y_SD = lax.fori_loop(0, last_block_E[-1], block, jnp.zeros_like(x_SD, jnp.float32))
    return _combine(jnp.where(here_C[:, None], y_SD[slot_C], 0), order_C, weight_Rk)


def _sorted_copies(expert_Rk):
    """Copies in order of expert, stable: (copy index, its expert, its row), each int32 [C]."""
    flat_C = expert_Rk.reshape(-1)
    order_C = jnp.argsort(flat_C, stable=True).astype(jnp.int32)
    return order_C, flat_C[order_C], order_C // expert_Rk.shape[1]


def _combine(y_CD, order_C, weight_Rk):
    """Undo the sort and add each row's k results in order of choice, float32 [R, D]."""
    R, k = weight_Rk.shape
    y_CD = jnp.zeros_like(y_CD).at[order_C].set(y_CD)
    return jnp.sum(y_CD.reshape(R, k, -1) * weight_Rk[..., None], axis=1)


def _ragged(x_CD, w_EOD, sizes_E):
    """Rows of each group times its own matrix, float32 [C, O]."""
    precision = lax.Precision.HIGHEST if x_CD.dtype == jnp.float32 else None
    y_CO = lax.ragged_dot(x_CD, w_EOD.swapaxes(1, 2), sizes_E, precision=precision, preferred_element_type=jnp.float32)
    return checkpoint_name(y_CO, PRODUCT)
