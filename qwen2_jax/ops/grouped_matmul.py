"""Rows sorted by group, each group times a matrix of its own.

Shape letters: C rows, E groups, O outputs, D inputs of a row. Three ways to the same numbers, with work for the rows
that are there and no other, and nothing transposed or widened in memory:

- `kernel`: Pallas' grouped products that JAX brings (megablox), for bfloat16 on TPU v4 and later;
- `tiles`: a loop over each group's rows, for TPU v2 and v3, where Pallas has no bfloat16, and for float32 on any TPU:
  XLA's own `ragged_dot` first widens all matrices there (3 GiB for those of a layer of the 57B), and computes their
  gradients from every row with every group;
- `ragged`: `lax.ragged_dot`, which XLA for CPU turns into a product with every group.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from qwen2_jax.ops.dot import PRODUCT
from qwen2_jax.ops.quant import Int8
from qwen2_jax.sharding.axes import ONE_DEVICE, Axes
from qwen2_jax.sharding.kernels import kernel

TILE_ROWS = 128
"""Rows of a group that `tiles` multiplies at a time."""
KERNEL_ROWS, KERNEL_COLUMNS = (512, 128), 1024
"""Rows of a tile of the kernel, the latter where rows are few; its most columns, a multiple of 128."""


@dataclass(frozen=True)
class How:
    way: Literal["kernel", "tiles", "ragged"]
    ax: Axes = ONE_DEVICE
    interpret: bool = False

    @classmethod
    def of(cls, ax: Axes, dtype) -> How:
        """The way for this kind of device."""
        if not ax.on_tpu:
            return cls("ragged", ax)
        return cls("kernel" if ax.has_pallas and dtype == jnp.bfloat16 else "tiles", ax)


def grouped_matmul(x_CD, w_EOD, sizes_E, how: How):
    """Each row times its group's matrix, [C, O], summed in float32 and rounded once to x's dtype.

    The groups' rows follow each other from the first row on. Rows behind them get anything, and so does their gradient.
    `w_EOD` is of x's dtype, in which gradients come back, or a constant `Int8`.
    """
    if isinstance(w_EOD, Int8):
        y_CO: Any = _product(how, x_CD, w_EOD.values.astype(x_CD.dtype), sizes_E)
        group_C = jnp.searchsorted(jnp.cumsum(sizes_E), jnp.arange(x_CD.shape[0], dtype=jnp.int32), side="right")
        y_CO = y_CO.astype(jnp.float32) * jnp.take(w_EOD.scale, group_C, axis=0, mode="clip")
        return checkpoint_name(y_CO.astype(x_CD.dtype), PRODUCT)
    return checkpoint_name(_product(how, x_CD, w_EOD, sizes_E), PRODUCT)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(how: How, x_CD, w_EOD, sizes_E):
    return _rows(how, x_CD, w_EOD, sizes_E, True)


def _forward(how: How, x_CD, w_EOD, sizes_E):
    return _product(how, x_CD, w_EOD, sizes_E), (x_CD, w_EOD, sizes_E)


def _backward(how: How, saved, g_CO):
    x_CD, w_EOD, sizes_E = saved
    return _rows(how, g_CO, w_EOD, sizes_E, False), _matrices(how, g_CO, x_CD, sizes_E), None


_product.defvjp(_forward, _backward)


def _rows(how: How, a_CK, w_EOD, sizes_E, transposed: bool):
    """a @ w.T of each group, or a @ w."""
    if how.way == "kernel":
        rows, a_CK = _tiled(a_CK)
        size = tuple(map(_columns, (a_CK.shape[1], w_EOD.shape[1 if transposed else 2])))
        run = partial(_megablox().gmm, preferred_element_type=a_CK.dtype, tiling=(_tile(a_CK), *size),
                      transpose_rhs=transposed, interpret=how.interpret)
        return kernel(run, how.ax, a_CK, w_EOD, sizes_E)[:rows]
    if how.way == "tiles":
        return _rows_by_tiles(how.ax, a_CK, w_EOD, sizes_E, transposed)
    dimensions = lax.RaggedDotDimensionNumbers((((1,), (2 if transposed else 1,)), ((), ())), [0], [0])
    return _ragged(a_CK, w_EOD, sizes_E, dimensions)


def _matrices(how: How, g_CO, x_CD, sizes_E):
    """g.T @ x of each group, [E, O, D]."""
    if how.way == "kernel":
        _, g_CO = _tiled(g_CO)
        _, x_CD = _tiled(x_CD)
        size = _columns(g_CO.shape[1]), _columns(x_CD.shape[1])

        def run(g_CO, x_CD, sizes_E):
            return _megablox().tgmm(g_CO.swapaxes(0, 1), x_CD, sizes_E, preferred_element_type=x_CD.dtype,
                                    tiling=(_tile(x_CD), *size), interpret=how.interpret)

        return kernel(run, how.ax, g_CO, x_CD, sizes_E)
    if how.way == "tiles":
        return _matrices_by_tiles(how.ax, g_CO, x_CD, sizes_E)
    return _ragged(g_CO, x_CD, sizes_E, lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], []))


def _megablox() -> Any:
    # The package shows a function of the same name as the module.
    return importlib.import_module("jax.experimental.pallas.ops.tpu.megablox.gmm")


def _tile(a_CK) -> int:
    return KERNEL_ROWS[0] if a_CK.shape[0] % KERNEL_ROWS[0] == 0 else KERNEL_ROWS[1]


def _tiled(a_CK):
    """(how many rows there are, those and as many more as fill the last tile)."""
    rows = a_CK.shape[0]
    return rows, jnp.pad(a_CK, ((0, -rows % KERNEL_ROWS[1]), (0, 0)))


def _columns(size: int) -> int:
    """The widest tile that divides them."""
    fit = [n for n in range(128, KERNEL_COLUMNS + 1, 128) if size % n == 0]
    return max(fit, default=min(size, KERNEL_COLUMNS // 2))


def _ragged(a, b, sizes_E, dimensions: lax.RaggedDotDimensionNumbers):
    return lax.ragged_dot_general(a, b, sizes_E, dimensions, precision=_precision(a),
                                  preferred_element_type=jnp.float32).astype(a.dtype)


def _precision(a):
    # On TPU a float32 product would otherwise be computed from bfloat16 pieces.
    return lax.Precision.HIGHEST if a.dtype == jnp.float32 else None


def _rows_by_tiles(ax: Axes, a_CK, w_EOD, sizes_E, transposed: bool):
    rows, outputs = a_CK.shape[0], w_EOD.shape[1 if transposed else 2]
    padded = jnp.pad(a_CK, ((0, TILE_ROWS), (0, 0)))
    dimensions = ((1,), (1 if transposed else 0,)), ((), ())

    def group(start_y, size_w):
        (start, y), (size, w_OD) = start_y, size_w

        def tile(i, y):
            at = start + i * TILE_ROWS
            a = lax.dynamic_slice_in_dim(padded, at, TILE_ROWS)
            product = lax.dot_general(a, w_OD, dimensions, precision=_precision(a), preferred_element_type=jnp.float32)
            # The last tile runs into the next group's rows, which come later.
            return lax.dynamic_update_slice_in_dim(y, product.astype(y.dtype), at, 0)

        return (start + size, lax.fori_loop(0, -(-size // TILE_ROWS), tile, y)), None

    start = ax.vary_like((jnp.int32(0), jnp.zeros((rows + TILE_ROWS, outputs), a_CK.dtype)), a_CK)
    (_, y), _ = lax.scan(group, start, (sizes_E, w_EOD))
    return y[:rows]


def _matrices_by_tiles(ax: Axes, g_CO, x_CD, sizes_E):
    g, x = (jnp.pad(a, ((0, TILE_ROWS), (0, 0))) for a in (g_CO, x_CD))

    def group(start, size):
        def tile(i, total):
            at, left = start + i * TILE_ROWS, size - i * TILE_ROWS
            g_tile, x_tile = (lax.dynamic_slice_in_dim(a, at, TILE_ROWS) for a in (g, x))
            own = jnp.arange(TILE_ROWS, dtype=jnp.int32)[:, None] < left
            g_tile, x_tile = jnp.where(own, g_tile, 0), jnp.where(own, x_tile, 0)
            return total + lax.dot_general(g_tile, x_tile, (((0,), (0,)), ((), ())), precision=_precision(g_tile),
                                           preferred_element_type=jnp.float32)

        zero = ax.vary_like(jnp.zeros((g.shape[1], x.shape[1]), jnp.float32), g_CO)
        return start + size, lax.fori_loop(0, -(-size // TILE_ROWS), tile, zero).astype(x.dtype)

    return lax.scan(group, ax.vary_like(jnp.int32(0), g_CO), sizes_E)[1]
