"""Train a tokenizer with sentencepiece: byte-pair encoding with byte fallback, which every text survives unchanged.

sentencepiece only learns the merges. What its trainer would do to text is kept away from it: it drops sentences with
reserved characters, cannot learn tabs, and allows spaces only at the front of a piece. So the text is cut into chunks
here, the chunks are counted, and their characters are renamed to private-use ones that the trainer has no opinion on;
the trained pieces are named back. The finished model reads raw text: no normalisation, no `▁` for a space.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece

from qwen2_jax.data.chatml import SPECIAL_TOKENS
from qwen2_jax.data.export_tokenizer import PIECE, Model, exported_files, parse_model
from qwen2_jax.data.tokenizer_files import refuse_existing, write_files
from qwen2_jax.errors import UserError

# Within a chunk pieces may grow, across chunks they may not: a word with the one character before it; a digit; an end
# of line with the punctuation before it and the indentation after it, which saves a token on nearly every line of
# code; other punctuation; other white space. Bounded, because a word in a script without spaces has no end.
CHUNK = re.compile(
    r"(?:[^\r\n\w]|_)?[^\W\d_]{1,48}"
    r"|\d"
    r"| ?(?:[^\s\w]|_){0,48}(?:\r?\n){1,16}[ \t]{0,48}"
    r"| ?(?:[^\s\w]|_){1,48}[\r\n]{0,16}"
    r"|\s{1,48}(?!\S)"
    r"|\s{1,48}"
)
MAX_PIECE = 24  # characters; room for a line end with five levels of indentation
COVERAGE = 0.9998  # share of the characters of the texts that become pieces; the rest goes by bytes
# A piece must not hold NUL, nor the character that sentencepiece's decoder turns into a space.
NO_PIECE = frozenset("\0▁")
PRIVATE = 0xF0000  # first code point of plane 15, private use
BYTES = 256


def train_sentencepiece(
    texts: Iterable[str], vocab_size: int, out_folder: str | Path, *, overwrite: bool = False
) -> Path:
    """Train on `texts` (each a document, read once) and write a tokenizer of exactly `vocab_size` tokens.

    Ids: 0 `<unk>`, which no text encodes to; 1 `<|endoftext|>`; 2 `<|im_start|>`; 3 `<|im_end|>`; 4 to 259 the bytes;
    then pieces in the order of training. `out_folder` gets `tokenizer.model` and, with equal ids, `tokenizer.json`,
    `tokenizer_config.json` and `special_tokens_map.json`. The same texts give the same bytes in the files.

    Raises UserError when the texts are too few for `vocab_size`, when `vocab_size` has no room beside the bytes, when
    a text cannot be written as UTF-8, or when a tokenizer is already there and `overwrite` is false.
    """
    floor = 1 + len(SPECIAL_TOKENS) + BYTES
    if vocab_size <= floor:
        raise UserError(f"vocab_size {vocab_size} is too small: bytes and special tokens take {floor}, choose more")
    out_folder = Path(out_folder)
    if not overwrite:
        refuse_existing(out_folder, ("tokenizer.model", "tokenizer.json"))
    chunks = _count_chunks(texts)
    if not chunks:
        raise UserError("no text to train a tokenizer on: every text is empty")
    alphabet = _alphabet(chunks, limit=(vocab_size - floor + 1) // 2)
    model = _learn_merges(chunks, alphabet, vocab_size)
    if len(model.pieces) < vocab_size:
        raise UserError(
            f"the texts hold too little to learn vocab_size {vocab_size}: they give {len(model.pieces)} tokens,"
            " add text or choose at most that"
        )
    files = {"tokenizer.model": model.SerializeToString(deterministic=True), **exported_files(model)}
    write_files(out_folder, files, overwrite=overwrite)
    return out_folder


def _count_chunks(texts: Iterable[str]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for i, text in enumerate(texts):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            where = f"at character {error.start}"
            raise UserError(f"text {i} holds a lone surrogate {where}, which UTF-8 cannot write") from None
        counts.update(CHUNK.findall(text))
    return counts


def _alphabet(chunks: Counter[str], limit: int) -> dict[str, str]:
    """Characters that become pieces, most frequent first, each with the private-use character that stands for it."""
    counts: Counter[str] = Counter()
    for chunk, n in chunks.items():
        for char in chunk:
            counts[char] += n
    wanted = COVERAGE * counts.total()
    alphabet: dict[str, str] = {}
    seen = 0
    for char, n in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if seen >= wanted or len(alphabet) >= limit:
            break
        seen += n
        if char not in NO_PIECE:
            alphabet[char] = chr(PRIVATE + len(alphabet))
    return alphabet


def _learn_merges(chunks: Counter[str], alphabet: dict[str, str], vocab_size: int) -> Model:
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=_rows(chunks, alphabet), input_format="tsv", model_writer=out, model_type="bpe",
        vocab_size=vocab_size, hard_vocab_limit=False, character_coverage=1.0, max_sentencepiece_length=MAX_PIECE,
        byte_fallback=True, user_defined_symbols=list(SPECIAL_TOKENS), unk_id=0, bos_id=-1, eos_id=-1, pad_id=-1,
        unk_surface="<unk>", split_by_whitespace=False, split_by_unicode_script=False, split_by_number=False,
        normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False, minloglevel=2,
    )
    model = parse_model(out.getvalue())
    names = str.maketrans({private: char for char, private in alphabet.items()})
    for piece in model.pieces:
        if piece.type == PIECE.NORMAL:
            piece.piece = piece.piece.translate(names)
    model.normalizer_spec.escape_whitespaces = False
    return model


def _rows(chunks: Counter[str], alphabet: dict[str, str]) -> Iterator[str]:
    """Lines `chunk TAB count`, which the trainer sorts; cut where a character is outside the alphabet."""
    counts: Counter[str] = Counter()
    for chunk, n in chunks.items():
        part = ""
        for char in chunk:
            if char in alphabet:
                part += alphabet[char]
            else:
                counts[part] += n
                part = ""
        counts[part] += n
    del counts[""]
    for part, n in counts.items():
        yield f"{part}\t{n}"
