"""One step by Orbax: how it is laid out, written and read.

An entry of the state is an Orbax checkpoint in a folder of its name; `about` is JSON beside them.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from qwen2_jax.checkpoint import fault
from qwen2_jax.checkpoint.pieces import PART_BYTES
from qwen2_jax.errors import UserError

if TYPE_CHECKING:
    from qwen2_jax.checkpoint.digests import AnyPath

ABOUT = "about"
_BEFORE_DIGESTS = "position"
"""The entry that versions without digests had in the place of `about`."""


def _told_by_us(record: logging.LogRecord) -> bool:
    """Drops the tracebacks that Orbax's threads log when a save fails: `Store` raises the error, in a sentence."""
    trace = record.exc_info[2] if record.exc_info else None
    return trace is None or "orbax" not in Path(trace.tb_frame.f_code.co_filename).parts


logging.getLogger("absl").addFilter(_told_by_us)


def checkpointer(path: AnyPath) -> ocp.AsyncCheckpointer:
    """Orbax's, with the points of `fault` where they are, if the environment names one."""
    handler, temporary = ocp.CompositeCheckpointHandler(), None
    if fault.armed():
        finalize = handler.finalize

        def finalize_or_die(directory: epath.Path) -> None:
            fault.reach("mid_write")
            finalize(directory)

        handler.finalize = finalize_or_die      # a subclass would be unknown to Orbax's registry
        base: Any = ocp.path.atomicity_defaults.get_default_temporary_path_class(epath.Path(path))

        class Dying(base):
            async def create(self):
                made = await super().create()
                fault.reach("after_temporary_folder")
                return made

            async def finalize(self):
                fault.reach("before_rename")
                await super().finalize()
                fault.reach("after_rename")

        temporary = Dying
    return ocp.AsyncCheckpointer(handler, temporary_path_class=temporary)


def save_args(state: Mapping[str, Any], about: Mapping[str, Any]) -> ocp.args.Composite:
    """What Orbax is to write of entries of arrays, and of JSON."""
    items = {name: ocp.args.StandardSave(tree, save_args=jax.tree.map(_chunks, tree)) for name, tree in state.items()}
    return ocp.args.Composite(**items, **{ABOUT: ocp.args.JsonSave(dict(about))})


def read(reader: ocp.Checkpointer, folder: AnyPath, like: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The entries in `like`, as they are there, and what was said about them.

    Raises UserError when one is missing or has other names or shapes, Orbax's errors when files are damaged.
    """
    about = next((entry for entry in (ABOUT, _BEFORE_DIGESTS) if (folder / entry).is_dir()), ABOUT)
    for name, tree in like.items():
        _check_shapes(folder, name, tree)
    items = {name: ocp.args.StandardRestore(tree) for name, tree in like.items()}
    found = reader.restore(folder, args=ocp.args.Composite(**items, **{about: ocp.args.JsonRestore()}))
    return {name: found[name] for name in like}, found[about]


def wait_for_writers(seconds: float) -> None:
    """Returns when Orbax's threads have ended, or after so long for each: the first error ends its waiting for them,
    not their writing."""
    for thread in threading.enumerate():
        if type(thread).__module__.startswith("orbax."):
            thread.join(seconds)


def _check_shapes(folder: AnyPath, name: str, like: Any) -> None:
    """Raises UserError unless entry `name` of a step has the names and shapes of `like`; a dtype may be cast."""
    if not (folder / name).is_dir():
        raise UserError(f"{folder} holds no {name}")
    saved = _shapes(ocp.StandardCheckpointHandler().metadata(epath.Path(folder / name)).tree)
    wanted = _shapes(like)
    for path in sorted(saved.keys() | wanted.keys()):
        if saved.get(path) != wanted.get(path):
            found, needed = (f"has shape {list(s[path])}" if path in s else "has none" for s in (saved, wanted))
            raise UserError(f"{folder / name} does not fit at {path}: the checkpoint {found}, this program {needed}")


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {path: tuple(leaf.shape) for path, leaf in ocp.tree.to_flat_dict(tree, sep="/").items()}


def _chunks(leaf: Any) -> ocp.SaveArgs:
    """One layer and one expert a chunk, at most PART_BYTES: a conversion reads a stack slice by slice, and a device of
    another mesh its own part and little more. OCDBT packs them into few files."""
    if math.prod(np.shape(leaf)) == 0:
        return ocp.SaveArgs()
    return ocp.SaveArgs(chunk_byte_size=PART_BYTES, shard_axes=tuple(range(max(0, np.ndim(leaf) - 2))))
