"""The one name map between Hugging Face's tensors and our parameter tree, read in both directions.

Every row is a plain copy: matrices are `[out, in]` on both sides. `{i}` (layer) and `{e}` (expert) become leading axes
of our leaf; `layers` in our path stands for the run that holds layer i (`ModelConfig.layer_runs`). Which rows a model
has follows from its parameter tree, so there are no conditions here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from qwen2_jax.config import ModelConfig
from qwen2_jax.errors import UserError
from qwen2_jax.shapes import param_shapes

ROWS = (
    ("model.embed_tokens.weight", "embed/table"),
    ("model.layers.{i}.input_layernorm.weight", "layers/attn_norm/scale"),
    ("model.layers.{i}.self_attn.q_proj.weight", "layers/attn/q"),
    ("model.layers.{i}.self_attn.q_proj.bias", "layers/attn/q_bias"),
    ("model.layers.{i}.self_attn.k_proj.weight", "layers/attn/k"),
    ("model.layers.{i}.self_attn.k_proj.bias", "layers/attn/k_bias"),
    ("model.layers.{i}.self_attn.v_proj.weight", "layers/attn/v"),
    ("model.layers.{i}.self_attn.v_proj.bias", "layers/attn/v_bias"),
    ("model.layers.{i}.self_attn.o_proj.weight", "layers/attn/o"),
    ("model.layers.{i}.post_attention_layernorm.weight", "layers/mlp_norm/scale"),
    ("model.layers.{i}.mlp.gate_proj.weight", "layers/mlp/gate"),
    ("model.layers.{i}.mlp.up_proj.weight", "layers/mlp/up"),
    ("model.layers.{i}.mlp.down_proj.weight", "layers/mlp/down"),
    ("model.layers.{i}.mlp.gate.weight", "layers/moe/router"),
    ("model.layers.{i}.mlp.experts.{e}.gate_proj.weight", "layers/moe/gate"),
    ("model.layers.{i}.mlp.experts.{e}.up_proj.weight", "layers/moe/up"),
    ("model.layers.{i}.mlp.experts.{e}.down_proj.weight", "layers/moe/down"),
    ("model.layers.{i}.mlp.shared_expert.gate_proj.weight", "layers/moe/shared_gate"),
    ("model.layers.{i}.mlp.shared_expert.up_proj.weight", "layers/moe/shared_up"),
    ("model.layers.{i}.mlp.shared_expert.down_proj.weight", "layers/moe/shared_down"),
    ("model.layers.{i}.mlp.shared_expert_gate.weight", "layers/moe/shared_router"),
    ("model.norm.weight", "norm/scale"),
    ("lm_head.weight", "head/table"),
    ("score.weight", "score/weight"),
    ("score.0.weight", "reward/dense1"),
    ("score.0.bias", "reward/dense1_bias"),
    ("score.2.weight", "reward/dense2"),
    ("score.2.bias", "reward/dense2_bias"),
)

MAX_TENSORS = 100_000

EMBED, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"

# Buffers that old versions of transformers wrote; they follow from the configuration.
_INERT = re.compile(r"(^|\.)rotary_emb\.inv_freq$")

# transformers 5 keeps the experts of a layer in two tensors, [E, 2F, D] (gate rows, then up rows) and [E, D, F].
_FUSED = re.compile(r"^((?:model\.)?layers\.\d+\.mlp\.experts)\.(gate_up_proj|down_proj)$")
_FUSED_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


@dataclass(frozen=True)
class Slot:
    """One Hugging Face tensor and its place in our tree: `tree[path][index]` has shape `shape`."""

    name: str
    path: str
    index: tuple[int, ...]
    shape: tuple[int, ...]


def slots(cfg: ModelConfig, *, stacked: bool = True) -> list[Slot]:
    """Every tensor of a model, in the order of the Hugging Face modules: embedding, layer after layer, norm, head.

    `stacked` says in which layout of our tree the places are; the order does not depend on it. Raises UserError for a
    number of tensors that no checkpoint has, which a damaged config.json may ask for.
    """
    tensors = cfg.layers * (1 if cfg.moe is None else cfg.moe.experts)
    if tensors > MAX_TENSORS:
        raise UserError(f"num_hidden_layers {cfg.layers} times num_experts is {tensors:,}; at most {MAX_TENSORS:,} are"
                        " supported: check config.json")
    shapes = param_shapes(cfg, stacked=stacked)
    runs = {i: run for run in cfg.layer_runs(stacked=stacked) for i in run.layers}
    first_layer_row = next(n for n, (hf, _) in enumerate(ROWS) if "{i}" in hf)
    after_layers = max(n for n, (hf, _) in enumerate(ROWS) if "{i}" in hf) + 1
    found = list(_plain(ROWS[:first_layer_row], shapes))
    for i, run in runs.items():
        for hf, ours in ROWS[first_layer_row:after_layers]:
            path = ours.replace("layers", run.name, 1)
            if path not in shapes:
                continue
            if "{e}" in hf:
                found += [Slot(hf.format(i=i, e=e), path, (i - run.start, e), shapes[path][2:])
                          for e in range(shapes[path][1])]
            else:
                found.append(Slot(hf.format(i=i), path, (i - run.start,), shapes[path][1:]))
    found += _plain(ROWS[after_layers:], shapes)
    unmapped = set(shapes) - {slot.path for slot in found}
    if unmapped:
        raise AssertionError(f"parameters without a row in the name map: {sorted(unmapped)}")
    return found


def _plain(rows: tuple[tuple[str, str], ...], shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Slot]:
    return (Slot(hf, ours, (), shapes[ours]) for hf, ours in rows if ours in shapes)


def is_inert(name: str) -> bool:
    """Whether a tensor of a Hugging Face file carries no information (rotary frequency buffers)."""
    return _INERT.search(name) is not None


def with_prefix(name: str) -> str:
    """The name in a model with a head: files of the bare `Qwen2Model` leave out the leading `model.`."""
    return f"model.{name}" if name.startswith(("embed_tokens.", "layers.", "norm.")) else name


def fused_experts(name: str, shape: tuple[int, ...]) -> list[tuple[str, tuple[int, ...], int]] | None:
    """Splits a tensor that holds all experts of a layer: [(per-expert name, shape, first element in the tensor)].

    None when `name` is not such a tensor or its shape cannot be split; it is then reported like any unknown tensor.
    """
    match = _FUSED.match(name)
    if match is None or len(shape) != 3 or 0 in shape:
        return None
    prefix, parts = match[1], _FUSED_PARTS[match[2]]
    experts, out, width = shape
    if out % len(parts):
        return None
    rows = out // len(parts)
    return [(f"{prefix}.{e}.{part}.weight", (rows, width), (e * len(parts) + n) * rows * width)
            for e in range(experts) for n, part in enumerate(parts)]
