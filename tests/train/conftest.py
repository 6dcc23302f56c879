"""Two tiny models and a ragged batch, small enough to train in a test."""

from __future__ import annotations

import numpy as np
import pytest

from qwen2_jax.config import ModelConfig, MoeConfig, RopeConfig
from qwen2_jax.data.packing import PackedDocuments

VOCAB = 61


def tiny(**changes) -> ModelConfig:
    base = dict(vocab=VOCAB, layers=2, d_model=16, d_ff=24, heads=4, kv_heads=2, head_dim=4, tied=True, norm_eps=1e-6,
                rope=RopeConfig(theta=1e4), max_position=64, init_std=0.3)
    return ModelConfig(**(base | changes))


MOE = MoeConfig(experts=5, top_k=2, d_expert=8, d_shared=8, aux_loss_coef=0.5)


@pytest.fixture(params=["dense", "moe"])
def cfg(request) -> ModelConfig:
    # A large coefficient, so that an auxiliary loss that depends on the split of the batch is seen.
    return tiny(moe=MOE if request.param == "moe" else None)


@pytest.fixture
def dense() -> ModelConfig:
    return tiny()


@pytest.fixture
def documents() -> list[np.ndarray]:
    """Of unequal lengths, so that rows, devices and micro-batches hold different numbers of targets."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, VOCAB, n) for n in (40, 3, 17, 9, 16, 2, 30, 5, 5, 26, 12, 7)]


@pytest.fixture
def packed(documents) -> PackedDocuments:
    return PackedDocuments(documents, 16)
