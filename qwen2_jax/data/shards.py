"""Prepared token data: a folder of shards, read by memory map.

`manifest.json` names the shards in order: `shard-00000.npy` holds the tokens of its documents one after the other
(uint16 where the vocabulary fits, else uint32), `shard-00000.lengths.npy` how many tokens each document has (uint32).
A document's last token is the end token. The manifest is written last, so a folder with one is complete.
"""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from qwen2_jax.errors import UserError

MANIFEST = "manifest.json"
PROGRESS = "progress.jsonl"     # of a run that has not finished
FORMAT = 1
HEADER = 128        # bytes in front of the numbers: what numpy writes for one dimension, with room for any length
LENGTHS = np.dtype("<u4")
READ = 1 << 20


def token_dtype(vocab: int) -> np.dtype:
    """uint16 where ids below `vocab` fit, else uint32."""
    return np.dtype("<u2" if vocab <= 1 << 16 else "<u4")


class TokenShards:
    """The documents of a prepared folder, by number over all shards.

    Opening reads the manifest and the files' sizes; maps open when they are used. A pickled copy is the path, and the
    hash that the folder must still have.

    Raises UserError for a folder without a manifest, of another format, or whose files are missing or cut short.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder).absolute()
        self._manifest = read_manifest(self.folder)
        self._shards: list[dict[str, Any]] = self._manifest["shards"]
        self.vocab: int = self._manifest["vocab"]
        self.end_token: int = self._manifest["end_token"]
        self.documents = np.array([shard["documents"] for shard in self._shards], np.int64)
        self._dtype = token_dtype(self.vocab)
        for shard in self._shards:
            _check_size(self.folder / shard["file"], shard["tokens"] * self._dtype.itemsize)
            _check_size(self.folder / shard["lengths_file"], shard["documents"] * LENGTHS.itemsize)

    def __len__(self) -> int:
        """How many documents there are."""
        return int(self.documents.sum())

    def summary(self) -> str:
        """One line for people."""
        tokens = sum(shard["tokens"] for shard in self._shards)
        skipped = self._manifest.get("skipped", 0)
        return (f"{self.folder}: {len(self):,} documents, {tokens:,} tokens, {len(self._shards):,} "
                f"shard{'s' * (len(self._shards) != 1)}, {skipped:,} bad row{'s' * (skipped != 1)} skipped")

    @cached_property
    def manifest_hash(self) -> str:
        """Hex SHA-256 of what the folder holds: the shards' contents in their order, the tokenizer, the end token."""
        contents = [[shard["sha256"], shard["lengths_sha256"]] for shard in self._shards]
        held = [FORMAT, self._manifest["tokenizer_sha256"], self.end_token, self.vocab, contents]
        return hashlib.sha256(json.dumps(held).encode()).hexdigest()

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, its end token included: uint32 [documents]."""
        parts = [self._load(shard["lengths_file"], LENGTHS, shard["documents"]) for shard in self._shards]
        lengths = np.concatenate([np.empty(0, LENGTHS), *parts])
        ends = np.cumsum(self.documents)
        for shard, start, end in zip(self._shards, ends - self.documents, ends, strict=True):
            if int(lengths[start:end].sum(dtype=np.int64)) != shard["tokens"]:
                raise UserError(f"{self.folder / shard['lengths_file']}: the lengths do not add up to the "
                                f"{shard['tokens']:,} tokens of the manifest; prepare the data anew")
        return lengths

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        """Tokens `start` to `stop` of a document, a read-only view: uint16 or uint32 [stop - start].

        Raises IndexError for a document or a slice that is not there.
        """
        if not 0 <= document < len(self._starts):
            raise IndexError(f"document {document} of {len(self._starts)}")
        if not 0 <= start <= stop <= self.lengths[document]:
            raise IndexError(f"tokens {start} to {stop} of document {document}, which has {self.lengths[document]}")
        shard = int(np.searchsorted(self._first_documents, document, side="right")) - 1
        at = int(self._starts[document])
        return self._maps(shard)[at + start : at + stop]

    def verify(self, *, progress: bool = False) -> None:
        """Reads every file and compares it with the manifest. Raises UserError naming the files that differ."""
        files = [(shard[name], shard[digest]) for shard in self._shards
                 for name, digest in (("file", "sha256"), ("lengths_file", "lengths_sha256"))]
        wrong = []
        size = sum((self.folder / name).stat().st_size for name, _ in files)
        with tqdm(total=size, unit="B", unit_scale=True, desc="verify", disable=not progress) as bar:
            for name, expected in files:
                if file_sha256(self.folder / name, bar) != expected:
                    wrong.append(name)
        if wrong:
            more = f" and {len(wrong) - 5} more" * (len(wrong) > 5)
            raise UserError(f"{self.folder}: {', '.join(wrong[:5])}{more} changed since {MANIFEST} was written; "
                            "prepare the data anew")

    def __reduce__(self):
        return _reopen, (self.folder, self.manifest_hash)

    @cached_property
    def _first_documents(self) -> np.ndarray:
        return np.cumsum(self.documents) - self.documents

    @cached_property
    def _starts(self) -> np.ndarray:
        """Where each document starts in its shard: int64 [documents]."""
        ends = np.cumsum(self.lengths, dtype=np.int64)
        shard_tokens = np.array([shard["tokens"] for shard in self._shards], np.int64)
        before = np.repeat(np.cumsum(shard_tokens) - shard_tokens, self.documents)
        return ends - self.lengths - before

    @cached_property
    def _open_maps(self) -> dict[int, np.ndarray]:
        return {}

    def _maps(self, shard: int) -> np.ndarray:
        if shard not in self._open_maps:
            entry = self._shards[shard]
            self._open_maps[shard] = self._load(entry["file"], self._dtype, entry["tokens"])
        return self._open_maps[shard]

    def _load(self, name: str, dtype: np.dtype, length: int) -> np.ndarray:
        """A plain array over the file's memory map, which pickles and slices without numpy's bookkeeping for maps."""
        try:
            found = np.load(self.folder / name, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {self.folder / name}: {error}; prepare the data anew") from None
        if (found.dtype, found.shape) != (dtype, (length,)):
            raise UserError(f"{self.folder / name} holds {found.dtype} {list(found.shape)} where {MANIFEST} says "
                            f"{dtype} [{length}]; prepare the data anew")
        return np.asarray(found)


def file_sha256(path: Path, bar: tqdm | None = None) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(READ):
            digest.update(block)
            if bar is not None:
                bar.update(len(block))
    return digest.hexdigest()


def _reopen(folder: Path, expected: str) -> TokenShards:
    shards = TokenShards(folder)
    if shards.manifest_hash != expected:
        raise UserError(f"{folder} was prepared anew meanwhile: start again")
    return shards


def read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        what = "is not complete" if (folder / PROGRESS).exists() else "holds no prepared data"
        raise UserError(f"{folder} {what}: there is no {MANIFEST}; `qwen2-jax data prepare` writes it when all is "
                        "done") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}; prepare the data anew") from None
    if not isinstance(manifest, dict) or "shards" not in manifest:
        raise UserError(f"{path} is not a manifest of prepared data")
    if manifest.get("format") != FORMAT:
        raise UserError(f"{path} has format {manifest.get('format')!r}; this version reads format {FORMAT}: prepare "
                        "the data anew, or take the version that wrote it")
    fields = {"vocab": int, "end_token": int, "tokenizer_sha256": str, "shards": list}
    shard_fields = {"file": str, "documents": int, "tokens": int, "sha256": str, "lengths_file": str,
                    "lengths_sha256": str}
    _check_fields(path, manifest, fields)
    for shard in manifest["shards"]:
        _check_fields(path, shard, shard_fields)
    return manifest


def _check_fields(path: Path, found: Any, fields: dict[str, type]) -> None:
    for name, kind in fields.items():
        if not isinstance(found, dict) or not isinstance(found.get(name), kind):
            raise UserError(f"{path} is damaged: {name} is missing, or no {kind.__name__}; prepare the data anew")


def _check_size(path: Path, payload: int) -> None:
    try:
        found = path.stat().st_size
    except FileNotFoundError:
        raise UserError(f"{path} is missing: copy it from where it was prepared, or prepare the data anew") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if found != HEADER + payload:
        raise UserError(f"{path} has {found:,} bytes where {MANIFEST} says {HEADER + payload:,}: copy it once more, or "
                        "prepare the data anew")
