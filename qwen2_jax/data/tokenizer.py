"""Text to token ids and back, for Qwen2's files and for tokenizers trained here."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from qwen2_jax.data.chatml import END_OF_TEXT, IM_END
from qwen2_jax.data.tokenizer_files import TokenizerFiles, naming_failures, read_tokenizer, token_id
from qwen2_jax.errors import UserError

BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Tokenizer:
    """A tokenizer loaded from a folder. Decoding is defined over bytes: every id stands for some bytes, a text is
    all of them together read as UTF-8, and bytes that are not UTF-8 become U+FFFD.

    For byte-level BPE that is what transformers gives. For byte fallback it is as well, except that `tokenizers`
    replaces a whole run of byte pieces when one of them is wrong, and we replace the wrong bytes only: a rule that a
    later token cannot change what was already shown.
    """

    def __init__(self, files: TokenizerFiles):
        self._pipeline, self._source = files.pipeline, files.source
        self._byte_level = _is_byte_level(files)
        self._bytes: dict[int, bytes] = {}
        added = files.pipeline.get_added_tokens_decoder()
        self.control_tokens: Mapping[str, int] = {token.content: i for i, token in added.items() if token.special}
        self.special_ids: frozenset[int] = frozenset(self.control_tokens.values())
        self.special_tokens: Mapping[str, str] = files.special_tokens  # named: "eos_token" → "<|im_end|>", …
        self.chat_templates: Mapping[str, str] = files.chat_templates

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Read Qwen2's files: `tokenizer.json`, or `vocab.json` with `merges.txt`, or `tokenizer.model` as
        `train_sentencepiece` writes it; with `tokenizer_config.json` and chat templates where present.

        Raises UserError naming the file that is missing, damaged or not supported.
        """
        return cls(read_tokenizer(Path(folder)))

    @property
    def vocab_size(self) -> int:
        """One more than the highest id. Models may pad their embedding to more rows."""
        return max(self._pipeline.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end a text: the folder's `eos_token`, then ChatML's two. A model's generation_config goes first."""
        tokens = (self.special_tokens.get("eos_token"), IM_END, END_OF_TEXT)
        ids = (None if token is None else self.token_id(token) for token in tokens)
        return tuple(dict.fromkeys(i for i in ids if i is not None))

    @property
    def pad_id(self) -> int | None:
        """The folder's `pad_token`, or the separator of documents, or None when there is neither."""
        return self.token_id(self.special_tokens.get("pad_token", END_OF_TEXT))

    @property
    def chat_template(self) -> str | None:
        """Jinja source of the default chat template; `chat_templates` has all by name."""
        return self.chat_templates.get("default")

    @cached_property
    def rules(self) -> Mapping[str, Any]:
        """How texts become tokens: what `tokenizer.json` says, without the vocabulary and its merges."""
        rules = json.loads(self._pipeline.to_str())
        return rules | {"model": {k: v for k, v in rules["model"].items() if k not in ("vocab", "merges")}}

    def token_id(self, token: str) -> int | None:
        """Id of a token by its exact text in the vocabulary, None when there is no such token."""
        return token_id(self._pipeline, token)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Ids of `text`; nothing is added in front or behind.

        `special=True` reads `<|im_end|>` in the text as the control token, as transformers does. `special=False`
        reads it as plain characters: use it for text that is not to be trusted.
        """
        return self.encode_batch([text], special=special)[0]

    def encode_batch(self, texts: Sequence[str], *, special: bool = True) -> list[list[int]]:
        """`encode` of every text, on all cores."""
        pipeline = self._pipeline if special else self._plain_pipeline
        for i, text in enumerate(texts):
            if not text.isascii():
                _refuse_surrogates(text, f"text {i}" if len(texts) > 1 else "the text")
        with naming_failures(f"{self._source} cannot encode the text"):
            return [encoding.ids for encoding in pipeline.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Text of `ids`. An id without a token, such as a padded row of the embedding, gives nothing."""
        return b"".join(self._bytes_of(ids, skip_special)).decode("utf-8", "replace")

    def stream(self, *, skip_special: bool = False) -> TextStream:
        """Decode ids as they come; see `TextStream`."""
        return TextStream(self, skip_special=skip_special)

    def id_to_bytes(self, i: int) -> bytes:
        """The bytes that token `i` stands for, empty when there is no such token."""
        i = int(i)
        known = self._bytes.get(i)
        if known is None:
            token = self._pipeline.id_to_token(i) if 0 <= i < 2**32 else None
            known = b"" if token is None else _byte_level(token) if self._byte_level else _byte_fallback(token)
            self._bytes[i] = known
        return known

    def _bytes_of(self, ids: Iterable[int], skip_special: bool) -> Iterable[bytes]:
        return (self.id_to_bytes(i) for i in ids if not (skip_special and int(i) in self.special_ids))

    @cached_property
    def _plain_pipeline(self) -> tokenizers.Tokenizer:
        # A second object, because the switch is a state of the pipeline and threads share the first.
        pipeline = tokenizers.Tokenizer.from_str(self._pipeline.to_str())
        pipeline.encode_special_tokens = True
        return pipeline


class TextStream:
    """Decodes ids piece by piece and holds back an unfinished character until it is whole.

    What `push` and `finish` return, joined, equals `Tokenizer.decode` of all ids. Each token is looked at once.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = False):
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Iterable[int]) -> str:
        """The text that became certain with these ids; often empty within a character of several tokens."""
        return self._utf8.decode(b"".join(self._tokenizer._bytes_of(ids, self._skip_special)))

    def finish(self) -> str:
        """What is still held back: U+FFFD for a character that never became whole."""
        return self._utf8.decode(b"", final=True)


def _is_byte_level(files: TokenizerFiles) -> bool:
    """Whether tokens are written in the byte-level alphabet (else: as text, with byte pieces `<0x0A>`)."""
    decoder = json.loads(files.pipeline.to_str())["decoder"] or {}
    kinds = [part["type"] for part in decoder.get("decoders", [decoder]) if part]
    if kinds == ["ByteLevel"]:
        return True
    if "ByteFallback" in kinds and set(kinds) <= {"ByteFallback", "Fuse"}:
        return False
    found = ", ".join(kinds) or "none"
    raise UserError(f"{files.source}: decoder {found} is not supported, ByteLevel is, and ByteFallback with Fuse")


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's table: printable Latin-1 bytes stand for themselves, the others take code points from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


ALPHABET = _byte_level_alphabet()


def _byte_level(token: str) -> bytes:
    if all(char in ALPHABET for char in token):
        return bytes(ALPHABET[char] for char in token)
    return token.encode()  # an added token whose text is outside the alphabet


def _byte_fallback(token: str) -> bytes:
    match = BYTE_PIECE.fullmatch(token)
    return bytes([int(match[1], 16)]) if match else token.encode()


def _refuse_surrogates(text: str, what: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        where = f"at character {error.start}"
        raise UserError(f"{what} holds a lone surrogate {where}, which no tokenizer can read") from None
