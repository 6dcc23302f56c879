"""What each remat policy keeps for the backward pass."""

from __future__ import annotations

import contextlib
import io
import re

import jax
import jax.numpy as jnp
import pytest
from jax.ad_checkpoint import print_saved_residuals

from qwen2_jax.model.decoder import Decoder, init_params
from tests.model.test_decoder import CONFIGS, whole_rows


def kept_sizes(name: str, remat: str) -> set[tuple[int, ...]]:
    cfg = CONFIGS[name]
    ids, *_ = whole_rows(0)
    params = jax.eval_shape(lambda: init_params(cfg, jax.random.key(0)))

    def loss(params):
        return jnp.sum(Decoder(cfg, remat=remat).apply({"params": params}, ids).x_BTD)

    with contextlib.redirect_stdout(io.StringIO()) as out:
        print_saved_residuals(loss, params)
    kept = [line for line in out.getvalue().splitlines() if "from the argument" not in line]
    return {tuple(map(int, re.findall(r"\d+", line[line.index("["):line.index("]")]))) for line in kept}


@pytest.mark.parametrize("name", CONFIGS)
def test_policies(name):
    """`full` keeps blocks' inputs; `dots` the products with weights too; neither keeps attention's [.., T, T]."""
    cfg = CONFIGS[name]
    full, dots, none = (kept_sizes(name, remat) for remat in ("full", "dots", "none"))
    width = cfg.d_ff if cfg.moe is None else cfg.moe.d_expert
    layers, queries = cfg.layers, cfg.heads * cfg.head_dim

    def holds(kept, last: int) -> bool:
        return any(len(s) > 2 and s[0] == layers and s[-1] == last for s in kept)

    def holds_scores(kept) -> bool:
        return any(s[-4:] == (2, cfg.kv_heads, cfg.group * 12, 12) for s in kept)

    assert holds(full, cfg.d_model) and not holds(full, queries) and not holds(full, width)
    assert holds(dots, queries) and holds(dots, width)
    assert holds_scores(none) and not holds_scores(full) and not holds_scores(dots)
