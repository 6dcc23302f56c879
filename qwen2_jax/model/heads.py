"""What sits on the last hidden state: the vocabulary, the linear score, or Qwen2-Math-RM's two layers."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from qwen2_jax.config import ModelConfig
from qwen2_jax.model.params import normal, weight, zeros
from qwen2_jax.ops.dot import linear, matmul
from qwen2_jax.sharding.axes import Axes
from qwen2_jax.sharding.rules import Rules
from qwen2_jax.sharding.split import Split


def table(module: Any):
    """The module's parameter "table" [vocab, D]: this device's rows, for `ops.vocab`."""
    cfg = module.cfg
    spread = vocab_split(cfg, module.ax).spread
    return weight(module, "table", (cfg.vocab, cfg.d_model), ("vocab", "embed"), normal(cfg.init_std), spread)


def vocab_split(cfg: ModelConfig, ax: Axes) -> Split:
    """How the rows of a table [vocab, D] lie on the mesh."""
    rules = Rules.of(cfg, ax)
    return Split(ax, rules.split_over("vocab"), rules.gathered(("vocab", "embed"), (cfg.vocab, cfg.d_model))[0])


class Head(nn.Module):
    """Declares the head's parameters and returns this device's view of them, by name; `cfg.head` says which."""

    cfg: ModelConfig
    ax: Axes
    dtype: Any

    @nn.compact
    def __call__(self) -> dict[str, jax.Array]:
        cfg, D, init = self.cfg, self.cfg.d_model, normal(self.cfg.init_std)
        if cfg.head == "lm":
            return {"table": table(self)}
        if cfg.head == "score":
            return {"weight": weight(self, "weight", (cfg.labels, D), ("label", "embed"), init)}
        return {"dense1": weight(self, "dense1", (D, D), ("hidden", "embed"), init),
                "dense1_bias": weight(self, "dense1_bias", (D,), ("hidden",), zeros),
                "dense2": weight(self, "dense2", (1, D), ("label", "hidden"), init),
                "dense2_bias": weight(self, "dense2_bias", (1,), ("label",), zeros)}


def score(x_BD, head: dict[str, jax.Array]):
    """Scores float32 [B, labels] (`reward`: [B, 1]) of the last token's hidden state under the model's head.

    `reward` is Linear → ReLU → Linear with biases (Qwen2-Math-RM-72B; Qwen2.5-Math report, section 3.2).
    """
    if "weight" in head:
        return matmul(x_BD, head["weight"])
    hidden_BD = jax.nn.relu(linear(x_BD, head["dense1"], head["dense1_bias"]))
    return matmul(hidden_BD, head["dense2"]) + head["dense2_bias"].astype(jnp.float32)[None]
