"""Scoring given tokens: logits of whole rows, likelihoods of continuations. Rows of like length share a call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from qwen2_jax.data.chatml import END_OF_TEXT
from qwen2_jax.data.tokenizer import Tokenizer
from qwen2_jax.errors import UserError
from qwen2_jax.serve.programs import Programs
from qwen2_jax.sharding.axes import CONTEXT
from qwen2_jax.sharding.mesh import BATCH_SPEC, TOKENS_SPEC
from qwen2_jax.sharding.processes import check_same, fetch, put, spans_processes

SHORTEST_ROW = 32
ROWS_A_DEVICE = (1, 8)
LOGIT_BYTES = 1 << 30
"""Most bytes of float32 logits that a device makes in one call, as long as a single row fits."""


def check_ids(ids: Any, vocab: int, what: str) -> list[int]:
    """Token ids as a list of ints; UserError when empty, not whole numbers, or outside the vocabulary."""
    if ids is None or isinstance(ids, int | float | np.number | dict):
        raise UserError(f"{what} must be a list of at least one token id, found {ids!r}: give a list of such lists")
    try:
        array = np.asarray(ids)
    except ValueError:      # lists of unequal lengths
        raise UserError(f"{what} must be a flat list of token ids, found lists within it") from None
    if array.ndim != 1 or not array.size:
        found = f"shape {array.shape}" if array.size else "none"
        raise UserError(f"{what} must be a list of at least one token id, found {found}")
    if not np.issubdtype(array.dtype, np.integer):
        raise UserError(f"{what} must hold whole numbers, found {array.dtype}")
    if array.min() < 0 or array.max() >= vocab:
        bad = array[(array < 0) | (array >= vocab)][0]
        raise UserError(f"{what} holds token id {bad}, outside the model's vocabulary of {vocab}")
    return array.tolist()


def id_rows(ids: Any, vocab: int) -> list[list[int]]:
    """Rows of token ids, checked."""
    shape = getattr(ids, "shape", None)     # an array's, numpy's or JAX's
    if (shape is None and not isinstance(ids, Sequence)) or (shape is not None and len(shape) != 2):
        found = repr(ids) if shape is None else f"shape {tuple(shape)}"
        raise UserError(f"token ids must be a list of lists or an array [B, T], found {found}")
    return [check_ids(row, vocab, f"row {i}") for i, row in enumerate(ids if shape is None else np.asarray(ids))]


def encode_pair(tokenizer: Tokenizer, pair: tuple[str, str], number: int) -> tuple[list[int], int]:
    """(ids of context and continuation tokenised as one text, where the continuation begins).

    Spaces at the context's end go with the continuation, whose first token usually holds them (lm-evaluation-harness'
    rule). An empty context becomes the end-of-text token.
    """
    if not isinstance(pair, tuple | list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
        raise UserError(f"pair {number} must be (context, continuation), both text, found {pair!r}")
    context, continuation = pair
    if not continuation:
        raise UserError(f"pair {number}: the continuation is empty, it has no likelihood")
    head = context.rstrip()
    if not head:
        end = tokenizer.token_id(END_OF_TEXT)   # pad_token may be another: <|vision_pad|> in some fine-tuned models
        end = tokenizer.pad_id if end is None else end
        if end is None:
            raise UserError(f"pair {number}: the context is empty, and the tokenizer has no end-of-text token instead")
        return [end, *tokenizer.encode(context + continuation)], 1
    ids, start = tokenizer.encode(context + continuation), len(tokenizer.encode(head))
    if start >= len(ids):
        raise UserError(f"pair {number}: its continuation {continuation!r} melts into the context's last token")
    return ids, start


def logits(programs: Programs, rows: Sequence[list[int]], long: Sequence[bool]) -> list[np.ndarray]:
    """float32 [T, V] of each row."""
    out: list[Any] = [None] * len(rows)
    check_same("rows", (list(rows), list(long)), programs.mesh)
    # Every device gets all rows where other processes want them too.
    copies = programs.devices if spans_processes(programs.mesh) else 1
    for members, ids_BT, long_B in _batches(programs, rows, long, logit_bytes=4 * programs.cfg.vocab * copies):
        logits_BTV = programs.logits(*put((ids_BT, long_B), programs.mesh, (TOKENS_SPEC, BATCH_SPEC)))
        result = fetch(logits_BTV, programs.mesh, TOKENS_SPEC)
        for position, i in enumerate(members):
            out[i] = result[position, :len(rows[i])].copy()
    return out


def loglikelihoods(programs: Programs, rows: Sequence[list[int]], starts: Sequence[int], long: Sequence[bool],
                   progress: Callable[[int], None] | None) -> list[tuple[float, bool]]:
    """(summed log-probability of each row's tokens from `start` on, are they all the arg-max)."""
    out: list[Any] = [None] * len(rows)
    check_same("rows", (list(rows), list(starts), list(long)), programs.mesh)
    for members, ids_BT, long_B in _batches(programs, [row[:-1] for row in rows], long, logit_bytes=0):
        targets_BT = np.zeros_like(ids_BT)
        for position, i in enumerate(members):
            targets_BT[position, :len(rows[i]) - 1] = rows[i][1:]
        arrays = put((ids_BT, targets_BT, long_B), programs.mesh, (TOKENS_SPEC, TOKENS_SPEC, BATCH_SPEC))
        logprob_BT, greedy_BT = fetch(programs.scores(*arrays), programs.mesh, TOKENS_SPEC)
        for position, i in enumerate(members):
            span = slice(starts[i] - 1, len(rows[i]) - 1)
            out[i] = float(logprob_BT[position, span].sum(dtype=np.float64)), bool(greedy_BT[position, span].all())
        if progress is not None:
            progress(len(members))
    return out


def _batches(programs: Programs, rows: Sequence[list[int]], long: Sequence[bool], *,
             logit_bytes: int) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
    """Rows padded to powers of two, longest first: (their numbers, ids [B, T], long [B]). Few shapes to compile.

    Where context's devices do not divide such a power, to the next multiple of them.
    """
    context = programs.ax.size(CONTEXT)
    widths = [-(-max(SHORTEST_ROW, 1 << (len(row) - 1).bit_length()) // context) * context for row in rows]
    for width in sorted(set(widths), reverse=True):
        members = [i for i, w in enumerate(widths) if w == width]
        fitting = [n for n in ROWS_A_DEVICE if n * width * logit_bytes <= LOGIT_BYTES] or [1]
        while members:
            each = next((n for n in fitting if n * programs.devices >= len(members)), fitting[-1])
            batch, members = members[:each * programs.devices], members[each * programs.devices:]
            ids_BT = np.zeros((each * programs.devices, width), np.int32)
            long_B = np.zeros(each * programs.devices, bool)
            for position, i in enumerate(batch):
                ids_BT[position, :len(rows[i])] = rows[i]
                long_B[position] = long[i]
            yield batch, ids_BT, long_B
