"""The fields of `config.json`, sorted: what is implemented, what is inert, what is refused by name.

A field that no table knows is passed over with a warning when it is null or false, and refused otherwise, unless the
caller ignores it by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qwen2_jax.checkpoint.json_fields import Fields, Leftovers
from qwen2_jax.config import HeadKind
from qwen2_jax.errors import UserError

IMPLEMENTED = frozenset("""
    architectures model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads head_dim hidden_act max_position_embeddings initializer_range rms_norm_eps tie_word_embeddings
    rope_theta rope_scaling rope_parameters original_max_position_embeddings
    use_sliding_window sliding_window max_window_layers layer_types dual_chunk_attention_config
    bos_token_id eos_token_id pad_token_id dtype torch_dtype attention_dropout auto_map id2label num_labels
""".split())

IMPLEMENTED_MOE = frozenset("""
    num_experts num_experts_per_tok moe_intermediate_size shared_expert_intermediate_size norm_topk_prob
    router_aux_loss_coef decoder_sparse_step mlp_only_layers
""".split())

# Nothing that this package computes depends on them.
INERT = frozenset("""
    transformers_version _name_or_path name_or_path _commit_hash unsloth_version unsloth_fixed
    use_cache return_dict return_dict_in_generate output_hidden_states output_attentions output_scores
    output_router_logits label2id problem_type finetuning_task task_specific_params tokenizer_class
    attn_implementation _attn_implementation _attn_implementation_autoset _experts_implementation
    gradient_checkpointing chunk_size_feed_forward torchscript is_decoder use_bfloat16
""".split()) | frozenset("""
    max_length max_new_tokens min_length do_sample temperature top_k top_p typical_p repetition_penalty
    length_penalty num_beams num_beam_groups num_return_sequences no_repeat_ngram_size early_stopping
""".split())     # transformers 5 leaves these to generation_config.json too

# Field: the values that ask for nothing, and what is supported instead of the others.
REFUSED: dict[str, tuple[tuple[object, ...], str]] = {
    "quantization_config": ((None,), "weights in float32, bfloat16 or float16, so take the unquantised checkpoint"),
    "compression_config": ((None,), "weights in float32, bfloat16 or float16, so take the unquantised checkpoint"),
    "use_mrope": ((None, False), "rotary embedding of one position a token"),
    "is_causal": ((True,), "true, causal attention; transformers reads null as false"),
    "qkv_bias": ((True,), "true, query, key and value projections with a bias"),
    "partial_rotary_factor": ((None, 1, 1.0), "1, every dimension of a head is rotated"),
    "is_encoder_decoder": ((None, False), "decoder-only models"),
    "per_layer_config": ((None,), "layers of one configuration"),
}

MODEL_TYPES = {"qwen2": "Qwen2", "qwen2_moe": "Qwen2Moe"}
ARCHITECTURES: dict[str, tuple[str, HeadKind]] = {
    "Qwen2ForCausalLM": ("qwen2", "lm"),
    "Qwen2MoeForCausalLM": ("qwen2_moe", "lm"),
    "Qwen2ForSequenceClassification": ("qwen2", "score"),
    "Qwen2MoeForSequenceClassification": ("qwen2_moe", "score"),
    "Qwen2ForRewardModel": ("qwen2", "reward"),
    "Qwen2Model": ("qwen2", "lm"),          # only with tied embeddings: they are its vocabulary head then
    "Qwen2MoeModel": ("qwen2_moe", "lm"),
}
HEADLESS = ("Qwen2Model", "Qwen2MoeModel")

# The published reward models carry their class as code beside the weights, and name it so.
REWARD_AUTO_MAP = {
    "AutoConfig": "configuration_qwen2_rm.Qwen2RMConfig",
    "AutoModel": "modeling_qwen2_rm.Qwen2ForRewardModel",
}
HIDDEN_ACTS = ("silu", "swish")     # two names of x * sigmoid(x)
DEFAULT_LABELS = 2                  # transformers does not write id2label when there are two unnamed labels
MAX_LABELS = 100_000


def implemented_fields(config: Mapping[str, Any], leftovers: Leftovers) -> dict[str, Any]:
    """The fields that are read; the others are refused or passed over."""
    fields = Fields(config)
    model_type = fields.text("model_type")
    if model_type not in MODEL_TYPES:
        raise fields.refuse("model_type", ", ".join(MODEL_TYPES))
    used = IMPLEMENTED | IMPLEMENTED_MOE if model_type == "qwen2_moe" else IMPLEMENTED
    for name in leftovers.ignore:
        if name in used and name != "auto_map":
            raise UserError(f"{name} cannot be ignored: the model depends on it")
    asked = set(leftovers.ignore)
    for name, (harmless, supported) in REFUSED.items():
        if name in config and name not in asked:
            if not any(type(config[name]) is type(value) and config[name] == value for value in harmless):
                raise fields.refuse(name, supported)
    leftovers.sort(fields, used=(used | INERT | REFUSED.keys()) - asked)
    return {name: value for name, value in config.items() if name in used - asked}
