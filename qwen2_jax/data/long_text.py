"""Tokens of long documents, a part at a time: `tokenizers` needs some 500 bytes of memory a token while it encodes."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator

import numpy as np

from qwen2_jax.data.tokenizer import Tokenizer
from qwen2_jax.data.tokenizer_files import QWEN2_SPLIT

LONG = 1 << 18      # characters that are encoded at a time where a document may be cut
# After the end of a line, before an ASCII letter or digit. NFC changes nothing across it, Qwen2's split never keeps the
# two together nor looks across, and where no token holds such a place, no merge reaches across it either.
PLACE = re.compile(r"\n(?=[0-9A-Za-z])")
PLACE_IN_TOKEN = re.compile(rb"\n[0-9A-Za-z]")


QWEN2 = {"Regex": QWEN2_SPLIT}
BYTES = ("ByteLevel", False, False)


def encode_documents(tokenizer: Tokenizer, texts: list[str]) -> list[np.ndarray]:
    """`tokenizer.encode_batch(texts, special=False)`, to the token: uint32 [tokens] of each text. Long texts are cut
    where the tokenizer's rules allow it, so that memory stays bounded; else they go in whole."""
    if all(len(text) <= LONG for text in texts) or not may_cut(tokenizer):
        return [np.array(ids, np.uint32) for ids in tokenizer.encode_batch(texts, special=False)]
    # Each part by itself: a batch of them would need the memory of the whole.
    return [np.concatenate([np.array(tokenizer.encode(part, special=False), np.uint32) for part in parts(text)])
            for text in texts]


def parts(text: str, size: int = LONG) -> Iterator[str]:
    """`text` cut at the first place after each `size` characters."""
    start = 0
    while place := PLACE.search(text, start + size):
        yield text[start : place.end()]
        start = place.end()
    yield text[start:]


@functools.lru_cache(maxsize=4)
def may_cut(tokenizer: Tokenizer) -> bool:
    """Whether the parts of a text, encoded alone, give the tokens of the whole: BPE that splits as Qwen2's does, or
    nowhere, and has no token across a place."""
    rules = tokenizer.rules
    model, split = rules["model"], rules["pre_tokenizer"]
    if split is not None:
        first, *rest = split.get("pretokenizers", [split])
        if (first.get("pattern"), first.get("behavior"), first.get("invert")) != (QWEN2, "Isolated", False):
            return False
        if [(part["type"], part.get("add_prefix_space"), part.get("use_regex")) for part in rest] != [BYTES]:
            return False
    if rules["normalizer"] not in (None, {"type": "NFC"}) or model["type"] != "BPE":
        return False
    if any(model.get(name) for name in ("dropout", "ignore_merges", "end_of_word_suffix", "continuing_subword_prefix")):
        return False
    if any(token["lstrip"] or token["rstrip"] for token in rules["added_tokens"]):
        return False
    return not any(PLACE_IN_TOKEN.search(tokenizer.id_to_bytes(i)) for i in range(tokenizer.vocab_size))
