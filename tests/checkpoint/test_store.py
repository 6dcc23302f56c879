import logging
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from etils import epath

from qwen2_jax.checkpoint import files
from qwen2_jax.checkpoint.convert import convert
from qwen2_jax.checkpoint.hf_config import read_config
from qwen2_jax.checkpoint.load import load_params
from qwen2_jax.checkpoint.store import Store
from qwen2_jax.errors import UserError


def mesh_of(*sizes):
    return jax.make_mesh(sizes, ("x", "y")[:len(sizes)])


def state_on(mesh, axis="x"):
    params = {"layers_0": {"w": jnp.arange(32, dtype=jnp.float32).reshape(2, 4, 4)}, "norm": {"scale": jnp.ones(8)}}
    sharding = {"layers_0": {"w": jax.NamedSharding(mesh, jax.P(None, axis))},
                "norm": {"scale": jax.NamedSharding(mesh, jax.P(axis))}}
    params = jax.device_put(params, sharding)
    return {"params": params, "optimizer": optax.adamw(1e-3).init(params)}


def like(tree, mesh, axis="x"):
    def target(leaf):
        spec = jax.P() if leaf.ndim == 0 else jax.P(*(None,) * (leaf.ndim > 1), axis)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=jax.NamedSharding(mesh, spec))

    return jax.tree.map(target, tree)


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(x, y) and x.dtype == y.dtype for x, y in pairs)


def test_restores_on_another_mesh_with_position(tmp_path):
    state = state_on(mesh_of(4))
    store = Store(tmp_path / "run")
    assert store.latest_step() is None
    assert store.save(3, state, {"epoch": 1, "row": 17})
    store.close()
    again = Store(tmp_path / "run")
    assert again.latest_step() == 3
    target = like(state, mesh_of(2, 2), "y")
    restored, position = again.restore(target)
    again.close()
    assert equal(restored, state) and position == {"epoch": 1, "row": 17}
    assert restored["params"]["layers_0"]["w"].sharding == target["params"]["layers_0"]["w"].sharding


def test_parameters_alone_are_restored(tmp_path):
    state = state_on(mesh_of(4))
    store = Store(tmp_path)
    store.save(0, state, {})
    store.wait()
    restored, _ = store.restore({"params": like(state["params"], mesh_of(1))})
    store.close()
    assert restored.keys() == {"params"} and equal(restored["params"], state["params"])


def test_saving_does_not_wait_for_the_disk_and_survives_donation(tmp_path):
    state = state_on(mesh_of(4))
    expected = jax.tree.map(np.array, state)
    store = Store(tmp_path)
    store.save(1, state, {})
    jax.tree.map(lambda leaf: leaf.delete(), state)  # what donation to the next step does
    store.wait()
    restored, _ = store.restore(like(expected, mesh_of(2)))
    store.close()
    assert equal(restored, expected)


def test_keeps_the_newest_and_the_first(tmp_path):
    store = Store(tmp_path, keep=2)
    states = {step: {"params": {"w": jnp.full(4, float(step))}} for step in (0, 10, 20, 30, 34)}
    for step, state in states.items():
        assert store.save(step, state, {"step": step})
    store.wait()
    target = like(states[0], mesh_of(1))
    assert store.restore(target)[1] == {"step": 34}
    restored, position = store.restore(target, step=30)
    assert restored["params"]["w"][0] == 30 and position == {"step": 30}
    with pytest.raises(UserError, match="no checkpoint of step 20; it has 0, 30, 34"):
        store.restore(target, step=20)
    store.close()


def test_the_best_and_every_tenth_stay(tmp_path):
    store = Store(tmp_path, keep=1, keep_every=10, keep_best=1)
    metrics = {3: 0.5, 6: 0.2, 9: None, 10: math.nan, 12: 0.4, 15: 0.3}
    for step, metric in metrics.items():
        store.save(step, {"params": {"w": jnp.ones(4)}}, {}, metric=metric)
    store.wait()
    assert store.steps() == [6, 10, 15]
    store.set_metric(15, 0.1)       # evaluated later
    store.set_metric(12, 0.0)       # gone meanwhile
    store.save(16, {"params": {"w": jnp.ones(4)}}, {})
    store.set_metric(16, 0.05)      # while it is being saved
    store.wait()
    assert store.steps() == [10, 16]
    store.save(17, {"params": {"w": jnp.ones(4)}}, {})
    store.close()
    assert Store(tmp_path, read_only=True).steps() == [10, 16, 17]


def test_steps_only_grow_until_later_ones_are_discarded(tmp_path, caplog):
    store = Store(tmp_path, keep=3)
    for step in (2, 4, 6):
        assert store.save(step, {"params": {"w": jnp.full(4, step)}}, {"of": step})
    assert not store.save(6, {"params": {"w": jnp.zeros(4)}}, {})       # saved already
    with pytest.raises(UserError, match="holds step 6, so step 5 cannot be saved after it: discard the steps from"):
        store.save(5, {"params": {"w": jnp.zeros(4)}}, {})
    with pytest.raises(ValueError, match="step -1 is negative"):
        store.save(-1, {"params": {"w": jnp.zeros(4)}}, {})
    store.close()
    store = Store(tmp_path, keep=3)
    with pytest.raises(UserError, match="holds step 6, so step 6 cannot"):      # another run's, perhaps another state
        store.save(6, {"params": {"w": jnp.zeros(4)}}, {})
    assert store.discard_after(2) == [4, 6] and store.steps() == [2]
    assert "checkpoint 6 is removed: the run goes on from 2" in caplog.text
    assert store.save(4, {"params": {"w": jnp.zeros(4)}}, {"of": "another 4"})
    assert store.restore({})[1] == {"of": "another 4"}
    assert store.discard_after(-1) == [2, 4] and store.latest_step() is None
    store.close()


def test_committing_is_logged_after_it_happened(tmp_path, caplog):
    caplog.set_level(logging.INFO, "qwen2_jax")
    store = Store(tmp_path)
    store.save(5, {"params": {"w": jnp.ones(4)}}, {})
    store.wait()
    assert re.fullmatch(r"checkpoint 5 committed: [0-9]+ bytes in .*/5", caplog.messages[-1])
    store.close()


def test_two_runs_do_not_write_to_one_folder(tmp_path):
    first = Store(tmp_path)
    with pytest.raises(UserError, match="another run is writing checkpoints to"):
        Store(tmp_path)
    reader = Store(tmp_path, read_only=True)
    with pytest.raises(UserError, match="was opened for reading only"):
        reader.save(0, {"params": {"w": jnp.ones(4)}}, {})
    first.close()
    Store(tmp_path).close()
    with pytest.raises(UserError, match=r"keep must be at least 1.*found 0, None, 0"):
        Store(tmp_path, keep=0)


def test_reading_makes_and_cleans_nothing(tmp_path):
    reader = Store(tmp_path / "none", read_only=True)
    assert not (tmp_path / "none").exists() and reader.latest_step() is None
    (tmp_path / "3.saving").write_text("")
    Store(tmp_path, read_only=True).close()
    assert (tmp_path / "3.saving").exists()


def test_what_does_not_fit_is_named(tmp_path):
    store = Store(tmp_path / "run")
    with pytest.raises(UserError, match="holds no checkpoint"):
        store.restore({"params": {}})
    state = state_on(mesh_of(1))
    store.save(0, state, {})
    store.wait()
    target = like(state["params"], mesh_of(1))
    target["norm"]["scale"] = jax.ShapeDtypeStruct((9,), jnp.float32, sharding=target["norm"]["scale"].sharding)
    with pytest.raises(UserError, match=r"norm/scale: the checkpoint has shape \[8\], this program has shape \[9\]"):
        store.restore({"params": target})
    del target["norm"]
    with pytest.raises(UserError, match=r"norm/scale: the checkpoint has shape \[8\], this program has none"):
        store.restore({"params": target})
    target["new"] = target["layers_0"]["w"]
    with pytest.raises(UserError, match=r"new: the checkpoint has none, this program has shape \[2, 4, 4\]"):
        store.restore({"params": target})
    with pytest.raises(UserError, match="holds no ema"):
        store.restore({"ema": target})
    store.close()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write checkpoints"):
        Store(tmp_path / "file/run")


def test_an_unfinished_step_is_not_the_latest(tmp_path):
    store = Store(tmp_path)
    store.save(1, {"params": {"w": jnp.zeros(4)}}, {})
    store.close()
    (tmp_path / "2.orbax-checkpoint-tmp/params").mkdir(parents=True)
    store = Store(tmp_path)
    assert store.latest_step() == 1
    store.close()


def test_a_step_of_a_run_is_a_checkpoint_to_convert(hf_folder, tensors, tmp_path):
    """Parameters with the chunks of a training checkpoint go to Hugging Face's form slice by slice."""
    params = load_params(hf_folder("mixed"), dtype="keep", stacked=True)
    store = Store(tmp_path / "run")
    for step in (9, 10):
        store.save(step, {"params": params if step == 10 else {"w": jnp.zeros(3)}, "rest": {"n": jnp.zeros(1)}}, {})
    store.close()
    files.write_model_files(tmp_path / "run", read_config(hf_folder("mixed")), beside=hf_folder("mixed"))
    for name, src in (("run", "run"), ("step", "run/10"), ("params", "run/10/params")):
        convert(tmp_path / src, tmp_path / f"{name}_hf", to="safetensors")
        assert tensors(tmp_path / f"{name}_hf") == tensors(hf_folder("mixed"))
        assert (tmp_path / f"{name}_hf/tokenizer.json").exists()
    with ocp.StandardCheckpointer() as checkpointer:
        storage = checkpointer.metadata(tmp_path / "run/10/params").item_metadata["layers_2"]["moe"]["up"].storage
    assert storage.chunk_shape == (1, 1, 16, 32)


def test_what_a_device_of_another_mesh_wants_is_read_without_the_rest(tmp_path):
    store = Store(tmp_path / "run")
    store.save(1, {"params": {"w": jnp.zeros((2, 1024, 512))}}, {})
    store.close()
    with ocp.StandardCheckpointer() as checkpointer:
        chunk = checkpointer.metadata(tmp_path / "run/1/params").item_metadata["w"].storage.chunk_shape
    assert chunk[0] == 1 and 2**18 < 4 * math.prod(chunk) <= 2**20


def test_a_full_disk_is_named_and_leaves_the_last_step(small_disk, capfd):
    store = Store(small_disk / "run")
    small = {"params": {"w": jnp.arange(100.0)}}
    store.save(0, small, {})
    store.save(1, {"params": {"w": jax.random.normal(jax.random.key(0), (1024, 1024))}}, {})
    with pytest.raises(UserError, match=r"no space left on the disk of .*run/1: .*4,194,304 bytes are needed, [1-9,]+"):
        store.wait()
    assert [p.name for p in store.path.iterdir()] == ["0"] and store.newest_good() == store.latest_step() == 0
    store.check()       # told once
    assert store.save(1, small, {"again": True})    # there is room for this one
    store.close()
    again = Store(small_disk / "run", read_only=True)
    assert again.steps() == [0, 1] and again.restore({})[1] == {"again": True}
    assert "Traceback" not in capfd.readouterr().err


def test_as_in_a_bucket(tmp_path):
    """Where folders are not renamed and nothing is flushed; the paths are epath's, the disk is this one."""
    path = epath.Path(tmp_path / "run")
    store = Store(path, keep=1)
    for step in (1, 2, 3):
        store.save(step, {"params": {"w": jnp.full(4, step)}}, {"of": step})
    store.set_metric(2, 0.5)
    store.close()
    (path / "5.saving").write_text("")
    (path / "5" / "params").mkdir(parents=True)
    (path / "2.removing").write_text("")
    (path / "2" / "params").mkdir(parents=True)
    store = Store(path, keep=1)
    assert sorted(p.name for p in path.iterdir()) == ["3"] and store.newest_good() == 3
    assert store.restore({})[1] == {"of": 3} and store.discard_after(2) == [3]
    assert not list(path.iterdir())
    store.close()
