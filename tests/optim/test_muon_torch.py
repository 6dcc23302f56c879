"""Muon against torch.optim.Muon: on matrices of all shapes, layer by layer and expert by expert, and in a model."""

from __future__ import annotations

import functools

import jax
import numpy as np
import optax
import pytest
import torch

from qwen2_jax.optim.adamw import make_optimizer
from qwen2_jax.optim.muon import MuonConfig
from tests.optim.torch_training import CASES, DECAY, LR, SETTINGS, Run, adamw, errors, our_run, torch_run

pytestmark = pytest.mark.parity

STEPS, RATE = 5, 0.02
FLOAT32 = 2e-5
"""Relative L2 of a matrix's total update, both sides iterating in float32: sums in another order, times 480 where a
singular value is small."""
BFLOAT16 = 3e-2
"""Both in bfloat16, as PyTorch always does: each side is 1.2 % away from what float32 gives, its products' sums rounded
in another order."""
MODEL = 1e-3
"""The same in a model, each side with its own gradients."""

OPTIONS = {
    "default": {},
    "no nesterov, matched to AdamW": {"nesterov": False, "rate_adjustment": "match_rms_adamw"},
    "three iterations of another polynomial": {"ns_steps": 3, "ns_coefficients": (3.0, -3.2, 1.2), "momentum": 0.8},
}
SHAPES = {("attn", "q"): (2, 24, 24), ("mlp", "up"): (2, 40, 24), ("moe", "gate"): (2, 3, 12, 24)}


def torch_muon(parameters, options: dict, rate: float = RATE) -> torch.optim.Muon:
    names = {"rate_adjustment": "adjust_lr_fn"}
    given = {"rate_adjustment": "original"} | options
    return torch.optim.Muon(parameters, lr=rate, weight_decay=DECAY, **{names.get(k, k): v for k, v in given.items()})


def our_config(options: dict, **more) -> MuonConfig:
    return MuonConfig(**(SETTINGS | {"rate_adjustment": "original"} | options | more))


@pytest.fixture
def torch_in_float32(monkeypatch):
    """PyTorch's own iteration, but for the cast in front of it; a copy, for what follows is done in place."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)


@functools.cache
def matrices() -> tuple[dict, list[dict]]:
    """(weights, gradients of each step)"""
    rng = np.random.default_rng(0)

    def draw():
        tree: dict = {"layers_0": {part: {} for part, _ in SHAPES}}
        for (part, name), shape in SHAPES.items():
            tree["layers_0"][part][name] = rng.normal(size=shape).astype(np.float32)
        return tree

    return draw(), [draw() for _ in range(STEPS)]


def matrix_errors(options: dict, ns_dtype: str, scale: float = 1.0) -> dict[str, float]:
    before, gradients = matrices()
    optimizer = make_optimizer(our_config(options, peak=RATE, ns_dtype=ns_dtype, clip=None))
    update = jax.jit(optimizer.update)
    params, state = before, optimizer.init(before)
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)

    def compare(path, start, ours, *gradients):
        rows = start.reshape(-1, *start.shape[-2:])      # of layers and experts
        theirs = [torch.nn.Parameter(torch.tensor(matrix)) for matrix in rows]
        muon = torch_muon(theirs, options)
        for gradient in gradients:
            for parameter, g in zip(theirs, gradient.reshape(rows.shape), strict=True):
                parameter.grad = torch.tensor(g)
            muon.step()
        expected = np.stack([parameter.detach().numpy() for parameter in theirs]) - rows
        found = scale * (np.asarray(ours).reshape(rows.shape) - rows)
        return max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in zip(found, expected, strict=True))

    tree = jax.tree_util.tree_map_with_path(compare, before, params, *gradients)
    return {jax.tree_util.keystr(path): error for path, error in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.parametrize("name", OPTIONS)
def test_matrices_move_as_in_torch(name, torch_in_float32):
    found = matrix_errors(OPTIONS[name], "float32")
    assert max(found.values()) <= FLOAT32, found


def test_matrices_move_as_in_torch_in_bfloat16():
    found = matrix_errors({}, "bfloat16")
    assert max(found.values()) <= BFLOAT16, found


def test_the_tolerances_see_a_wrong_step(torch_in_float32):
    assert min(matrix_errors({}, "float32", scale=0.99).values()) > FLOAT32
    assert min(matrix_errors({}, "float32", scale=0.95).values()) > BFLOAT16


@functools.cache
def model_runs() -> tuple[Run, Run]:
    def optimizers(model):
        muons = {name: p for name, p in model.named_parameters() if name.endswith("proj.weight")}
        return [torch_muon(muons.values(), {}, LR), adamw(model, without=frozenset(muons))]

    theirs = torch_run(CASES["dense, tied"], optimizers)
    return our_run(CASES["dense, tied"], theirs.before, our_config({}, ns_dtype="float32")), theirs


def test_a_model_is_trained_as_in_torch(torch_in_float32):
    ours, theirs = model_runs()
    np.testing.assert_allclose(ours.losses, theirs.losses, rtol=1e-5)
    for steps in ours.after:
        found = errors(ours, theirs, steps)
        assert max(found.values()) <= MODEL, found
        assert min(errors(ours, theirs, steps, scale=0.99).values()) > MODEL
