"""Tokenizers that several test files of this room share."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest

from qwen2_jax.data.tokenizer import Tokenizer
from qwen2_jax.data.train_tokenizer import train_sentencepiece

VOCAB = 1024


def library_sources(*names: str) -> list[str]:
    """Sources of Python's standard library, by module name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return [(root / f"{name}.py").read_text(encoding="utf-8") for name in names]


@pytest.fixture(scope="session")
def training_texts() -> list[str]:
    prose = "Tabs\tand  spaces, naïve café, “quotes” – 北京市 東京都 서울 Привет мир مرحبا 🤗🎉\r\n" * 20
    return [*library_sources("argparse", "ast", "dataclasses", "inspect", "subprocess"), prose]


@pytest.fixture(scope="session")
def trained_folder(tmp_path_factory, training_texts) -> Path:
    return train_sentencepiece(training_texts, VOCAB, tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="session")
def trained(trained_folder) -> Tokenizer:
    return Tokenizer.load(trained_folder)


@pytest.fixture(scope="session")
def qwen2_folder(shared) -> Path:
    return shared / "data" / "qwen2_tokenizer"


@pytest.fixture(scope="session")
def qwen2(qwen2_folder) -> Tokenizer:
    return Tokenizer.load(qwen2_folder)
