"""Moments stored in bfloat16 between updates, which compute in float32."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax import lax

MomentDtype = Literal["float32", "bfloat16"]


def stored_in(dtype: MomentDtype, inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner`, whose state is an `optax.ScaleByAdamState`, with both moments held in `dtype`.

    What bfloat16 loses: a first moment keeps 8 binary digits, rounded to nearest, so an element of an update is wrong
    by up to 0.2 %. A second moment would not survive that: with b2 = 0.999 it falls by 0.1 % an update at most, less
    than half of its last digit, hence never. It is therefore rounded up or down at random, in proportion, so that it is
    right on average, with a spread of a few per mille.
    """
    if dtype == "float32":
        return inner

    def init(params):
        state: Any = inner.init(params)
        return state._replace(mu=_cast(state.mu, jnp.bfloat16), nu=_cast(state.nu, jnp.bfloat16))

    def update(updates, state: Any, params=None):
        whole = state._replace(mu=_cast(state.mu, jnp.float32), nu=_cast(state.nu, jnp.float32))
        new: Any
        updates, new = inner.update(updates, whole, params)
        nu = jax.tree.map(lambda v: round_at_random(v, new.count), new.nu)
        return updates, new._replace(mu=_cast(new.mu, jnp.bfloat16), nu=nu)

    return optax.GradientTransformation(init, update)


def round_at_random(x: jax.Array, count: jax.Array) -> jax.Array:
    """Float32 → bfloat16, up with the probability of the part cut off, else down (stochastic rounding).

    The dice are a hash of the value's own bits and of the update's number `count`: no key to keep, the same on every
    mesh and in every layout of the parameters, and far cheaper than a generator. What is not finite stays.
    """
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    noise = _mixed(bits ^ _mixed(count.astype(jnp.uint32) + jnp.uint32(0x9E3779B9))) >> jnp.uint32(16)
    rounded = lax.bitcast_convert_type((bits + noise) & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)


def _mixed(h: jax.Array) -> jax.Array:
    """The finalizer of MurmurHash3: each bit of the result depends on every bit given."""
    h = (h ^ (h >> jnp.uint32(16))) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> jnp.uint32(13))) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> jnp.uint32(16))


def _cast(tree, dtype):
    return jax.tree.map(lambda leaf: leaf.astype(dtype), tree)
