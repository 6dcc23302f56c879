"""Data sets prepared by TensorFlow Datasets, read without TensorFlow: by name, or from the folder of a builder."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from typing import Any

from qwen2_jax.data.array_record_source import ranges
from qwen2_jax.data.rows import Unusable, text_of, usable
from qwen2_jax.data.source_files import TFDS, Piece, SourceFile, SourceOptions
from qwen2_jax.errors import UserError

TFRECORD = ("TFRecord files are read by TensorFlow only; prepare the data set once more where TensorFlow is, as "
            "ArrayRecord: `tfds build NAME --file_format=array_record`")


def describe(source: str, options: SourceOptions) -> SourceFile:
    """The split `options.split` of `tfds:NAME[/CONFIG][:VERSION]`, or of the folder that a builder has prepared.

    Raises UserError when it is not there, is prepared as TFRecord, or has no such split or feature.
    """
    data = _open(source, options)
    features = data.dataset_info.features
    if options.text_key not in features:
        raise UserError(f"{source} has no feature {options.text_key!r}, only {', '.join(features)}; --text-key names "
                        "the text's")
    stats = [os.stat(path) for path in data.dataset_info.splits[options.split].filepaths]
    return SourceFile(source, "tfds", None, sum(stat.st_size for stat in stats),
                      max((stat.st_mtime_ns for stat in stats), default=0))


def pieces(file: SourceFile, options: SourceOptions, row: int, offset: int) -> Iterator[Piece]:
    """Ranges of examples from example `row`."""
    yield from ranges(file, len(_opened(file, options)), row)
    if describe(file.path, options) != file:
        raise UserError(f"{file.path} was changed while it was being prepared: prepare it anew into another folder")


def rows(piece: Piece, options: SourceOptions) -> Iterator[tuple[int, str | Unusable]]:
    """The number and the text of each example of a piece, or why it has none."""
    data = _opened(piece.file, options)
    try:
        examples = data.__getitems__(range(*piece.data))
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(f"{piece.file.path} is damaged ({_first_line(error)}); prepare it anew") from None
    return usable((example[options.text_key] for example in examples), _text, piece.row)


def _text(value: Any) -> str:
    if not isinstance(value, bytes | str):
        raise Unusable(f"{type(value).__name__} instead of a string")
    return text_of(value)


@functools.lru_cache(maxsize=2)
def _opened(file: SourceFile, options: SourceOptions) -> Any:
    return _open(file.path, options)


def _open(source: str, options: SourceOptions) -> Any:
    import tensorflow_datasets as tfds

    split, folder = options.split, options.tfds_dir
    try:
        if source.startswith(TFDS):
            name = source.removeprefix(TFDS)
            return tfds.data_source(name, split=split, data_dir=folder, download=False)
        builder: Any = tfds.builder_from_directory(source)
        return builder.as_data_source(split=split)
    except NotImplementedError:
        where = f" in {folder}" if folder else ""
        raise UserError(f"{source} is not prepared as ArrayRecord{where}; {TFRECORD}") from None
    except Exception as error:      # of any kind: an unknown name, split or version, a file that is missing
        raise UserError(f"{source}, split {split}: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
