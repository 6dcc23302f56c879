"""Memory and time of a task on a mesh by arithmetic alone: to choose what is worth compiling, never as an answer.

Rough on purpose: state is exact to a few per cent, temporaries and seconds to some tens. Tokens are those
of one device.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from qwen2_jax.config import ModelConfig
from qwen2_jax.ops.vocab import TOKEN_CHUNK
from qwen2_jax.plan.chips import Chip
from qwen2_jax.plan.flops import Mode, model_flops
from qwen2_jax.plan.program import Task
from qwen2_jax.plan.topology import Topology
from qwen2_jax.shapes import kv_bytes_per_token, param_shapes

MATMUL_SHARE = 0.62
"""Of peak that a step's products and what lies between them reach together."""
OVERLAPPED = 0.7
"""Part of the travel of weights that hides behind computation."""
COLLECTIVE_LATENCY = 5e-6
"""Seconds before a collective moves anything."""
STATE = 12
"""Bytes a parameter: float32 weight and two moments."""
LARGEST_TENSOR, LARGEST_CONTEXT = 16, 16


@dataclass(frozen=True)
class Sizes:
    """A mesh by its sizes; fsdp as one number, which `make_mesh` spreads over the torus."""

    data: int = 1
    fsdp: int = 1
    expert: int = 1
    context: int = 1
    tensor: int = 1

    @property
    def rows(self) -> int:
        return self.data * self.fsdp * self.expert

    def __str__(self) -> str:
        named = [f"{name}={size}" for name, size in self.__dict__.items() if size > 1]
        return ",".join(named) or "data=1"


@dataclass(frozen=True)
class Estimate:
    sizes: Sizes
    argument_bytes: float
    temp_bytes: float
    seconds: float

    @property
    def peak_bytes(self) -> float:
        return self.argument_bytes + self.temp_bytes


def estimate(task: Task, sizes: Sizes, chip: Chip) -> Estimate:
    """Bytes of one device, and seconds of a step."""
    return _training(task, sizes, chip) if task.mode == "train" else _serving(task, sizes, chip)


def candidates(task: Task, topology: Topology) -> list[Estimate]:
    """Every mesh over all devices of a topology that divides rows, tokens and heads; the fastest first."""
    found = [estimate(task, sizes, topology.chip) for sizes in _meshes(task, topology.devices)]
    return sorted(found, key=lambda e: (e.seconds, e.peak_bytes))


def _meshes(task: Task, devices: int) -> Iterator[Sizes]:
    cfg = task.cfg
    experts = cfg.moe.experts if cfg.moe else 1
    factors = [n for n in range(1, devices + 1) if devices % n == 0]
    for tensor, context, expert, data in itertools.product(factors, repeat=4):
        if tensor > LARGEST_TENSOR or context > LARGEST_CONTEXT or devices % (tensor * context * expert * data):
            continue
        sizes = Sizes(data, devices // (tensor * context * expert * data), expert, context, tensor)
        fits_model = cfg.heads % tensor == 0 and experts % expert == 0 and task.batch % sizes.rows == 0
        if fits_model and (context == 1 or (task.mode == "train" and task.seq % (2 * context * tensor) == 0)):
            yield sizes


def _local_parameters(cfg: ModelConfig, sizes: Sizes, mode: Mode = "decode") -> float:
    """Parameters that a device holds."""
    total = 0.0
    for path, shape in param_shapes(cfg).items():
        name = path.rpartition("/")[2]
        split = 1
        if not (name.endswith("bias") or name == "scale"):
            routed = path.endswith(("moe/gate", "moe/up", "moe/down"))
            split = sizes.fsdp * (1 if "router" in name else sizes.tensor)
            split *= sizes.expert if routed or mode == "train" else 1
        total += math.prod(shape) / split
    return total


def _layer_parameters(cfg: ModelConfig, sizes: Sizes) -> float:
    """Parameters of one layer as a device computes with them: gathered."""
    whole = Sizes(expert=sizes.expert, tensor=sizes.tensor)
    vocabulary = cfg.vocab * cfg.d_model * (1 if cfg.tied_head else 2) / sizes.tensor
    return max(0.0, _local_parameters(cfg, whole) - vocabulary) / cfg.layers


def _training(task: Task, sizes: Sizes, chip: Chip) -> Estimate:
    cfg = task.cfg
    held, layer = _local_parameters(cfg, sizes, "train"), _layer_parameters(cfg, sizes)
    tokens = task.batch // sizes.rows * task.seq / sizes.context
    wide = max(cfg.d_ff, cfg.moe.top_k * cfg.moe.d_expert + cfg.moe.d_shared if cfg.moe else 0)
    heads = cfg.heads * cfg.head_dim / sizes.tensor
    saved = tokens / sizes.tensor * cfg.d_model * 2
    block = tokens * (10 * wide / sizes.tensor + 8 * heads + 8 * cfg.d_model)
    if task.remat == "none":
        saved += block
    elif task.remat == "dots":
        saved += tokens * 2 * (2 * wide / sizes.tensor + 2 * heads + cfg.d_model)
    elif task.remat == "attention":
        saved += tokens * 2 * heads
    vocabulary = cfg.vocab / sizes.tensor * (2 * cfg.d_model + 8 * min(TOKEN_CHUNK, tokens))
    temporaries = 4 * held + cfg.layers * saved + block + 6 * layer + vocabulary
    again = {"full": 4 / 3, "attention": 1.3, "dots": 1.1, "none": 1.0}[task.remat]
    flops = model_flops(cfg, "train", task.batch, task.seq) * again
    devices = sizes.rows * sizes.context * sizes.tensor
    seconds = flops / devices / (MATMUL_SHARE * chip.flops)
    link = chip.link_bandwidth / chip.devices_per_chip
    weights = 2 * cfg.layers * layer * (sizes.fsdp * sizes.expert > 1)
    seconds += (1 - OVERLAPPED) * 3 * weights / (2 * link)
    activations = tokens * cfg.d_model * 2
    seconds += cfg.layers * 10 * activations * (sizes.tensor - 1) / sizes.tensor / link
    seconds += cfg.layers * 3 * activations * (sizes.context - 1) / sizes.context / link * cfg.kv_heads / cfg.heads
    if cfg.moe is not None and sizes.expert > 1:
        seconds += cfg.layers * 6 * activations * sizes.expert / link
    seconds += 2 * 4 * held * (sizes.data * sizes.context > 1) / link      # gradients summed over them, at the end
    return Estimate(sizes, STATE * held, temporaries, seconds)


def _serving(task: Task, sizes: Sizes, chip: Chip) -> Estimate:
    cfg = task.cfg
    held, layer = _local_parameters(cfg, sizes), _layer_parameters(cfg, sizes)
    itemsize = {"bfloat16": 2, "float32": 4}[task.dtype]
    weight = 1 if task.quant else itemsize
    rows = task.batch // sizes.rows if task.mode == "decode" else 1
    tensor = min(sizes.tensor, cfg.kv_heads)
    cache = rows * task.seq * kv_bytes_per_token(cfg, itemsize=itemsize) / tensor
    arguments = weight * held + cache
    tokens = rows if task.mode == "decode" else min(512, task.seq)
    temporaries = 2 * itemsize * layer + tokens * (cfg.vocab * 12 / sizes.tensor + 8 * cfg.d_ff) + \
        (weight * cfg.vocab * cfg.d_model / sizes.tensor if sizes.fsdp > 1 else 0)
    flops = model_flops(cfg, task.mode, task.batch, task.seq) / (sizes.rows * sizes.context * sizes.tensor)
    reads = arguments if task.mode == "decode" else weight * held * math.ceil(task.seq / 512) * task.batch / sizes.rows
    link = chip.link_bandwidth / chip.devices_per_chip
    steps = 1 if task.mode == "decode" else math.ceil(task.seq / 512) * task.batch / sizes.rows
    seconds = max(flops / (MATMUL_SHARE * chip.flops), reads / chip.hbm_bandwidth)
    if sizes.fsdp > 1:
        seconds += steps * itemsize * cfg.layers * layer / (2 * link)
    if sizes.tensor > 1:
        seconds += steps * cfg.layers * 2 * (COLLECTIVE_LATENCY + 2 * tokens * cfg.d_model * itemsize / link)
    return Estimate(sizes, arguments, temporaries, seconds)
