"""The key-value cache: one pair of arrays a run of layers, [R, B, K, S, H].

Slot s of a row holds its s-th token. Right-padded prompts leave garbage beyond their end; it is never seen, because a
query sees slots up to its own only, and each new token overwrites its slot before it is attended to. A bfloat16 cache
holds its numbers as their bits, uint16 (ops/bits.py says why).
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from qwen2_jax.config import ModelConfig
from qwen2_jax.ops.attention import KEY_BLOCK
from qwen2_jax.ops.bits import as_bits, bits_dtype
from qwen2_jax.sharding.axes import BATCH, ONE_DEVICE, Axes
from qwen2_jax.sharding.rules import Rules


def cache_slots(tokens: int) -> int:
    """The smallest legal cache length that holds `tokens`."""
    return -(-tokens // KEY_BLOCK) * KEY_BLOCK


def empty_cache(cfg: ModelConfig, batch: int, slots: int, dtype, *, stacked: bool, ax: Axes = ONE_DEVICE) -> dict:
    """Zeros for `batch` rows of `slots` tokens of `dtype`, all of a mesh together (`cache_spec` says where they lie);
    the same run names as the parameters. A key-value head that devices share has a copy for each."""
    kv_heads = cfg.kv_heads * Rules.of(cfg, ax).kv_copies

    def leaf(run):
        return jnp.zeros((run.length, batch, kv_heads, slots, cfg.head_dim), bits_dtype(dtype))

    return {run.name: {"k": leaf(run), "v": leaf(run)} for run in cfg.layer_runs(stacked=stacked)}


def cache_spec(cfg: ModelConfig, ax: Axes) -> P:
    """Of every leaf of a cache: rows over the batch axes, heads as attention splits them."""
    return P(None, BATCH, Rules.of(cfg, ax).head_axes)


def write(cache_RBKSH, layer, new_BTKH, start):
    """The cache with `new`, of the cache's dtype, written at slots start … start+T-1 of `layer`.

    `start` int32: a scalar, the same slot in all rows; or [B] with T = 1, a slot of its own for each row.
    """
    new = as_bits(new_BTKH)
    if start.ndim == 0 and new.shape[1] == 1:
        start = jnp.broadcast_to(start, new.shape[:1])      # XLA for CPU would copy the cache to write one slice to it
    if start.ndim == 0:
        return lax.dynamic_update_slice(cache_RBKSH, new.swapaxes(1, 2)[None], (layer, 0, 0, start, 0))
    if new.shape[1] != 1:
        raise ValueError(f"rows with slots of their own take one token at a time, found {new.shape[1]}")
    return lax.platform_dependent(cache_RBKSH, jnp.asarray(layer, jnp.int32), new, start, cpu=_scatter,
                                  default=_row_by_row)


def _scatter(cache_RBKSH, layer, new_B1KH, start_B):
    rows = jnp.arange(start_B.shape[0], dtype=jnp.int32)
    return cache_RBKSH.at[layer, rows, :, start_B].set(new_B1KH[:, 0])


def _row_by_row(cache_RBKSH, layer, new_B1KH, start_B):
    """For a scatter XLA for TPU lays the cache out anew, all of it, before and after each step: a copy in memory, and
    for the 7B with 8 rows of 4,096 slots more time than the rest of the step."""
    for b in range(start_B.shape[0]):
        cache_RBKSH = lax.dynamic_update_slice(cache_RBKSH, new_B1KH[b:b + 1].swapaxes(1, 2)[None],
                                               (layer, b, 0, start_B[b], 0))
    return cache_RBKSH
