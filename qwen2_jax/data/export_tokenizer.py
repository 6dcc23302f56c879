"""Write a sentencepiece model as an equivalent `tokenizer.json`: the same ids for every text, also in `AutoTokenizer`.

sentencepiece joins, again and again, the two neighbours whose joint piece has the best score, the leftmost on a tie.
`tokenizers` joins the pair that stands first in its list of merges, the leftmost of equal pairs. So every way to write
a piece as two pieces goes into the list, in the order of the pieces' scores. The order among the ways of one piece is
free: when its turn comes, all better pieces inside its text have been joined, wherever that text stands, so only one
of the ways ever occurs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import sentencepiece.sentencepiece_model_pb2
from google.protobuf.message import DecodeError

from qwen2_jax.data.chatml import END_OF_TEXT, IM_END, IM_START, QWEN2_SYSTEM, chatml_template
from qwen2_jax.data.tokenizer_files import write_files
from qwen2_jax.errors import UserError

# transformers 5 gives every folder with `model_type` qwen2 the pipeline of Qwen2's own tokenizer around the vocabulary
# of `tokenizer.json`, which changes the ids of any other tokenizer, unless `auto_map` names a class. It then obeys
# `tokenizer_class`; the named class is imported only for `trust_remote_code=True`, and does the same.
CLASS_FILE = "tokenization_as_stored.py"
CLASS_NAME = "TokenizerAsStored"
CLASS_SOURCE = f'''"""Loads tokenizer.json as it stands, instead of the pipeline that transformers keeps for Qwen2."""

from transformers import PreTrainedTokenizerFast


class {CLASS_NAME}(PreTrainedTokenizerFast):
    pass
'''
# protobuf makes its classes at import, out of a type checker's sight.
MESSAGES: Any = sentencepiece.sentencepiece_model_pb2
PIECE = MESSAGES.ModelProto.SentencePiece
Model = Any  # a ModelProto
BYTE_PIECES = {f"<0x{b:02X}>" for b in range(256)}


def export_tokenizer_json(model_file: str | Path, out_folder: str | Path, *, overwrite: bool = False) -> Path:
    """Write `tokenizer.json`, `tokenizer_config.json` (with a ChatML template), `special_tokens_map.json`, and the
    small module that keeps transformers from replacing the pipeline.

    `model_file` is a model that `train_sentencepiece` wrote, or another byte-pair model with byte fallback that
    reads raw text; UserError names what another one has otherwise.
    """
    write_files(Path(out_folder), exported_files(read_model(Path(model_file))), overwrite=overwrite)
    return Path(out_folder)


def exported_files(model: Model) -> dict[str, bytes]:
    """Name and content of each file that `export_tokenizer_json` writes."""
    special = {piece.piece: i for i, piece in enumerate(model.pieces) if piece.type == PIECE.USER_DEFINED}
    end = next((token for token in (IM_END, END_OF_TEXT) if token in special), None)
    named = {
        "eos_token": end,
        "pad_token": END_OF_TEXT if END_OF_TEXT in special else None,
        "additional_special_tokens": [token for token in (IM_START, IM_END) if token in special],
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "auto_map": {"AutoTokenizer": [None, f"{CLASS_FILE.removesuffix('.py')}.{CLASS_NAME}"]},
        "bos_token": None, "unk_token": None, **named,
        "added_tokens_decoder": {str(i): _added_token(content) for content, i in special.items()},
        "clean_up_tokenization_spaces": False, "split_special_tokens": False,
        "chat_template": chatml_template(QWEN2_SYSTEM),
    }
    named = {name: value for name, value in named.items() if value}
    return {
        "tokenizer.json": tokenizer_json(model).encode(),
        "tokenizer_config.json": json.dumps(config, ensure_ascii=False, indent=2).encode(),
        "special_tokens_map.json": json.dumps(named, ensure_ascii=False, indent=2).encode(),
        CLASS_FILE: CLASS_SOURCE.encode(),
    }


def parse_model(serialized: bytes) -> Model:
    return MESSAGES.ModelProto.FromString(serialized)


def read_model(model_file: Path) -> Model:
    """Read a sentencepiece model and check that it is of the kind that `tokenizer_json` can write."""
    try:
        model = parse_model(model_file.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {model_file}: {error.strerror}") from None
    except DecodeError:
        raise UserError(f"{model_file} is not a sentencepiece model, or is damaged") from None
    trainer, text = model.trainer_spec, model.normalizer_spec
    wrong = {
        "model_type": (trainer.model_type == MESSAGES.TrainerSpec.BPE, "BPE"),
        "byte_fallback": (trainer.byte_fallback, "true"),
        "precompiled_charsmap": (not text.precompiled_charsmap, "empty"),
        "add_dummy_prefix": (not text.add_dummy_prefix, "false"),
        "remove_extra_whitespaces": (not text.remove_extra_whitespaces, "false"),
        "escape_whitespaces": (not text.escape_whitespaces, "false"),
    }
    for field, (right, needed) in wrong.items():
        if not right:
            raise UserError(
                f"{model_file}: this sentencepiece model is not supported, {field} must be {needed};"
                " use a folder with tokenizer.json, or train with train_sentencepiece"
            )
    names = {piece.piece for piece in model.pieces if isinstance(piece.piece, str)}  # damaged UTF-8 comes as bytes
    if len(names) < len(model.pieces) or not BYTE_PIECES <= names:
        raise UserError(f"{model_file} is damaged: it must hold the 256 byte pieces, and each piece once, as UTF-8")
    return model


def tokenizer_json(model: Model) -> str:
    """The text of the `tokenizer.json` that gives `model`'s ids."""
    vocab = {piece.piece: i for i, piece in enumerate(model.pieces)}
    normal = {piece.piece: piece.score for piece in model.pieces if piece.type == PIECE.NORMAL}
    ordered = sorted((name for name in normal if len(name) > 1), key=lambda name: -normal[name])
    merges = [
        [name[:cut], name[cut:]]
        for name in ordered
        for cut in range(1, len(name))
        if name[:cut] in normal and name[cut:] in normal
    ]
    return json.dumps({
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [
            {"id": i, **_added_token(piece.piece)}
            for i, piece in enumerate(model.pieces) if piece.type == PIECE.USER_DEFINED
        ],
        "normalizer": None, "pre_tokenizer": None, "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": True, "ignore_merges": False,
            "vocab": vocab, "merges": merges,
        },
    }, ensure_ascii=False)


def _added_token(content: str) -> dict[str, object]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"content": content, **flags}
