"""Every published model of the family as data, under its published name. Standard library only.

Shapes stand in `SIZES`, what differs between the models of one size in `PRESETS`. No published model switches its
sliding window on; the sizes of the windows are kept because `config.json` states them.
"""

from __future__ import annotations

import difflib
from typing import NamedTuple

from qwen2_jax.config import DualChunkConfig, HeadKind, ModelConfig, MoeConfig, RopeConfig, WindowConfig
from qwen2_jax.errors import UserError


class Size(NamedTuple):
    d_model: int
    layers: int
    heads: int
    kv_heads: int
    d_ff: int
    vocab: int
    tied: bool = False
    moe: MoeConfig | None = None


SMALL_VOCAB, LARGE_VOCAB = 151936, 152064

SIZES = {
    # Qwen1.5; all but 32B and 110B have one key-value head a query head
    "1.5-0.5B": Size(1024, 24, 16, 16, 2816, SMALL_VOCAB, tied=True),
    "1.5-1.8B": Size(2048, 24, 16, 16, 5504, SMALL_VOCAB),
    "1.5-4B": Size(2560, 40, 20, 20, 6912, SMALL_VOCAB),
    "1.5-7B": Size(4096, 32, 32, 32, 11008, SMALL_VOCAB),
    "1.5-14B": Size(5120, 40, 40, 40, 13696, LARGE_VOCAB),
    "1.5-32B": Size(5120, 64, 40, 8, 27392, LARGE_VOCAB),
    "1.5-72B": Size(8192, 80, 64, 64, 24576, LARGE_VOCAB),
    "1.5-110B": Size(8192, 80, 64, 8, 49152, LARGE_VOCAB),
    "1.5-MoE": Size(2048, 24, 16, 16, 5632, SMALL_VOCAB,
                    moe=MoeConfig(experts=60, top_k=4, d_expert=1408, d_shared=5632)),
    # Qwen2 and Qwen2.5
    "0.5B": Size(896, 24, 14, 2, 4864, SMALL_VOCAB, tied=True),
    "1.5B": Size(1536, 28, 12, 2, 8960, SMALL_VOCAB, tied=True),
    "3B": Size(2048, 36, 16, 2, 11008, SMALL_VOCAB, tied=True),
    "7B": Size(3584, 28, 28, 4, 18944, LARGE_VOCAB),
    "14B": Size(5120, 48, 40, 8, 13824, LARGE_VOCAB),
    "32B": Size(5120, 64, 40, 8, 27648, LARGE_VOCAB),
    "72B": Size(8192, 80, 64, 8, 29568, LARGE_VOCAB),
    "57B-A14B": Size(3584, 28, 28, 4, 18944, SMALL_VOCAB,
                     moe=MoeConfig(experts=64, top_k=8, d_expert=2560, d_shared=20480)),
}

DOCUMENT, TURN = 151643, 151645     # the stop id that config.json names: <|endoftext|> or <|im_end|>
K4, K8, K32, K64, K128, M1 = 4096, 8192, 32768, 65536, 131072, 1_010_000
DUAL_CHUNK_1M = DualChunkConfig(chunk_size=262144, local_size=8192, original_max_position=262144)


def _model(
    size: str, max_position: int, window: int, max_window_layers: int, stop: int, *,
    theta: float = 1e6, eps: float = 1e-6, head: HeadKind = "lm", dual_chunk: DualChunkConfig | None = None,
) -> ModelConfig:
    s = SIZES[size]
    return ModelConfig(
        vocab=s.vocab, layers=s.layers, d_model=s.d_model, d_ff=s.d_ff, heads=s.heads, kv_heads=s.kv_heads,
        head_dim=s.d_model // s.heads, tied=s.tied, moe=s.moe, norm_eps=eps, rope=RopeConfig(theta=theta),
        max_position=max_position, window=WindowConfig(size=window, max_window_layers=max_window_layers),
        dual_chunk=dual_chunk, head=head, bos_id=DOCUMENT, eos_ids=(stop,),
    )


PRESETS: dict[str, ModelConfig] = {
    "Qwen2-0.5B": _model("0.5B", K128, K128, 24, DOCUMENT),
    "Qwen2-1.5B": _model("1.5B", K128, K128, 28, DOCUMENT),
    "Qwen2-7B": _model("7B", K128, K128, 28, DOCUMENT),
    "Qwen2-57B-A14B": _model("57B-A14B", K128, K128, 28, DOCUMENT),
    "Qwen2-72B": _model("72B", K128, K128, 28, DOCUMENT, eps=1e-5),
    "Qwen2-0.5B-Instruct": _model("0.5B", K32, K32, 24, TURN),
    "Qwen2-1.5B-Instruct": _model("1.5B", K32, K32, 28, TURN),
    "Qwen2-7B-Instruct": _model("7B", K32, K128, 28, TURN),
    "Qwen2-57B-A14B-Instruct": _model("57B-A14B", K32, K64, 28, DOCUMENT),
    "Qwen2-72B-Instruct": _model("72B", K32, K128, 80, TURN),

    "Qwen2-Math-1.5B": _model("1.5B", K4, K4, 21, DOCUMENT, theta=1e4),
    "Qwen2-Math-1.5B-Instruct": _model("1.5B", K4, K4, 21, TURN, theta=1e4),
    "Qwen2-Math-7B": _model("7B", K4, K4, 28, DOCUMENT, theta=1e4),
    "Qwen2-Math-7B-Instruct": _model("7B", K4, K32, 28, TURN, theta=1e4),
    "Qwen2-Math-72B": _model("72B", K4, K4, 80, DOCUMENT, theta=1e4, eps=1e-5),
    "Qwen2-Math-72B-Instruct": _model("72B", K4, K4, 80, TURN, theta=1e4),
    "Qwen2-Math-RM-72B": _model("72B", K4, K4, 80, TURN, theta=1e4, head="reward"),
    "Qwen2.5-Math-1.5B": _model("1.5B", K4, K4, 21, DOCUMENT, theta=1e4),
    "Qwen2.5-Math-7B": _model("7B", K4, K4, 28, DOCUMENT, theta=1e4),
    "Qwen2.5-Math-RM-72B": _model("72B", K4, K4, 70, TURN, theta=1e4, head="reward"),

    "Qwen1.5-0.5B": _model("1.5-0.5B", K32, K32, 21, DOCUMENT),
    "Qwen1.5-1.8B": _model("1.5-1.8B", K32, K32, 21, DOCUMENT),
    "Qwen1.5-4B": _model("1.5-4B", K32, K32, 21, DOCUMENT, theta=5e6),
    "Qwen1.5-4B-Chat": _model("1.5-4B", K32, K4, 21, DOCUMENT, theta=5e6),
    "Qwen1.5-7B": _model("1.5-7B", K32, K32, 28, DOCUMENT),
    "Qwen1.5-7B-Chat": _model("1.5-7B", K32, K32, 28, DOCUMENT),
    "Qwen1.5-14B": _model("1.5-14B", K32, K32, 35, DOCUMENT),
    "Qwen1.5-32B": _model("1.5-32B", K32, K32, 35, DOCUMENT),
    "Qwen1.5-72B-Chat": _model("1.5-72B", K32, K4, 70, DOCUMENT),
    "Qwen1.5-110B-Chat": _model("1.5-110B", K32, K32, 70, TURN),
    "Qwen1.5-MoE-A2.7B": _model("1.5-MoE", K8, K32, 21, DOCUMENT),
    "Qwen1.5-MoE-A2.7B-Chat": _model("1.5-MoE", K32, K32, 21, TURN),

    "Qwen2.5-0.5B": _model("0.5B", K32, K32, 24, DOCUMENT),
    "Qwen2.5-0.5B-Instruct": _model("0.5B", K32, K32, 21, TURN),
    "Qwen2.5-1.5B": _model("1.5B", K128, K128, 28, DOCUMENT),
    "Qwen2.5-1.5B-Instruct": _model("1.5B", K32, K32, 21, TURN),
    "Qwen2.5-3B": _model("3B", K32, K32, 36, DOCUMENT),
    "Qwen2.5-3B-Instruct": _model("3B", K32, K32, 70, TURN),
    "Qwen2.5-7B": _model("7B", K128, K128, 28, DOCUMENT),
    "Qwen2.5-7B-Instruct": _model("7B", K32, K128, 28, TURN),
    "Qwen2.5-14B": _model("14B", K128, K128, 48, DOCUMENT, eps=1e-5),
    "Qwen2.5-14B-Instruct": _model("14B", K32, K128, 70, TURN),
    "Qwen2.5-32B": _model("32B", K128, K128, 64, DOCUMENT, eps=1e-5),
    "Qwen2.5-32B-Instruct": _model("32B", K32, K128, 70, TURN),
    "Qwen2.5-72B": _model("72B", K128, K128, 80, DOCUMENT, eps=1e-5),
    "Qwen2.5-72B-Instruct": _model("72B", K32, K128, 70, TURN),
    "Qwen2.5-7B-Instruct-1M": _model("7B", M1, M1, 28, TURN, theta=1e7, eps=1e-5, dual_chunk=DUAL_CHUNK_1M),
    "Qwen2.5-14B-Instruct-1M": _model("14B", M1, M1, 48, TURN, theta=1e7, eps=1e-5, dual_chunk=DUAL_CHUNK_1M),
}

_BY_LOWER = {name.lower(): name for name in PRESETS}
_HUB_OWNER = "qwen/"


def preset_name(name: str) -> str | None:
    """The published name that `name` means, whatever its case, with or without `Qwen/` before it; None where none."""
    return _BY_LOWER.get(name.lower().removeprefix(_HUB_OWNER))


def preset(name: str) -> ModelConfig:
    """The published model of that name; case does not matter, nor `Qwen/` before it.

    Raises:
      UserError: no model has this name; the message lists those that resemble it, or all.
    """
    found = preset_name(name)
    if found is None:
        raise UserError(f"no model is named {name!r}; {suggestions(name)}")
    return PRESETS[found]


def suggestions(name: str) -> str:
    """The part of a message that tells which models there are: those that resemble `name`, or all."""
    near = difflib.get_close_matches(name.lower().removeprefix(_HUB_OWNER), _BY_LOWER, n=5, cutoff=0.6)
    return f"did you mean {', '.join(_BY_LOWER[n] for n in near)}?" if near else f"there are {', '.join(PRESETS)}"
