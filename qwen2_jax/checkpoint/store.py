"""A small façade over Orbax for training: save now and then, restore anywhere. Nothing else knows the manager.

Layout: `path/{step}/params/`, `path/{step}/optimizer/`, … one Orbax checkpoint for each entry of the state, and
`path/{step}/position/`, the data iterator's place. A step folder is a checkpoint that `open_checkpoint` reads, with the
config.json that lies in it or in `path`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from qwen2_jax.checkpoint.pieces import PART_BYTES
from qwen2_jax.checkpoint.staging import naming_disk_errors
from qwen2_jax.errors import UserError
from qwen2_jax.ops.quant import refuse_quantized

POSITION = "position"


class Store:
    """Checkpoints of one training run, the newest `keep` of them; saving goes on while training does.

    Args:
      path: the run's folder; made when it is missing.
      keep: how many steps stay on disk.
      every: `save` passes over steps that are not multiples of it.
    """

    def __init__(self, path: str | Path, *, keep: int = 3, every: int = 1):
        self.path = Path(path).absolute()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(
                self.path, options=ocp.CheckpointManagerOptions(max_to_keep=keep, save_interval_steps=every))
        except OSError as e:
            raise UserError(f"cannot write checkpoints to {self.path}: {e.strerror or e}") from e

    def save(self, step: int, state: Mapping[str, Any], position: Mapping[str, Any], *, force: bool = False) -> bool:
        """Starts to save step `step`; returns whether it is one to be saved (`force`: it is, whatever `every` says).

        `state` is {"params": tree, "optimizer": tree, …} of arrays, copied off the devices before this returns, so
        they may be donated to the next step. `position` is JSON: what the data iterator needs to go on. Raises
        UserError when the disk is full, for this step or the one before, whose writing ends here; for a quantized tree.
        """
        refuse_quantized(state, f"{self.path}: a checkpoint")
        items = {name: ocp.args.StandardSave(tree, save_args=jax.tree.map(_chunks, tree))
                 for name, tree in state.items()}
        args = ocp.args.Composite(**items, **{POSITION: ocp.args.JsonSave(dict(position))})
        with naming_disk_errors(self.path):
            return self._manager.save(step, args=args, force=force)

    def restore(self, like: Mapping[str, Any], step: int | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
        """State and position of a step, by default the latest.

        `like` mirrors the entries wanted (`params` alone is fine) in `jax.ShapeDtypeStruct`s with shardings: any mesh
        will do, whatever mesh the state was saved from. Raises UserError when there is no such step, or when what was
        saved has other names or shapes.
        """
        steps = sorted(self._manager.all_steps())
        if not steps:
            raise UserError(f"{self.path} holds no checkpoint")
        step = steps[-1] if step is None else step
        if step not in steps:
            raise UserError(f"{self.path} holds no checkpoint of step {step}; it has {', '.join(map(str, steps))}")
        for name, tree in like.items():
            self._check(step, name, tree)
        items = {name: ocp.args.StandardRestore(tree) for name, tree in like.items()}
        restored = self._manager.restore(step, args=ocp.args.Composite(**items, **{POSITION: ocp.args.JsonRestore()}))
        return {name: restored[name] for name in like}, restored[POSITION]

    def _check(self, step: int, name: str, like: Any) -> None:
        """Raises UserError unless entry `name` of a step has the names and shapes of `like`; a dtype may be cast."""
        folder = self.path / str(step) / name
        if not folder.is_dir():
            raise UserError(f"{self.path / str(step)} holds no {name}")
        with ocp.StandardCheckpointer() as checkpointer:
            saved = _shapes(checkpointer.metadata(folder).item_metadata)
        wanted = _shapes(like)
        for path in sorted(saved.keys() | wanted.keys()):
            if saved.get(path) != wanted.get(path):
                found, needed = (f"has shape {list(s[path])}" if path in s else "has none" for s in (saved, wanted))
                raise UserError(f"{folder} does not fit at {path}: the checkpoint {found}, this program {needed}")

    def latest_step(self) -> int | None:
        """The last step that is complete on disk, None when there is none."""
        return self._manager.latest_step()

    def wait(self) -> None:
        """Returns when what is being saved is complete on disk; raises what went wrong meanwhile."""
        with naming_disk_errors(self.path):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then lets go of the manager's threads."""
        try:
            self.wait()
        finally:
            self._manager.close()


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {path: tuple(leaf.shape) for path, leaf in ocp.tree.to_flat_dict(tree, sep="/").items()}


def _chunks(leaf: Any) -> ocp.SaveArgs:
    """One layer and one expert a chunk, at most PART_BYTES: a conversion reads a stack slice by slice, and a device of
    another mesh its own part and little more. OCDBT packs them into few files."""
    if math.prod(np.shape(leaf)) == 0:
        return ocp.SaveArgs()
    return ocp.SaveArgs(chunk_byte_size=PART_BYTES, shard_axes=tuple(range(max(0, np.ndim(leaf) - 2))))
