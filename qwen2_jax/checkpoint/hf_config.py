"""`config.json` of Hugging Face's Qwen2 models, both ways, with the meaning that transformers 5.23 gives it.

`hf_table.py` says which fields are implemented, inert or refused. A field may be absent where both major versions of
transformers agree on a default that means "off"; sizes, `rms_norm_eps` and `rope_theta` must be stated.

transformers 4 applies a window to every layer of a mixture-of-experts model, transformers 5 to those of `layer_types`:
such a model, of which none is published, cannot be written so that both agree.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from qwen2_jax.checkpoint.hf_rope import read_rope, write_rope
from qwen2_jax.checkpoint.hf_table import (
    ARCHITECTURES,
    DEFAULT_LABELS,
    HEADLESS,
    HIDDEN_ACTS,
    MAX_LABELS,
    MODEL_TYPES,
    REWARD_AUTO_MAP,
    implemented_fields,
)
from qwen2_jax.checkpoint.json_fields import Fields, Leftovers, disagreement, is_whole, read_object, shown
from qwen2_jax.config import (
    LAYER_TYPES,
    QWEN2_VOCABS,
    DualChunkConfig,
    HeadKind,
    ModelConfig,
    MoeConfig,
    RopeWhen,
    WindowConfig,
)
from qwen2_jax.errors import UserError

log = logging.getLogger(__name__)


def read_config(
    folder_or_file: str | Path, *, ignore: Collection[str] = (), rope_when: RopeWhen = "always",
) -> ModelConfig:
    """`from_hf` of a `config.json`, given by its own path or by its folder's.

    Raises:
      UserError: there is no such file, it is not a JSON object, or `from_hf` refuses it.
    """
    path = Path(folder_or_file)
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        problem = "is no regular file" if path.exists() else "does not exist"
        raise UserError(f"{path} {problem}; a folder with a Hugging Face config.json is needed")
    return from_hf(read_object(path), ignore=ignore, where=str(path), rope_when=rope_when)


def from_hf(
    config: Mapping[str, Any], *,
    ignore: Collection[str] = (), where: str = "config.json", rope_when: RopeWhen = "always",
) -> ModelConfig:
    """The model that a `config.json` describes.

    Args:
      config: the parsed file; it is not changed.
      ignore: names of fields to pass over though they are unknown or refused.
      where: what messages call the file.
      rope_when: when scaled rotary embedding applies (`RopeConfig.when`); files cannot say it.

    Raises:
      UserError: a field that is missing, unknown, not supported, of the wrong type or range, or at odds with another.
    """
    try:
        if not isinstance(config, Mapping):
            raise UserError(f"an object is needed, found {shown(config)}")
        leftovers = Leftovers(ignore)
        cfg = _read(Fields(implemented_fields(config, leftovers)), leftovers, rope_when)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    leftovers.notes += [f"{name} was to be ignored, but is not there" for name in leftovers.missed()]
    if leftovers.notes:
        log.warning("%s: %s", where, "; ".join(leftovers.notes))
    return cfg


def to_hf(cfg: ModelConfig) -> dict[str, Any]:
    """The `config.json` of a model, in the spellings of transformers 4 and of transformers 5 at once.

    `from_hf` of it gives `cfg` back, but for `rope.when`, and for a `layer_types` that only repeats the rule.
    """
    window = cfg.window
    out: dict[str, Any] = {
        "architectures": [_architecture(cfg)],
        "attention_dropout": 0.0,
        "bos_token_id": cfg.bos_id,
        "dtype": cfg.dtype,
        "eos_token_id": cfg.eos_ids[0] if len(cfg.eos_ids) == 1 else list(cfg.eos_ids) or None,
        "hidden_act": "silu",
        "hidden_size": cfg.d_model,
        "initializer_range": cfg.init_std,
        "intermediate_size": cfg.d_ff,
        "max_position_embeddings": cfg.max_position,
        "max_window_layers": window.max_window_layers,
        "model_type": _model_type(cfg),
        "num_attention_heads": cfg.heads,
        "num_hidden_layers": cfg.layers,
        "num_key_value_heads": cfg.kv_heads,
        "pad_token_id": cfg.pad_id,
        "rms_norm_eps": cfg.norm_eps,
        "sliding_window": window.size,
        "tie_word_embeddings": cfg.tied,
        "torch_dtype": cfg.dtype,
        "use_cache": True,
        "use_sliding_window": window.enabled,
        "vocab_size": cfg.vocab,
        **write_rope(cfg.rope),
    }
    if cfg.head_dim * cfg.heads != cfg.d_model:
        out["head_dim"] = cfg.head_dim
    if window.enabled:
        # Written out, since the rules of older releases differ from today's.
        out["layer_types"] = [LAYER_TYPES[windowed] for windowed in cfg.windowed_layers()]
    if cfg.moe is not None:
        out |= _write_moe(cfg.moe)
    if cfg.dual_chunk is not None:
        chunk = cfg.dual_chunk
        out["dual_chunk_attention_config"] = {"chunk_size": chunk.chunk_size, "local_size": chunk.local_size,
                                              "original_max_position_embeddings": chunk.original_max_position}
    if cfg.head == "score":
        names = cfg.label_names or tuple(f"LABEL_{i}" for i in range(cfg.labels))
        out["id2label"] = {str(i): name for i, name in enumerate(names)}
        out["label2id"] = {name: i for i, name in enumerate(names)}
    elif cfg.head == "reward":
        out["auto_map"] = dict(REWARD_AUTO_MAP)
    return dict(sorted(out.items()))


def generation_config(cfg: ModelConfig) -> dict[str, Any]:
    """The least `generation_config.json` of a model: its special ids, with every id that ends a generation."""
    out: dict[str, Any] = {}
    if cfg.bos_id is not None:
        out["bos_token_id"] = cfg.bos_id
    if cfg.stop_ids:
        out["eos_token_id"] = list(cfg.stop_ids)
    # Qwen2 pads with <|endoftext|>, which its config.json does not say.
    pad = cfg.stop_ids[-1] if cfg.pad_id is None and cfg.vocab in QWEN2_VOCABS and cfg.stop_ids else cfg.pad_id
    if pad is not None:
        out["pad_token_id"] = pad
    return out


def _read(fields: Fields, leftovers: Leftovers, rope_when: RopeWhen) -> ModelConfig:
    model_type = fields.text("model_type")
    tied = fields.flag("tie_word_embeddings", False)
    head = _read_head(fields, model_type, tied)
    if fields.text("hidden_act", "silu") not in HIDDEN_ACTS:
        raise fields.refuse("hidden_act", " or ".join(HIDDEN_ACTS))
    if fields.number("attention_dropout", 0.0) != 0:
        leftovers.notes.append("attention_dropout acts in training only and is not implemented: it is taken as 0")
    labels, label_names = _read_labels(fields) if head == "score" else (1, None)
    max_position = fields.whole("max_position_embeddings")
    vocab, heads, d_model = (fields.whole(name) for name in ("vocab_size", "num_attention_heads", "hidden_size"))
    cfg = ModelConfig(
        vocab=vocab, layers=fields.whole("num_hidden_layers"), d_model=d_model, d_ff=fields.whole("intermediate_size"),
        heads=heads, kv_heads=_read_kv_heads(fields, heads), head_dim=_read_head_dim(fields, d_model, heads),
        tied=tied, norm_eps=fields.number("rms_norm_eps"), max_position=max_position,
        rope=read_rope(fields, leftovers, max_position=max_position, when=rope_when),
        moe=_read_moe(fields) if model_type == "qwen2_moe" else None,
        dual_chunk=_read_dual_chunk(fields, leftovers),
        head=head, labels=labels, label_names=label_names,
        init_std=fields.number("initializer_range", 0.02),
        bos_id=_read_id(fields, "bos_token_id"), eos_ids=_read_eos_ids(fields), pad_id=_read_id(fields, "pad_token_id"),
        dtype=_read_dtype(fields),
    )
    outside = [i for i in (cfg.bos_id, cfg.pad_id, *cfg.eos_ids) if i is not None and i >= cfg.vocab]
    if outside:
        leftovers.notes.append(f"special token id {outside[0]} lies outside vocab_size {cfg.vocab}")
    return dataclasses.replace(cfg, window=_read_window(fields, cfg, leftovers))


def _read_head(fields: Fields, model_type: str, tied: bool) -> HeadKind:
    names = fields.list_of(str, "architectures", None) or (f"{MODEL_TYPES[model_type]}ForCausalLM",)
    kind, head = ARCHITECTURES.get(names[0], (None, "lm"))
    if len(names) > 1 or kind != model_type:
        wanted = [name for name, (other, _) in ARCHITECTURES.items() if other == model_type]
        raise fields.refuse("architectures", f"for model_type {model_type} one of {', '.join(wanted)}")
    if names[0] in HEADLESS and not tied:
        raise UserError(f"architectures is {names[0]}, which has no head, and tie_word_embeddings is false; "
                        "supported: a model with a head, or with tied embeddings")
    code = fields.object("auto_map", None)
    if code and not (head == "reward" and str(code.get("AutoModel", "")).endswith("Qwen2ForRewardModel")):
        raise fields.refuse("auto_map", "architectures of transformers itself; the code it names is not run")
    return head


def _read_labels(fields: Fields) -> tuple[int, tuple[str, ...] | None]:
    by_id, count = fields.object("id2label", None), fields.whole("num_labels", None)
    if by_id is None:
        count = DEFAULT_LABELS if count is None else count
        if not 0 < count <= MAX_LABELS:
            raise fields.refuse("num_labels", f"1 to {MAX_LABELS}")
        return count, None
    names = tuple(by_id.get(str(i)) for i in range(len(by_id)))
    if not names or len(names) > MAX_LABELS or not all(isinstance(name, str) for name in names):
        raise fields.refuse("id2label", f"strings under the keys 0, 1, 2, and so on, at most {MAX_LABELS}")
    if count not in (None, len(names)):
        raise disagreement("num_labels", count, "the number of labels in id2label", len(names))
    standard = all(name == f"LABEL_{i}" for i, name in enumerate(names))
    return len(names), None if standard else names


def _read_kv_heads(fields: Fields, heads: int) -> int:
    if "num_key_value_heads" in fields.data and not fields.has("num_key_value_heads"):
        return heads        # null is transformers' way to say one key-value head a query head
    return fields.whole("num_key_value_heads")


def _read_head_dim(fields: Fields, d_model: int, heads: int) -> int:
    if fields.has("head_dim"):
        return fields.whole("head_dim")
    if heads <= 0 or d_model % heads:
        raise UserError(f"hidden_size {d_model} is not a multiple of num_attention_heads {heads}, and there is no "
                        "head_dim; supported: a multiple, or a head_dim")
    return d_model // heads


def _read_moe(fields: Fields) -> MoeConfig:
    dense = fields.list_of(int, "mlp_only_layers", ())
    if any(layer < 0 for layer in dense):
        raise fields.refuse("mlp_only_layers", "layers counted from 0")
    return MoeConfig(
        experts=fields.whole("num_experts"), top_k=fields.whole("num_experts_per_tok"),
        d_expert=fields.whole("moe_intermediate_size"), d_shared=fields.whole("shared_expert_intermediate_size"),
        norm_topk_prob=fields.flag("norm_topk_prob", False), aux_loss_coef=fields.number("router_aux_loss_coef", 0.001),
        sparse_step=fields.whole("decoder_sparse_step", 1), dense_layers=dense,
    )


def _write_moe(moe: MoeConfig) -> dict[str, Any]:
    return {
        "decoder_sparse_step": moe.sparse_step,
        "mlp_only_layers": list(moe.dense_layers),
        "moe_intermediate_size": moe.d_expert,
        "norm_topk_prob": moe.norm_topk_prob,
        "num_experts": moe.experts,
        "num_experts_per_tok": moe.top_k,
        "output_router_logits": False,
        "qkv_bias": True,
        "router_aux_loss_coef": moe.aux_loss_coef,
        "shared_expert_intermediate_size": moe.d_shared,
    }


def _read_window(fields: Fields, cfg: ModelConfig, leftovers: Leftovers) -> WindowConfig:
    """The window as stated, but for a `layer_types` that says what the rule says anyway."""
    enabled = fields.flag("use_sliding_window", False)
    if enabled and "sliding_window" not in fields.data:
        raise UserError("sliding_window is missing while use_sliding_window is true; needed: a size, or null for none")
    plain = WindowConfig(enabled=enabled, size=fields.whole("sliding_window", None),
                         max_window_layers=fields.whole("max_window_layers", 28))     # transformers' default
    kinds = fields.list_of(str, "layer_types", None)
    if kinds is None:
        return plain
    explicit = dataclasses.replace(plain, layer_types=kinds)
    stated, by_rule = (dataclasses.replace(cfg, window=window).windowed_layers() for window in (explicit, plain))
    if "sliding_attention" in kinds and not plain.active:
        leftovers.notes.append("layer_types names sliding_attention, but use_sliding_window or sliding_window is off: "
                               "every layer attends to all positions")
    return plain if stated == by_rule else explicit


def _read_dual_chunk(fields: Fields, leftovers: Leftovers) -> DualChunkConfig | None:
    stated = fields.object("dual_chunk_attention_config", None)
    if stated is None:
        return None
    inner = Fields(stated, "dual_chunk_attention_config.")
    leftovers.sort(inner, used=("chunk_size", "local_size", "original_max_position_embeddings"))
    return DualChunkConfig(chunk_size=inner.whole("chunk_size"), local_size=inner.whole("local_size"),
                           original_max_position=inner.whole("original_max_position_embeddings"))


def _read_id(fields: Fields, name: str) -> int | None:
    value = fields.whole(name, None)
    if value is not None and value < 0:
        raise fields.refuse(name, "ids from 0, or null")
    return value


def _read_eos_ids(fields: Fields) -> tuple[int, ...]:
    value = fields.data.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(is_whole(i) and i >= 0 for i in ids):
        raise fields.refuse("eos_token_id", "an id from 0, a list of them, or null")
    return tuple(ids)


def _read_dtype(fields: Fields) -> str:
    """`torch_dtype` is transformers 4's name, `dtype` that of 5; where neither stands, torch's default does."""
    new, old = (fields.text(name, None) for name in ("dtype", "torch_dtype"))
    new, old = (name and name.removeprefix("torch.") for name in (new, old))
    if new is not None and old is not None and new != old:
        raise disagreement("dtype", new, "torch_dtype", old)
    return new or old or "float32"


def _model_type(cfg: ModelConfig) -> str:
    return "qwen2" if cfg.moe is None else "qwen2_moe"


def _architecture(cfg: ModelConfig) -> str:
    for name, (model_type, head) in ARCHITECTURES.items():
        if (model_type, head) == (_model_type(cfg), cfg.head):
            return name
    raise UserError(f"no architecture of Hugging Face is a {_model_type(cfg)} model with head '{cfg.head}'")
