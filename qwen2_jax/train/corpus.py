"""An experiment's text as token streams: what is not prepared yet is prepared in the run's folder."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen2_jax.data.mixture import Ramp
from qwen2_jax.data.prepare import prepare
from qwen2_jax.data.shards import MANIFEST, TokenShards
from qwen2_jax.data.source_files import SourceOptions
from qwen2_jax.data.sources import documents
from qwen2_jax.data.stream import Stream
from qwen2_jax.data.subset import Subset
from qwen2_jax.data.train_tokenizer import train_sentencepiece
from qwen2_jax.errors import UserError
from qwen2_jax.sharding import distributed
from qwen2_jax.train.experiment import DataConfig, Experiment, SourceConfig
from qwen2_jax.train.run_folder import DATA, TOKENIZER

TOKENIZER_DOCUMENTS = 200_000
"""A tokenizer is trained on so many documents of each source at most: a sample is enough for its counts."""
PATIENCE = 24 * 3600.0
"""Seconds that the other processes wait for process 0 to prepare the text."""


@dataclass(frozen=True)
class Corpus:
    stream: Stream
    held_out: dict[str, Any]
    """Source → its documents that are not trained on."""
    tokenizer: Path | None
    """Folder of the tokenizer; None where all sources came prepared and none was named."""


def open_corpus(experiment: Experiment, folder: Path, *, source: Path | None, say: Callable[[str], None]) -> Corpus:
    """Opens the experiment's sources. Process 0 makes what is missing, in `folder`: a tokenizer and token shards; of a
    run that goes on from another, `source`, its tokenizer is taken. Raises UserError as `prepare` and `Stream` do."""
    data = experiment.data
    if not data.mixture:
        raise UserError("there is nothing to train on: set data.path to text (files, a folder, a glob) or to a folder "
                        "that `qwen2-jax data prepare` made")
    names = [source.name or source.path for source in data.mixture]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"two sources are called '{twice}': give them names")
    made = distributed.exchange("data", _on_first(lambda: _make(experiment, folder, source, say)), seconds=PATIENCE)
    if made[0].get("error"):
        raise UserError(made[0]["error"])
    shards = {name: TokenShards(path) for name, path in zip(names, made[0]["folders"], strict=True)}
    _check_vocabulary(experiment, shards)
    share = data.held_out
    trained: dict[str, Any] = {name: Subset(whole, share, held_out=False) if share else whole
                               for name, whole in shards.items()}
    held_out = {name: Subset(whole, share, held_out=True) for name, whole in shards.items()} if share else {}
    stream = Stream(trained, row_length=data.row_length, batch_size=data.batch_size, seed=experiment.seed,
                    weights=_weights(names, data.mixture))
    tokenizer = made[0]["tokenizer"]
    return Corpus(stream, {name: part for name, part in held_out.items() if (part.lengths > 1).any()},
                  None if tokenizer is None else Path(tokenizer))


def _on_first(make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What process 0 made, or why it could not: so that the others do not wait in vain."""
    if not distributed.is_first():
        return {}
    if distributed.count() == 1:
        return make()
    try:
        return make()
    except UserError as error:
        return {"error": str(error)}


def _make(experiment: Experiment, folder: Path, source: Path | None, say: Callable[[str], None]) -> dict[str, Any]:
    data = experiment.data
    unprepared = [s for s in data.mixture if not (Path(s.path) / MANIFEST).is_file()]
    tokenizer = Path(data.tokenizer).absolute() if data.tokenizer else None
    if unprepared and tokenizer is None:
        tokenizer = folder / TOKENIZER
        if not (tokenizer / "tokenizer.json").exists():
            theirs = None if source is None else source / TOKENIZER
            if theirs is not None and theirs != tokenizer and (theirs / "tokenizer.json").exists():
                tokenizer = theirs
            else:
                say(f"training a tokenizer of {experiment.model.vocab:,} tokens")
                _train_tokenizer(experiment, unprepared, tokenizer)
    folders = []
    for number, each in enumerate(data.mixture):
        if each not in unprepared:
            folders.append(str(Path(each.path).absolute()))
            continue
        assert tokenizer is not None    # there is text to be tokenized
        out = folder / DATA / str(number)
        prepare([each.path], out, tokenizer, options=_options(data), workers=max(1, data.workers),
                max_bad_rows=data.max_bad_rows, progress=True)
        folders.append(str(out))
    return {"folders": folders, "tokenizer": None if tokenizer is None else str(tokenizer)}


def _options(data: DataConfig) -> SourceOptions:
    return SourceOptions(text_key=data.text_key, document=data.document)


def _train_tokenizer(experiment: Experiment, sources: list[SourceConfig], out: Path) -> None:
    texts = (document.text for source in sources
             for document in itertools.islice(documents([source.path], _options(experiment.data),
                                                        max_bad_rows=experiment.data.max_bad_rows),
                                              TOKENIZER_DOCUMENTS))
    try:
        train_sentencepiece(texts, experiment.model.vocab, out, overwrite=True)
    except UserError as error:
        raise UserError(f"{error} (the setting is model.vocab; data.tokenizer names one that is there)") from None


def _check_vocabulary(experiment: Experiment, shards: dict[str, TokenShards]) -> None:
    for name, source in shards.items():
        if source.vocab > experiment.model.vocab:
            raise UserError(f"source '{name}' is prepared with a tokenizer of {source.vocab:,} tokens, the model has "
                            f"{experiment.model.vocab:,}: prepare it with the model's tokenizer, or change model.vocab")


def _weights(names: list[str], sources: tuple[SourceConfig, ...]) -> dict[str, float | Ramp] | None:
    given = [source.weight is not None for source in sources]
    if not any(given):
        return None
    if not all(given):
        lacking = names[given.index(False)]
        raise UserError(f"source '{lacking}' has no weight and others have: give each one, or none, to go by size")
    return {name: _weight(source) for name, source in zip(names, sources, strict=True)}


def _weight(source: SourceConfig) -> float | Ramp:
    assert source.weight is not None
    if source.final_weight is None:
        return source.weight
    return Ramp(((source.ramp_start, source.weight), (source.ramp_end, source.final_weight)))
