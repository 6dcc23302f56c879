"""Does each process read and hold no more than its share of a model?

    python -m tools.measure_loading [--megabytes 256] [--processes 1 2 4] [--mesh fsdp=4 fsdp=2x2 tensor=4] [--json]

Writes a model of random weights as a Hugging Face folder and in our Orbax form (into a temporary folder), then loads
both in 1, 2 and 4 processes of this machine, four host devices in all. For each process: `share`, the bytes of the
parameters on its devices, a part that lies on several of them counted once; `asked`, bytes that the readers were asked
for; `read`, bytes that all its system calls read meanwhile, the metadata and index of the checkpoint among them;
`grown`, the largest anonymous memory beyond what the process had before. Every loaded part is then compared with the
file. Ratios are over the share; a stacked leaf is the most that is on the host twice.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DEVICES = 4
CONFIG = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 8192, "hidden_size": 1024,
          "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 4,
          "max_position_embeddings": 4096, "rope_theta": 1e6, "rms_norm_eps": 1e-6, "hidden_act": "silu",
          "tie_word_embeddings": False, "torch_dtype": "bfloat16"}
LAYER_BYTES, OTHER_BYTES = 22_554_112, 33_556_480
"""Of CONFIG's model, in bfloat16."""


def write_model(folder: Path, megabytes: float) -> None:
    """Random weights of about that size, a Hugging Face folder `hf` and our form `orbax`."""
    import ml_dtypes
    import numpy as np

    from qwen2_jax.checkpoint import names, pieces
    from qwen2_jax.checkpoint.convert import convert
    from qwen2_jax.checkpoint.hf import HfWriter
    from qwen2_jax.checkpoint.hf_config import from_hf

    config = CONFIG | {"num_hidden_layers": max(1, round((megabytes * 1e6 - OTHER_BYTES) / LAYER_BYTES))}
    (folder / "hf").mkdir()
    (folder / "hf/config.json").write_text(json.dumps(config))
    slots, dtype = names.slots(from_hf(config)), np.dtype(ml_dtypes.bfloat16)
    writer = HfWriter(folder / "hf", slots, [dtype] * len(slots), max_shard_bytes=2**40)
    draw = np.random.default_rng(0)
    for slot in slots:
        for start, stop in pieces.blocks(slot.shape, dtype):
            bits = draw.integers(0, 2**14, (stop - start, *slot.shape[1:]), np.uint16)      # no NaN among them
            writer.write(slot, start, bits.view(dtype))
    writer.close()
    convert(folder / "hf", folder / "orbax", to="orbax")


def load_here(source: Path, mesh_spec: str, hf: Path) -> dict[str, Any]:
    """What this process found; all processes call it together."""
    import jax
    import numpy as np

    from qwen2_jax.checkpoint.load import load_params
    from qwen2_jax.checkpoint.source import open_checkpoint
    from qwen2_jax.checkpoint.tree import flat
    from qwen2_jax.model.decoder import param_specs
    from qwen2_jax.sharding import distributed
    from qwen2_jax.sharding.mesh import make_mesh, shardings

    distributed.start()
    mesh = make_mesh(mesh_spec)
    assert mesh is not None
    jax.block_until_ready(jax.device_put(np.zeros(1), jax.local_devices()[0]))
    checkpoint = open_checkpoint(source)
    asked, lock, rows = [0], threading.Lock(), checkpoint.reader.rows

    def counted(*wanted: Any) -> np.ndarray:
        found = rows(*wanted)
        with lock:
            asked[0] += found.nbytes
        return found

    checkpoint.reader.rows = counted    # pyright: ignore[reportAttributeAccessIssue]
    where = shardings(param_specs(checkpoint.cfg, mesh, stacked=True), mesh)
    read, began = rchar(), time.perf_counter()
    with peak_memory() as grown:
        params = jax.block_until_ready(load_params(checkpoint, dtype="keep", stacked=True, shardings=where))
    found = {"process": jax.process_index(), "asked": asked[0], "read": rchar() - read, "grown": grown[0],
             "seconds": time.perf_counter() - began}

    parts: dict[tuple[str, str], Any] = {}
    for path, leaf in flat(params).items():
        parts |= {(path, str(shard.index)): shard for shard in leaf.addressable_shards}
    stored, different = open_checkpoint(hf), 0
    for slot in stored.slots:
        whole = stored.reader.rows(slot, 0, slot.shape[0])
        for (path, _), shard in parts.items():
            if path == slot.path:
                lead, rest = shard.index[:len(slot.index)], shard.index[len(slot.index):]
                place = [range(*s.indices(10**9)) for s in lead]
                if all(i in r for i, r in zip(slot.index, place, strict=True)):
                    held = np.asarray(shard.data)[tuple(i - r.start for i, r in zip(slot.index, place, strict=True))]
                    different += int((held.view(np.uint16) != whole[rest].view(np.uint16)).sum())
    return found | {"share": sum(shard.data.nbytes for shard in parts.values()), "different": different,
                    "largest_leaf": max(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in flat(params).values())}


def rchar() -> int:
    """Bytes that this process's system calls have read, from files, pipes and sockets."""
    return int(Path("/proc/self/io").read_text().split()[1])


@contextlib.contextmanager
def peak_memory() -> Iterator[list[int]]:
    """[the largest growth of anonymous memory inside of the block], in bytes."""
    def held() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

    def watch() -> None:
        while not done.wait(0.005):
            found[0] = max(found[0], held() - before)

    before, found, done = held(), [0], threading.Event()
    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()
        found[0] = max(found[0], held() - before)


def measure(source: Path, processes: int, mesh: str, hf: Path) -> list[dict[str, Any]]:
    """What each of several processes found."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-m", "tools.launch_local", "-n", str(processes), "--devices", str(DEVICES // processes),
             "--", sys.executable, "-m", "tools.measure_loading", "--child", str(source), mesh, str(hf), folder],
            capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stdout + done.stderr)
        return [json.loads((Path(folder) / str(n)).read_text()) for n in range(processes)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=256, help="size of the model in bfloat16 (default: 256)")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4], choices=(1, 2, 4))
    parser.add_argument("--mesh", nargs="+", default=["fsdp=4", "fsdp=2x2", "tensor=4"], help="each of four devices")
    parser.add_argument("--json", action="store_true", help="print one JSON object a process")
    parser.add_argument("--child", nargs=4, type=str, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        source, mesh, hf, folder = args.child
        found = load_here(Path(source), mesh, Path(hf))
        (Path(folder) / str(found["process"])).write_text(json.dumps(found))
        return
    if not Path("/proc/self/io").exists():
        sys.exit("not measured: this needs Linux's /proc")
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), args.megabytes)
        if not args.json:
            print("| form | processes | mesh | process | share MB | asked | read | grown | seconds | different |")
            print("|---|---|---|---|---|---|---|---|---|---|")
        for form in ("hf", "orbax"):
            for processes in args.processes:
                for mesh in args.mesh:
                    for row in measure(Path(folder) / form, processes, mesh, Path(folder) / "hf"):
                        print(json.dumps({"form": form, "processes": processes, "mesh": mesh} | row) if args.json
                              else line(form, processes, mesh, row), flush=True)


def line(form: str, processes: int, mesh: str, row: dict[str, Any]) -> str:
    asked, read, grown = (row[name] / row["share"] for name in ("asked", "read", "grown"))
    return (f"| {form} | {processes} | `{mesh}` | {row['process']} | {row['share'] / 1e6:.1f} | {asked:.2f}x "
            f"| {read:.2f}x | {grown:.2f}x | {row['seconds']:.1f} | {row['different']} |")


if __name__ == "__main__":
    main()
