"""One measurement of tools/bench_gpu.py: `bench_gpu_worker.py ours|transformers ROW` prints a JSON line."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable

import numpy as np

from tools.bench_gpu import ROWS, Row, config
from tools.bench_worker import seconds

STEPS = 5
"""Training steps timed, after two to warm up: the first compiles."""


def token_ids(row: Row) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 150_000, (row.batch, row.tokens + 1)).astype(np.int32)


def ours(row: Row) -> dict[str, float]:
    import jax

    device = jax.devices()[0]
    if device.platform != "gpu":
        raise SystemExit(f"JAX sees no GPU: its devices are {device.device_kind}s; install the extra `cuda`")
    out = our_training(row) if row.kind == "train" else our_decoding(row)
    stats = device.memory_stats() or {}
    return out | {"peak_memory_gib": round(stats.get("peak_bytes_in_use", 0) / 2**30, 2)}


def our_training(row: Row) -> dict[str, float]:
    import jax
    import jax.numpy as jnp

    from qwen2_jax.data.packing import PackedBatch
    from qwen2_jax.model.decoder import init_params
    from qwen2_jax.optim.adamw import AdamWConfig, make_optimizer, schedule
    from qwen2_jax.train.losses import NextTokenLoss
    from qwen2_jax.train.step import init_state, make_step

    optim = AdamWConfig(peak=1e-5, steps=100, schedule="constant")
    loss = NextTokenLoss(model=config(row), dtype="bfloat16", remat="full" if row.recompute else "none")
    step = make_step(loss, make_optimizer(optim), schedule(optim))
    state = init_state(init_params(loss.model, jax.random.key(0)), make_optimizer(optim))
    ids, shape = token_ids(row), (row.batch, row.tokens)
    positions = np.broadcast_to(np.arange(row.tokens, dtype=np.int32), shape)
    batch = jax.tree.map(jnp.asarray, PackedBatch(ids[:, :-1], ids[:, 1:], np.ones(shape, np.int32), positions,
                                                  np.ones(shape, np.float32)))

    def call():
        nonlocal state
        state, metrics = step(state, batch)
        return float(metrics["loss"])

    call()
    return {"seconds": seconds(call, STEPS)}


def our_decoding(row: Row) -> dict[str, float]:
    import jax
    import jax.numpy as jnp

    from qwen2_jax.model.decoder import init_params
    from qwen2_jax.serve.lm import LM

    cfg = config(row)
    params = jax.jit(lambda key: jax.tree.map(lambda a: a.astype(jnp.bfloat16), init_params(cfg, key)))(
        jax.random.key(0))
    lm = LM(params, cfg, dtype=jnp.bfloat16, stacked=True)
    prompts = token_ids(row)[:, :-1].tolist()

    def generate(new: int):
        if any(len(g.token_ids) < new for g in lm.generate(prompts, max_new_tokens=new, temperature=0)):
            raise SystemExit("a random model drew a stop token: the numbers of tokens differ")

    return decoding(row, generate, sum(leaf.nbytes for leaf in jax.tree.leaves(params)))


def decoding(row: Row, generate: Callable[[int], object], weight_bytes: int) -> dict[str, float]:
    """Seconds a step, from runs that differ in their number of tokens alone."""
    first, whole = (seconds(lambda n=new: generate(n), 3) for new in (1, row.new + 1))
    return {"seconds": (whole - first) / row.new, "weight_bytes": weight_bytes}


def theirs(row: Row) -> dict[str, float]:
    import torch
    import transformers

    if not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU: install torch for CUDA")
    torch.set_float32_matmul_precision("high")
    cfg = config(row)
    hf = transformers.Qwen2Config(
        vocab_size=cfg.vocab, hidden_size=cfg.d_model, intermediate_size=cfg.d_ff, num_hidden_layers=cfg.layers,
        num_attention_heads=cfg.heads, num_key_value_heads=cfg.kv_heads, tie_word_embeddings=cfg.tied,
        max_position_embeddings=cfg.max_position, bos_token_id=None, eos_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": cfg.rope.theta})
    torch.set_default_dtype(torch.float32 if row.kind == "train" else torch.bfloat16)
    with torch.device("cuda"):
        model = transformers.AutoModelForCausalLM.from_config(hf, attn_implementation="sdpa")
    torch.set_default_dtype(torch.float32)
    out = their_training(model, row) if row.kind == "train" else their_decoding(model.eval(), row)
    return out | {"peak_memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2)}


def their_training(model, row: Row) -> dict[str, float]:
    import torch

    model.train()
    if row.recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in model.model.layers:    # one layer's code is compiled once for all, in seconds instead of minutes
        layer.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    ids = torch.from_numpy(token_ids(row)[:, :-1]).long().cuda()

    def call():
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    call()
    return {"seconds": seconds(call, STEPS)}


def their_decoding(model, row: Row) -> dict[str, float]:
    import torch

    ids = torch.from_numpy(token_ids(row)[:, :-1]).long().cuda()

    def generate(new: int):
        # With a static cache `generate` compiles the decoding step itself, by torch.compile (mode reduce-overhead).
        with torch.inference_mode():
            model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new,
                           do_sample=False, pad_token_id=0, cache_implementation="static")
        torch.cuda.synchronize()

    return decoding(row, generate, sum(p.nbytes for p in model.parameters()))


def main() -> None:
    # A benchmark's processes come one after the other: none needs most of the card from its start.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    print(json.dumps({"ours": ours, "transformers": theirs}[sys.argv[1]](ROWS[sys.argv[2]])))


if __name__ == "__main__":
    main()
