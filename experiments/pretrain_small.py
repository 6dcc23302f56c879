"""Pretrain 4 million parameters, embeddings not counted, on two CPU cores.

    qwen2-jax train experiments/pretrain_small.py --out runs/small
    qwen2-jax train experiments/pretrain_small.py --out runs/mine --set data.path='texts/*.txt'

The text is the Python library's own sources, as in the quickstart, or any other; the tokenizer, of 8,192 tokens, is
trained on it.
"""

from experiments.library_corpus import as_jsonl
from qwen2_jax.config import ModelConfig, RopeConfig
from qwen2_jax.optim.adamw import AdamWConfig
from qwen2_jax.train.experiment import CheckpointConfig, DataConfig, EvaluationConfig, Experiment

ROW = 256

experiment = Experiment(
    model=ModelConfig(vocab=8192, layers=4, d_model=288, d_ff=832, heads=6, kv_heads=2, head_dim=48, tied=True,
                      norm_eps=1e-6, rope=RopeConfig(theta=1e4), max_position=ROW, init_std=0.04, eos_ids=(1, 3),
                      pad_id=1, dtype="float32"),
    data=DataConfig(path=as_jsonl(), row_length=ROW, batch_size=8, held_out=0.02),
    optimizer=AdamWConfig(peak=2e-3, warmup=50, weight_decay=0.1),
    steps=1500,
    remat="none",
    checkpoint=CheckpointConfig(every=250),
    evaluation=EvaluationConfig(every=250, documents=16),
)
