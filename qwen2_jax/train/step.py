"""One training step: the gradient of the mean over the whole batch, through the per-device map, then Optax."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh

from qwen2_jax.errors import UserError
from qwen2_jax.model.params import Master
from qwen2_jax.sharding.axes import BATCH, CONTEXT, Axes
from qwen2_jax.sharding.compiler import training_options
from qwen2_jax.sharding.mesh import REPLICATED, TOKENS_SPEC, per_device, place


class TrainState(NamedTuple):
    params: dict
    """Float32 master weights."""
    optimizer: Any
    step: jax.Array
    """Updates made so far, int32."""


class Loss(Protocol):
    """What `make_step` minimises; see `train.losses`."""

    @property
    def gradient_dtype(self) -> Any: ...
    def param_specs(self, mesh: Mesh | None) -> Any: ...
    def sums(self, params: dict, batch: Any, *, ax: Any) -> Any: ...
    def mean(self, sums: Any) -> jax.Array: ...
    def bends_in(self, batch: Any) -> Any: ...
    def metrics(self, sums: Any) -> dict[str, jax.Array]: ...


Step = Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]


def init_state(params: dict, optimizer: optax.GradientTransformation, mesh: Mesh | None = None,
               specs: Any = None) -> TrainState:
    """The state before the first step. The arrays of `params` are given up to it.

    `specs`: with a mesh, where parameters lie on it: `loss.param_specs(mesh)`. They go there, and so does what the
    optimizer keeps of each; parameters that are there already do not move.
    """
    if mesh is not None and specs is None:
        raise ValueError("a state on a mesh needs the partition specs of its parameters: loss.param_specs(mesh)")
    params = place(params, mesh, specs)
    # From numpy: over several processes of one device each, JAX 0.10.2 makes of a jax.Array one that cannot be read.
    step = place(np.zeros((), np.int32), mesh)
    where = None
    if mesh is not None:
        each = jax.tree.map(lambda p: p.sharding, params)
        where = optax.tree.map_params(optimizer, lambda _, own: own, jax.eval_shape(optimizer.init, params), each,
                                      transform_non_params=lambda _: step.sharding)
    return TrainState(params, jax.jit(optimizer.init, out_shardings=where)(params), step)


def make_step(loss: Loss, optimizer: optax.GradientTransformation, rate: optax.Schedule, *, mesh: Mesh | None = None,
              micro_batches: int = 1) -> Step:
    """`step(state, batch) -> (state, metrics)`, jitted; the state given is donated.

    `batch` is a tree of arrays [B, T, …]: B a multiple of the mesh's batch axes times `micro_batches`, which are
    computed one after the other with the memory of one; T a multiple of its context axis. The state's parameters lie as
    `loss.param_specs` says. Loss and gradient are those of the whole batch, up to rounding, whatever the split;
    gradients are summed over devices once a micro-batch. A mixture-of-experts model with an auxiliary loss pays one
    more forward pass for it, because that loss multiplies two sums over the batch.

    Metrics, float32 scalars on device: `loss` (what is minimised), `grad_norm` (before clipping), `learning_rate` and
    the loss's own.
    """
    ax = Axes.of(mesh)
    global_sums = per_device(loss.sums, mesh, (loss.param_specs(mesh), TOKENS_SPEC), REPLICATED)
    rows, context = micro_batches * ax.size(BATCH), ax.size(CONTEXT)

    def sums_from(slots, params, batch):
        return global_sums(jax.tree.map(Master, params, slots), batch)

    def whole(slots, params, batch):
        sums = sums_from(slots, params, batch)
        return loss.mean(sums), sums

    def gradients(params, batch):
        slots = jax.tree.map(lambda p: jnp.zeros(p.shape, loss.gradient_dtype), params)
        if micro_batches == 1:
            (_, sums), gradient = jax.value_and_grad(whole, has_aux=True)(slots, params, batch)
            return jax.tree.map(_to_float32, gradient), sums
        return _accumulate(loss, sums_from, slots, params, batch, micro_batches)

    def step(state: TrainState, batch):
        B, T = jax.tree.leaves(batch)[0].shape[:2]
        if B % rows:
            raise UserError(f"a batch of {B} rows cannot be split over {rows} = batch axes x micro_batches; "
                            "change the batch size, the mesh or micro_batches")
        if T % context:
            raise UserError(f"rows of {T} tokens cannot be split over context={context}")
        gradient, sums = gradients(state.params, batch)
        with jax.named_scope("optimizer"):
            updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.params)
            params: Any = optax.apply_updates(state.params, updates)
        metrics = {"loss": loss.mean(sums), "grad_norm": optax.tree.norm(gradient), "learning_rate": rate(state.step),
                   **loss.metrics(sums)}
        return TrainState(params, optimizer_state, state.step + 1), metrics

    return jax.jit(step, donate_argnums=0, compiler_options=training_options(mesh))


def _accumulate(loss: Loss, sums_from: Callable, slots: dict, params: dict, batch: Any, micro_batches: int):
    """(gradient of `mean` over all micro-batches, their sums), with one micro-batch's activations at a time."""
    micro = jax.tree.map(lambda x: _split_rows(x, micro_batches), batch)
    zero_sums = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype),
                             jax.eval_shape(sums_from, slots, params, jax.tree.map(lambda x: x[0], micro)))

    def add_sums(total, part):
        return jax.tree.map(jnp.add, total, sums_from(slots, params, part)), None

    bends_in = loss.bends_in(batch)
    if bends_in is None:
        bends_in, _ = lax.scan(add_sums, zero_sums, micro)
    slopes = jax.grad(loss.mean)(bends_in)

    def add_gradient(carry, part):
        gradient, total = carry
        sums, pull_back = jax.vjp(lambda s: sums_from(s, params, part), slots)
        gradient = jax.tree.map(lambda g, more: g + _to_float32(more), gradient, pull_back(slopes)[0])
        return (gradient, jax.tree.map(jnp.add, total, sums)), None

    (gradient, sums), _ = lax.scan(add_gradient, (jax.tree.map(jnp.zeros_like, params), zero_sums), micro)
    return gradient, sums


def _to_float32(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)


def _split_rows(x: jax.Array, micro_batches: int) -> jax.Array:
    """[B, …] → [M, B/M, …], micro-batch m taking rows m, m + M, …: so each device's rows stay on it."""
    return x.reshape(-1, micro_batches, *x.shape[1:]).swapaxes(0, 1)
