"""Declaring parameters, and moving a tree between its stacked and its unstacked layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from qwen2_jax.config import ModelConfig
from qwen2_jax.ops.dot import for_product
from qwen2_jax.ops.quant import Int8
from qwen2_jax.sharding.axes import BATCH, Axes
from qwen2_jax.sharding.rules import Rules


def normal(std: float) -> Callable:
    return nn.initializers.normal(std)


zeros, ones = nn.initializers.zeros, nn.initializers.ones


def weight(module: Any, name: str, shape: tuple[int, ...], axes: tuple[str, ...], init: Callable,
           spread: tuple[str, ...] = ()):
    """Declare a parameter by global shape and logical axes; return this device's view in the compute dtype: its piece
    along the axes that stay split (`sharding/rules.py`), gathered over the others but for the axes `spread`; with any
    of those, in the dtype that gradients are summed in.

    `module` is a Linen module with fields `cfg`, `ax` and `dtype`. Stored in float32 at initialisation; a tree loaded
    in another dtype is used as it is, and cast here. Of a quantized tree, a matrix is seen as the `Int8` that it is; a
    `Master` is cast to the dtype of its slot.
    """
    ax: Axes = module.ax
    rules = Rules.of(module.cfg, ax)
    stored: Any = module.param(name, nn.with_partitioning(init, axes), rules.local_shape(axes, shape), jnp.float32)
    gathered = rules.gathered(axes, shape)

    def view(piece, dtype=None):
        w = ax.vary(piece, BATCH + ax.tokens)
        for dim in range(w.ndim):       # a scale [out] lies as its matrix [out, in] does
            w = ax.gather(w, [n for n in gathered[dim] if n not in spread], dim, dtype)
        return w

    if isinstance(stored, Int8):
        return jax.tree.map(view, stored)
    # Cast first: half the bytes travel, and the gradient's sum over devices happens once, here.
    cast = stored.cast() if isinstance(stored, Master) else stored.astype(ax.reduce_dtype or module.dtype)
    return view(cast, None if spread else module.dtype)


def matrix(module: Any, name: str, shape: tuple[int, int], axes: tuple[str, str], init: Callable):
    """`weight` for a product of `ops.dot`, which may sum the gradient over devices as it is made."""
    ax: Axes = module.ax
    over = Rules.of(module.cfg, ax).gathered(axes, shape)[0]
    return for_product(weight(module, name, shape, axes, init, over), ax, over, module.dtype)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Master:
    """A float32 parameter whose gradient is wanted in another dtype; a parameter tree may have one for an array.

    JAX gives a gradient the dtype of what it is a gradient of: with respect to the parameter itself, a stack of layers'
    bfloat16 gradients would be widened as it is written, to twice the bytes and not one digit more. So it is taken with
    respect to `slot`, an array of the parameter's shape and of the other dtype, which is never read.
    """

    value: Any
    slot: Any

    def cast(self):
        return _cast(self.value, self.slot)


@jax.custom_vjp
def _cast(value, slot):
    return value.astype(slot.dtype)


def _cast_forward(value, slot):
    return _cast(value, slot), None


def _cast_backward(_, gradient):
    return None, gradient


_cast.defvjp(_cast_forward, _cast_backward)


def stack(params: dict, cfg: ModelConfig) -> dict:
    """One run a layer → runs of equal kind, leaves concatenated along their leading axis; a stacked tree as it is."""
    single = cfg.layer_runs(stacked=False)
    if not all(run.name in params for run in single):
        return params
    rest = {k: v for k, v in params.items() if k not in {run.name for run in single}}
    for run in cfg.layer_runs():
        layers = [params[f"layers_{i}"] for i in run.layers]
        if len(layers) > 1:
            layers = [jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *layers)]
        rest[run.name] = layers[0]
    return rest


def unstack(params: dict, cfg: ModelConfig) -> dict:
    """Runs of equal kind → one run a layer, each leaf with a leading axis of 1. An unstacked tree is returned as is."""
    runs = {run.name: run for run in cfg.layer_runs()}
    rest = {k: v for k, v in params.items() if k not in runs}
    for name, run in runs.items():
        if jax.tree.leaves(params[name])[0].shape[0] != run.length:
            return params
        for offset, layer in enumerate(run.layers):
            rest[f"layers_{layer}"] = jax.tree.map(lambda leaf, o=offset: leaf[o:o + 1], params[name])
    return rest
