"""What the processes of one program must have in common while they all run the same host code on a mesh over all of
them: the same arrays going in, the same ones coming out, the same decisions.

With a mesh of one process's devices, or none, each function does only what it does for a single process.
"""

from __future__ import annotations

import functools
import hashlib
import pickle
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from qwen2_jax.errors import UserError
from qwen2_jax.sharding.axes import Axes
from qwen2_jax.sharding.mesh import REPLICATED, per_device, place, shardings


def spans_processes(mesh: Mesh | None) -> bool:
    """Whether some of the mesh's devices belong to another process."""
    return mesh is not None and mesh.is_multi_process


def put(tree: Any, mesh: Mesh | None, spec: Any) -> Any:
    """`mesh.place` for host arrays that are known to be the same in all processes: nothing is compared, each process
    gives its devices their pieces."""
    if mesh is None or not spans_processes(mesh):
        return place(tree, mesh, spec)

    def pieces(sharding: Any, part: Any) -> Any:
        return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]), part)

    return jax.tree.map(pieces, shardings(spec, mesh), tree)


def fetch(tree: Any, mesh: Mesh | None, spec: P) -> Any:
    """Whole arrays as numpy, in every process, of arrays that lie on the mesh under `spec`."""
    if mesh is not None and spans_processes(mesh):
        tree = _gather(mesh, spec)(tree)
    return jax.device_get(tree)


@functools.lru_cache(maxsize=32)
def _gather(mesh: Mesh, spec: P):
    def whole(x, ax: Axes):
        for dim, names in enumerate(spec):
            x = ax.gather_same(x, (names,) if isinstance(names, str) else names or (), dim)
        return x

    def gather(tree, *, ax: Axes):
        return jax.tree.map(functools.partial(whole, ax=ax), tree)

    return jax.jit(per_device(gather, mesh, (spec,), REPLICATED))


def agreed(values: Sequence[int], mesh: Mesh | None) -> list[int]:
    """Process 0's values, whole numbers from 0 to 2**32 - 1, in all processes."""
    if not values or not spans_processes(mesh):
        return list(values)
    return np.asarray(multihost_utils.broadcast_one_to_all(np.asarray(values, np.uint32))).tolist()


def check_same(what: str, value: Any, mesh: Mesh | None) -> None:
    """Raises UserError, in all processes, when they do not hold equal values (of plain data that pickles alike)."""
    if not spans_processes(mesh):
        return
    digest = np.frombuffer(hashlib.sha256(pickle.dumps(value)).digest(), np.uint8)
    digests = np.asarray(multihost_utils.process_allgather(digest))
    if others := [n for n, row in enumerate(digests) if (row != digests[0]).any()]:
        raise UserError(f"processes {', '.join(map(str, others))} were given other {what} than process 0: all must run "
                        "the same program on the same input")
