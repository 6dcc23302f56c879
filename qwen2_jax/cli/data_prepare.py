"""`qwen2-jax data prepare SRC… --out DIR --tokenizer DIR`: documents into shards of tokens."""

from __future__ import annotations

import argparse

from qwen2_jax.cli.source_flags import add_source_flags, source_options

DESCRIPTION = """\
Tokenizes documents into shards that training reads: DIR/shard-00000.npy, …, and last of all DIR/manifest.json.

Each SRC is one of
  a file         .jsonl .ndjson .json (a JSON object a line), .txt .text, .parquet, .array_record;
                 text and JSON also with .gz or .zst behind
  a folder       all such files in it and below, sorted
  a glob         'corpus/*.jsonl.gz', in quotes or not
  gs://…         any of these in Google's storage
  tfds:NAME      a data set that TFDS has prepared as ArrayRecord, also tfds:NAME/CONFIG:VERSION, or its folder

Each document ends with the tokenizer's <|endoftext|>. Text that reads like a control token stays plain text. A row that
gives no document (no JSON, no such key, no string, no UTF-8, empty) is reported with its file and line; --max-bad-rows
are skipped, one more is refused.

Interrupted, even by kill -9, the same command goes on where it stopped, and ends with the same bytes.
"""


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser("prepare", help="tokenize documents into shards", description=DESCRIPTION,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to make, or to go on in")
    parser.add_argument("--tokenizer", required=True, metavar="DIR", help="folder of a tokenizer, or of a model")
    add_source_flags(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from qwen2_jax.data.prepare import prepare

    shards = prepare(args.sources, args.out, args.tokenizer, options=source_options(args), workers=args.workers,
                     max_bad_rows=args.max_bad_rows, progress=True)
    print(shards.summary())
    return 0
