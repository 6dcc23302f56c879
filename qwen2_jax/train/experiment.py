"""What a training run is: frozen dataclasses, every field of which can be set by name (`qwen2_jax/settings.py`)."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

from qwen2_jax.config import ModelConfig, Remat
from qwen2_jax.errors import UserError
from qwen2_jax.ops.exchange import ExpertExchange
from qwen2_jax.optim.adamw import AdamWConfig
from qwen2_jax.optim.muon import MuonConfig

FREE = ("steps", "mesh", "micro_batches", "remat", "expert_exchange", "data.workers", "checkpoint", "evaluation",
        "preempt_exit_code")
"""Settings, and groups of them, with which a run may go on differently: its losses stay what they would have been."""


def _need(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One source of text in a mixture."""

    path: str
    """Text to train on, as `data prepare` takes it (files, a folder, a glob), or a folder that it has made."""
    name: str = ""
    """What the source is called in metrics; its path where it has no name."""
    weight: float | None = None
    """Share of the rows, against the other sources' weights; none for all of them: by size."""
    final_weight: float | None = None
    """Weight from `ramp_end` on, where it is not to stay the same."""
    ramp_start: int = 0
    """Step until which `weight` holds."""
    ramp_end: int = 0
    """Step from which `final_weight` holds; in between the weight changes evenly."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Text, its tokens, and how they fill rows."""

    path: str = ""
    """One source: files, a folder, a glob, or a prepared folder. Takes the place of `sources`."""
    sources: tuple[SourceConfig, ...] = ()
    """A mixture."""
    text_key: str = "text"
    """Field of a JSON object or a table that holds the text."""
    document: Literal["file", "line", "paragraph"] = "file"
    """What one document is in plain text; a paragraph ends at an empty line."""
    tokenizer: str = ""
    """Folder of the tokenizer; empty: one of `model.vocab` tokens is trained on the text."""
    row_length: int
    """Tokens a row."""
    batch_size: int
    """Rows of a step, over all devices."""
    held_out: float = 0.0
    """Share of the documents that is not trained on but evaluated."""
    workers: int = 0
    """Processes that make rows ahead of time; 0: a thread of this one."""
    max_bad_rows: int = 0
    """Rows of the input that may be unreadable; beyond it the run refuses to start."""

    def __post_init__(self):
        for name in ("row_length", "batch_size"):
            _need(getattr(self, name) >= 1, f"data.{name} must be at least 1, found {getattr(self, name)}")
        for name in ("workers", "max_bad_rows"):
            _need(getattr(self, name) >= 0, f"data.{name} must be at least 0, found {getattr(self, name)}")
        _need(0 <= self.held_out < 1, f"data.held_out must be at least 0 and below 1, found {self.held_out}")

    @property
    def mixture(self) -> tuple[SourceConfig, ...]:
        return (SourceConfig(path=self.path),) if self.path else self.sources


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the state is saved, and what stays on disk."""

    every: int = 500
    """Steps between saves; the last step is always saved, and step 0."""
    keep: int = 3
    """How many of the newest stay."""
    keep_every: int | None = None
    """Multiples of it stay for ever."""

    def __post_init__(self):
        for name in ("every", "keep", "keep_every"):
            value = getattr(self, name)
            _need(value is None or value >= 1, f"checkpoint.{name} must be at least 1, found {value}")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Loss on the documents held out."""

    every: int = 500
    """Steps between evaluations; the last step is always evaluated."""
    documents: int = 64
    """How many documents of each source are scored, the first of those held out."""

    def __post_init__(self):
        for name in ("every", "documents"):
            _need(getattr(self, name) >= 1, f"evaluation.{name} must be at least 1, found {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A training run, whole. An experiment file holds one under the name `experiment`."""

    model: ModelConfig
    data: DataConfig
    optimizer: AdamWConfig | MuonConfig
    steps: int
    """Updates to make, from the first one on."""
    seed: int = 0
    """Of the initial weights and of the order of the data."""
    start_from: str = ""
    """Checkpoint whose weights training starts from, as `load` takes it; empty: fresh weights."""
    mesh: str = ""
    """Mesh of devices, like fsdp=2,tensor=2; empty: one device."""
    micro_batches: int = 1
    """Parts that a step's rows are computed in, one after the other, to save memory."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What is computed in; auto: float32 on CPU, else bfloat16. Weights and moments are float32."""
    remat: Remat = "full"
    """What the backward pass computes again."""
    reduce_dtype: Literal["", "float32", "bfloat16"] = ""
    """What gradients are summed in over devices; empty: what is computed in."""
    expert_exchange: ExpertExchange = "auto"
    """How tokens reach their experts on a mesh."""
    z_coef: float = 0.0
    """Weight of the squared log-sum-exp of the logits in the loss."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    preempt_exit_code: int = 0
    """Exit status after SIGTERM, once the state is saved; some schedulers start again only what failed."""

    def __post_init__(self):
        _need(self.steps >= 1, f"steps must be at least 1, found {self.steps}")
        _need(self.micro_batches >= 1, f"micro_batches must be at least 1, found {self.micro_batches}")
        _need(0 <= self.seed < 2**32, f"seed must lie between 0 and 2**32 - 1, found {self.seed}")
        _need(0 <= self.z_coef < math.inf, f"z_coef must be a number of at least 0, found {self.z_coef}")
        _need(0 <= self.preempt_exit_code < 256,
              f"preempt_exit_code must lie between 0 and 255, found {self.preempt_exit_code}")
        _need(self.data.row_length <= self.model.longest_context, f"data.row_length {self.data.row_length} is beyond "
              f"the model's context of {self.model.longest_context} tokens (model.max_position)")

    def resolved(self, schedule_steps: int | None = None) -> Experiment:
        """With a schedule that has an end, where it was left open: `schedule_steps`, or else the run's own, or that of
        warm-up and decay where the run ends before."""
        if self.optimizer.steps is not None:
            return self
        steps = schedule_steps or max(self.steps, self.optimizer.warmup + self.optimizer.decay)
        optimizer = dataclasses.replace(self.optimizer, steps=steps)
        return dataclasses.replace(self, optimizer=optimizer)


def is_free(name: str) -> bool:
    """Whether a run may go on with another value of this setting."""
    return any(name == free or name.startswith(free + ".") for free in FREE)
