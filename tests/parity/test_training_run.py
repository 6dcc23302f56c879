"""A run of ours, made again by transformers and torch from what anyone can have of it: step 0 and the batches."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from qwen2_jax.checkpoint.convert import convert
from qwen2_jax.optim.adamw import AdamWConfig
from qwen2_jax.train.corpus import open_corpus
from qwen2_jax.train.metrics import read_metrics
from qwen2_jax.train.run import train
from qwen2_jax.train.run_folder import begin, read_config
from tests.train.runs import tiny_experiment, write_text

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.parity, pytest.mark.optax, pytest.mark.slow]

STEPS = 8
LOSS = 1e-5
"""Relative; float32 sums in another order, carried on through eight updates."""


def test_the_losses_of_a_run_are_those_of_torch(tmp_path):
    text = write_text(tmp_path / "text.jsonl")
    optimizer = AdamWConfig(peak=1e-3, schedule="constant", weight_decay=0.1, clip=1.0)
    experiment = tiny_experiment(text, steps=STEPS, optimizer=optimizer)
    experiment = dataclasses.replace(experiment, model=dataclasses.replace(experiment.model, layers=2))
    out = tmp_path / "run"
    train(begin(experiment, out), say=lambda line: None, peak_flops=lambda experiment: None)
    convert(out / "checkpoints" / "0", tmp_path / "hf", to="safetensors", dtype="float32")
    stream = open_corpus(read_config(out), out, source=None, say=lambda line: None).stream
    theirs = torch_losses(tmp_path / "hf", optimizer, [stream.batch(n) for n in range(STEPS)])
    lines = read_metrics(out / "metrics.jsonl")
    np.testing.assert_allclose([line["loss"] for line in lines], [loss for loss, _ in theirs], rtol=LOSS)
    np.testing.assert_allclose([line["grad_norm"] for line in lines], [norm for _, norm in theirs], rtol=10 * LOSS)
    assert lines[-1]["loss"] < lines[0]["loss"]


def torch_losses(folder, cfg, batches):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    decayed = [p for name, p in model.named_parameters() if "norm" not in name and not name.endswith("bias")]
    others = [p for name, p in model.named_parameters() if "norm" in name or name.endswith("bias")]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": cfg.weight_decay},
                                   {"params": others, "weight_decay": 0.0}], lr=cfg.peak, betas=(cfg.b1, cfg.b2),
                                  eps=cfg.eps)
    found = []
    for batch in batches:
        T = batch.ids_BT.shape[1]
        seen_BTT = (batch.segments_BT[:, :, None] == batch.segments_BT[:, None]) & np.tri(T, dtype=bool)
        mask = torch.where(torch.tensor(seen_BTT)[:, None], 0.0, torch.finfo(torch.float32).min)
        logits = model(input_ids=torch.tensor(batch.ids_BT, dtype=torch.long), attention_mask=mask,
                       position_ids=torch.tensor(batch.positions_BT, dtype=torch.long)).logits
        each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.tensor(batch.targets_BT).flatten().long(),
                                                 reduction="none")
        weights = torch.tensor(batch.weights_BT).flatten()
        loss = (each * weights).sum() / weights.sum()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
        optimizer.step()
        found.append((loss.item(), norm.item()))
    return found
