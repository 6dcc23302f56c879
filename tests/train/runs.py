"""A training run small enough for tests: text, experiment, command line."""

from __future__ import annotations

import json
import random
from pathlib import Path

from qwen2_jax.config import ModelConfig, RopeConfig
from qwen2_jax.optim.adamw import AdamWConfig
from qwen2_jax.train.experiment import CheckpointConfig, DataConfig, EvaluationConfig, Experiment

VOCAB = 320


def write_text(path: Path, documents: int = 60) -> Path:
    chance = random.Random(0)
    words = ["".join(chance.choices("abcdefgh", k=chance.randint(2, 6))) for _ in range(80)]
    with path.open("w") as file:
        for _ in range(documents):
            file.write(json.dumps({"text": " ".join(chance.choices(words, k=chance.randint(5, 40)))}) + "\n")
    return path


def tiny_experiment(text: Path, **changes) -> Experiment:
    model = ModelConfig(vocab=VOCAB, layers=1, d_model=16, d_ff=24, heads=2, kv_heads=1, head_dim=8, tied=True,
                        norm_eps=1e-6, rope=RopeConfig(theta=1e4), max_position=64, init_std=0.1, eos_ids=(1, 3),
                        pad_id=1, dtype="float32")
    given = dict(model=model, data=DataConfig(path=str(text), row_length=32, batch_size=4, held_out=0.1),
                 optimizer=AdamWConfig(peak=1e-2, warmup=2), steps=6, remat="none",
                 checkpoint=CheckpointConfig(every=2), evaluation=EvaluationConfig(every=3, documents=4))
    return Experiment(**(given | changes))
