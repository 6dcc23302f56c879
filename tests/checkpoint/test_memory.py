"""A conversion's memory does not grow with the stacks: measured as anonymous memory of a process of its own."""

import json
import subprocess
import sys

import pytest

MIB = 2**20
PIECE = MIB
# Python, JAX, Orbax and TensorStore take the base. What the conversion adds are pieces: three read ahead, four being
# written, each also compressed, and what malloc keeps of them. One stack is 48 MiB.
GROWTH = 32 * MIB
SLACK = 1500 * 10**6  # the promise: at most the largest Hugging Face tensor and 1.5 GB

MEASURED = """
import json, sys, threading, time
src, dst, to, piece = sys.argv[1:]
import orbax.checkpoint, tensorstore
from qwen2_jax.checkpoint import convert, pieces, stream
pieces.PIECE_BYTES = int(piece)

def rss_anon():
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith("RssAnon"))

base, peak, running = rss_anon(), 0, True
def sample():
    global peak
    while running:
        peak = max(peak, rss_anon())
        time.sleep(0.002)
thread = threading.Thread(target=sample)
thread.start()
convert.convert(src, dst, to=to)
running = False
thread.join()
print(json.dumps({"base": base, "peak": peak}))
"""

MAKE = """
import json, sys, numpy as np
from pathlib import Path
from qwen2_jax.checkpoint import names, pieces
from qwen2_jax.checkpoint.hf import HfWriter
from qwen2_jax.checkpoint.hf_config import from_hf
folder, config = Path(sys.argv[1]), json.loads(sys.argv[2])
folder.mkdir()
(folder / "config.json").write_text(json.dumps(config))
slots = names.slots(from_hf(config))
import ml_dtypes
dtype = np.dtype(ml_dtypes.bfloat16)
writer = HfWriter(folder, slots, [dtype] * len(slots), max_shard_bytes=2**40)
rng = np.random.default_rng(0)
for slot in slots:
    for start, stop in pieces.blocks(slot.shape, dtype):
        writer.write(slot, start, rng.normal(size=(stop - start, *slot.shape[1:])).astype(np.float32).astype(dtype))
print(json.dumps({"largest": max(2 * int(np.prod(s.shape)) for s in slots)}))
"""


def python(code, env, *args):
    done = subprocess.run([sys.executable, "-c", code, *map(str, args)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="RssAnon is Linux's")
def test_memory_is_bounded_by_pieces_in_both_directions(process_env, tensors, tmp_path):
    """Stacks of 48 MiB in tensors of 1 MiB, 150 MiB in all, with pieces of 1 MiB."""
    config = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 512, "hidden_size": 512,
              "intermediate_size": 1024, "num_hidden_layers": 48, "num_attention_heads": 8, "num_key_value_heads": 2,
              "max_position_embeddings": 128, "rope_theta": 10000.0, "rms_norm_eps": 1e-6, "hidden_act": "silu",
              "tie_word_embeddings": True, "torch_dtype": "bfloat16"}
    largest = python(MAKE, process_env, tmp_path / "hf", json.dumps(config))["largest"]
    for src, dst, to in (("hf", "orbax", "orbax"), ("orbax", "back", "safetensors")):
        found = python(MEASURED, process_env, tmp_path / src, tmp_path / dst, to, PIECE)
        assert found["peak"] <= largest + SLACK
        assert found["peak"] - found["base"] <= GROWTH, f"{to}: {found}"
    assert tensors(tmp_path / "hf") == tensors(tmp_path / "back")
