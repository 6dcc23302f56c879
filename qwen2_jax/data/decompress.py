"""The bytes of a file, gzip or zstd undone; what is cut short or damaged never passes for the end."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any

from qwen2_jax.errors import UserError

SUFFIXES = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd"}
BLOCK = 1 << 18     # bytes read at a time


def blocks(stream: IO[bytes], compression: str | None, name: str) -> Iterator[bytes]:
    """The uncompressed bytes of an open file, block by block. `compression`: "gzip", "zstd" or None.

    Members and frames that follow one another are one text. Raises UserError naming the file when it is truncated or
    damaged, or when zstd needs the package that is not there.
    """
    if compression is None:
        while block := stream.read(BLOCK):
            yield block
        return
    new, errors, padding = _gzip() if compression == "gzip" else _zstd()
    frame = None
    try:
        while block := stream.read(BLOCK):
            while block:
                if frame is None:
                    block = block.lstrip(padding) if padding else block
                    if not block:
                        break
                    frame = new()
                yield frame.decompress(block)
                block = frame.unused_data if frame.eof else b""
                if frame.eof:
                    frame = None
    except errors as error:
        raise UserError(f"{name} is damaged, or no {compression} file: {error}; get it anew or leave it out") from None
    if frame is not None:
        raise UserError(f"{name} is truncated: its {compression} data has no end; get it anew or leave it out")


Decompressor = tuple[Callable[[], Any], type[Exception], bytes]


def _gzip() -> Decompressor:
    return lambda: zlib.decompressobj(wbits=16 + zlib.MAX_WBITS), zlib.error, b"\0"     # zeros may pad a member


def _zstd() -> Decompressor:
    try:
        import zstandard
    except ImportError:
        raise UserError('.zst files need the package zstandard: pip install "qwen2_jax[data]"') from None
    # Not `stream_reader`, which takes a truncated file for a short one.
    return lambda: zstandard.ZstdDecompressor().decompressobj(), zstandard.ZstdError, b""
