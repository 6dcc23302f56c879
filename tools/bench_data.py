"""How many packed tokens a second does one core make out of prepared shards?

    python -m tools.bench_data [--data DIR] [--seq 4096] [--batch 8] [--documents 1000000] [--workers 0] [--seconds 5]

Without --data, shards of random tokens are written into a temporary folder: documents of log-normal length (median 300
tokens, mean about 550). Prints one JSON line. `tokens_per_second` is the median of five stretches of --seconds on one
core, `tokens_per_cpu_second` is over the processor time of this process (which other work on the machine changes
little); `open_seconds` is for a new stream's batch 0, `far_seconds` for a new stream's batch 10^6, whose packing plans
are counted; `cut` is the share of the documents shorter than a row that lie in more than one; `load` is what else ran.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np

from qwen2_jax.data.loader import Loader
from qwen2_jax.data.shards import FORMAT, MANIFEST, TokenShards, file_sha256
from qwen2_jax.data.stream import Stream

VOCAB = 151_936
STRETCHES = 5
FAR = 10**6


def write_shards(folder: Path, documents: int) -> None:
    """A prepared folder of one shard of random tokens."""
    draw = np.random.default_rng(0)
    lengths = np.clip(draw.lognormal(np.log(300), 1.1, documents), 2, 200_000).astype(np.uint32)
    tokens = draw.integers(1, VOCAB, int(lengths.sum(dtype=np.int64)), np.uint32)
    tokens[np.cumsum(lengths, dtype=np.int64) - 1] = 0
    shard: dict[str, Any] = {"documents": documents, "tokens": len(tokens)}
    for field, digest, name, array in (("file", "sha256", "shard-00000.npy", tokens),
                                       ("lengths_file", "lengths_sha256", "shard-00000.lengths.npy", lengths)):
        np.save(folder / name, array)
        shard |= {field: name, digest: file_sha256(folder / name)}
    (folder / MANIFEST).write_text(json.dumps({"format": FORMAT, "shards": [shard], "tokenizer_sha256": "random",
                                               "end_token": 0, "vocab": VOCAB, "skipped": 0}))


def measure(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    def new_stream() -> Stream:
        return Stream({"data": TokenShards(folder)}, row_length=args.seq, batch_size=args.batch, seed=0)

    def first_batch(n: int) -> tuple[float, Stream]:
        began = time.perf_counter()
        stream = new_stream()
        stream.batch(n)
        return time.perf_counter() - began, stream

    open_seconds, stream = first_batch(0)
    far_seconds, far = first_batch(FAR)
    walls, processors, padding = [], [], 0.0
    with contextlib.ExitStack() as stack:
        if args.workers:
            batches = stack.enter_context(Loader(stream, workers=args.workers))
        else:
            batches = map(stream.batch, count())
        next(batches)
        for _ in range(STRETCHES):
            began, began_processor, made = time.perf_counter(), time.process_time(), 0
            while time.perf_counter() - began < args.seconds:
                batch = next(batches)
                made += int((batch.segments_BT > 0).sum())
                padding = max(padding, float((batch.segments_BT == 0).mean()))
            walls.append(made / (time.perf_counter() - began))
            processors.append(made / (time.process_time() - began_processor))
    shards = stream.sources["data"]
    return {"tokens_per_second": round(statistics.median(walls)),
            "tokens_per_cpu_second": None if args.workers else round(statistics.median(processors)),
            "open_seconds": round(open_seconds, 3), "far_seconds": round(far_seconds, 3),
            "far_plans": far.blocks_planned, "padding": padding, "cut": round(cut_share(stream), 4),
            "documents": len(shards), "mean_tokens": round(float(shards.lengths.mean()), 1)}


def cut_share(stream: Stream) -> float:
    """Of the documents shorter than a row in some 2,000 rows, those that are cut."""
    lengths = stream.sources["data"].lengths
    plans = (stream.plan(n) for n in range(max(1, 2048 // stream.batch_size)))
    pieces = [piece for plan in plans for _, row in plan for piece in row
              if lengths[piece.document] <= stream.row_length]
    parts = Counter(piece.document for piece in pieces)
    cut = {piece.document for piece in pieces if piece.length + 1 < lengths[piece.document]}
    return len(cut) / max(1, len(parts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a folder that `qwen2-jax data prepare` has made")
    parser.add_argument("--seq", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--documents", type=int, default=1_000_000, help="to write, without --data")
    parser.add_argument("--workers", type=int, default=0, help="0: in this process, without reading ahead")
    parser.add_argument("--seconds", type=float, default=5.0)
    args = parser.parse_args()
    if not args.workers:
        os.sched_setaffinity(0, list(islice(sorted(os.sched_getaffinity(0)), 1)))
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as temporary:
        if args.data is None:
            write_shards(Path(temporary), args.documents)
        found = measure(args.data or Path(temporary), args)
    processor = next((line.partition(": ")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                      if line.startswith("model name")), "unknown")
    print(json.dumps({"command": " ".join(["python -m tools.bench_data", *sys.argv[1:]])} | found
                     | {"machine": f"{processor}, {os.cpu_count()} cores", "load": round(load, 1)}))


if __name__ == "__main__":
    main()
