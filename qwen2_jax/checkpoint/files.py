"""The small files beside the weights: config.json, generation_config.json, the tokenizer's, and our format mark."""

from __future__ import annotations

import fnmatch
import json
import shutil
from pathlib import Path
from typing import Any

from qwen2_jax.checkpoint import hf_config
from qwen2_jax.checkpoint.json_fields import is_whole, read_object, shown
from qwen2_jax.config import ModelConfig
from qwen2_jax.errors import UserError

CONFIG, GENERATION, MARK = "config.json", "generation_config.json", "qwen2_jax.json"
FORMAT = 1

# With the modules that an `auto_map` in a config names: transformers needs them beside it.
TOKENIZER_FILES = ("tokenizer*", "tokenization_*.py", "configuration_*.py", "modeling_*.py", "vocab.json", "vocab.txt",
                   "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*", "*.tiktoken",
                   "*.model")
TOKENIZER_FOLDER = "additional_chat_templates"


def write_model_files(folder: Path, cfg: ModelConfig, *, beside: Path | None = None) -> None:
    """Writes config.json and generation_config.json, and copies what else `beside` holds of a model.

    From `beside` (None: nothing) come the tokenizer's files and the fields of generation_config.json, whose stop ids
    are joined with those that every chat model of the family needs.
    """
    write_config(folder, cfg)
    write_files_beside(folder, cfg, beside)


def write_config(folder: Path, cfg: ModelConfig) -> None:
    """Writes config.json, without which a folder is no checkpoint."""
    _write_json(folder / CONFIG, hf_config.to_hf(cfg))


def write_files_beside(folder: Path, cfg: ModelConfig, beside: Path | None) -> None:
    """Writes what `write_model_files` does, but config.json."""
    generation = hf_config.generation_config(cfg)
    if beside is not None:
        theirs = read_object(beside / GENERATION) if (beside / GENERATION).exists() else {}
        stops = [*_ids(theirs.get("eos_token_id")), *_ids(generation.get("eos_token_id"))]
        generation |= theirs
        if stops:
            generation["eos_token_id"] = list(dict.fromkeys(stops))
        for file in sorted(beside.iterdir()):
            # No other folder: DST itself may lie here, by a name like `tokenizer-2`.
            if file.name == TOKENIZER_FOLDER if file.is_dir() else _is_tokenizer_file(file.name):
                _copy(file, folder / file.name)
    _write_json(folder / GENERATION, generation)


def write_mark(folder: Path) -> None:
    """Marks a folder as our checkpoint: `params/` is an Orbax checkpoint of the stacked tree (docs/architecture.md)."""
    _write_json(folder / MARK, {"format": FORMAT, "layout": "stacked"})


def check_mark(folder: Path) -> None:
    """Raises UserError when a checkpoint was written by a version that this one does not know."""
    if (folder / MARK).exists():
        found = read_object(folder / MARK).get("format")
        if found != FORMAT:
            raise UserError(f"{folder / MARK}: checkpoint format {shown(found)}, this version of qwen2_jax reads"
                            f" {FORMAT}: use the version that wrote it")


def _is_tokenizer_file(name: str) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in TOKENIZER_FILES)


def _copy(src: Path, dst: Path) -> None:
    if not src.exists():
        raise UserError(f"cannot read {src}: it is a link to {src.readlink()}, which does not exist")
    try:
        if src.is_dir():
            shutil.copytree(src, dst)
        else:
            shutil.copyfile(src, dst)
    except shutil.Error as e:
        raise OSError(None, f"cannot copy {src}: {e}") from e


def _ids(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [v for v in values if is_whole(v)]


def _write_json(file: Path, value: dict[str, object]) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", "utf-8")
