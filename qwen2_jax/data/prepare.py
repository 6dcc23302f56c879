"""Documents into shards of tokens, in parallel, by runs that may be killed: `qwen2-jax data prepare`.

One process cuts the sources into pieces and writes what comes back, in order; workers take the documents out of a piece
and tokenize them. So the shards do not depend on the number of workers, and what is written is always a prefix.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from qwen2_jax.data.chatml import END_OF_TEXT
from qwen2_jax.data.long_text import encode_documents
from qwen2_jax.data.rows import BadRow
from qwen2_jax.data.shard_writer import ShardWriter, naming_errors
from qwen2_jax.data.shards import LENGTHS, MANIFEST, PROGRESS, TokenShards, read_manifest, token_dtype
from qwen2_jax.data.source_files import PIECE_BYTES, Piece, SourceFile, SourceOptions, find_files
from qwen2_jax.data.sources import BadRows, Position, pieces, rows
from qwen2_jax.data.tokenizer import Tokenizer
from qwen2_jax.data.tokenizer_files import tokenizer_sha256
from qwen2_jax.data.workers import ordered
from qwen2_jax.errors import UserError

log = logging.getLogger(__name__)

SHARD_TOKENS = 1 << 25
MOST_PIECES = 256       # of small files in a task


def prepare(sources: Sequence[str], out: str | Path, tokenizer: str | Path, *, options: SourceOptions | None = None,
            workers: int | None = None, max_bad_rows: int = 0, shard_tokens: int = SHARD_TOKENS,
            progress: bool = False) -> TokenShards:
    """Tokenize the documents of `sources` into the folder `out`, or go on where an earlier call with the same arguments
    stopped; `workers` and `max_bad_rows` may change. The result depends on neither.

    Args:
      sources: files, folders, globs, `gs://…`, `tfds:…`; see `source_files.find_files`.
      out: a folder that is new, empty, or of an earlier call. When that has finished, nothing is done.
      tokenizer: the folder of a tokenizer with an `<|endoftext|>`, with which each document ends.
      workers: processes; 1 works in this one. Default: as many as there are processors to run on.
      max_bad_rows: rows without a document that are reported and skipped; one more is refused.
      shard_tokens: a shard is closed with the task that brings it to so many tokens.

    Raises UserError for sources, a tokenizer or a folder that cannot be used, and for an earlier call's folder with
    other arguments, saying which.
    """
    options = options or SourceOptions()
    workers = len(os.sched_getaffinity(0)) if workers is None else workers
    for name, value, least in (("workers", workers, 1), ("max_bad_rows", max_bad_rows, 0),
                               ("shard_tokens", shard_tokens, 1)):
        if value < least:
            raise UserError(f"{name} is {value}; at least {least} is needed")
    if str(out).startswith("gs://"):
        raise UserError(f"{out}: shards are written to a local folder, and read by memory map; copy them afterwards")
    out = Path(out).absolute()
    encoder = _Encoder.load(tokenizer, options)
    files = find_files(sources, options)
    identity = {
        "tokenizer_sha256": tokenizer_sha256(Path(tokenizer)), "end_token": encoder.end_token, "vocab": encoder.vocab,
        "shard_tokens": shard_tokens, "options": dataclasses.asdict(options),
        "sources": [{"file": file.path, "bytes": file.bytes, "modified": file.modified} for file in files],
    }
    if _is_finished(out, identity):
        log.warning("%s is prepared already: nothing to do", out)
        return TokenShards(out)
    with contextlib.closing(ShardWriter(out)) as writer:
        if writer.identity is not None:
            _refuse_differences(out, writer.identity, identity, unread=writer.position)
        writer.begin(identity, shard_tokens)
        if writer.documents:
            log.warning("going on in %s after %d documents, %d tokens", out, writer.documents, writer.tokens)
        try:
            _run(files, encoder, writer, workers, BadRows(max_bad_rows, len(writer.skipped)), progress)
        except KeyboardInterrupt:
            log.warning("stopped after %d documents: the same command goes on there", writer.documents)
            raise
        writer.finish()
    return TokenShards(out)


@dataclass(frozen=True)
class _Task:
    pieces: list[Piece]
    next: Position


@dataclass(frozen=True)
class _Result:
    tokens: np.ndarray
    lengths: np.ndarray
    bad: list[BadRow]
    next: Position
    read: int       # bytes of the last piece's file


@dataclass(frozen=True)
class _Encoder:
    """What a worker does; a copy of this is sent to each, which loads the tokenizer there."""

    folder: Path
    options: SourceOptions
    end_token: int
    vocab: int

    @classmethod
    def load(cls, folder: str | Path, options: SourceOptions) -> _Encoder:
        tokenizer = Tokenizer.load(folder)
        end_token = tokenizer.token_id(END_OF_TEXT)
        if end_token is None:
            raise UserError(f"the tokenizer in {folder} has no {END_OF_TEXT}, with which documents end")
        return cls(Path(folder).absolute(), options, end_token, tokenizer.vocab_size)

    def __call__(self):
        tokenizer, dtype = Tokenizer.load(self.folder), token_dtype(self.vocab)
        end = np.array([self.end_token], np.uint32)

        def encode(task: _Task) -> _Result:
            texts, bad = [], []
            for piece in task.pieces:
                for row in rows(piece, self.options):
                    if isinstance(row, BadRow):
                        bad.append(row)
                    else:
                        texts.append(row.text)
            documents = encode_documents(tokenizer, texts)
            lengths = np.array([len(document) + 1 for document in documents], LENGTHS)
            ended = [part for document in documents for part in (document, end)]
            tokens = np.concatenate([end[:0], *ended]).astype(dtype)
            return _Result(tokens, lengths, bad, task.next, task.pieces[-1].read)

        return encode


def _run(files: Sequence[SourceFile], encoder: _Encoder, writer: ShardWriter, workers: int, bad: BadRows, progress: bool
         ) -> None:
    ends = np.cumsum([0, *(file.bytes for file in files)])
    tasks = _tasks(pieces(files, encoder.options, writer.position))
    bar = tqdm(total=int(ends[-1]), initial=int(ends[writer.position[0]]), unit="B", unit_scale=True, desc="prepare",
               dynamic_ncols=True, disable=not progress)
    results = ordered(encoder, tasks, workers)
    with bar, logging_redirect_tqdm(), _one_thread(), contextlib.closing(results):
        for result in results:
            for row in result.bad:
                bad.add(row)
            writer.append(result.tokens, result.lengths, result.bad, result.next)
            number, row, _ = result.next
            bar.update(int(ends[number]) + (result.read if row > 1 else 0) - bar.n)
            bar.set_postfix_str(f"{writer.tokens:,} tokens", refresh=False)
    bad.summarize()


def _tasks(parts: Iterable[tuple[Piece, Position]]) -> Iterator[_Task]:
    """Small pieces together, so that a million small files are not a million messages."""
    held: list[Piece] = []
    size, end = 0, None
    for piece, end in parts:
        held.append(piece)
        size += len(piece.data) if isinstance(piece.data, bytes) else PIECE_BYTES
        if size >= PIECE_BYTES or len(held) == MOST_PIECES:
            yield _Task(held, end)
            held, size = [], 0
    if held and end is not None:
        yield _Task(held, end)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Each process tokenizes in one thread, as read from the environment by `tokenizers`, here and in workers."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _is_finished(out: Path, identity: dict[str, Any]) -> bool:
    """Whether `out` holds the finished result. Raises UserError when it holds anything but this work, or part of it."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; --out names a folder to make")
    if (out / MANIFEST).exists():
        _refuse_differences(out, read_manifest(out), identity)
        with naming_errors(out):
            (out / PROGRESS).unlink(missing_ok=True)    # of a run that was killed after its last step but one
        return True
    if out.exists() and not (out / PROGRESS).exists() and (found := sorted(path.name for path in out.iterdir())):
        some = ", ".join(found[:3]) + ", …" * (len(found) > 3)
        raise UserError(f"{out} holds other files ({some}): --out names a new folder, or one that this command began")
    return False


def _refuse_differences(out: Path, then: dict[str, Any], now: dict[str, Any], unread: Position | None = None) -> None:
    """Raises UserError that says how `now` is another work than `then`. A file behind the position `unread`, which has
    not been read yet, may have changed."""
    found = [f"{name} was {then.get(name)!r}, is {now[name]!r}" for name in ("tokenizer_sha256", "end_token", "vocab",
             "shard_tokens") if then.get(name) != now[name]]
    before = then.get("options", {})
    found += [f"{name} was {before.get(name)!r}, is {value!r}" for name, value in now["options"].items()
              if before.get(name) != value]
    names, names_now = ([file["file"] for file in work.get("sources", ())] for work in (then, now))
    for change, others, ones in (("is new", names, names_now), ("is gone", names_now, names)):
        if changed := [name for name in ones if name not in set(others)]:
            more = f" (and {len(changed) - 1} more)" * (len(changed) > 1)
            found.append(f"source {changed[0]}{more} {change}")
    if not found and names != names_now:
        found.append("the sources come in another order")
    if not found:
        for number, (file, file_now) in enumerate(zip(then["sources"], now["sources"], strict=True)):
            if file == file_now:
                continue
            change = f"{file['file']} has changed ({file['bytes']:,} bytes then, {file_now['bytes']:,} now)"
            if unread is not None and (number, 1) >= unread[:2]:
                log.warning("%s; it had not been read, and is taken as it is now", change)
            else:
                found.append(change)
    if found:
        raise UserError(f"{out} was prepared from something else: {'; '.join(found)}. Repeat the command that it was "
                        "begun with, or choose another --out")
