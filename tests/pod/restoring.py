"""A training run saved by some processes on one mesh, gone on with by others on another:

    python -m tests.pod.restoring MESH FOLDER save|restore      process 0 writes FOLDER/saved or FOLDER/restored
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from qwen2_jax.checkpoint.step_folders import DamagedCheckpoint
from qwen2_jax.checkpoint.store import Store
from qwen2_jax.model.decoder import init_params
from qwen2_jax.optim.adamw import make_optimizer
from qwen2_jax.sharding import distributed
from qwen2_jax.sharding.mesh import make_mesh
from qwen2_jax.sharding.processes import check_same
from qwen2_jax.train.losses import NextTokenLoss
from qwen2_jax.train.resume import SaveState, restore_state, stored_state
from qwen2_jax.train.step import init_state
from tools.sameness import DENSE, OPTIM, whole


def run(spec: str, folder: Path, what: str) -> Any:
    """The state as it is stored, whole, the position beside it, and what is said once two bits of it have changed."""
    mesh = make_mesh(spec)
    seed = 0 if what == "save" else 1
    state = init_state(init_params(DENSE, jax.random.key(seed), mesh=mesh), make_optimizer(OPTIM), mesh,
                       NextTokenLoss(model=DENSE).param_specs(mesh))
    store, position = Store(folder / "run"), {"rows": 8}
    if what == "save":
        state = jax.tree.map(lambda x: x + 1, state)    # moments that are not zero, without compiling a step
        SaveState(store, DENSE, lambda step: position, every=1).after_step(1, state)
    else:
        state, position = restore_state(store, DENSE, state)
    refused = None if what == "save" else damaged(store, mesh, lambda: restore_state(store, DENSE, state))
    store.close()
    return whole(stored_state(state, DENSE)), position, refused


def damaged(store: Store, mesh: Mesh | None, restore: Callable[[], Any]) -> str:
    """What all processes say alike, although each of them reads one of the two files with a changed bit."""
    if jax.process_index() == 0:
        largest = sorted(Path(store.path).glob("1/**/d/*"), key=lambda file: file.stat().st_size)[-2:]
        for file in largest:
            data = bytearray(file.read_bytes())
            data[len(data) // 2] ^= 1
            file.write_bytes(data)
    try:
        restore()
    except DamagedCheckpoint as e:
        check_same("error", str(e), mesh)
        return str(e)
    return ""


if __name__ == "__main__":
    distributed.start()
    found = run(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
    if jax.process_index() == 0:
        (Path(sys.argv[2]) / f"{sys.argv[3]}d").write_bytes(pickle.dumps(found))
