"""A training run saved by some processes on one mesh, gone on with by others on another:

    python -m tests.pod.restoring MESH FOLDER save|restore      process 0 writes FOLDER/saved or FOLDER/restored
"""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

import jax

from qwen2_jax.checkpoint.store import Store
from qwen2_jax.model.decoder import init_params
from qwen2_jax.optim.adamw import make_optimizer
from qwen2_jax.sharding import distributed
from qwen2_jax.sharding.mesh import make_mesh
from qwen2_jax.train.losses import NextTokenLoss
from qwen2_jax.train.resume import SaveState, restore_state, stored_state
from qwen2_jax.train.step import init_state
from tools.sameness import DENSE, OPTIM, whole


def run(spec: str, folder: Path, what: str) -> Any:
    """The state as it is stored, whole, and the position beside it."""
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
    store.close()
    return whole(stored_state(state, DENSE)), position


if __name__ == "__main__":
    distributed.start()
    found = run(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
    if jax.process_index() == 0:
        (Path(sys.argv[2]) / f"{sys.argv[3]}d").write_bytes(pickle.dumps(found))
