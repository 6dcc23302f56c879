"""Matrix products with float32 accumulation, against weights stored `[out, in]`.

XLA for CPU reaches its fast bfloat16 kernels only when the product comes out in float32, and only for two rows or
more; accelerators accumulate in float32 anyway. So each product here is bfloat16 x bfloat16 → float32, then rounded
once. The backward pass is written out because the automatic one multiplies a float32 cotangent with a bfloat16 weight,
which no platform does fast.

A weight may be an `Int8`: its whole numbers are cast to x's dtype on their way into the product, whose columns are then
scaled. It is a constant: gradients go to x alone. Or a `Spread`: gathered for the product, and its gradient made a part
at a time while the sums of the parts before travel to the devices that keep them (a collective matmul, Wang et al.,
ASPLOS 2023).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from qwen2_jax.ops.quant import Int8
from qwen2_jax.sharding.axes import Axes

PRODUCT = "product"
"""Name of every product with a weight, for a remat policy to keep."""

NARROWEST = 8
"""Fewest outputs of one product."""

_OUT_IN = (((1,), (1,)), ((), ()))
_OUT_OUT = (((1,), (0,)), ((), ()))
_ROWS_ROWS = (((0,), (0,)), ((), ()))


def _dot(a, b, dimensions):
    # On TPU a float32 product would otherwise be computed from bfloat16 pieces.
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


@jax.custom_vjp
def _matmul(x_RD, w_OD):
    return _dot(x_RD, w_OD, _OUT_IN)


def _matmul_forward(x_RD, w_OD):
    return _matmul(x_RD, w_OD), (x_RD, w_OD)


def _matmul_backward(saved, g_RO):
    x_RD, w_OD = saved
    # Written out once: XLA for TPU otherwise computes what made it anew inside of both products, at half their speed.
    g_RO = lax.optimization_barrier(g_RO.astype(x_RD.dtype))
    return _dot(g_RO, w_OD, _OUT_OUT).astype(x_RD.dtype), _dot(g_RO, x_RD, _ROWS_ROWS).astype(w_OD.dtype)


_matmul.defvjp(_matmul_forward, _matmul_backward)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["piece_oD"], meta_fields=["ax", "over"])
@dataclass(frozen=True)
class Spread:
    """A matrix [O, D] whose rows the devices along the axes `over` hold between them, each [o, D], in order. Its
    gradient is summed over them in the dtype of the piece."""

    piece_oD: Any
    ax: Axes
    over: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, int]:
        return self.piece_oD.shape[0] * self.ax.size(self.over), self.piece_oD.shape[1]


RING_LEAST = 2**15
"""Numbers in a device's piece of a matrix from which on sums travel by hops: a link carries them, in bfloat16, in the
time that a hop takes to start, one or two microseconds."""
RING_MOST = 8
"""Devices along an axis up to which sums travel by hops: each is an operation of its own, and the compiler takes six
times as long for axes of 16."""
LINE = 4
"""Devices along an axis beyond which it is taken to be a ring, both ways round which half of each row travels."""


def for_product(piece_oD, ax: Axes, over: tuple[str, ...], dtype):
    """A matrix whose rows the devices along `over` hold between them, as `matmul` takes it, to compute in `dtype`:
    gathered, or a `Spread` where the compiler's own scatter of the gradient would make everything wait."""
    if isinstance(piece_oD, Int8):
        return jax.tree.map(lambda part: ax.gather(part, over, 0), piece_oD)
    sizes = [ax.size((name,)) for name in ax.live(over)]
    if ax.on_tpu and sizes and max(sizes) <= RING_MOST and piece_oD.size >= RING_LEAST:
        return Spread(piece_oD, ax, over)
    return ax.gather(piece_oD, over, 0, dtype)


@jax.custom_vjp
def _matmul_spread(x_RD, w_OD: Spread):
    return _matmul_spread_forward(x_RD, w_OD)[0]


def _matmul_spread_forward(x_RD, w_OD: Spread):
    gathered_OD = w_OD.ax.gather(w_OD.piece_oD, w_OD.over, 0, x_RD.dtype)
    like_w = replace(w_OD, piece_oD=jnp.zeros(0, w_OD.piece_oD.dtype))
    return _dot(x_RD, gathered_OD, _OUT_IN), (x_RD, gathered_OD, like_w)


def _matmul_spread_backward(saved, g_RO):
    x_RD, w_OD, like_w = saved
    ax, over, dtype = like_w.ax, like_w.over, like_w.piece_oD.dtype
    g_RO = lax.optimization_barrier(g_RO.astype(x_RD.dtype))
    first, *others = over

    def summed(x_Rd, step: int):
        """The gradient of the columns that `x_Rd` stands for, [o, d]."""
        rows = g_RO.shape[1] // ax.size((first,))
        total = ax.ring_sum(lambda i: _dot(lax.dynamic_slice_in_dim(g_RO, i * rows, rows, 1), x_Rd,
                                           _ROWS_ROWS).astype(dtype), first, step)
        for name in others:
            whole, rows = total, total.shape[0] // ax.size((name,))
            total = ax.ring_sum(lambda i, whole=whole, rows=rows: lax.dynamic_slice_in_dim(whole, i * rows, rows),
                                name, step)
        return total

    if max(ax.size((name,)) for name in over) > LINE:
        half = x_RD.shape[1] // 2
        dw_oD = jnp.concatenate([summed(x_RD[:, :half], 1), summed(x_RD[:, half:], -1)], axis=1)
    else:
        dw_oD = summed(x_RD, 1)
    return _dot(g_RO, w_OD, _OUT_OUT).astype(x_RD.dtype), replace(like_w, piece_oD=dw_oD)


_matmul_spread.defvjp(_matmul_spread_forward, _matmul_spread_backward)


@jax.custom_vjp
def _matmul_int8(x_RD, w_OD: Int8):
    return _dot(x_RD, w_OD.values.astype(x_RD.dtype), _OUT_IN) * w_OD.scale[None]


def _matmul_int8_forward(x_RD, w_OD: Int8):
    return _matmul_int8(x_RD, w_OD), (w_OD, jnp.zeros(0, x_RD.dtype))


def _matmul_int8_backward(saved, g_RO):
    w_OD, like_x = saved
    g_RO = (g_RO * w_OD.scale[None]).astype(like_x.dtype)
    return _dot(g_RO, w_OD.values.astype(like_x.dtype), _OUT_OUT).astype(like_x.dtype), None


_matmul_int8.defvjp(_matmul_int8_forward, _matmul_int8_backward)


def matmul(x_xD, w_OD):
    """`x @ w.T` in float32. x `[..., D]` and w `[O, D]` of one dtype, in which gradients come back; or w an `Int8` or
    a `Spread`."""
    return checkpoint_name(_product(x_xD, w_OD), PRODUCT)


def linear(x_xD, w_OD, bias_O=None):
    """`x @ w.T + bias` rounded once to x's dtype."""
    y_xO = _product(x_xD, w_OD)
    if bias_O is not None:
        y_xO = y_xO + jnp.broadcast_to(bias_O.astype(jnp.float32), y_xO.shape)
    return checkpoint_name(y_xO.astype(x_xD.dtype), PRODUCT)


def _product(x_xD, w_OD):
    """The product, in shapes for which a row's bits do not depend on its company.

    A single row is multiplied twice over: XLA for CPU takes one row through another kernel, whose sums differ in their
    last bits (and which is ten times slower in bfloat16). From two rows on all rows are treated alike, unless there is
    but a single output: narrow weights are padded with zeros.
    """
    x_RD = x_xD.reshape(-1, x_xD.shape[-1])
    rows, outputs = x_RD.shape[0], w_OD.shape[0]
    if rows == 1:
        x_RD = jnp.concatenate([x_RD, x_RD])
    if outputs < NARROWEST:
        w_OD = jax.tree.map(lambda w: jnp.pad(w, ((0, NARROWEST - outputs), *((0, 0),) * (w.ndim - 1))), w_OD)
    product = {Int8: _matmul_int8, Spread: _matmul_spread}.get(type(w_OD), _matmul)
    return product(x_RD, w_OD)[:rows, :outputs].reshape(*x_xD.shape[:-1], outputs)
