"""Three training steps against torch.optim.AdamW with transformers' decay groups, each side with its own gradients."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
import torch
import transformers

from qwen2_jax.config import ModelConfig, RopeConfig
from qwen2_jax.data.packing import PackedDocuments
from qwen2_jax.optim.adamw import AdamWConfig, decays, make_optimizer, schedule
from qwen2_jax.train.losses import NextTokenLoss
from qwen2_jax.train.step import init_state, make_step
from tests.oracle import gradients, random_model, tensors, to_params

pytestmark = pytest.mark.parity

STEPS, LR, DECAY, CLIP, BETAS, EPS = 3, 1e-3, 0.1, 1.0, (0.9, 0.95), 1e-8
TOLERANCE = 1e-3
"""Relative L2 of each tensor's total update. Float32 gradients of two frameworks differ by about 1e-6 of a tensor's
norm; Adam divides each element by its own size, so small elements show that much larger."""
TINY_GRADIENT = 1e-7
"""Below it, but above 0, an element's sign is rounding, and its update is a coin's throw."""
MAX_TINY = 0.01

CFG = ModelConfig(vocab=67, layers=2, d_model=32, d_ff=48, heads=4, kv_heads=2, head_dim=8, tied=False, norm_eps=1e-6,
                  rope=RopeConfig(theta=1e4), max_position=32, dtype="float32")


@functools.cache
def batches():
    rng = np.random.default_rng(1)
    rows = PackedDocuments([rng.integers(0, CFG.vocab, 17) for _ in range(4 * STEPS)], 16)     # a document a row
    return [rows.batch(n, 4, seed=0) for n in range(STEPS)]


def decayed_names(model: torch.nn.Module) -> set[str]:
    return set(transformers.Trainer.get_decay_parameter_names(None, model))


@functools.cache
def torch_side():
    """(weights before, weights after, smallest |gradient| > 0 over the steps, what decays), as our trees."""
    model = random_model(CFG)
    before = {name: value.copy() for name, value in tensors(model).items()}
    named, decayed = dict(model.named_parameters()), decayed_names(model)
    optimizer = torch.optim.AdamW(
        [{"params": [p for n, p in named.items() if n in decayed], "weight_decay": DECAY},
         {"params": [p for n, p in named.items() if n not in decayed], "weight_decay": 0.0}],
        lr=LR, betas=BETAS, eps=EPS)
    smallest = {name: np.full(p.shape, np.inf, np.float32) for name, p in named.items()}
    for batch in batches():
        optimizer.zero_grad()
        logits = model(torch.from_numpy(batch.ids_BT).long()).logits
        targets = torch.from_numpy(batch.targets_BT).long()
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        assert norm > CLIP, "the clip does nothing here"
        for name, g in gradients(model).items():
            smallest[name] = np.minimum(smallest[name], np.where(g == 0, np.inf, np.abs(g)))
        optimizer.step()
    mask = {name: np.full(p.shape, name in decayed) for name, p in named.items()}
    return tuple(to_params(tree, CFG) for tree in (before, tensors(model), smallest, mask))


@functools.cache
def our_side(**changes):
    optim = AdamWConfig(**(dict(peak=LR, steps=STEPS, schedule="constant", weight_decay=DECAY, clip=CLIP, b1=BETAS[0],
                                b2=BETAS[1], eps=EPS) | changes))
    optimizer = make_optimizer(optim)
    state = init_state(jax.tree.map(jax.numpy.array, torch_side()[0]), optimizer)
    step = make_step(NextTokenLoss(model=CFG), optimizer, schedule(optim))
    for batch in batches():
        state, _ = step(state, batch)
    return jax.tree.map(np.asarray, state.params)


def errors(after: dict, scale: float = 1.0) -> dict[str, float]:
    """Relative L2 distance between our update (times `scale`) and torch's, of each tensor."""
    before, theirs, smallest, _ = torch_side()

    def error(b, ours, t, g):
        clear = g >= TINY_GRADIENT
        assert (~clear).mean() <= MAX_TINY, f"{(~clear).sum()} of {g.size} gradients are tiny"
        update, expected = (scale * (ours - b))[clear], (t - b)[clear]
        return float(np.linalg.norm(update - expected) / np.linalg.norm(expected))

    tree = jax.tree.map(error, before, after, theirs, smallest)
    return {jax.tree_util.keystr(path): value for path, value in jax.tree_util.tree_leaves_with_path(tree)}


def test_updates_equal_torch():
    found = errors(our_side())
    assert max(found.values()) <= TOLERANCE, found


def test_the_tolerance_sees_one_percent():
    assert min(errors(our_side(), scale=0.99).values()) > TOLERANCE


MUTATIONS = {"decay doubled": {"weight_decay": 2 * DECAY}, "no decay": {"weight_decay": 0.0},
             "no clip": {"clip": None}, "b1": {"b1": 0.8}, "b2": {"b2": 0.999}}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wrong_setting_fails(name):
    assert max(errors(our_side(**MUTATIONS[name])).values()) > TOLERANCE


def test_decay_groups_are_those_of_transformers():
    before, _, _, mask = torch_side()
    assert jax.tree.map(bool, decays(before)) == jax.tree.map(lambda m: bool(m.all()), mask)
    assert {True, False} == set(jax.tree.leaves(decays(before)))
