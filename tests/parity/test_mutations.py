"""Wrong programs must fail the comparisons that the right one passes, by far: each test here is a test of the tests."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from qwen2_jax.config import ModelConfig, WindowConfig
from qwen2_jax.model import attention as model_attention
from qwen2_jax.ops import attention, experts, norm
from tests.oracle import Rows
from tests.parity.cases import CASES, TOLERANCE, errors, our_answer, our_program

FACTOR = 20
"""How far beyond its tolerance every error of a wrong program lies, at the least. The loss, one number, may agree by
chance; the others may not."""


def changed(cfg: ModelConfig, part: str, **fields) -> ModelConfig:
    return dataclasses.replace(cfg, **{part: dataclasses.replace(getattr(cfg, part), **fields)})


def with_leaf(params: dict, path: str, change) -> dict:
    """A copy of the tree with one leaf of the first run replaced."""
    room, leaf = path.split("/")
    run = params["layers_0"]
    return params | {"layers_0": run | {room: run[room] | {leaf: change(run[room][leaf])}}}


def swap_query_heads(params: dict, cfg: ModelConfig) -> dict:
    """What a program does that gives head n the key-value head n mod K instead of n // G."""
    order = np.arange(cfg.heads).reshape(cfg.group, cfg.kv_heads).T.reshape(-1)

    def rows(w):
        return w.reshape(w.shape[0], cfg.heads, cfg.head_dim, *w.shape[2:])[:, order].reshape(w.shape)

    for leaf in ("q", "q_bias"):
        params = with_leaf(params, f"attn/{leaf}", rows)
    return with_leaf(params, "attn/o", lambda w: np.swapaxes(rows(np.swapaxes(w, 1, 2)), 1, 2))


def scaled_leaf(path: str, factor: float):
    return lambda cfg, params, rows: (cfg, with_leaf(params, path, lambda w: w * np.float32(factor)), rows)


def other_config(part: str | None = None, **fields):
    def change(cfg, params, rows):
        return (changed(cfg, part, **fields) if part else dataclasses.replace(cfg, **fields)), params, rows
    return change


def other_rows(**fields):
    def change(cfg, params, rows: Rows):
        return cfg, params, dataclasses.replace(rows, **{name: fn(rows) for name, fn in fields.items()})
    return change


def swapped_gate_up(cfg, params, rows):
    run = params["layers_0"]
    mlp = run["mlp"] | {"gate": run["mlp"]["up"], "up": run["mlp"]["gate"]}
    return cfg, params | {"layers_0": run | {"mlp": mlp}}, rows


# name → (case, change of (cfg, params, rows))
MUTATIONS = {
    "query bias dropped": ("grouped_query", scaled_leaf("attn/q_bias", 0)),
    "key bias dropped": ("grouped_query", scaled_leaf("attn/k_bias", 0)),
    "value bias dropped": ("grouped_query", scaled_leaf("attn/v_bias", 0)),
    "a norm's scale off by 0.3 %": ("grouped_query", scaled_leaf("mlp_norm/scale", 1.003)),
    "theta doubled": ("grouped_query", other_config("rope", theta=2e4)),
    "position off by one": ("grouped_query", other_rows(
        positions_BT=lambda rows: rows.positions_BT + (rows.positions_BT >= 8))),
    "wrong key-value group": ("grouped_query", lambda cfg, params, rows: (cfg, swap_query_heads(params, cfg), rows)),
    "epsilon 1e-5 for 1e-6": ("grouped_query", other_config(norm_eps=1e-5)),
    "gate and up swapped": ("grouped_query", swapped_gate_up),
    "no borders between segments": ("grouped_query", other_rows(
        segments_BT=lambda rows: np.minimum(rows.segments_BT, 1))),
    "padding seen": ("grouped_query", other_rows(segments_BT=lambda rows: np.maximum(rows.segments_BT, 1))),
    "window off by one": ("window", other_config("window", size=6)),
    "window from the first layer": ("window", other_config("window", max_window_layers=0)),
    "the dense rule for an expert model's windows": ("experts_but_one_layer", other_config(
        window=WindowConfig(enabled=True, size=5, layer_types=("full_attention",) * 2 + ("sliding_attention",)))),
    "yarn's temperature forgotten": ("yarn_4x", other_config("rope", attention_factor=1.0)),
    "linear for yarn": ("yarn_4x", other_config("rope", kind="linear")),
    "norm_topk_prob switched on": ("experts", other_config("moe", norm_topk_prob=True)),
    "norm_topk_prob switched off": ("experts_normalised", other_config("moe", norm_topk_prob=False)),
    "one expert fewer": ("experts_normalised", other_config("moe", top_k=2)),
    "shared expert's gate dropped": ("experts", scaled_leaf("moe/shared_router", 0)),
}


@pytest.fixture(scope="session")
def right_programs():
    """The compiled right program of each case: mutations of weights and rows need no other."""
    return {case: our_program(CASES[case]) for case in {case for case, _ in MUTATIONS.values()}}


@pytest.mark.parametrize("name", MUTATIONS)
def test_wrong_weights_configs_and_rows_are_caught(oracle, right_programs, name):
    case, change = MUTATIONS[name]
    _, params, rows, reference = oracle(case)
    cfg, params, wrong_rows = change(CASES[case], params, rows)
    program = right_programs[case] if cfg == CASES[case] else None
    assert_caught(errors(our_answer(cfg, params, wrong_rows, program), reference, rows.real_BT))


def assert_caught(found: dict[str, float]) -> None:
    missed = {name: error for name, error in found.items()
              if name != "loss" and not error > FACTOR * TOLERANCE[name]}
    assert not missed, f"the comparison would hardly notice: {missed} of {found}"


def larger_scores(q_BTNH, *args, real=attention._scores, **fields):
    return real(q_BTNH * np.float32(1.1), *args, **fields)


def sees_the_next_token(query_slots_BT, *args, real=attention._visible):
    return real(query_slots_BT + 1, *args)


def interleaved_rope(x_BTNH, cos_BTh, sin_BTh, real=model_attention.apply_rope):
    pairs = x_BTNH.reshape(*x_BTNH.shape[:-1], -1, 2)
    turned = real(jnp.concatenate([pairs[..., 0], pairs[..., 1]], -1), cos_BTh, sin_BTh)
    return jnp.stack(jnp.split(turned, 2, -1), -1).reshape(x_BTNH.shape)


def backward_rope(x_BTNH, cos_BTh, sin_BTh, real=model_attention.apply_rope):
    """Keys turn the wrong way: queries have twice as many heads here."""
    return real(x_BTNH, cos_BTh, sin_BTh if x_BTNH.shape[2] == 4 else -sin_BTh)


def weights_in_reverse(*args, real=experts.route, **fields):
    weight_Rk, expert_Rk, probability_RE = real(*args, **fields)
    return weight_Rk[:, ::-1], expert_Rk, probability_RE


def norm_off_by_a_hundredth(x_xD, scale_D, eps, real=norm.rms_norm):
    return real(x_xD, scale_D, eps) * np.float32(1.01)


CODE = {
    "attention's scale off by a tenth": ("grouped_query", "qwen2_jax.ops.attention._scores", larger_scores),
    "the next token is seen": ("grouped_query", "qwen2_jax.ops.attention._visible", sees_the_next_token),
    "interleaved halves of a head": ("grouped_query", "qwen2_jax.model.attention.apply_rope", interleaved_rope),
    "keys turned backwards": ("grouped_query", "qwen2_jax.model.attention.apply_rope", backward_rope),
    "expert weights in another order": ("experts", "qwen2_jax.model.moe.route", weights_in_reverse),
    "norms off by a hundredth": ("grouped_query", "qwen2_jax.model.decoder.rms_norm", norm_off_by_a_hundredth),
}


@pytest.mark.parametrize("name", CODE)
def test_wrong_code_is_caught(oracle, monkeypatch, name):
    case, target, wrong = CODE[name]
    monkeypatch.setattr(target, wrong)
    _, params, rows, reference = oracle(case)
    assert_caught(errors(our_answer(CASES[case], params, rows), reference, rows.real_BT))
