"""Small checkpoints as users have them: random weights whose mistakes would show, a tokenizer, generation settings."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sysconfig
from functools import cache
from pathlib import Path

import numpy as np

from qwen2_jax.config import DualChunkConfig, ModelConfig, MoeConfig, RopeConfig, WindowConfig
from qwen2_jax.data.train_tokenizer import train_sentencepiece
from tests.oracle import random_model

VOCAB, TOKENS = 512, 500    # rows of the embedding, and how many of them the tokenizer knows
STOP_IDS = (3, 76, 111, 404)     # <|im_end|>, and some that random models say now and then

DENSE = ModelConfig(vocab=VOCAB, layers=2, d_model=96, d_ff=160, heads=4, kv_heads=2, head_dim=24, tied=False,
                    norm_eps=1e-6, rope=RopeConfig(theta=1e4), max_position=1024, dtype="float32")
CONFIGS = {
    "dense": DENSE,
    "moe": dataclasses.replace(DENSE, moe=MoeConfig(experts=8, top_k=2, d_expert=32, d_shared=48)),
    "window": dataclasses.replace(DENSE, window=WindowConfig(enabled=True, size=24, max_window_layers=1)),
    "yarn": dataclasses.replace(DENSE, max_position=512,
                                rope=RopeConfig(theta=1e4, kind="yarn", factor=4.0, original_max_position=128)),
    "chunks": dataclasses.replace(DENSE, dual_chunk=DualChunkConfig(chunk_size=64, local_size=16,
                                                                    original_max_position=1024)),
    "small vocabulary": dataclasses.replace(DENSE, vocab=300),
}


@cache
def model(kind: str):
    """The transformers model."""
    hf = random_model(CONFIGS[kind])
    hf.config.eos_token_id = hf.generation_config.eos_token_id = list(STOP_IDS)
    hf.config.pad_token_id = hf.generation_config.pad_token_id = 1
    return hf


def write_tokenizer(folder: Path) -> Path:
    root = Path(sysconfig.get_paths()["stdlib"])
    texts = [(root / name).read_text(encoding="utf-8") for name in ("bisect.py", "heapq.py", "colorsys.py")]
    return train_sentencepiece([*texts, "naïve café 北京 🤗 " * 20], TOKENS, folder)


def write_checkpoint(folder: Path, kind: str, tokenizer: Path | None) -> Path:
    """What `save_pretrained` writes for the random model of this kind, and the tokenizer's files."""
    model(kind).save_pretrained(folder)
    chunks = CONFIGS[kind].dual_chunk
    if chunks is not None:      # a field that transformers does not know
        config = json.loads((folder / "config.json").read_text())
        config["dual_chunk_attention_config"] = {
            "chunk_size": chunks.chunk_size, "local_size": chunks.local_size,
            "original_max_position_embeddings": chunks.original_max_position}
        (folder / "config.json").write_text(json.dumps(config))
    for file in () if tokenizer is None else tokenizer.iterdir():
        shutil.copy(file, folder)
    return folder


def random_prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(4, TOKENS, n).tolist() for n in lengths]
