"""Rows in, what stays and what goes out: read and judged in several processes, written in their order."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import IO, Any, NamedTuple

from tqdm import tqdm

from qwen2_jax.data.rows import BadRow
from qwen2_jax.data.source_files import Piece, SourceFile, SourceOptions
from qwen2_jax.data.sources import BadRows, Position, pieces, rows
from qwen2_jax.data.text_source import BOM
from qwen2_jax.data.workers import ordered

Reason = dict[str, Any]
"""Why a document goes: `reason` and what was measured. A line of the report, behind `file` and `row`."""
Judge = Callable[[str], Any]


class Judged(NamedTuple):
    """One row of the sources."""

    file: str
    row: int
    line: bytes
    """The row as JSON without the end of the line: of JSON lines as it was found, of other files the text alone."""
    bad: str | None
    """Why the row gives no document."""
    verdict: Any
    """What the judge said of the document's text."""


def judged(files: Sequence[SourceFile], options: SourceOptions, start: Callable[[], Judge], *, workers: int, title: str,
           bad: BadRows | None) -> Iterator[Judged]:
    """Every row of `files`, in order, with `start()(text)`; `start` is called once in each process, and `bad` told of
    bad rows.

    Raises UserError for a file that cannot be read, or is not the one any more that `files` describes, and for more bad
    rows than `bad` allows.
    """
    before = [0, *accumulate(file.bytes for file in files)]
    with tqdm(total=before[-1], desc=title, unit="B", unit_scale=True, unit_divisor=1024) as progress:
        for found, (number, row, _), read in ordered(partial(_start, start, options), pieces(files, options), workers):
            for one in found:
                if bad is not None and one.bad is not None:
                    bad.add(BadRow(one.file, one.row, one.bad))
                yield one
            progress.update(before[number] + (read if row > 1 else 0) - progress.n)
    if bad is not None:
        bad.summarize()


def _start(start: Callable[[], Judge], options: SourceOptions):
    return partial(_judge_piece, start(), options)


def _judge_piece(judge: Judge, options: SourceOptions, task: tuple[Piece, Position]):
    piece, behind = task
    lines = piece.data.split(b"\n") if piece.file.kind == "jsonl" else None
    found: list[Judged] = []
    for row in rows(piece, options):
        line = b""
        if lines is not None:
            line = lines[row.row - piece.row].removesuffix(b"\r")
            line = line.removeprefix(BOM) if row.row == 1 else line
        elif not isinstance(row, BadRow):
            line = json.dumps({options.text_key: row.text}, ensure_ascii=False).encode()
        bad, verdict = (row.reason, None) if isinstance(row, BadRow) else (None, judge(row.text))
        found.append(Judged(row.file, row.row, line, bad, verdict))
    return found, behind, piece.read


@dataclass
class Sieve:
    """Writes rows that stay to one file, why others go to another, and counts."""

    kept_lines: IO[bytes]
    removed_lines: IO[str]
    kept: int = 0
    removed: Counter[str] = field(default_factory=Counter)
    """Rows by reason."""

    def put(self, found: Judged, reason: Reason | None) -> None:
        """Writes the row when `reason` is None and it is no bad row."""
        if found.bad is not None:
            reason = {"reason": "bad_row", "problem": found.bad}
        if reason is None:
            self.kept_lines.write(found.line + b"\n")
            self.kept += 1
        else:
            line = {"file": found.file, "row": found.row, **reason}
            self.removed_lines.write(json.dumps(line, ensure_ascii=False) + "\n")
            self.removed[reason["reason"]] += 1

    def summary(self) -> str:
        total = self.kept + self.removed.total()
        reasons = [f"  {reason.replace('_', ' ')}: {count:,}" for reason, count in self.removed.most_common()]
        return "\n".join([f"{self.kept:,} of {total:,} rows kept, {total - self.kept:,} removed", *reasons])
