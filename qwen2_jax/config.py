"""What a Qwen2 model is: frozen dataclasses, one per concern. Standard library only.

Reading and writing Hugging Face's `config.json` lives in `checkpoint/hf_config.py`; every published model is in
`presets.py`; what a config says about shapes and counts is in `shapes.py`.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

from qwen2_jax.errors import UserError

RopeKind = Literal["default", "linear", "yarn"]
RopeWhen = Literal["always", "long"]
HeadKind = Literal["lm", "score", "reward"]
Remat = Literal["full", "attention", "dots", "none"]
"""What a training step keeps of the forward pass; `model.decoder.Decoder` says what each means."""

DTYPES = ("float32", "bfloat16", "float16")
LAYER_TYPES = ("full_attention", "sliding_attention")
QWEN2_STOP_IDS = (151645, 151643)   # <|im_end|> ends a turn, <|endoftext|> a document
# 151,643 words and 3 control tokens; the published tables are padded to 151,936 or 152,064 rows.
QWEN2_VOCABS = range(151646, 152064 + 1)

MAX_LAYERS = 10_000
MAX_SIZE = 2**31 - 1    # a longer axis cannot be indexed by int32, which all of JAX's index arithmetic here is


def _need(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def _need_size(name: str, value: object) -> None:
    is_size = isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MAX_SIZE
    _need(is_size, f"{name} must be a positive whole number below 2**31, found {value!r}")


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding. `factor` and what follows matter to `linear` and `yarn` only.

    `when="long"` keeps plain RoPE for a request whose prompt and new tokens fit `original_max_position`, and scales
    only longer ones; `"always"` is the static rule of transformers and vLLM.
    """

    theta: float
    kind: RopeKind = "default"
    factor: float = 1.0
    original_max_position: int | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    when: RopeWhen = "always"

    def __post_init__(self):
        _need(self.kind in ("default", "linear", "yarn"),
              f"rope_type {self.kind!r} is not supported: default, linear, yarn are")
        _need(self.when in ("always", "long"), f"rope_when {self.when!r} is not supported: always, long are")
        _need(0 < self.theta < math.inf, f"rope_theta must be a positive number, found {self.theta}")
        if self.original_max_position is not None:
            _need_size("original_max_position_embeddings", self.original_max_position)
        if self.kind == "default":
            return
        _need(1 <= self.factor < math.inf, f"rope factor must be a number of at least 1, found {self.factor}")
        if self.kind == "yarn" or self.when == "long":
            _need(self.original_max_position is not None,
                  f"rope_type {self.kind} with rope_when {self.when} needs original_max_position_embeddings")
        if self.kind == "yarn":
            _need(self.theta > 1, f"yarn needs rope_theta above 1, found {self.theta}")
            _need(0 < self.beta_slow <= self.beta_fast < math.inf,
                  f"yarn needs 0 < beta_slow <= beta_fast, found {self.beta_slow} and {self.beta_fast}")


@dataclass(frozen=True, kw_only=True)
class MoeConfig:
    """Sparse mixture-of-experts block with one shared expert (Qwen2 report, section 2.2.2).

    Layer i is sparse when it is not in `dense_layers` and (i + 1) % `sparse_step` == 0.
    """

    experts: int
    top_k: int
    d_expert: int
    d_shared: int
    norm_topk_prob: bool = False
    aux_loss_coef: float = 0.001
    sparse_step: int = 1
    dense_layers: tuple[int, ...] = ()

    def __post_init__(self):
        _need_size("num_experts", self.experts)
        _need(1 <= self.top_k <= self.experts,
              f"num_experts_per_tok {self.top_k} must lie between 1 and num_experts {self.experts}")
        _need_size("moe_intermediate_size", self.d_expert)
        _need_size("shared_expert_intermediate_size", self.d_shared)
        _need(self.sparse_step >= 1, f"decoder_sparse_step must be at least 1, found {self.sparse_step}")
        _need(0 <= self.aux_loss_coef < math.inf,
              f"router_aux_loss_coef must be a number of at least 0, found {self.aux_loss_coef}")


@dataclass(frozen=True, kw_only=True)
class WindowConfig:
    """Sliding-window attention as Hugging Face's files state it; `ModelConfig.windowed_layers` applies the rule.

    A windowed query at position i sees the keys at positions i - size + 1 to i. `size` 0 or None, or `enabled` false,
    means full attention everywhere. An explicit `layer_types` wins over the rule that `max_window_layers` gives.
    """

    enabled: bool = False
    size: int | None = None
    max_window_layers: int = 0
    layer_types: tuple[str, ...] | None = None

    def __post_init__(self):
        _need(self.size is None or self.size >= 0, f"sliding_window must not be negative, found {self.size}")
        _need(self.max_window_layers >= 0, f"max_window_layers must not be negative, found {self.max_window_layers}")
        for kind in self.layer_types or ():
            _need(kind in LAYER_TYPES, f"layer_types entry {kind!r} is not supported: {', '.join(LAYER_TYPES)} are")

    @property
    def active(self) -> bool:
        """Whether any layer may be windowed at all."""
        return self.enabled and bool(self.size)


@dataclass(frozen=True, kw_only=True)
class DualChunkConfig:
    """Dual chunk attention of the 1M models: the identity up to `chunk_size` tokens, and no longer request is taken."""

    chunk_size: int
    local_size: int
    original_max_position: int

    def __post_init__(self):
        for name, value in (("chunk_size", self.chunk_size), ("local_size", self.local_size),
                            ("original_max_position_embeddings", self.original_max_position)):
            _need_size(f"dual_chunk_attention_config.{name}", value)
        _need(self.local_size < self.chunk_size, "dual_chunk_attention_config: local_size must be below chunk_size, "
              f"found {self.local_size} and {self.chunk_size}")


@dataclass(frozen=True)
class LayerRun:
    """Consecutive layers of one kind; they share one stack of parameters named `layers_{start}`."""

    start: int
    length: int
    sparse: bool

    @property
    def name(self) -> str:
        return f"layers_{self.start}"

    @property
    def layers(self) -> range:
        return range(self.start, self.start + self.length)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One decoder of the Qwen2 family. Nothing that changes the numbers has a default.

    `head` is what sits on the last hidden state: `lm` the vocabulary head; `score` the bias-free linear layer of
    `Qwen2ForSequenceClassification`, with `labels` rows named `label_names` (None: LABEL_0, LABEL_1, …); `reward` the
    two-layer head of Qwen2-Math-RM. `dtype` is what a checkpoint stores its weights in.
    """

    vocab: int
    layers: int
    d_model: int
    d_ff: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool
    norm_eps: float
    rope: RopeConfig
    max_position: int
    window: WindowConfig = WindowConfig()
    moe: MoeConfig | None = None
    dual_chunk: DualChunkConfig | None = None
    head: HeadKind = "lm"
    labels: int = 1
    label_names: tuple[str, ...] | None = None
    init_std: float = 0.02
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None
    dtype: str = "bfloat16"

    def __post_init__(self):
        sizes = ("vocab", "layers", "d_model", "d_ff", "heads", "kv_heads", "head_dim", "max_position", "labels")
        for name in sizes:
            _need_size(HF_FIELD.get(name, name), getattr(self, name))
        # A depth that no machine could hold would otherwise be met as a loop that does not end.
        _need(self.layers <= MAX_LAYERS, f"num_hidden_layers must be at most {MAX_LAYERS}, found {self.layers}")
        _need(self.heads % self.kv_heads == 0,
              f"num_attention_heads {self.heads} is not a multiple of num_key_value_heads {self.kv_heads}")
        _need(self.head_dim % 2 == 0, f"head_dim must be even for rotary embedding, found {self.head_dim}")
        _need(0 <= self.norm_eps < math.inf, f"rms_norm_eps must be a number of at least 0, found {self.norm_eps}")
        _need(0 <= self.init_std < math.inf, f"initializer_range must be a number of at least 0, found {self.init_std}")
        _need(self.head in ("lm", "score", "reward"), f"head {self.head!r} is not supported: lm, score, reward are")
        _need(self.dtype in DTYPES, f"dtype {self.dtype!r} is not supported: {', '.join(DTYPES)} are")
        if self.label_names is not None:
            _need(len(self.label_names) == self.labels,
                  f"id2label names {len(self.label_names)} labels where num_labels is {self.labels}")
        if self.window.layer_types is not None:
            _need(len(self.window.layer_types) == self.layers,
                  f"layer_types has {len(self.window.layer_types)} entries for num_hidden_layers {self.layers}")

    @property
    def group(self) -> int:
        """Query heads that share one key-value head."""
        return self.heads // self.kv_heads

    @property
    def tied_head(self) -> bool:
        return self.tied and self.head == "lm"

    @property
    def longest_context(self) -> int:
        """Tokens that a sequence may have: `max_position`, or what YaRN stretches the original context to; with dual
        chunk attention no more than one chunk."""
        if self.dual_chunk:
            return min(self.max_position, self.dual_chunk.chunk_size)
        if self.rope.kind == "yarn" and self.rope.original_max_position:
            return max(self.max_position, int(self.rope.factor * self.rope.original_max_position))
        return self.max_position

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end a generation: both of Qwen2's where the vocabulary is Qwen2's, else `eos_ids`.

        A published config.json names only one of the two, and for Qwen2-57B-A14B-Instruct the wrong one for its turns.
        """
        is_qwen2 = self.vocab in QWEN2_VOCABS and set(self.eos_ids) <= set(QWEN2_STOP_IDS)
        return QWEN2_STOP_IDS if is_qwen2 else self.eos_ids

    def is_sparse(self, layer: int) -> bool:
        moe = self.moe
        return moe is not None and layer not in moe.dense_layers and (layer + 1) % moe.sparse_step == 0

    def layer_runs(self, *, stacked: bool = True) -> tuple[LayerRun, ...]:
        """Layers in order, grouped into runs of equal kind; `stacked=False` gives one run a layer.

        Stacked runs are scanned: one compiled layer whatever the depth, which suits accelerators. XLA for CPU copies
        each layer's slice out of a stack before it multiplies, four times slower at decoding (docs/architecture.md),
        so CPU programs use one run a layer.
        """
        runs: list[LayerRun] = []
        for i in range(self.layers):
            sparse = self.is_sparse(i)
            if stacked and runs and runs[-1].sparse == sparse:
                runs[-1] = dataclasses.replace(runs[-1], length=runs[-1].length + 1)
            else:
                runs.append(LayerRun(i, 1, sparse))
        return tuple(runs)

    def windowed_layers(self) -> tuple[bool, ...]:
        """Whether each layer attends within `window.size` only, by transformers' rules (dense and MoE differ)."""
        w = self.window
        if not w.active:
            return (False,) * self.layers
        if w.layer_types is not None:
            return tuple(kind == "sliding_attention" for kind in w.layer_types)
        if self.moe is None:
            return tuple(i >= w.max_window_layers for i in range(self.layers))
        return tuple(bool((i + 1) % 2) and i < w.max_window_layers for i in range(self.layers))


HF_FIELD = {
    "vocab": "vocab_size", "layers": "num_hidden_layers", "d_model": "hidden_size", "d_ff": "intermediate_size",
    "heads": "num_attention_heads", "kv_heads": "num_key_value_heads", "head_dim": "head_dim",
    "max_position": "max_position_embeddings", "labels": "num_labels",
}
