"""What each process of a program notes of generation and scoring on a mesh over all of them:

    python -m tests.pod.serving MESH FILE       writes FILE.0, FILE.1, …
"""

from __future__ import annotations

import os
import pickle
import sys
import time
from pathlib import Path
from typing import Any

import jax

from qwen2_jax.errors import UserError
from qwen2_jax.model.decoder import init_params
from qwen2_jax.serve import engine, score
from qwen2_jax.serve.lm import LM
from qwen2_jax.sharding import distributed
from qwen2_jax.sharding.mesh import make_mesh
from tools.sameness import DENSE, batch

NEW = 12
PROMPTS = [batch().ids_BT[0, :n].tolist() for n in (3, 32, 17, 9, 24)]


def heard(spec: str | None) -> dict[str, Any]:
    """Everything a caller may ask for; what a single process answers is what each of several must."""
    mesh = make_mesh(spec)
    lm = LM(init_params(DENSE, jax.random.key(0), mesh=mesh, stacked=False), DENSE, mesh=mesh, stacked=False)
    texts = {name: [(g.token_ids, g.logprobs) for g in lm.generate(PROMPTS, max_new_tokens=NEW, **settings)]
             for name, settings in (("greedy", dict(temperature=0)), ("sampled", dict(temperature=1.0, seed=3, n=2)),
                                    ("fresh", dict(temperature=1.0)))}
    lengths = [1] * len(PROMPTS)
    return texts | {"logits": lm.logits(PROMPTS),
                    "likelihoods": score.loglikelihoods(lm._programs, PROMPTS, lengths, [False] * len(PROMPTS), None),
                    "refused": refused(lm)}


def refused(lm: LM) -> str:
    """What is said when the processes ask for different things."""
    try:
        lm.generate([[1, 2, 3 + jax.process_index()]], max_new_tokens=1, temperature=0)
    except UserError as e:
        return str(e)
    return ""


def slow_clock() -> None:
    """A process with a clock of its own: it would look after every token, where the others draw as many as they may."""
    honest = time.perf_counter
    engine.time = type("Clock", (), {"perf_counter": staticmethod(lambda: 100 * honest())})    # pyright: ignore


if __name__ == "__main__":
    distributed.start()
    if os.environ[distributed.PROCESS] == "1":
        slow_clock()
    Path(f"{sys.argv[2]}.{jax.process_index()}").write_bytes(pickle.dumps(heard(sys.argv[1])))
