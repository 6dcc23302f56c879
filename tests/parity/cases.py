"""Tiny models of odd shapes, and how far ours may be from transformers'."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from qwen2_jax.config import ModelConfig, MoeConfig, RopeConfig, WindowConfig
from qwen2_jax.model.decoder import Decoder
from qwen2_jax.ops.experts import load_balancing_loss
from qwen2_jax.ops.vocab import logits, target_logprobs
from tests.oracle import AUX_COEF, Answer, Rows

# Float32 on both sides, so only the order of sums differs: some 1e-7 a product, through at most four layers whose
# attention is sharp (an error in a score is multiplied by it). The largest measured are 2.3e-5 and, loss, 2e-7.
TOLERANCE = {"logits": 5e-5, "hidden": 5e-5, "gradients": 5e-5, "loss": 1e-6}

BASE = ModelConfig(vocab=160, layers=3, d_model=32, d_ff=48, heads=4, kv_heads=2, head_dim=8, tied=False,
                   norm_eps=1e-6, rope=RopeConfig(theta=1e4), max_position=64)
MOE = dataclasses.replace(BASE, moe=MoeConfig(experts=6, top_k=2, d_expert=24, d_shared=40))


def _moe(cfg: ModelConfig = MOE, **changes) -> ModelConfig:
    return dataclasses.replace(cfg, moe=dataclasses.replace(cfg.moe, **changes))


def _base(**changes) -> ModelConfig:
    return dataclasses.replace(BASE, **changes)


CASES = {
    "grouped_query": BASE,
    "one_kv_head_tied": _base(kv_heads=1, tied=True),
    "kv_heads_equal_heads": _base(heads=3, kv_heads=3, d_model=24),
    "wide_heads": _base(heads=2, kv_heads=1, head_dim=24, d_model=40, norm_eps=1e-5),
    "linear_rope": _base(rope=RopeConfig(theta=1e4, kind="linear", factor=2.0)),
    "yarn_4x": _base(rope=RopeConfig(theta=1e4, kind="yarn", factor=4.0, original_max_position=16), head_dim=16),
    "window": _base(window=WindowConfig(enabled=True, size=5, max_window_layers=1)),
    "window_by_layer_types": _base(window=WindowConfig(
        enabled=True, size=4, max_window_layers=3,
        layer_types=("sliding_attention", "full_attention", "sliding_attention"))),
    "window_off": _base(window=WindowConfig(enabled=False, size=4, max_window_layers=0)),
    "experts": MOE,
    "experts_normalised": _moe(norm_topk_prob=True, top_k=3),
    "experts_every_second_layer": _moe(dataclasses.replace(MOE, layers=4), sparse_step=2),
    "experts_but_one_layer": _moe(
        dataclasses.replace(MOE, window=WindowConfig(enabled=True, size=5, max_window_layers=3)), dense_layers=(1,)),
}


def our_program(cfg: ModelConfig, **fields) -> Callable:
    """Jitted (params, rows as arrays) → Answer as a tuple; `fields` go to the `Decoder`."""
    decoder = Decoder(cfg, collect=True, **fields)

    def loss(params, ids_BT, segments_BT, positions_BT, targets_BT):
        out = decoder.apply({"params": params}, ids_BT, positions_BT=positions_BT, segments_BT=segments_BT)
        real_BT = (segments_BT > 0).astype(jnp.float32)
        logprob_BT, _, _ = target_logprobs(out.x_BTD, out.head["table"], targets_BT)
        total = -jnp.sum(real_BT * logprob_BT) / real_BT.sum()
        if out.router is not None:
            total = total + AUX_COEF * load_balancing_loss(out.router)
        return total, (logits(out.x_BTD, out.head["table"]), out.hidden_LBTD)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def our_answer(cfg: ModelConfig, params: dict, rows: Rows, program: Callable | None = None, **fields) -> Answer:
    """`answer` of tests/oracle.py, by our decoder."""
    program = program or our_program(cfg, **fields)
    (loss, (logits_BTV, hidden_LBTD)), grads = program(
        params, rows.ids_BT, rows.segments_BT, rows.positions_BT, rows.targets_BT)
    return Answer(*jax.tree.map(np.asarray, (logits_BTV, hidden_LBTD, loss, grads)))


def errors(ours: Answer, reference: Answer, real_BT: np.ndarray) -> dict[str, float]:
    """Largest errors, relative: logits and hidden states to their spread, gradients by norm, leaf by leaf."""
    hidden = max(np.abs(a - b)[real_BT].max() / b[real_BT].std()
                 for a, b in zip(ours.hidden_LBTD, reference.hidden_LBTD, strict=True))
    return {
        "logits": float(np.abs(ours.logits_BTV - reference.logits_BTV)[real_BT].max()
                        / reference.logits_BTV[real_BT].std()),
        "hidden": float(hidden),
        "gradients": gradient_error(ours.grads, reference.grads),
        "loss": float(abs(ours.loss - reference.loss) / abs(reference.loss)),
    }


def gradient_error(ours: dict, reference: dict) -> float:
    """Largest ‖Δ‖/‖g‖ over leaves, each layer of a stack on its own. No ‖g‖ may be 0: it would compare nothing."""
    assert jax.tree.structure(ours) == jax.tree.structure(reference)
    worst = 0.0
    for (path, a), b in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(reference), strict=True):
        assert a.shape == b.shape, jax.tree_util.keystr(path)
        layered = "layers_" in jax.tree_util.keystr(path)
        for a_layer, b_layer in zip(a, b, strict=True) if layered else [(a, b)]:
            norm = np.linalg.norm(b_layer.astype(np.float64))
            assert norm > 0, jax.tree_util.keystr(path)
            worst = max(worst, float(np.linalg.norm((a_layer - b_layer).astype(np.float64)) / norm))
    return worst


def assert_close(found: dict[str, float]) -> None:
    beyond = {name: error for name, error in found.items() if not error <= TOLERANCE[name]}
    assert not beyond, f"beyond the tolerance: {beyond} of {found}"
