"""`qwen2-jax data inspect DIR`: rows of a training batch as text, with what is trained on marked."""

from __future__ import annotations

import argparse
import os
import sys
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from qwen2_jax.errors import UserError

if TYPE_CHECKING:
    from qwen2_jax.data.packing import PackedBatch, Piece
    from qwen2_jax.data.shards import TokenShards
    from qwen2_jax.data.tokenizer import Tokenizer

DESCRIPTION = """\
Shows rows of a training batch as the model sees them: pieces of documents, one after the other, which do not see each
other. A piece's first token is read but not predicted; all others are what is trained on.

In a terminal what is trained on is green and the rest red; elsewhere, or with NO_COLOR set, the rest stands in ⟦ ⟧.
Characters that cannot be seen are written as \\x1b or \\u200d. Without --tokenizer tokens are shown as their ids.
"""
TRAINED, UNTRAINED, HEADING, PLAIN = "\x1b[32m", "\x1b[31m", "\x1b[1m", "\x1b[0m"


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser("inspect", help="show rows of a training batch as text", description=DESCRIPTION,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="DIR", help="a folder that `qwen2-jax data prepare` has made")
    parser.add_argument("--tokenizer", metavar="DIR", help="folder of the tokenizer that it was prepared with")
    parser.add_argument("--seq", type=int, default=512, metavar="T", help="tokens of a row (default: 512)")
    parser.add_argument("--batch", type=int, default=8, metavar="B", help="rows of a batch (default: 8)")
    parser.add_argument("--step", type=int, default=0, metavar="N", help="number of the batch, from 0 (default: 0)")
    parser.add_argument("--rows", type=int, default=2, metavar="K", help="rows to show, at most (default: 2)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the order (default: 0)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from qwen2_jax.data.shards import TokenShards
    from qwen2_jax.data.stream import Stream

    for flag, value, least in (("--seq", args.seq, 1), ("--batch", args.batch, 1), ("--step", args.step, 0),
                               ("--rows", args.rows, 1)):
        if value < least:
            raise UserError(f"{flag} must be at least {least}, found {value}")
    shards = TokenShards(args.folder)
    decode = _by_tokenizer(args.tokenizer, shards) if args.tokenizer else _as_ids
    stream = Stream({"data": shards}, row_length=args.seq, batch_size=args.batch, seed=args.seed)
    batch, plan = stream.batch(args.step), stream.plan(args.step)
    style = _Style(coloured=sys.stdout.isatty() and not os.environ.get("NO_COLOR"))
    print(shards.summary())
    for b, (_, pieces) in enumerate(plan[:args.rows]):
        print(style.heading(f"\nstep {args.step}, row {b}: {_counts(batch, slice(b, b + 1))}"))
        for piece, spans in zip(pieces, row_spans(batch, b), strict=True):
            print(style.heading(f"── {_described(piece, shards)} ──"))
            print("".join(map(style.span, decode(spans))))
    print(style.heading(f"\nstep {args.step}, all {args.batch} rows: {_counts(batch, slice(None))}"))
    return 0


Spans = Sequence[tuple[bool, list[int]]]     # whether they are trained on, and token ids
Texts = Iterator[tuple[bool, str]]


def row_spans(batch: PackedBatch, b: int) -> list[Spans]:
    """For each piece of a row its tokens, the last target too, in spans that are trained on or are not."""
    segments_T, pieces = batch.segments_BT[b], []
    for segment in range(1, int(segments_T.max(initial=0)) + 1):
        here = segments_T == segment
        ids = [int(batch.ids_BT[b, here][0]), *batch.targets_BT[b, here].tolist()]
        trained = [False, *(batch.weights_BT[b, here] > 0).tolist()]
        pieces.append([(flag, [i for _, i in span])
                       for flag, span in groupby(zip(trained, ids, strict=True), key=lambda token: token[0])])
    return pieces


def _by_tokenizer(folder: str, shards: TokenShards) -> Callable[[Spans], Texts]:
    from pathlib import Path

    from qwen2_jax.data.shards import read_manifest
    from qwen2_jax.data.tokenizer import Tokenizer
    from qwen2_jax.data.tokenizer_files import tokenizer_sha256

    tokenizer = Tokenizer.load(folder)
    if tokenizer_sha256(Path(folder)) != read_manifest(shards.folder)["tokenizer_sha256"]:
        raise UserError(f"{shards.folder} was prepared with another tokenizer than that of --tokenizer {folder}: its "
                        "tokens would read as other text; give the folder that it was prepared with")
    return lambda spans: _decoded(tokenizer, spans)


def _decoded(tokenizer: Tokenizer, spans: Spans) -> Texts:
    """A character made of several tokens goes to the span that ends it."""
    text = tokenizer.stream()
    for number, (trained, ids) in enumerate(spans, start=1):
        yield trained, text.push(ids) + (text.finish() if number == len(spans) else "")


def _as_ids(spans: Spans) -> Texts:
    for trained, ids in spans:
        yield trained, "".join(f"{i} " for i in ids)


def _described(piece: Piece, shards: TokenShards) -> str:
    document, start, length = piece
    tokens = int(shards.lengths[document])
    if length == tokens - 1:
        return f"document {document:,}, all {tokens:,} tokens"
    return f"document {document:,}, tokens {start:,} to {start + length:,} of 0 to {tokens - 1:,}"


def _counts(batch: PackedBatch, rows: slice) -> str:
    positions, targets = batch.segments_BT[rows].size, int((batch.weights_BT[rows] > 0).sum())
    padding = (batch.segments_BT[rows] == 0).mean()
    return f"{positions:,} positions, {targets:,} trained on, {padding:.1%} padding"


class _Style:
    def __init__(self, *, coloured: bool):
        self._coloured = coloured

    def heading(self, text: str) -> str:
        return f"{HEADING}{text}{PLAIN}" if self._coloured else text

    def span(self, span: tuple[bool, str]) -> str:
        trained, text = span
        text = "".join(map(_visible, text))
        if self._coloured:
            return f"{TRAINED if trained else UNTRAINED}{text}{PLAIN}"
        return text if trained else f"⟦{text}⟧"


def _visible(char: str) -> str:
    """The character, or how Python writes it when it cannot be seen: a document must not steer the terminal."""
    if char.isprintable() or char in "\n\t" or unicodedata.category(char) == "Zs":
        return char
    return char.encode("unicode_escape").decode()
