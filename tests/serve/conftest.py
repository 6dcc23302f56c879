"""Checkpoints and loaded models, made once."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch

import qwen2_jax
from qwen2_jax.serve.lm import LM
from tests.serve.models import write_checkpoint, write_tokenizer


@pytest.fixture(scope="session", autouse=True)
def one_torch_thread():
    """Torch's threads wait for each other: on models this small that takes longer than the work."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, tokenizer_folder):
    """`checkpoint("moe")` → its folder."""

    @functools.cache
    def make(kind: str) -> Path:
        return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), kind, tokenizer_folder)

    return make


@pytest.fixture(scope="session")
def load(checkpoint):
    """`load("moe", dtype="bfloat16")` → an LM, the same one for the same arguments, so that it compiles once."""

    @functools.cache
    def loaded(kind: str = "dense", **options) -> LM:
        return qwen2_jax.load(checkpoint(kind), **options)

    return loaded
