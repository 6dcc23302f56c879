"""One measurement of tools/bench_transformers.py: `bench_worker.py ours|transformers ROW DTYPE` prints a JSON line."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import numpy as np

LAYERS, D, F, HEADS, KV_HEADS, HEAD, VOCAB = 24, 896, 4864, 14, 2, 64, 151936
PROMPT, NEW, PREFILL, BATCH, TOKENS = 32, 32, 512, 8, 256
MATRICES = ((HEADS * HEAD, D), (KV_HEADS * HEAD, D), (KV_HEADS * HEAD, D), (D, HEADS * HEAD), (F, D), (F, D), (D, F))
"""[out, in] of one layer's matrices."""
ROWS = {"decode_b1": 1, "decode_b8": 8, "prefill": PREFILL, "train": BATCH * TOKENS}
HEAD_ROWS = {"decode_b1": 1, "decode_b8": 8, "prefill": 1, "train": BATCH * TOKENS}
CALLS = {"decode_b1": 3, "decode_b8": 3, "prefill": 3, "train": 1}


def uniform(shape: tuple[int, ...], scale: float = 0.035) -> np.ndarray:
    """Random weights of standard deviation 0.02, float32."""
    return np.random.default_rng(sum(shape)).random(shape, np.float32) * (2 * scale) - scale


def seconds(call: Callable[[], object], calls: int) -> float:
    """Median seconds of a call, after one to warm up."""
    call()
    times = []
    for _ in range(calls):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def prompts(row: str) -> list[list[int]]:
    count, length = {"decode_b1": (1, PROMPT), "decode_b8": (8, PROMPT), "prefill": (1, PREFILL)}[row]
    return np.random.default_rng(1).integers(0, 150_000, (count, length)).tolist()


def generation_seconds(generate: Callable[[int], object], row: str) -> dict[str, float]:
    """Seconds of prefill with one token; of decoding, from runs that differ in their number of tokens alone."""
    first = seconds(lambda: generate(1), CALLS[row])
    if row == "prefill":
        return {"seconds": first, "tokens": PREFILL}
    whole = seconds(lambda: generate(NEW + 1), CALLS[row])
    return {"seconds": whole - first, "tokens": NEW * ROWS[row], "steps": NEW}


def ours(row: str, dtype: str) -> dict[str, float]:
    import jax
    import jax.numpy as jnp

    from qwen2_jax.cli.compilation_cache import enable_compilation_cache
    from qwen2_jax.model.decoder import abstract_params
    from qwen2_jax.presets import PRESETS
    from qwen2_jax.serve.lm import LM

    enable_compilation_cache()
    cfg = PRESETS["Qwen2-0.5B"]
    stored = jnp.float32 if row == "train" else jnp.dtype(dtype)
    params = jax.tree_util.tree_map_with_path(
        lambda path, a: jnp.asarray(uniform(a.shape) + (path[-1].key == "scale"), stored),
        abstract_params(cfg, stacked=False))
    weight_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    if row == "train":
        out = {"seconds": our_training(params, cfg, dtype), "tokens": BATCH * TOKENS}
    else:
        lm = LM(params, cfg, dtype=stored, stacked=False)
        ids = prompts(row)
        out = generation_seconds(lambda new: lm.generate(ids, max_new_tokens=new, temperature=0), row)
        del lm
    del params
    return out | {"weight_bytes": weight_bytes, "matmul_seconds": our_matmuls(row, jnp.dtype(dtype))}


def our_training(params: dict, cfg, dtype: str) -> float:
    import jax
    import jax.numpy as jnp

    from qwen2_jax.data.packing import PackedBatch
    from qwen2_jax.optim.adamw import AdamWConfig, make_optimizer, schedule
    from qwen2_jax.train.losses import NextTokenLoss
    from qwen2_jax.train.step import init_state, make_step

    optim = AdamWConfig(peak=1e-5, steps=100, schedule="constant")
    step = make_step(NextTokenLoss(model=cfg, dtype=dtype, stacked=False), make_optimizer(optim), schedule(optim))
    state = init_state(params, make_optimizer(optim))
    ids = np.random.default_rng(1).integers(0, 150_000, (BATCH, TOKENS + 1)).astype(np.int32)
    ones = np.ones((BATCH, TOKENS), np.int32)
    positions = np.broadcast_to(np.arange(TOKENS, dtype=np.int32), (BATCH, TOKENS))
    batch = jax.tree.map(jnp.asarray, PackedBatch(ids[:, :-1], ids[:, 1:], ones, positions, ones.astype(np.float32)))

    def call():
        nonlocal state
        state, metrics = step(state, batch)
        return float(metrics["loss"])

    return seconds(call, CALLS["train"])


def our_matmuls(row: str, dtype) -> float:
    import jax
    import jax.numpy as jnp

    from qwen2_jax.ops.dot import linear, matmul

    weights = [[jnp.asarray(uniform(shape), dtype) for shape in MATRICES] for _ in range(LAYERS)]
    head = jnp.asarray(uniform((VOCAB, D)), dtype)
    x = {n: jnp.asarray(uniform((ROWS[row], n), 1.0), dtype) for n in (D, F)}
    x_head = x[D][:HEAD_ROWS[row]]

    def forward(weights, head, x, x_head):
        products = [linear(x[w.shape[1]], w) for layer in weights for w in layer]
        return sum(jnp.sum(p[:1, :1].astype(jnp.float32)) for p in products) + jnp.sum(matmul(x_head, head)[:1, :1])

    if row == "train":
        def squared(weights, head, x, x_head):
            products = [linear(x[w.shape[1]], w) for layer in weights for w in layer]
            total = sum(jnp.sum(jnp.square(p.astype(jnp.float32))) for p in products)
            return total + jnp.sum(jnp.square(matmul(x_head, head)))

        call = jax.jit(jax.grad(squared, argnums=(0, 1, 2, 3)))
    else:
        call = jax.jit(forward)
    return seconds(lambda: jax.block_until_ready(call(weights, head, x, x_head)), CALLS[row])


def theirs(row: str, dtype: str) -> dict[str, float]:
    import torch
    import transformers

    torch.set_grad_enabled(row == "train")
    config = transformers.Qwen2Config(
        vocab_size=VOCAB, hidden_size=D, intermediate_size=F, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, tie_word_embeddings=True, bos_token_id=None, eos_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    torch.set_default_dtype(torch.float32 if row == "train" else getattr(torch, dtype))
    model = transformers.Qwen2ForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.from_numpy(uniform(tuple(p.shape))) + (1 if "norm" in name else 0))
    if row == "train":
        out = {"seconds": their_training(model, dtype), "tokens": BATCH * TOKENS}
    else:
        ids = torch.tensor(prompts(row))
        out = generation_seconds(partial(their_generation, model.eval(), ids), row)
    del model
    return out | {"matmul_seconds": their_matmuls(row, getattr(torch, dtype)), "bandwidth": read_bandwidth()}


def their_generation(model, ids, new: int):
    return model.generate(ids, attention_mask=ids.new_ones(ids.shape), max_new_tokens=new, min_new_tokens=new,
                          do_sample=False, pad_token_id=0)


def their_training(model, dtype: str) -> float:
    import torch

    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.1)
    ids = torch.from_numpy(np.random.default_rng(1).integers(0, 150_000, (BATCH, TOKENS)))

    def call():
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return seconds(call, CALLS["train"])


def their_matmuls(row: str, dtype) -> float:
    import torch

    train = row == "train"

    def tensor(shape: tuple[int, ...], scale: float = 0.035):
        return torch.from_numpy(uniform(shape, scale)).to(dtype).requires_grad_(train)

    weights = [[tensor(shape) for shape in MATRICES] for _ in range(LAYERS)]
    head = tensor((VOCAB, D))
    x = {n: tensor((ROWS[row], n), 1.0) for n in (D, F)}
    x_head = x[D][:HEAD_ROWS[row]]

    def call():
        outputs = [torch.nn.functional.linear(x[w.shape[1]], w) for layer in weights for w in layer]
        outputs.append(torch.nn.functional.linear(x_head, head))
        if train:
            torch.autograd.backward(outputs, outputs)

    return seconds(call, CALLS[row])


def read_bandwidth() -> float:
    """Bytes a second that all threads read from memory together: the best of five sums over 1.6 GB."""
    import torch

    data = torch.ones(400_000_000)
    times = []
    for _ in range(6):
        began = time.perf_counter()
        data.sum()
        times.append(time.perf_counter() - began)
    return data.nbytes / min(times[1:])


if __name__ == "__main__":
    print(json.dumps({"ours": ours, "transformers": theirs}[sys.argv[1]](sys.argv[2], sys.argv[3])))
