"""Attention over whole rows on TPU v4 and later: the splash kernel that JAX brings, forward and backward.

Memory grows with T; blocks that causality or the window hides are not computed. The kernel is bfloat16's: float32 asks
for exactness, which the reference in `ops/attention.py` gives, and TPU v2 and v3 have no bfloat16 in Pallas.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

from qwen2_jax.sharding.axes import Axes
from qwen2_jax.sharding.kernels import kernel
from qwen2_jax.sharding.order import RowOrder

ATTENDED = "attended"
"""Name of what attention leaves for its backward pass, for a remat policy to keep: the output, and a float32
log-sum-exp a token and head."""

LANES = 128
BLOCKS = (1024, 512, 256, 128)
"""Queries, and keys, that the kernel takes at a time: the first that divides their number."""


def suits(ax: Axes, dtype, tokens: int) -> bool:
    """Whether the kernel runs there, on pieces of `tokens` tokens."""
    return ax.has_pallas and dtype == jnp.bfloat16 and tokens % LANES == 0


def flash_attend(q_BTNH, k_BSKH, v_BSKH, *, order: RowOrder, segments_BT=None, key_segments_BS=None, windowed=None,
                 window: int = 0, ax: Axes, interpret: bool = False):
    """Causal attention of this device's piece of each row to the whole row → [B, T, N, H] in q's dtype.

    `order` says which of the row's tokens those are, keys being the pieces of all devices one after the other. Segments
    and the window as in `ops.attention.attend`. T a multiple of LANES.
    """
    keys = (k_BSKH, v_BSKH) if key_segments_BS is None else (k_BSKH, v_BSKH, key_segments_BS)
    k_BSKH, v_BSKH, *rest = (order.in_order(x) for x in keys)
    segments = None if segments_BT is None else splash.SegmentIds(segments_BT, rest[0])
    return _attend_where(windowed, window, q_BTNH, k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2), segments, order, ax,
                         interpret)


def suits_cache(ax: Axes, dtype, tokens: int, slots: int) -> bool:
    """Whether the kernel runs there, on `tokens` tokens over a cache of `slots`."""
    return suits(ax, dtype, tokens) and slots % tokens == 0


def flash_attend_cache(q_BTNH, k_BKSH, v_BKSH, *, start, windowed=None, window: int = 0, ax: Axes,
                       interpret: bool = False):
    """Attention of the tokens at slots start … start+T-1 over a cache that already holds their own keys → [B, T, N, H]
    in q's dtype. T divides S, and the int32 scalar `start` is a multiple of T: everything is NaN where it is not."""
    T, S = q_BTNH.shape[1], k_BKSH.shape[2]
    out_BTNH = _attend_where(windowed, window, q_BTNH, k_BKSH, v_BKSH, None, RowOrder(S // T, start // T, 0), ax,
                             interpret)
    return jnp.where(start % T == 0, out_BTNH, jnp.nan)


def _attend_where(windowed, window: int, q_BTNH, k_BKSH, v_BKSH, segments, order: RowOrder, ax: Axes,
                  interpret: bool) -> Any:
    """With the window where `windowed`, which may be traced, says so."""
    scale = jnp.float32(q_BTNH.shape[-1] ** -0.5)
    q_BNTH = (q_BTNH.astype(jnp.float32) * scale).astype(q_BTNH.dtype).swapaxes(1, 2)
    piece = jnp.asarray(order.piece, jnp.int32)

    def run(window: int) -> Any:
        setting = _Setting(k_BKSH.shape[2], order.pieces, order.halves, window, q_BNTH.shape[1], interpret)
        return _attend(setting, ax, q_BNTH, k_BKSH, v_BKSH, segments, piece)

    if not window or windowed is None:
        out_BNTH = run(0)
    else:
        out_BNTH = jax.lax.cond(windowed, lambda: run(window), lambda: run(0))
    return out_BNTH.swapaxes(1, 2)


@dataclass(frozen=True)
class _Setting:
    """What a kernel is made for: rows of `tokens`, of which a device has one of `pieces`; `halves` as in RowOrder."""

    tokens: int
    pieces: int
    halves: int
    window: int
    heads: int
    interpret: bool


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(setting: _Setting, ax: Axes, q_BNTH, k_BKSH, v_BKSH, segments, piece):
    return _forward(setting, ax, q_BNTH, k_BKSH, v_BKSH, segments, piece)[0]


def _forward(setting: _Setting, ax: Axes, q_BNTH, k_BKSH, v_BKSH, segments, piece):
    def run(q_BNTH, k_BKSH, v_BKSH, segments, piece):
        attend = _of_piece(_splash(setting), setting.pieces, piece)
        return jax.vjp(lambda q, k, v: jax.vmap(attend)(q, k, v, segments), q_BNTH, k_BKSH, v_BKSH)

    args = (q_BNTH, k_BKSH, v_BKSH, segments, piece)
    out_BNTH, pull_back = kernel(run, ax, *args)
    given = {id(leaf) for leaf in jax.tree.leaves(args)}
    out_BNTH = checkpoint_name(out_BNTH, ATTENDED)
    pull_back = jax.tree.map(lambda x: x if id(x) in given else checkpoint_name(x, ATTENDED), pull_back)
    return out_BNTH, (pull_back, segments, piece)


def _backward(setting: _Setting, ax: Axes, saved, g_BNTH):
    pull_back, segments, piece = saved
    gradients = kernel(lambda pull_back, g: pull_back(g), ax, pull_back, g_BNTH)
    none = jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), (segments, piece))
    return (*gradients, *none)


_attend.defvjp(_forward, _backward)


@functools.lru_cache(maxsize=64)
def _splash(setting: _Setting) -> Any:
    """The kernel, with its tables of blocks as numpy arrays."""
    S, piece = setting.tokens, setting.tokens // setting.pieces
    if setting.window:
        mask = masks.LocalMask((S, S), (setting.window - 1, 0), 0)
    else:
        mask = masks.CausalMask((S, S))
    mask.q_sequence = RowOrder.slots_of(S, setting.halves)
    queries, keys = _block(piece), _block(S)
    sizes = splash.BlockSizes(block_q=queries, block_kv=keys, block_kv_compute=keys, block_q_dkv=queries,
                              block_kv_dkv=keys, block_kv_dkv_compute=keys, block_q_dq=queries, block_kv_dq=keys)
    with jax.ensure_compile_time_eval():
        made = splash.make_splash_mha(masks.MultiHeadMask([mask] * setting.heads), block_sizes=sizes, head_shards=1,
                                      q_seq_shards=setting.pieces, interpret=setting.interpret)
        return jax.tree.map(np.asarray, made)


def _block(tokens: int) -> int:
    return next(block for block in BLOCKS if tokens % block == 0)


def _of_piece(whole: Any, pieces: int, piece) -> Any:
    """The kernel of one piece of the queries: its part of the tables."""
    if pieces == 1:
        return whole

    def cut(x, dim: int):
        return None if x is None else jax.lax.dynamic_slice_in_dim(x, piece * (n := x.shape[dim] // pieces), n, dim)

    def of(info: MaskInfo | None) -> Any:
        return info and info._replace(data_next=cut(info.data_next, 1), mask_next=cut(info.mask_next, 1),
                                      block_mask=cut(info.block_mask, 1), q_sequence=cut(info.q_sequence, 0))

    return splash.SplashAttentionKernel(of(whole.fwd_mask_info), of(whole.dq_mask_info), of(whole.dkv_mask_info),
                                        **whole.kwargs)
