"""transformers as the oracle: random models whose mistakes would show, and what they answer.

Every kind of weight is drawn to matter (tools/telling_weights.py), and `assert_telling` checks that it does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from transformers.models.qwen2_moe.modeling_qwen2_moe import load_balancing_loss_func

from qwen2_jax.checkpoint.names import fused_experts, slots
from qwen2_jax.checkpoint.tree import nested
from qwen2_jax.config import ModelConfig, RopeConfig
from tools.telling_weights import scale_and_offset

AUX_COEF = 0.1      # large, so that a wrong balancing loss shows in the gradients


def hf_config(cfg: ModelConfig) -> transformers.PreTrainedConfig:
    """The same model said in transformers' words, written by hand: the product's own writer is not its own judge."""
    window = cfg.window
    fields: dict[str, Any] = dict(
        vocab_size=cfg.vocab, hidden_size=cfg.d_model, intermediate_size=cfg.d_ff, num_hidden_layers=cfg.layers,
        num_attention_heads=cfg.heads, num_key_value_heads=cfg.kv_heads, head_dim=cfg.head_dim,
        tie_word_embeddings=cfg.tied, rms_norm_eps=cfg.norm_eps, max_position_embeddings=cfg.max_position,
        rope_parameters=hf_rope(cfg.rope), use_sliding_window=window.enabled, sliding_window=window.size,
        max_window_layers=window.max_window_layers, num_labels=cfg.labels, pad_token_id=cfg.pad_id,
        layer_types=None if window.layer_types is None else list(window.layer_types), attn_implementation="eager")
    if cfg.moe is None:
        return transformers.Qwen2Config(**fields)
    moe = cfg.moe
    return transformers.Qwen2MoeConfig(
        **fields, num_experts=moe.experts, num_experts_per_tok=moe.top_k, moe_intermediate_size=moe.d_expert,
        shared_expert_intermediate_size=moe.d_shared, norm_topk_prob=moe.norm_topk_prob,
        decoder_sparse_step=moe.sparse_step, mlp_only_layers=list(moe.dense_layers))


def hf_rope(rope: RopeConfig) -> dict[str, Any]:
    fields = {"rope_type": rope.kind, "rope_theta": rope.theta}
    if rope.kind != "default":
        fields["factor"] = rope.factor
    if rope.kind == "yarn":
        fields |= {name: getattr(rope, name) for name in ("beta_fast", "beta_slow", "attention_factor", "mscale",
                                                          "mscale_all_dim", "truncate")}
        fields["original_max_position_embeddings"] = rope.original_max_position
    return fields


class RewardModel(torch.nn.Module):
    """Qwen2-Math-RM: a decoder under Linear, ReLU, Linear, with biases, read at every token."""

    def __init__(self, config: transformers.Qwen2Config):
        super().__init__()
        D = config.hidden_size
        self.model = transformers.Qwen2Model(config)
        self.score = torch.nn.Sequential(torch.nn.Linear(D, D), torch.nn.ReLU(), torch.nn.Linear(D, 1))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.score(self.model(ids).last_hidden_state)


def random_model(cfg: ModelConfig, seed: int = 0) -> torch.nn.Module:
    """A float32 model of `cfg` in evaluation mode."""
    config = hf_config(cfg)
    if cfg.head == "reward":
        model = RewardModel(config)
    elif cfg.head == "score":
        model = transformers.Qwen2ForSequenceClassification(config)
    else:
        model = (transformers.Qwen2ForCausalLM if cfg.moe is None else transformers.Qwen2MoeForCausalLM)(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            scale, offset = scale_and_offset(name, tuple(p.shape), tied=cfg.tied_head)
            p.normal_(offset, scale, generator=generator)
    return model.float().eval()


def tensors(model: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: t.detach().numpy() for name, t in model.state_dict().items()}


def gradients(model: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: p.grad.numpy() for name, p in model.named_parameters()}


def to_params(named: Mapping[str, np.ndarray], cfg: ModelConfig) -> dict:
    """Tensors by Hugging Face name → our stacked tree of numpy arrays."""
    named = dict(named)
    for name, value in list(named.items()):
        for part, shape, first in fused_experts(name, value.shape) or ():
            named[part] = value.reshape(-1)[first:first + math.prod(shape)].reshape(shape)
    leaves: dict[str, list[np.ndarray]] = {}
    index: dict[str, tuple[int, ...]] = {}
    for slot in slots(cfg):
        leaves.setdefault(slot.path, []).append(named[slot.name])
        index[slot.path] = slot.index
    # Slots come in order, so the last index of a leaf tells its leading axes.
    return nested({path: np.stack(values).reshape(*(i + 1 for i in index[path]), *values[0].shape)
                   for path, values in leaves.items()})


@dataclass(frozen=True)
class Rows:
    """Tokens [B, T] as the decoder takes them: segment 0 is padding, positions restart at each segment."""

    ids_BT: np.ndarray
    segments_BT: np.ndarray
    positions_BT: np.ndarray
    targets_BT: np.ndarray

    @property
    def real_BT(self) -> np.ndarray:
        return self.segments_BT > 0

    def spans(self):
        """(row, slice) of every segment."""
        for b, segments_T in enumerate(self.segments_BT):
            for s in range(1, segments_T.max() + 1):
                at = np.flatnonzero(segments_T == s)
                yield b, slice(at[0], at[-1] + 1)


# Segment lengths of each row, 0-lengths never; a negative number is padding.
LAYOUT = ((24,), (9, 11, -4), (-5, 19))


def random_rows(cfg: ModelConfig, layout: tuple[tuple[int, ...], ...] = LAYOUT, seed: int = 1) -> Rows:
    """A whole row, a packed row padded on the right, a row padded on the left."""
    rng = np.random.default_rng(seed)
    segments, positions = [], []
    for row in layout:
        numbers = np.cumsum([n > 0 for n in row])
        segments.append(np.concatenate([np.full(abs(n), s if n > 0 else 0) for n, s in zip(row, numbers, strict=True)]))
        positions.append(np.concatenate([np.arange(abs(n)) for n in row]))
    shape = np.shape(segments)
    ids, targets = rng.integers(0, cfg.vocab, (2, *shape))
    return Rows(*(np.asarray(a, np.int32) for a in (ids, segments, positions, targets)))


@dataclass(frozen=True)
class Answer:
    """What a model says to some rows. Padding tokens hold zeros."""

    logits_BTV: np.ndarray
    hidden_LBTD: np.ndarray
    """Output of every block."""
    loss: np.ndarray
    """Mean nats over real tokens, plus AUX_COEF times the balancing loss."""
    grads: dict
    """Of the loss, in our tree."""


def answer(model: torch.nn.Module, cfg: ModelConfig, rows: Rows) -> Answer:
    """Each segment is a forward pass of its own: no mask, no padding, nothing to get wrong."""
    hidden: list[torch.Tensor] = []
    routing: list[list[torch.Tensor]] = [[] for _ in range(cfg.layers)]
    hooks = [layer.register_forward_hook(lambda _, __, out: hidden.append(out[0].detach()))
             for layer in model.model.layers]
    for layer, block in zip(routing, model.model.layers, strict=True):
        if hasattr(block.mlp, "experts"):
            hooks.append(block.mlp.gate.register_forward_hook(lambda _, __, out, layer=layer: layer.append(out[0])))
    B, T = rows.ids_BT.shape
    logits_BTV = np.zeros((B, T, cfg.vocab), np.float32)
    hidden_LBTD = np.zeros((cfg.layers, B, T, cfg.d_model), np.float32)
    nll = torch.zeros(())
    model.zero_grad()
    for b, at in rows.spans():
        hidden.clear()
        logits = model(torch.tensor(rows.ids_BT[b:b + 1, at]).long()).logits[0]
        targets = torch.tensor(rows.targets_BT[b, at]).long()
        nll = nll + torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
        logits_BTV[b, at] = logits.detach().numpy()
        hidden_LBTD[:, b, at] = torch.stack(hidden).numpy()
    loss = nll / int(rows.real_BT.sum())
    if cfg.moe is not None:
        gates = tuple(torch.cat(layer) for layer in routing if layer)
        assert_clear_routing(gates, cfg.moe.top_k)
        loss = loss + AUX_COEF * load_balancing_loss_func(gates, cfg.moe.experts, cfg.moe.top_k)
    loss.backward()
    for hook in hooks:
        hook.remove()
    return Answer(logits_BTV, hidden_LBTD, loss.detach().numpy(), to_params(gradients(model), cfg))


def assert_telling(model: torch.nn.Module, rows: Rows) -> None:
    """Logits spread, attention with favourites, biases and scales off their defaults: mistakes would show."""
    with torch.no_grad():
        out = model(torch.tensor(rows.ids_BT[:1]).long(), output_attentions=True)
    assert out.logits.std() >= 1
    favourite = torch.stack([a.max(-1).values.mean() for a in out.attentions])
    assert favourite.min() >= 0.35, f"attention is too flat to tell right from wrong: {favourite.tolist()}"
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert p.abs().mean() > 0.1, name
        if name.endswith("norm.weight"):
            assert (p - 1).abs().mean() > 0.1, name


def assert_clear_routing(gates: tuple[torch.Tensor, ...], top_k: int) -> None:
    """The k-th and the next expert differ by far more than rounding, or two right programs could disagree."""
    for gate in gates:
        p = torch.softmax(gate.detach(), -1).sort(-1, descending=True).values
        assert (p[:, top_k - 1] - p[:, top_k]).min() > 1e-5, "near tie in the routing: use another seed"
