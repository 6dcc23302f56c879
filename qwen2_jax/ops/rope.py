"""Rotary position embedding: default, linear interpolation, static YaRN (arXiv 2309.00071).

The two halves of a head are rotated against each other (the NeoX form). YaRN's ramp is linear in the frequency index,
as transformers and vLLM compute it, and its temperature multiplies cos and sin, so logits get its square.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from qwen2_jax.config import RopeConfig


def default_inv_freq(theta: float, head_dim: int) -> np.ndarray:
    """theta^(-2i/H) for i in [0, H/2), float32, radians a position."""
    return np.float32(1.0) / _wavelengths(theta, head_dim)


def _wavelengths(theta: float, head_dim: int) -> np.ndarray:
    """theta^(2i/H), float32. A correctly rounded power equals torch's to the bit almost everywhere; numpy's own float32
    power is off by one bit in every tenth, which at position 100,000 is a hundredth of a radian."""
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    return np.power(np.float64(theta), exponent.astype(np.float64)).astype(np.float32)


def yarn_ramp_bounds(rope: RopeConfig, head_dim: int) -> tuple[float, float]:
    """Frequency indices between which YaRN goes from extrapolation to interpolation."""
    original = rope.original_max_position
    assert original is not None     # RopeConfig refuses YaRN without it

    def index(rotations: float) -> float:
        wavelength = original / (rotations * 2 * math.pi)
        return head_dim * math.log(wavelength) / (2 * math.log(rope.theta))

    low, high = index(rope.beta_fast), index(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    return max(low, 0), min(high, head_dim - 1)


def yarn_attention_factor(rope: RopeConfig) -> float:
    """What multiplies cos and sin: 0.1 ln(factor) + 1 unless the file says otherwise."""
    def scale(m: float) -> float:
        return 0.1 * m * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return scale(rope.mscale) / scale(rope.mscale_all_dim)
    return scale(1.0)


def frequencies(rope: RopeConfig, head_dim: int) -> tuple[np.ndarray, float]:
    """(inverse frequencies float32 [H/2], attention factor) with the configured scaling applied."""
    inv_freq = default_inv_freq(rope.theta, head_dim)
    if rope.kind == "default":
        return inv_freq, 1.0
    if rope.kind == "linear":
        return inv_freq / np.float32(rope.factor), 1.0
    low, high = yarn_ramp_bounds(rope, head_dim)
    high = high + 0.001 if low == high else high  # as transformers: no division by zero
    ramp = np.clip((np.arange(head_dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low), 0, 1)
    interpolated = np.float32(1.0) / (np.float32(rope.factor) * _wavelengths(rope.theta, head_dim))
    kept = np.float32(1.0) - ramp
    return interpolated * (np.float32(1.0) - kept) + inv_freq * kept, yarn_attention_factor(rope)


def rope_tables(positions_BT, rope: RopeConfig, head_dim: int, long_B=None) -> tuple[jax.Array, jax.Array]:
    """cos, sin float32 [B, T, H/2] at integer positions.

    `long_B` bool [B] is needed when `rope.when == "long"`: rows that are not long keep plain RoPE.
    """
    scaled, factor = frequencies(rope, head_dim)
    if rope.kind == "default" or rope.when == "always":
        return _tables(positions_BT, scaled, factor)
    if long_B is None:
        raise ValueError('rope_when "long" needs to be told which rows are long')
    plain = _tables(positions_BT, default_inv_freq(rope.theta, head_dim), 1.0)
    long = _tables(positions_BT, scaled, factor)
    cos_BTh, sin_BTh = (jnp.where(long_B[:, None, None], a, b) for a, b in zip(long, plain, strict=True))
    return cos_BTh, sin_BTh


def _tables(positions_BT, inv_freq_h: np.ndarray, factor: float):
    angle = positions_BT[..., None].astype(jnp.float32) * jnp.asarray(inv_freq_h)[None, None, :]
    return jnp.cos(angle) * jnp.float32(factor), jnp.sin(angle) * jnp.float32(factor)


def apply_rope(x_BTNH, cos_BTh, sin_BTh):
    """Rotate each head by its position; float32 inside, x's dtype outside."""
    lo, hi = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos_BTh[:, :, None], sin_BTh[:, :, None]
    return jnp.concatenate([lo * cos - hi * sin, hi * cos + lo * sin], axis=-1).astype(x_BTNH.dtype)
