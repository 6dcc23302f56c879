"""Kernels inside of a map that checks what varies.

A kernel of Pallas is traced with the types of its results written out, and those bundled with JAX leave out over which
mesh axes they vary, so that a checked map refuses them. `kernel` makes such a function one operation, typed here: its
results vary wherever an argument does, which is right for anything without collectives. It is not differentiable; give
the whole a `custom_vjp`.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Primitive, jaxpr_as_fun
from jax.interpreters import mlir
from jax.sharding import PartitionSpec as P

from qwen2_jax.sharding.axes import Axes

_kernel_p = Primitive("kernel")
_kernel_p.multiple_results = True


def kernel(fn: Callable, ax: Axes, *args) -> Any:
    """`fn(*args)`, pytrees of arrays in and out, without collectives in it. What `fn` returns of its arguments as they
    came is handed back, not copied."""
    leaves, tree = jax.tree.flatten(args)
    leaves = ax.vary(leaves, sorted({name for leaf in leaves for name in ax.varying(leaf)}))
    shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]

    def trace() -> tuple[ClosedJaxpr, Any]:
        with jax.numpy_dtype_promotion("standard"):
            return jax.make_jaxpr(lambda *flat: fn(*jax.tree.unflatten(tree, flat)), return_shape=True)(*shapes)

    # The check belongs to a thread's tracing context; a new thread starts without it.
    with ThreadPoolExecutor(1) as thread:
        closed, result = thread.submit(trace).result()
    given = dict(zip(closed.jaxpr.invars, leaves, strict=True))
    made = _kernel_p.bind(*leaves, jaxpr=closed)
    out = [given.get(var, value) if not hasattr(var, "val") else value
           for var, value in zip(closed.jaxpr.outvars, made, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(result), out)


def _typed(*avals, jaxpr: ClosedJaxpr):
    like = avals[0]
    return [like.update(shape=out.shape, dtype=out.dtype, weak_type=False,
                        sharding=like.sharding.update(spec=P(*(None,) * out.ndim))) for out in jaxpr.out_avals]


def _lowered(ctx, *values, jaxpr: ClosedJaxpr):
    # Traced once more while it is lowered, without the types that the map gave.
    ctx = ctx.replace(avals_in=list(jaxpr.in_avals), avals_out=list(jaxpr.out_avals))
    return mlir.lower_fun(jaxpr_as_fun(jaxpr), multiple_results=True)(ctx, *values)


_kernel_p.def_abstract_eval(_typed)
_kernel_p.def_impl(lambda *values, jaxpr: jax.jit(jaxpr_as_fun(jaxpr))(*values))
mlir.register_lowering(_kernel_p, _lowered)
