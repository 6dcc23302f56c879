"""Flags of the commands that read documents: sources, what a document is, workers, bad rows."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qwen2_jax.data.source_files import SourceOptions


def add_source_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sources", nargs="+", metavar="SRC",
                        help="file, folder, glob, gs://… or tfds:NAME, as of `qwen2-jax data prepare`")
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


def source_options(args: argparse.Namespace) -> SourceOptions:
    from qwen2_jax.data.source_files import SourceOptions

    return SourceOptions(format=args.format, text_key=args.text_key, document=args.document, records=args.records,
                         split=args.split, tfds_dir=args.tfds_dir)
