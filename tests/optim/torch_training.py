"""The same training run in PyTorch and here, each side with its own gradients, and how far their updates are apart."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import transformers

from qwen2_jax.config import ModelConfig, MoeConfig, RopeConfig
from qwen2_jax.data.packing import PackedDocuments
from qwen2_jax.optim.adamw import AdamWConfig, make_optimizer, schedule
from qwen2_jax.train.losses import NextTokenLoss
from qwen2_jax.train.step import init_state, make_step
from tests.oracle import gradients, random_model, tensors, to_params

STEPS = (3, 10)
LR, DECAY, CLIP, BETAS, EPS = 1e-3, 0.1, 1.0, (0.9, 0.95), 1e-8
SETTINGS: dict[str, Any] = dict(peak=LR, steps=STEPS[-1], schedule="constant", weight_decay=DECAY, clip=CLIP,
                                b1=BETAS[0], b2=BETAS[1], eps=EPS)
TINY_GRADIENT = 1e-7
"""Where both sides' gradient of an element is below it and not 0, its sign is rounding, and Adam's update of it the
throw of a coin."""
MAX_TINY = 0.01
"""Most elements of a tensor that may be left out of the comparison for that."""

DENSE = ModelConfig(vocab=67, layers=2, d_model=32, d_ff=48, heads=4, kv_heads=2, head_dim=8, tied=True, norm_eps=1e-6,
                    rope=RopeConfig(theta=1e4), max_position=32, dtype="float32")
CASES = {
    "dense, tied": DENSE,
    "experts": dataclasses.replace(DENSE, tied=False, moe=MoeConfig(experts=4, top_k=2, d_expert=24, d_shared=40,
                                                                    aux_loss_coef=0.01)),
}


@dataclass
class Run:
    """Trees are ours, of numpy arrays."""

    before: dict
    after: dict[int, dict] = field(default_factory=dict)
    """Number of updates → parameters then."""
    losses: list[float] = field(default_factory=list)
    gradients: list[dict] = field(default_factory=list)
    """Before clipping."""


@functools.cache
def batches(vocab: int):
    rng = np.random.default_rng(1)
    rows = PackedDocuments([rng.integers(0, vocab, 17) for _ in range(4 * STEPS[-1])], 16)     # a document a row
    return [rows.batch(n, 4, seed=0) for n in range(STEPS[-1])]


def decayed_names(model: torch.nn.Module) -> set[str]:
    return set(transformers.Trainer.get_decay_parameter_names(None, model))


def adamw(model: torch.nn.Module, without: frozenset[str] = frozenset()) -> torch.optim.Optimizer:
    """PyTorch's AdamW in transformers' two groups, of all parameters but those `without`."""
    named, decayed = dict(model.named_parameters()), decayed_names(model)
    groups = [{"params": [p for n, p in named.items() if (n in decayed) == flag and n not in without],
               "weight_decay": DECAY * flag} for flag in (True, False)]
    return torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS)


def torch_run(cfg: ModelConfig, optimizers: Callable[[torch.nn.Module], list[torch.optim.Optimizer]]) -> Run:
    model = random_model(cfg)

    def ours(tree):
        return jax.tree.map(np.copy, to_params(tree, cfg))

    run = Run(ours(tensors(model)))
    made = optimizers(model)
    for n, batch in enumerate(batches(cfg.vocab), 1):
        model.zero_grad()
        out = model(torch.from_numpy(batch.ids_BT).long(), **({"output_router_logits": True} if cfg.moe else {}))
        loss = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1),
                                                 torch.from_numpy(batch.targets_BT).long().flatten())
        if cfg.moe is not None:
            loss = loss + cfg.moe.aux_loss_coef * out.aux_loss
        loss.backward()
        run.losses.append(loss.item())
        run.gradients.append(ours(gradients(model)))
        assert torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP) > CLIP, "the clip does nothing here"
        for optimizer in made:
            optimizer.step()
        if n in STEPS:
            run.after[n] = ours(tensors(model))
    return run


def our_run(cfg: ModelConfig, before: dict, optim: AdamWConfig) -> Run:
    keep = optax.GradientTransformation(lambda params: jax.tree.map(jnp.zeros_like, params), lambda g, *_: (g, g))
    optimizer = optax.chain(keep, make_optimizer(optim))
    run = Run(before)
    state = init_state(jax.tree.map(jnp.array, before), optimizer)
    step = make_step(NextTokenLoss(model=cfg), optimizer, schedule(optim))
    for n, batch in enumerate(batches(cfg.vocab), 1):
        state, metrics = step(state, batch)
        run.losses.append(float(metrics["loss"]))
        run.gradients.append(jax.tree.map(np.array, state.optimizer[0]))
        if n in STEPS:
            run.after[n] = jax.tree.map(np.array, state.params)
    return run


def errors(ours: Run, theirs: Run, steps: int, scale: float = 1.0) -> dict[str, float]:
    """Relative L2 distance between our update after `steps` (times `scale`) and PyTorch's, of each tensor."""
    found = {}

    def compare(path, before, a, b, *gradients):
        name = jax.tree_util.keystr(path)
        larger = np.maximum(np.abs(gradients[:steps]), np.abs(gradients[steps:]))      # [steps, *shape], of both sides'
        tiny = ((larger > 0) & (larger < TINY_GRADIENT)).any(0)
        assert tiny.mean() <= MAX_TINY, f"{tiny.sum()} of {tiny.size} gradients of {name} are tiny"
        update, expected = (scale * (a - before))[~tiny], (b - before)[~tiny]
        found[name] = float(np.linalg.norm(update - expected) / np.linalg.norm(expected))

    jax.tree_util.tree_map_with_path(compare, theirs.before, ours.after[steps], theirs.after[steps],
                                     *ours.gradients[:steps], *theirs.gradients[:steps])
    return found
