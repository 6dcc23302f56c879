"""A small model for the commands that run one, and the command line called in this process."""

from __future__ import annotations

import dataclasses
import signal
from pathlib import Path

import pytest

from qwen2_jax.cli import main


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    """A dense model with a tokenizer, whose files say nothing about sampling: greedy."""
    # Here, for these need torch and transformers, which the smoke tests of this room do without.
    from tests.serve.models import write_checkpoint, write_tokenizer

    return write_checkpoint(tmp_path_factory.mktemp("model"), "dense", write_tokenizer(tmp_path_factory.mktemp("tok")))


@dataclasses.dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def call(capsys):
    """`call("generate", "--model", folder)`: the command in this process, as `run_cli` does it in one of its own."""

    def run(*argv: object) -> Done:
        before = signal.getsignal(signal.SIGTERM)
        try:
            status = main.entry([str(word) for word in argv])
        finally:
            signal.signal(signal.SIGTERM, before)
        return Done(status, *capsys.readouterr())

    return run
