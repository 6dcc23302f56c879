"""Running the step that was planned, on the devices that are here, with random weights."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from qwen2_jax.data.packing import PackedBatch
from qwen2_jax.model.cache import cache_slots
from qwen2_jax.model.decoder import init_params, param_specs
from qwen2_jax.ops.quant import quantize
from qwen2_jax.optim.adamw import AdamWConfig, make_optimizer, schedule
from qwen2_jax.plan.program import Task, check, chunk_width
from qwen2_jax.serve.programs import DECODE_CHUNK, Programs
from qwen2_jax.sharding.mesh import BATCH_SPEC, TOKENS_SPEC, place, shardings
from qwen2_jax.train.losses import NextTokenLoss
from qwen2_jax.train.step import init_state, make_step


def measure(task: Task, mesh: Mesh, runs: int) -> list[float]:
    """Seconds of each of `runs` steps, after one that compiles. Raises UserError where task and mesh do not fit."""
    check(task, mesh)
    step = {"train": _training, "prefill": _prefill, "decode": _decode}[task.mode](task, mesh)
    step()
    seconds = []
    for _ in range(runs):
        began = time.perf_counter()
        tokens = step()
        seconds.append((time.perf_counter() - began) / tokens)
    return seconds


def _training(task: Task, mesh: Mesh) -> Callable[[], int]:
    loss = NextTokenLoss(model=task.cfg, dtype=task.dtype, remat=task.remat)
    settings = AdamWConfig(peak=1e-5, steps=1_000_000)
    optimizer = make_optimizer(settings)
    specs = loss.param_specs(mesh)
    params = init_params(task.cfg, jax.random.key(0), mesh=mesh, specs=specs)
    state = init_state(params, optimizer, mesh, specs)
    ids = np.random.default_rng(0).integers(0, task.cfg.vocab, (task.batch, task.seq)).astype(np.int32)
    places = np.broadcast_to(np.arange(task.seq, dtype=np.int32), ids.shape)
    rows = PackedBatch(ids, ids, np.ones_like(ids), places, np.ones(ids.shape, np.float32))
    batch: Any = place(rows, mesh, TOKENS_SPEC)
    step = make_step(loss, optimizer, schedule(settings), mesh=mesh)
    held = [state]

    def once() -> int:
        held[0], metrics = step(held[0], batch)
        jax.block_until_ready(metrics)
        return 1

    return once


def _programs(task: Task, mesh: Mesh) -> Programs:
    dtype = jnp.dtype(task.dtype)
    where = shardings(param_specs(task.cfg, mesh, quant=task.quant), mesh)

    def make():
        params = init_params(task.cfg, jax.random.key(0))
        return quantize(params) if task.quant else jax.tree.map(lambda p: p.astype(dtype), params)

    params = jax.jit(make, out_shardings=where)()
    return Programs(params, task.cfg, dtype=dtype, stacked=True, mesh=mesh, notify=lambda what, seconds: None)


def _decode(task: Task, mesh: Mesh) -> Callable[[], int]:
    programs, slots = _programs(task, mesh), cache_slots(task.seq)
    tokens = min(DECODE_CHUNK, slots)
    state = programs.new_state(task.batch, slots)
    full, budget = (place(np.full(task.batch, n, np.int32), mesh, BATCH_SPEC) for n in (slots - tokens, tokens + 1))
    held = [state]

    def once() -> int:
        # Fresh lengths each time, so that every call reads the end of a full cache.
        begun = held[0]._replace(length_R=jnp.copy(full), budget_R=jnp.copy(budget))
        held[0], drawn = programs.decode(begun, (), tokens)
        jax.block_until_ready(drawn)
        return tokens

    return once


def _prefill(task: Task, mesh: Mesh) -> Callable[[], int]:
    programs, width = _programs(task, mesh), chunk_width(task.seq)
    n = programs.devices
    ids, row, flags = (place(x, mesh, BATCH_SPEC) for x in (
        np.zeros((n, width), np.int32), np.full(n, width, np.int32), np.ones(n, bool)))
    starts = [place(np.full(n, at, np.int32), mesh, BATCH_SPEC) for at in range(0, task.seq, width)]
    held = [programs.new_prompt(cache_slots(task.seq))]

    def once() -> int:
        for _ in range(task.batch // n):
            for start in starts:
                held[0] = programs.prefill(held[0], ids, start, row, ~flags, flags)
        jax.block_until_ready(held[0])
        return 1

    return once
