"""The real programs, lowered for devices that need not be here: training, a chunk of prefill, a token of decoding.

State and arguments are shapes alone. A single device is a mesh of one, so that kernels are chosen for it and not for
the machine that compiles.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from qwen2_jax.config import ModelConfig, Remat
from qwen2_jax.data.packing import PackedBatch
from qwen2_jax.errors import UserError
from qwen2_jax.model.cache import cache_slots
from qwen2_jax.model.decoder import abstract_params, param_specs
from qwen2_jax.ops.attention import key_block
from qwen2_jax.ops.grouped_matmul import TILE_ROWS
from qwen2_jax.optim.adamw import AdamWConfig, make_optimizer, schedule
from qwen2_jax.plan.compiled import Buffer
from qwen2_jax.plan.flops import Mode
from qwen2_jax.plan.hlo import Instruction
from qwen2_jax.serve.programs import Programs, PromptState, SlotState
from qwen2_jax.serve.scheduler import prefill_chunks
from qwen2_jax.sharding.axes import BATCH, CONTEXT, EXPERT, Axes
from qwen2_jax.sharding.mesh import BATCH_SPEC, REPLICATED, TOKENS_SPEC, make_mesh, shardings
from qwen2_jax.train.losses import NextTokenLoss
from qwen2_jax.train.step import TrainState, make_step

ONE_DEVICE = "data=1"
_KEYS = jax.dtypes.prng_key


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is to be planned. `batch` rows on all devices together; `seq` tokens a row, in decoding those in the cache.

    `dtype` is what is computed in, and what serving holds its weights in; training holds float32. `remat` is
    training's, `quant` serving's.
    """

    cfg: ModelConfig
    mode: Mode
    seq: int
    batch: int
    dtype: str = "bfloat16"
    remat: Remat = "full"
    quant: Any = None


@dataclass(frozen=True)
class Lowered:
    """A program before its compilation, and what its text will not tell."""

    lower: Callable[[], Any]
    repeats: int
    """Runs of the program that make the step: chunks of prompts, in prefill."""
    loops: dict[str, float]
    """Pattern of scopes → turns of loops there whose bound is computed while they run; the first that matches holds."""
    arguments: list[Buffer]
    """What a device is handed, the largest first, without the padding of layouts."""

    @functools.cached_property
    def lowered(self) -> jax.stages.Lowered:
        """Traced when first asked for: for tens of thousands of rows that takes minutes, and the arguments may settle
        before that nothing of this size will run."""
        return self.lower()

    def assumed(self, loop: Instruction) -> float | None:
        return next((turns for pattern, turns in self.loops.items() if re.search(pattern, loop.scope)), None)


def mesh_of(spec: str, devices: Sequence[Any]) -> Mesh:
    """The mesh that `--mesh` names, on devices to compile for; the first of them where it is smaller."""
    mesh = make_mesh(spec or ONE_DEVICE, devices)
    assert mesh is not None     # None is for no text at all
    return mesh


def check(task: Task, mesh: Mesh) -> None:
    """Raises UserError with the numbers: rows, tokens or positions that do not fit mesh or model."""
    ax = Axes.of(mesh)
    rows, context = ax.size(BATCH), ax.size(CONTEXT)
    if task.batch % rows:
        raise UserError(f"--batch {task.batch} rows cannot be split over {rows} devices along data, fsdp and expert; "
                        f"take a multiple of {rows}, or another --mesh")
    if task.mode == "train" and task.seq % context:
        raise UserError(f"--seq {task.seq} tokens cannot be split over context={context}")
    if task.seq > task.cfg.longest_context:
        raise UserError(f"--seq {task.seq} is beyond the model's context of {task.cfg.longest_context} tokens")
    if task.cfg.head != "lm" and task.mode != "train":
        raise UserError(f"the model has the head '{task.cfg.head}': it scores text and cannot write it")


def lower(task: Task, mesh: Mesh) -> Lowered:
    """The program of a task on a mesh. Raises UserError where they do not fit each other."""
    check(task, mesh)
    return {"train": _train, "prefill": _prefill, "decode": _decode}[task.mode](task, mesh)


def _train(task: Task, mesh: Mesh) -> Lowered:
    loss = NextTokenLoss(model=task.cfg, dtype=task.dtype, remat=task.remat)
    settings = AdamWConfig(peak=1e-5, steps=100)        # numbers that change nothing but numbers
    optimizer = make_optimizer(settings)
    whole = shardings(REPLICATED, mesh)
    params = _placed(abstract_params(task.cfg), shardings(loss.param_specs(mesh), mesh))
    moments = optax.tree.map_params(optimizer, lambda leaf, p: _like(leaf, p.sharding),
                                    jax.eval_shape(optimizer.init, params), params,
                                    transform_non_params=lambda leaf: _like(leaf, whole))
    ids, weights = (jax.ShapeDtypeStruct((task.batch, task.seq), dtype, sharding=shardings(TOKENS_SPEC, mesh))
                    for dtype in (jnp.int32, jnp.float32))
    count: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    state = TrainState(params, moments, count)
    step = make_step(loss, optimizer, schedule(settings), mesh=mesh)
    batch: Any = PackedBatch(ids, ids, ids, ids, weights)       # pyright: ignore[reportArgumentType]
    return Lowered(lambda: step.lower(state, batch), 1, _experts(task, mesh, task.batch * task.seq),
                   _buffers((state, batch)))


class _Lowering(Programs):
    """Serving's programs, which hand back what they would have compiled, from states that are shapes."""

    def _make(self, key, build, spec):
        made = jax.eval_shape(build)
        assert self.mesh is not None
        return jax.tree.map(_like, made, _spread(made, shardings(spec, self.mesh)))

    def _run(self, name, fn, in_specs, out_specs, donate, *args):
        return self._lower(fn, in_specs, out_specs, donate, *args)


def _programs(task: Task, mesh: Mesh) -> _Lowering:
    dtype = jnp.dtype(task.dtype)
    where = shardings(param_specs(task.cfg, mesh, quant=task.quant), mesh)
    params = _placed(abstract_params(task.cfg, quant=task.quant), where)

    def held(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding)

    if task.quant is None:
        params = jax.tree.map(held, params)
    return _Lowering(params, task.cfg, dtype=dtype, stacked=True, mesh=mesh, notify=lambda what, seconds: None)


def _decode(task: Task, mesh: Mesh) -> Lowered:
    """One turn of the loop that draws tokens: every row has a full cache."""
    programs, slots = _programs(task, mesh), cache_slots(task.seq)
    state: SlotState = programs.new_state(task.batch, slots)
    loops = _experts(task, mesh, task.batch)
    return Lowered(lambda: programs.decode(state, task.cfg.stop_ids, 1), 1,
                   loops | {"attention": slots / key_block(slots, 1, programs.ax), "while": 1.0},
                   _buffers((programs.params, state)))


def _prefill(task: Task, mesh: Mesh) -> Lowered:
    """One chunk of one prompt on each group of devices; the step is all chunks of all prompts."""
    programs, slots = _programs(task, mesh), cache_slots(task.seq)
    prompt: PromptState = programs.new_prompt(slots)
    width = chunk_width(task.seq)
    chunks = math.ceil(task.seq / width)
    n = programs.devices
    row, where = jax.ShapeDtypeStruct((n,), jnp.int32), shardings(BATCH_SPEC, mesh)
    flag = jax.ShapeDtypeStruct((n,), jnp.bool_)
    ids = jax.ShapeDtypeStruct((n, width), jnp.int32)
    given = [_like(x, where) for x in (ids, row, row, flag, flag)]
    # The i-th chunk reads the blocks up to its own end.
    size = key_block(slots, width, programs.ax)
    blocks = sum(-(-min(slots, (i + 1) * width) // size) for i in range(chunks)) / chunks
    return Lowered(lambda: programs.prefill(prompt, *given), chunks * (task.batch // n),
                   _experts(task, mesh, n * width) | {"attention": blocks},
                   _buffers((programs.params, prompt)))


def _experts(task: Task, mesh: Mesh, tokens: int) -> dict[str, float]:
    """Turns of the loops of experts, for a router that favours none: each has its share of the `tokens` that all
    devices run together, in tiles where there is no kernel, and no device needs a second round."""
    moe, ax = task.cfg.moe, Axes.of(mesh)
    if moe is None:
        return {}
    meet = tokens / ax.size(BATCH + CONTEXT) * ax.size(EXPERT)
    return {r"\bmoe\b.*\bwhile\b.*\bwhile\b": math.ceil(meet * moe.top_k / moe.experts / TILE_ROWS), r"\bmoe\b": 0.0}


def chunk_width(tokens: int) -> int:
    """How many tokens of a prompt are run at a time: as generation begins it."""
    return prefill_chunks(tokens)[0].width


def _buffers(tree: Any) -> list[Buffer]:
    found = [Buffer(math.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize,
                    f"{leaf.dtype}{list(leaf.sharding.shard_shape(leaf.shape))}", jax.tree_util.keystr(path))
             for path, leaf in jax.tree_util.tree_leaves_with_path(tree) if not jnp.issubdtype(leaf.dtype, _KEYS)]
    return sorted(found, key=lambda buffer: -buffer.bytes)


def _placed(tree: Any, where: Any) -> Any:
    return jax.tree.map(_like, tree, where)


def _like(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _spread(tree: Any, prefix: Any) -> Any:
    """A tree of shardings, each standing for a whole branch of `tree`, as one a leaf."""
    leaves = jax.tree.leaves(jax.tree.map(lambda where, branch: [where] * len(jax.tree.leaves(branch)), prefix, tree,
                                          is_leaf=lambda x: isinstance(x, jax.sharding.Sharding)))
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)
