"""Weight-only int8: a matrix as whole numbers with one scale an output channel, a quarter of float32's bytes.

Activations stay as they are. A product is `(x @ values.T) * scale`, its sum in float32: every whole number up to 127 is
exact in bfloat16, so that int8 weights give what their float32 meaning gives, but for the order of the sum. Symmetric
absmax quantization: Dettmers et al. 2022, arXiv 2208.07339, section 2.1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from qwen2_jax.errors import UserError
from qwen2_jax.shapes import is_quantized

Quant = Literal["int8"] | None

LARGEST = 127
LEAST_SCALE = float(np.finfo(np.float32).tiny)
"""A row whose scale would be smaller is one of zeros: processors compute with nothing smaller."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Int8:
    """A matrix [.., O, D] that means `values * scale[..., None]`; wherever a parameter tree may have a matrix, it may
    have one of these. The leaves may also be the specs or shardings of the two arrays."""

    values: Any
    """int8 [.., O, D], from -127 to 127."""
    scale: Any
    """float32 [.., O]."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape


def quantize_rows(w_xOD, xp: Any = jnp) -> Int8:
    """Each output channel (row) by its own largest magnitude, rounded to the nearest whole number. `xp`: numpy or
    jax.numpy; in the middle between two numbers XLA's division may decide for another than numpy's. A row that holds
    NaN or infinity gets the scale NaN, so that it is not hidden."""
    with np.errstate(invalid="ignore"):     # of a row with the scale NaN, any values will do
        w_xOD = w_xOD.astype(xp.float32)
        # Multiplied by 1/127, which is what XLA makes of a division by a constant.
        scale_xO = xp.max(xp.abs(w_xOD), axis=-1) * xp.float32(1 / LARGEST)
        scale_xO = xp.where(scale_xO < LEAST_SCALE, xp.float32(0), scale_xO)
        # Not read off the scale: XLA's maximum on CPU may pass over NaN.
        scale_xO = xp.where(xp.isfinite(w_xOD).all(-1), scale_xO, xp.float32(xp.nan))
        divisor_xO = xp.where(scale_xO > 0, scale_xO, xp.float32(xp.inf))
        return Int8(xp.rint(w_xOD / divisor_xO[..., None]).astype(xp.int8), scale_xO)


def meaning(w: Int8, dtype: Any = jnp.float32):
    """The matrix [.., O, D] that an `Int8` means, computed in float32 and rounded once to `dtype`."""
    return (w.values.astype(jnp.float32) * w.scale[..., None]).astype(dtype)


def on_matrices(tree: Any, fn: Callable[[Any], Any]) -> Any:
    """`fn` of each leaf that quantization takes (`shapes.is_quantized`), the others as they are. Leaves may be arrays,
    `Int8`s, partition specs."""
    def each(path, leaf):
        return fn(leaf) if is_quantized(path[-1].key) else leaf

    return jax.tree_util.tree_map_with_path(each, tree, is_leaf=lambda x: isinstance(x, Int8 | P))


def quantize(params: dict) -> dict:
    """A parameter tree, in either layout and on any mesh, with its matrices as `Int8`. Each is quantized by itself; the
    given tree keeps its arrays (`qwen2_jax.load(…, quant="int8")` never holds both)."""
    return on_matrices(params, _quantize_rows)


def dequantize(params: dict, dtype: Any = jnp.float32) -> dict:
    """The matrices that a quantized tree means, as arrays of `dtype`; other leaves as they are."""
    return on_matrices(params, lambda leaf: _meaning(leaf, dtype) if isinstance(leaf, Int8) else leaf)


def quantized_specs(specs: dict) -> dict:
    """Partition specs of a parameter tree → those of the quantized one: scales lie as their matrix' rows do."""
    return on_matrices(specs, lambda spec: Int8(spec, P(*spec[:-1])))


def quant_of(params: Any) -> Quant:
    """How a tree's matrices are quantized."""
    leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, Int8))
    return "int8" if any(isinstance(leaf, Int8) for leaf in leaves) else None


def check_quant(quant: Any) -> Quant:
    """`quant` if it is known; raises UserError."""
    known = get_args(get_args(Quant)[0])
    if quant is not None and quant not in known:
        raise UserError(f"quant {quant!r} is not supported: {', '.join(known)} is")
    return quant


def refuse_quantized(params: Any, what: str) -> None:
    """Raises UserError for a quantized tree: `what` takes the weights themselves."""
    if quant := quant_of(params):
        raise UserError(f"{what} takes the weights themselves, found a tree quantized to {quant}: use the parameters "
                        "that it was made from")


_quantize_rows = jax.jit(quantize_rows)
_meaning = jax.jit(meaning, static_argnums=1)
