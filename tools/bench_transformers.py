"""Qwen2-0.5B at true shape with random weights on this CPU: ours against transformers.

    python tools/bench_transformers.py [--json] [--rows decode_b1,prefill] [--dtypes bfloat16] [--rounds 5]

Rows: decoding at batch 1 and 8 (32 tokens after a prompt of 32), prefill of 512 tokens, a training step of 8 x 256
tokens (forward, backward, AdamW; bfloat16 is autocast over float32 weights on both sides). Each measurement is a
process of its own, the two sides take turns, and medians are compared. `ours` and `transformers` are tokens a second;
`matmul_ratio` is how much faster our library's bare matrix products are at the row's shapes, so it tells what part of
`ratio` is not our doing. `bandwidth_share`: weight bytes a second while decoding, over what all threads read.

Needs torch and transformers (the extra `dev`) and a machine with nothing else to do: results are printed with the load.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

ROWS = ("decode_b1", "decode_b8", "prefill", "train")
DTYPES = ("float32", "bfloat16")
SIDES = ("ours", "transformers")
ROOT = Path(__file__).parents[1]


def measure(side: str, row: str, dtype: str) -> dict[str, float]:
    """Seconds of one measurement in a fresh process: {"seconds": a call, "tokens": in it, …}."""
    command = [sys.executable, "-m", "tools.bench_worker", side, row, dtype]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed with status {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(row: str, dtype: str, rounds: int) -> dict[str, object]:
    """One row of the table, from `rounds` alternating measurements a side."""
    results: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for turn in range(rounds):
        for side in SIDES if turn % 2 == 0 else SIDES[::-1]:
            results[side].append(measure(side, row, dtype))
            print(f"{row} {dtype} round {turn + 1}/{rounds} {side}: {results[side][-1]}", file=sys.stderr)

    def median(side: str, name: str) -> float:
        return statistics.median(r[name] for r in results[side])

    speed = {side: median(side, "tokens") / median(side, "seconds") for side in SIDES}
    out: dict[str, object] = {"name": row, "dtype": dtype, **{side: round(speed[side], 2) for side in SIDES},
                              "ratio": round(speed["ours"] / speed["transformers"], 3),
                              "matmul_ratio": round(median("transformers", "matmul_seconds")
                                                    / median("ours", "matmul_seconds"), 3)}
    if row.startswith("decode"):
        read = median("ours", "weight_bytes") / (median("ours", "seconds") / median("ours", "steps"))
        out["bandwidth_share"] = round(read / median("transformers", "bandwidth"), 3)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object a row on stdout")
    parser.add_argument("--rows", default=",".join(ROWS), help=f"of {', '.join(ROWS)}")
    parser.add_argument("--dtypes", default=",".join(DTYPES), help=f"of {', '.join(DTYPES)}")
    parser.add_argument("--rounds", type=int, default=5, help="measurements a side (default: 5)")
    args = parser.parse_args()
    rows, dtypes = args.rows.split(","), args.dtypes.split(",")
    for given, known in ((rows, ROWS), (dtypes, DTYPES)):
        if unknown := sorted(set(given) - set(known)):
            parser.error(f"{unknown[0]!r} is none of {', '.join(known)}")
    if args.rounds < 1:
        parser.error("--rounds must be at least 1")
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}", file=sys.stderr)
    if not args.json:
        print(f"{'row':10} {'dtype':9} {'ours tok/s':>11} {'transformers':>13} {'ratio':>6} {'matmuls':>8} "
              f"{'bandwidth':>10}")
    for row in rows:
        for dtype in dtypes:
            result = compare(row, dtype, args.rounds)
            share = f"{result['bandwidth_share']:.0%}" if "bandwidth_share" in result else ""
            print(json.dumps(result) if args.json else
                  f"{row:10} {dtype:9} {result['ours']:>11} {result['transformers']:>13} {result['ratio']:>6} "
                  f"{result['matmul_ratio']:>8} {share:>10}", flush=True)


if __name__ == "__main__":
    main()
