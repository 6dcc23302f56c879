"""`qwen2-jax data prepare SRC… --out DIR --tokenizer DIR`: documents into shards of tokens."""

from __future__ import annotations

import argparse

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
    parser.add_argument("sources", nargs="+", metavar="SRC", help="where documents come from, see above")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to make, or to go on in")
    parser.add_argument("--tokenizer", required=True, metavar="DIR", help="folder of a tokenizer, or of a model")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one a processor)")
    parser.add_argument("--max-bad-rows", type=int, default=0, metavar="N",
                        help="rows without a document to skip (default: 0)")
    rows = parser.add_argument_group("what a document is")
    rows.add_argument("--text-key", default="text", metavar="KEY",
                      help="key of the JSON object, or column, that holds the text (default: text)")
    rows.add_argument("--document", choices=("file", "line", "paragraph"), default="file",
                      help="in plain text: a whole file (default), a line, or what stands between blank lines")
    rows.add_argument("--format", choices=("jsonl", "text", "parquet", "arrayrecord"),
                      help="of all files, whatever their names end with")
    rows.add_argument("--records", choices=("json", "text", "example"), default="json",
                      help="in ArrayRecord: JSON objects (default), the texts themselves, or tf.train.Example")
    rows.add_argument("--split", default="train", help="of a TFDS data set, like train[:10%%] (default: train)")
    rows.add_argument("--tfds-dir", metavar="DIR", help="where TFDS data sets lie (default: TFDS's own)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from qwen2_jax.data.prepare import prepare
    from qwen2_jax.data.source_files import SourceOptions

    options = SourceOptions(format=args.format, text_key=args.text_key, document=args.document, records=args.records,
                            split=args.split, tfds_dir=args.tfds_dir)
    shards = prepare(args.sources, args.out, args.tokenizer, options=options, workers=args.workers,
                     max_bad_rows=args.max_bad_rows, progress=True)
    print(shards.summary())
    return 0
