"""A training state to disk and back: stacked there, whatever its layout here, so that any program can go on with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from qwen2_jax.checkpoint.store import Store
from qwen2_jax.config import ModelConfig
from qwen2_jax.model.params import stack, unstack
from qwen2_jax.train.loop import Hook
from qwen2_jax.train.step import TrainState


class SaveState(Hook):
    """Saves every `every` updates and after the last; `position(step)` is what the data needs to go on. `before` is
    called first: what it writes is on the disk before the checkpoint counts."""

    def __init__(self, store: Store, cfg: ModelConfig, position: Callable[[int], Mapping[str, Any]], *, every: int,
                 before: Callable[[], None] = lambda: None):
        self.store, self.cfg, self.position, self.every, self.before = store, cfg, position, every, before

    def due(self, step, last):
        return last or step % self.every == 0

    def on_metrics(self, step, metrics):
        self.store.check()      # a save that failed ends the run now, not at the next one

    def after_step(self, step, state):
        self.before()
        self.store.save(step, stored_state(state, self.cfg), self.position(step))

    def close(self):
        self.store.wait()


def stored_state(state: TrainState, cfg: ModelConfig) -> dict[str, Any]:
    """The entries that `Store` saves; parameters and the optimizer's moments are stacked."""
    return _entries(TrainState(stack(state.params, cfg), _relayout(stack, state.optimizer, cfg), state.step))


def _entries(state: TrainState) -> dict[str, Any]:
    return {"params": state.params, "optimizer": _held(state.optimizer), "step": {"updates": state.step}}


def restore_state(store: Store, cfg: ModelConfig, like: TrainState, step: int | None = None) -> tuple[TrainState, dict]:
    """State and data position of a saved step (default: the last), in the layout and on the devices of `like`.

    `like` is a fresh state (`init_state`) of the same model and optimizer. Raises UserError as `Store.restore` does.
    """
    # A stack lies as its first layer does: its leading axis is never split.
    lies = {path: leaf.sharding for path, leaf in jax.tree_util.tree_leaves_with_path(_entries(like))}
    abstract = jax.tree_util.tree_map_with_path(
        lambda path, x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=lies[path]),
        jax.eval_shape(lambda s: stored_state(s, cfg), like))
    saved, position = store.restore(abstract, step)
    params, optimizer = saved["params"], _filled(saved["optimizer"], like.optimizer, cfg)
    if like.params.keys() != params.keys():
        params, optimizer = unstack(params, cfg), _relayout(unstack, optimizer, cfg)
    return TrainState(params, optimizer, saved["step"]["updates"]), position


def _relayout(change: Callable, optimizer_state: Any, cfg: ModelConfig) -> Any:
    """`change` applied to every tree in Optax's state that mirrors the parameters."""
    return jax.tree.map(lambda node: change(node, cfg) if isinstance(node, dict) else node, optimizer_state,
                        is_leaf=lambda node: isinstance(node, dict))


def _held(tree: Any) -> Any:
    """Without dicts' arrays that have no elements, where an optimizer holds nothing of a parameter: Orbax has no form
    for them."""
    def held(node):
        inner = {name: held(x) if isinstance(x, dict) else x for name, x in node.items()}
        return {name: x for name, x in inner.items() if (x if isinstance(x, dict) else x.size)}

    return jax.tree.map(lambda node: held(node) if isinstance(node, dict) else node, tree,
                        is_leaf=lambda node: isinstance(node, dict))


def _filled(held: Any, like: Any, cfg: ModelConfig) -> Any:
    """The inverse of `_held`, for a state stacked from `like`."""
    saved = dict(jax.tree_util.tree_leaves_with_path(held))
    lies = {path: leaf.sharding for path, leaf in jax.tree_util.tree_leaves_with_path(like)}
    return jax.tree_util.tree_map_with_path(
        lambda path, x: saved[path] if x.size else jnp.zeros(x.shape, x.dtype, device=lies[path]),
        jax.eval_shape(lambda s: _relayout(stack, s, cfg), like))
