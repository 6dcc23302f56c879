"""The files of a tokenizer's folder: read as Hugging Face lays them out, written so that none is ever half there."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from qwen2_jax.data.chatml import END_OF_TEXT, SPECIAL_TOKENS
from qwen2_jax.errors import UserError

# How Qwen2 cuts text before it merges bytes (fact of the published tokenizer): contractions; a word with the one
# character before it; a digit; punctuation with line ends after it; line ends; white space.
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_VOCAB = 151643
QWEN2_CLASSES = ("Qwen2Tokenizer", "Qwen2TokenizerFast")
PREFIX = "continuing_subword_prefix"
NO_PREFIX = re.compile(rf'"{PREFIX}"\s*:\s*(?:null|"")')


@dataclass(frozen=True, kw_only=True)
class TokenizerFiles:
    """What a folder says: the pipeline, the named special tokens (`eos_token`, …), the chat templates by name."""

    pipeline: tokenizers.Tokenizer
    source: Path
    special_tokens: dict[str, str]
    chat_templates: dict[str, str]


def has_tokenizer(folder: Path) -> bool:
    """Whether `read_tokenizer` would find something to read."""
    return any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer.model"))


def read_tokenizer(folder: Path) -> TokenizerFiles:
    """Read `tokenizer.json`, else `vocab.json` with `merges.txt`, else `tokenizer.model`; UserError names the file."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: a tokenizer is loaded from the folder that holds its files")
    config = _optional_json(folder / "tokenizer_config.json")
    if (folder / "tokenizer.json").is_file():
        source = folder / "tokenizer.json"
        pipeline = _parse_pipeline(_read_text(source), source)
    elif (folder / "vocab.json").is_file() or (folder / "merges.txt").is_file():
        source = folder / "vocab.json"
        pipeline = _build_qwen2(folder, config)
    elif (folder / "tokenizer.model").is_file():
        from qwen2_jax.data.export_tokenizer import read_model, tokenizer_json  # not needed for Qwen2's own files

        source = folder / "tokenizer.model"
        pipeline = _parse_pipeline(tokenizer_json(read_model(source)), source)
    else:
        needed = "tokenizer.json, or vocab.json and merges.txt, or tokenizer.model"
        raise UserError(f"{folder} has no tokenizer: {needed} is needed")
    pipeline.no_truncation()
    pipeline.no_padding()
    _add_tokens(pipeline, folder, config)
    special = {**_special_tokens(_optional_json(folder / "special_tokens_map.json")), **_special_tokens(config)}
    for name in ("eos_token", "pad_token"):
        if name in special and token_id(pipeline, special[name]) is None:
            raise UserError(f"{folder / 'tokenizer_config.json'}: {name} {special[name]!r} is not in {source.name}")
    return TokenizerFiles(
        pipeline=pipeline, source=source, special_tokens=special, chat_templates=_chat_templates(folder, config)
    )


def tokenizer_sha256(folder: Path) -> str:
    """Hex SHA-256 of the files that make tokens of texts: of `tokenizer.json`, or of `vocab.json`, `merges.txt` and
    the added tokens one after the other, or of `tokenizer.model`. Templates and names of tokens change nothing."""
    choices = (("tokenizer.json",), ("vocab.json", "merges.txt", "added_tokens.json"), ("tokenizer.model",))
    found = ([folder / name for name in names if (folder / name).is_file()] for names in choices)
    files = next(filter(None, found))
    digest = hashlib.sha256(b"".join(map(_read_bytes, files)))
    if files[0].name == "vocab.json":
        added = _optional_json(folder / "tokenizer_config.json").get("added_tokens_decoder", {})
        digest.update(json.dumps(added, sort_keys=True).encode())
    return digest.hexdigest()


def _parse_pipeline(text: str, source: Path) -> tokenizers.Tokenizer:
    # `tokenizers` 0.23 cuts each merge at the prefix's length, and aborts the process where that is no character.
    # Parsing takes as long as all else; where the text names no prefix, under no spelling, it is spared.
    if text.count(PREFIX) != len(NO_PREFIX.findall(text)) or "\\u00" in text:
        model = _parse_object(text, source).get("model")
        if isinstance(model, dict) and model.get(PREFIX) and model.get("type", "BPE") == "BPE":
            raise UserError(f"{source}: {PREFIX} is not supported: Qwen2's BPE has none, set it to null")
    with naming_failures(f"{source} is not a valid tokenizer"):
        try:
            return tokenizers.Tokenizer.from_str(text)
        except Exception:
            _parse_object(text, source)     # what is no JSON object is told so, with the place
            raise


def token_id(pipeline: tokenizers.Tokenizer, token: str) -> int | None:
    """Id of a token by its exact text in the vocabulary, None when there is no such token."""
    try:
        return pipeline.token_to_id(token)
    except UnicodeEncodeError:      # a lone surrogate, which no vocabulary holds
        return None


@contextlib.contextmanager
def naming_failures(what: str) -> Iterator[None]:
    """Turns what `tokenizers` raises into a UserError: a bare Exception, or a panic, which is a BaseException only."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, UserError):
        raise
    except BaseException as error:
        raise UserError(f"{what}: {error}") from None


def _build_qwen2(folder: Path, config: dict[str, Any]) -> tokenizers.Tokenizer:
    """Qwen2's pipeline around a vocabulary and its merges: NFC, the split, byte-level BPE."""
    kind = config.get("tokenizer_class", QWEN2_CLASSES[0])
    if kind not in QWEN2_CLASSES:
        raise UserError(
            f"{folder / 'tokenizer_config.json'}: tokenizer_class {kind!r} is not supported without tokenizer.json,"
            " only Qwen2Tokenizer is"
        )
    vocab, merges = _read_vocab(folder / "vocab.json"), _read_merges(folder / "merges.txt")
    try:
        pipeline = tokenizers.Tokenizer(BPE(vocab=vocab, merges=merges))
    except Exception as error:  # a merge whose parts are not in the vocabulary
        raise UserError(f"{folder / 'merges.txt'} does not fit vocab.json: {error}") from None
    pipeline.normalizer = normalizers.NFC()
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated")
    pipeline.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])  # pyright: ignore[reportAttributeAccessIssue]
    pipeline.decoder = decoders.ByteLevel()
    if "added_tokens_decoder" not in config and not (folder / "added_tokens.json").is_file():
        # Nothing names the special tokens: Qwen2's three follow its vocabulary, any other gets the one separator.
        new = SPECIAL_TOKENS if len(vocab) == QWEN2_VOCAB else (END_OF_TEXT,)
        pipeline.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in new])
    return pipeline


def _read_vocab(file: Path) -> dict[str, int]:
    vocab = _read_object(file)
    if sorted(vocab.values(), key=repr) != sorted(range(len(vocab)), key=repr):
        raise UserError(f"{file} must give its {len(vocab)} tokens the ids 0 to {len(vocab) - 1}, each once")
    return vocab


def _read_merges(file: Path) -> list[tuple[str, str]]:
    merges = []
    for number, line in enumerate(_read_text(file).split("\n"), start=1):
        if not line or (number == 1 and line.startswith("#version")):
            continue
        parts = line.split(" ")
        if len(parts) != 2 or not all(parts):
            raise UserError(f"{file}, line {number}: a merge is two tokens with one space between, found {line[:80]!r}")
        merges.append((parts[0], parts[1]))
    return merges


def _add_tokens(pipeline: tokenizers.Tokenizer, folder: Path, config: dict[str, Any]) -> None:
    """Tokens that only `tokenizer_config.json` or `added_tokens.json` lists, at the ids that they are given there."""
    file = folder / "tokenizer_config.json"
    listed: dict[int, AddedToken] = {}
    try:
        for i, token in config.get("added_tokens_decoder", {}).items():
            listed[int(i)] = AddedToken(**token)
        if not listed:
            file = folder / "added_tokens.json"
            for content, i in _optional_json(file).items():
                listed[int(i)] = AddedToken(content, special=content in SPECIAL_TOKENS, normalized=False)
    except (TypeError, ValueError, AttributeError):
        raise UserError(f"{file}: the added tokens must map ids to their texts and flags") from None
    known = {token.content for token in pipeline.get_added_tokens_decoder().values()}
    for i, token in sorted(listed.items(), key=lambda item: item[0]):
        if token.content not in known:
            pipeline.add_tokens([token])  # an entry of the vocabulary by this text keeps its id
        if (found := token_id(pipeline, token.content)) != i:
            raise UserError(f"{file} gives {token.content!r} the id {i}, but in the vocabulary it has {found}")


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """`bos_token`, `eos_token`, … as texts; they are stored as a text or as an object with `content`."""
    found = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        value = config.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            found[name] = value
    return found


def _chat_templates(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """Templates by name. A file of its own wins over `tokenizer_config.json`, as in transformers."""
    source, stored = folder / "tokenizer_config.json", config.get("chat_template")
    if (file := folder / "chat_template.json").is_file():
        source, stored = file, _read_object(file).get("chat_template")
    templates: dict[str, Any]
    try:
        listed = isinstance(stored, list)
        templates = {entry["name"]: entry["template"] for entry in stored} if listed else {"default": stored}
    except (TypeError, KeyError):
        raise UserError(f"{source}: each entry of a list in chat_template needs name and template") from None
    if stored is None:
        templates = {}
    if not all(isinstance(text, str) for pair in templates.items() for text in pair):
        raise UserError(f"{source}: chat_template must be a text, or a list of named texts")
    if (file := folder / "chat_template.jinja").is_file():
        templates = {"default": _read_text(file)}
        for extra in sorted((folder / "additional_chat_templates").glob("*.jinja")):
            templates[extra.stem] = _read_text(extra)
    return templates


def _optional_json(file: Path) -> dict[str, Any]:
    return _read_object(file) if file.is_file() else {}


def _read_object(file: Path) -> dict[str, Any]:
    return _parse_object(_read_text(file), file)


def _parse_object(text: str, file: Path) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{file} must hold a JSON object, found {type(value).__name__}")
    return value


def _read_bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from None


def _read_text(file: Path) -> str:
    try:
        return _read_bytes(file).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text: byte {error.start} is wrong") from None


def refuse_existing(folder: Path, names: Iterable[str]) -> None:
    for name in names:
        if (folder / name).exists():
            raise UserError(f"{folder / name} exists: choose another folder, or ask to overwrite it")


def write_files(folder: Path, files: dict[str, bytes], *, overwrite: bool) -> None:
    """Write all files under temporary names, then rename them; unless `overwrite`, refuse when one is there already."""
    if not overwrite:
        refuse_existing(folder, files)
    temporary = {name: folder / f".{name}.{os.getpid()}.tmp" for name in files}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            temporary[name].write_bytes(content)
        for name in files:
            os.replace(temporary[name], folder / name)
    except OSError as error:
        raise UserError(f"cannot write {error.filename or folder}: {error.strerror}") from None
    finally:
        for file in temporary.values():
            file.unlink(missing_ok=True)
