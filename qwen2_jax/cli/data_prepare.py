"""`qwen2-jax data prepare SRC… --out DIR --tokenizer DIR`: documents into shards of tokens."""

from __future__ import annotations

import argparse

DESCRIPTION = """\
Tokenizes documents into DIR: shards of tokens, and manifest.json, which is written last. Each document ends with the
tokenizer's <|endoftext|>; text that looks like a control token stays plain text.
"""


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser("prepare", help="tokenize documents into shards", description=DESCRIPTION,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", metavar="SRC", help="file, folder, glob or gs:// path")
