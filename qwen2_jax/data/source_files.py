"""Which files a command's sources name, what kind each is, and how it is opened: local or `gs://`."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from qwen2_jax.data.decompress import SUFFIXES
from qwen2_jax.errors import UserError

log = logging.getLogger(__name__)

PIECE_BYTES = 1 << 19       # of text: what a worker is given at a time, and the most that a killed run does again
KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".txt": "text", ".text": "text",
         ".parquet": "parquet", ".array_record": "arrayrecord", ".arrayrecord": "arrayrecord"}
FORMATS = ("jsonl", "text", "parquet", "arrayrecord")
DOCUMENTS = ("file", "line", "paragraph")
RECORDS = ("json", "text", "example")
SHARD_NUMBER = re.compile(r"-\d+-of-\d+$")      # behind the ending in TFDS's names
TFDS = "tfds:"
GS = "gs://"


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """How documents are taken from files.

    Attributes:
      format: one of FORMATS for all files; None tells it by the name.
      text_key: the key of a JSON object, the column, or the feature that holds the text.
      document: what one document is in plain text: a whole "file", a "line", or a "paragraph" between blank lines.
      records: what a record of an ArrayRecord file is: a "json" object, the "text" itself, or a tf.train "example".
      split: of a TFDS data set, as in `train[:10%]`.
      tfds_dir: where TFDS data sets lie; None for TFDS's own default.
    """

    format: str | None = None
    text_key: str = "text"
    document: str = "file"
    records: str = "json"
    split: str = "train"
    tfds_dir: str | None = None

    def __post_init__(self) -> None:
        for name, known in (("format", FORMATS), ("document", DOCUMENTS), ("records", RECORDS)):
            value = getattr(self, name)
            if value not in known and not (name == "format" and value is None):
                raise UserError(f"{name} is {value!r}; it is one of {', '.join(known)}")


@dataclass(frozen=True)
class SourceFile:
    """One file, or one TFDS split (`kind` "tfds"). `modified` is in nanoseconds, 0 where that is not known."""

    path: str
    kind: str
    compression: str | None
    bytes: int
    modified: int


@dataclass(frozen=True)
class Piece:
    """Some rows of a file, on their way to a worker.

    `data` is text, or raw rows, or for records that workers read themselves `(first, last + 1)`, from 0. `row` is the
    number of the first row, from 1; the next piece starts at `next_row` and `next_offset`; `read` is how many bytes of
    the file are used up with this one.
    """

    file: SourceFile
    data: Any
    row: int
    next_row: int
    next_offset: int
    read: int


def find_files(sources: Sequence[str], options: SourceOptions) -> list[SourceFile]:
    """The files that `sources` name, in their order; those of a folder or a glob sorted by path.

    Raises UserError for what does not exist, cannot be read, is named twice, or is of no known kind.
    """
    files: list[SourceFile] = []
    for source in sources:
        with _explained(source):
            found = list(_expand(str(source), options))
        if not found:
            raise UserError(f"{source} holds no file with a known ending ({', '.join(KINDS)}, each also .gz or .zst); "
                            "--format names the format of files with other endings")
        files += found
    seen: set[str] = set()
    for file in files:
        if file.path in seen:
            raise UserError(f"{file.path} is named twice: its documents would be there twice")
        seen.add(file.path)
    return files


@contextlib.contextmanager
def opened(file: SourceFile) -> Iterator[IO[bytes]]:
    """The file's bytes. Raises UserError when it cannot be read, or is not the file any more that was found first."""
    with _explained(file.path):
        check_unchanged(file)
        with _path(file.path).open("rb") as stream:
            yield stream
        check_unchanged(file)


def check_unchanged(file: SourceFile) -> None:
    found = _stat(_path(file.path))
    if found != (file.bytes, file.modified):
        raise UserError(f"{file.path} was changed while it was being prepared ({file.bytes:,} bytes then, {found[0]:,} "
                        "now): prepare it anew into another folder")


def _expand(source: str, options: SourceOptions) -> Iterator[SourceFile]:
    if source.startswith(TFDS):
        yield _tfds(source, options)
        return
    path = _path(source)
    if path.is_dir():
        yield from _folder(path, options, set())
    elif path.exists():
        yield _file(path, options)
    elif any(char in source for char in "*?["):
        parts = Path(source).parts if not source.startswith(GS) else tuple(source.split("/"))
        fixed = next(i for i, part in enumerate(parts) if any(char in part for char in "*?["))
        base = "/".join(parts[:fixed]) if source.startswith(GS) else str(Path(*parts[:fixed]))
        matches = sorted(_path(base).glob("/".join(parts[fixed:])), key=str)
        matches = [match for match in matches if not match.name.startswith(".") and not match.is_dir()]
        if not matches:
            raise UserError(f"no file matches {source}")
        for match in matches:
            yield _file(match, options)
    else:
        raise UserError(f"{source} does not exist")


def _folder(folder: Path, options: SourceOptions, above: set[str]) -> Iterator[SourceFile]:
    real = os.path.realpath(folder) if not str(folder).startswith(GS) else str(folder)
    if real in above:       # a link that leads back
        return
    if (folder / "dataset_info.json").exists() and (folder / "features.json").exists():
        yield _tfds(str(folder), options)
        return
    passed_over = []
    for path in sorted(folder.iterdir(), key=lambda path: path.name):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _folder(path, options, above | {real})
        elif options.format is None and _kind(path.name) is None:
            passed_over.append(path.name)
        else:
            yield _file(path, options)
    if passed_over:
        some = ", ".join(passed_over[:3]) + ", …" * (len(passed_over) > 3)
        log.warning("%s: %d without a known ending passed over (%s)", folder, len(passed_over), some)


def _file(path: Path, options: SourceOptions) -> SourceFile:
    if not path.is_file():
        raise UserError(f"{path} is neither a file nor a folder; data is read from files, to go on after a stop")
    kind = options.format or _kind(path.name)
    if kind is None:
        raise UserError(f"{path}: the ending tells no format; known are {', '.join(KINDS)}, each also .gz or .zst; "
                        "--format names it")
    compression = next((name for ending, name in SUFFIXES.items() if path.name.endswith(ending)), None)
    if compression and kind in ("parquet", "arrayrecord"):
        raise UserError(f"{path}: {kind} files are compressed inside; undo the {compression} around it")
    return SourceFile(str(path), kind, compression, *_stat(path))


def _kind(name: str) -> str | None:
    name = SHARD_NUMBER.sub("", name)
    for ending in SUFFIXES:
        name = name.removesuffix(ending)
    ending = os.path.splitext(name)[1].lower()
    if ending in (".tfrecord", ".tfrecords"):
        from qwen2_jax.data.tfds_source import TFRECORD

        raise UserError(f"{name}: {TFRECORD}")
    return KINDS.get(ending)


def _tfds(source: str, options: SourceOptions) -> SourceFile:
    from qwen2_jax.data.tfds_source import describe

    return describe(source, options)


def _path(source: str) -> Path:
    if not source.startswith(GS):
        return Path(os.path.abspath(source))
    try:
        from etils import epath
    except ImportError:
        raise UserError(GCSFS) from None
    path: Any = epath.Path(source)      # has pathlib's methods
    return path


def _stat(path: Path) -> tuple[int, int]:
    """Size, and when it was changed."""
    if not str(path).startswith(GS):
        found = os.stat(path)
        return found.st_size, found.st_mtime_ns
    found: Any = path.stat()
    return found.length, int((found.mtime or 0) * 1e9)


GCSFS = 'gs:// paths need the package gcsfs: pip install "qwen2_jax[data]"'


@contextlib.contextmanager
def _explained(source: str) -> Iterator[None]:
    """Turns what the system, or Google's storage, says of a path into a UserError."""
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"cannot read {error.filename or source}: {error.strerror or error}") from None
    except Exception as error:
        if not source.startswith(GS):
            raise
        raise UserError(GCSFS if isinstance(error, ImportError) else f"cannot read {source}: {error}") from None


