"""Several processes: each reads its share of a checkpoint and no more, and goes on with what others have saved."""

from __future__ import annotations

import pickle

import jax
import numpy as np
import pytest

from tests.pod.test_processes import launch
from tools import measure_loading

pytestmark = [pytest.mark.slow, pytest.mark.optax]

SMALL = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8,
         "num_key_value_heads": 4, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure_loading, "CONFIG", measure_loading.CONFIG | SMALL)
        patch.setattr(measure_loading, "LAYER_BYTES", 1e6)
        patch.setattr(measure_loading, "OTHER_BYTES", 0)
        measure_loading.write_model(folder, 2)
    return folder


@pytest.mark.parametrize("form, mesh", [("hf", "fsdp=2x2"), ("hf", "fsdp=2,tensor=2"), ("orbax", "tensor=4")])
def test_each_process_asks_for_its_share(model, form, mesh):
    """In bytes, whatever lies on several devices of a process once; and every part is the file's."""
    found = measure_loading.measure(model / form, 2, mesh, model / "hf")
    whole = sum(leaf.nbytes for leaf in stored(model / "hf"))
    for row in found:
        assert row["different"] == 0
        assert row["asked"] == row["share"] < 0.51 * whole      # norms and biases are with both


def stored(folder):
    from qwen2_jax.checkpoint.load import load_params

    return jax.tree.leaves(load_params(folder, dtype="keep", stacked=True))


def test_a_training_state_goes_on_in_other_processes_on_another_mesh(process_env, tmp_path):
    launch(process_env, 2, 2, "tests.pod.restoring", "fsdp=4", tmp_path, "save")
    launch(process_env, 2, 2, "tests.pod.restoring", "data=2,tensor=2", tmp_path, "restore")
    (saved, position, _), (restored, found, refused) = (pickle.loads((tmp_path / name).read_bytes())
                                                        for name in ("saved", "restored"))
    assert position == found == {"rows": 8}
    assert "/run/1 is damaged: " in refused and refused.count("is not what was written") == 2
    for a, b in zip(jax.tree.leaves(saved), jax.tree.leaves(restored), strict=True):
        np.testing.assert_array_equal(a, b)
