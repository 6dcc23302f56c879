"""The tree keeps the order of docs/architecture.md, and the checker that says so sees each kind of breach."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import layers

ROOT = Path(__file__).resolve().parents[1]
ORDER = "config → sharding → ops → model → {data · optim · checkpoint} → {train · serve} → cli → experiments, tools"

pytestmark = pytest.mark.smoke


def tree(root: Path, files: dict[str, str]) -> Path:
    files = {"docs/architecture.md": f"# Rooms\n\n```\n{ORDER}\n```\n"} | files
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_this_repository():
    assert layers.violations(ROOT) == []


def test_the_order_is_read_from_the_document():
    order = layers.room_order((ROOT / "docs" / "architecture.md").read_text())
    assert order["config"] < order["sharding"] < order["ops"] < order["model"] < order["data"]
    assert order["data"] == order["optim"] == order["checkpoint"] < order["train"] == order["serve"] < order["cli"]
    rooms = {path.name for path in (ROOT / "qwen2_jax").iterdir() if (path / "__init__.py").exists()}
    assert rooms <= set(order)


ALLOWED = {
    "left": ("qwen2_jax/serve/lm.py", "from qwen2_jax.model.mlp import Mlp\nfrom qwen2_jax.errors import UserError"),
    "own room": ("qwen2_jax/ops/rope.py", "from qwen2_jax.ops import dot\nfrom . import norm"),
    "flax in model": ("qwen2_jax/model/mlp.py", "import flax.linen as nn"),
    "collectives in axes": ("qwen2_jax/sharding/axes.py", "from jax import lax\nx = lax.psum(1, 'x')"),
    "the façade's own verbs": ("qwen2_jax/ops/dot.py", "def f(x, ax):\n    return ax.psum(x, 'tensor')"),
    "other parts of lax": ("qwen2_jax/ops/dot.py", "from jax import lax\nx = lax.dot_general"),
    "the face reaches serve": ("qwen2_jax/__init__.py", "from qwen2_jax.serve.lm import load"),
    "tests import anything": ("tests/test_x.py", "import torch\nfrom qwen2_jax.cli import main"),
    "oracles in tools": ("tools/bench.py", "import torch"),
    "400 lines": ("qwen2_jax/ops/long.py", "x = 1\n" * 400),
}


@pytest.mark.parametrize("file, source", ALLOWED.values(), ids=ALLOWED.keys())
def test_allowed(tmp_path, file, source):
    assert layers.violations(tree(tmp_path, {file: source})) == []


BREACHES = {
    "to the right": ("qwen2_jax/ops/a.py", "import qwen2_jax.model.decoder", "model, which stands to its right"),
    "inside a function": ("qwen2_jax/ops/a.py", "def f():\n    from qwen2_jax.cli import main", "cli, which stands"),
    "relative": ("qwen2_jax/ops/a.py", "from ..model import mlp", "model, which stands to its right"),
    "by name": ("qwen2_jax/ops/a.py", "import importlib\nimportlib.import_module('qwen2_jax.cli.main')", "cli, which"),
    "neighbours": ("qwen2_jax/data/a.py", "from qwen2_jax.optim.adamw import x", "side by side"),
    "through the face": ("qwen2_jax/train/a.py", "from qwen2_jax import load", "serve; rooms side by side"),
    "tools": ("qwen2_jax/cli/a.py", "from tools import layers", "tools, which stands to its right"),
    "unknown room": ("qwen2_jax/attic/a.py", "", "no room 'attic'"),
    "jax at the top": ("qwen2_jax/config.py", "import jax", "standard library only"),
    "flax outside": ("qwen2_jax/train/a.py", "from flax import linen", "flax, which lives in model/ only"),
    "torch": ("qwen2_jax/serve/a.py", "def f():\n    import torch.nn", "torch, which is for tests only"),
    "transformers": ("qwen2_jax/data/a.py", "from transformers import AutoTokenizer", "for tests only"),
    "collective": ("qwen2_jax/ops/a.py", "from jax import lax as L\nx = L.all_gather", "uses lax.all_gather"),
    "collective in full": ("qwen2_jax/train/a.py", "import jax\nx = jax.lax.psum", "uses lax.psum"),
    "collective by name": ("qwen2_jax/ops/a.py", "from jax.lax import ppermute", "imports the collective"),
    "shard_map": ("qwen2_jax/train/a.py", "import jax\nf = jax.shard_map", "uses shard_map"),
    "shard_map by name": ("qwen2_jax/ops/a.py", "from jax import shard_map", "imports shard_map"),
    "401 lines": ("tests/test_long.py", "x = 1\n" * 401, "401 lines, at most 400"),
    "nameless": ("qwen2_jax/ops/utils.py", "", "name the file after its one idea"),
}


@pytest.mark.parametrize("file, source, message", BREACHES.values(), ids=BREACHES.keys())
def test_breaches_are_seen(tmp_path, file, source, message):
    [found] = layers.violations(tree(tmp_path, {file: source}))
    assert found.startswith(file) and message in found
