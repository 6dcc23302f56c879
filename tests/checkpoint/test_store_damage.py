"""A checkpoint that is not what was written is not restored, whatever part of it; another one is offered."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen2_jax.checkpoint import files
from qwen2_jax.checkpoint.convert import convert
from qwen2_jax.checkpoint.hf_config import read_config
from qwen2_jax.checkpoint.load import load_params
from qwen2_jax.checkpoint.step_folders import DamagedCheckpoint
from qwen2_jax.checkpoint.store import Store
from qwen2_jax.errors import UserError

STATE = {"params": {"w": jnp.arange(4000.0)}, "optimizer": {"mu": jnp.ones(300)}}
LIKE = jax.tree.map(lambda x: jax.ShapeDtypeStruct(
    x.shape, x.dtype, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])), STATE)
KINDS = ("params/ocdbt.process_0/d/*", "optimizer/ocdbt.process_0/d/*", "params/d/*", "params/manifest.ocdbt",
         "params/ocdbt.process_0/manifest.ocdbt", "params/_METADATA", "params/_sharding",
         "params/array_metadatas/process_0", "params/commit_success.txt", "about/metadata", "_CHECKPOINT_METADATA",
         "commit_success.txt", "digests.json")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run with steps 4 and 8; to be left as it was."""
    path = tmp_path_factory.mktemp("saved") / "run"
    store = Store(path)
    for step in (4, 8):
        store.save(step, STATE, {"step": step})
    store.close()
    return path


def test_every_file_has_a_kind(saved):
    """So that the tests below leave out none."""
    kinds = {file for kind in KINDS for file in (saved / "8").glob(kind)}
    others = {file.relative_to(saved / "8").as_posix() for file in (saved / "8").rglob("*") if file.is_file()} - {
        file.relative_to(saved / "8").as_posix() for file in kinds}
    twins = {name.replace("optimizer/", "params/") for name in others}
    assert all((saved / "8" / name) in kinds or "/d/" in name for name in twins if not name.startswith("about/"))


@pytest.mark.parametrize("how", ["bit", "cut", "gone"])
@pytest.mark.parametrize("kind", KINDS)
def test_is_named_and_the_one_before_is_offered(saved, kind, how):
    file = max((saved / "8").glob(kind), key=lambda f: f.stat().st_size)
    data = file.read_bytes()
    try:
        if how == "bit":
            file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        elif how == "cut":
            file.write_bytes(data[:-1])
        else:
            file.unlink()
        store = Store(saved, read_only=True)
        name = file.relative_to(saved / "8").as_posix()
        with pytest.raises(DamagedCheckpoint, match=r"nothing was read from it; the newest checkpoint that is whole is "
                                                    r"step 4: go on from .*/run/4") as e:
            store.restore(LIKE)
        assert f"run/8 is damaged: {name} " in str(e.value) and "\n" not in str(e.value)
        assert (e.value.step, e.value.good) == (8, 4) and len(e.value.damages) == 1
        assert store.newest_good() == 4 and store.restore(LIKE, 4)[1] == {"step": 4}
    finally:
        file.write_bytes(data)
    assert store.restore(LIKE)[1] == {"step": 8}


def test_no_other_is_whole(saved):
    kept = {file: file.read_bytes() for file in saved.glob("*/about/metadata")}
    try:
        for file in kept:
            file.write_bytes(b'{"step": 9}')
        store = Store(saved, read_only=True)
        with pytest.raises(DamagedCheckpoint, match="no other checkpoint beside it is whole") as e:
            store.restore(LIKE, 4)
        assert e.value.good is None and store.newest_good() is None
        assert store.restore(LIKE, verify=False)[1] == {"step": 9}      # as it is
    finally:
        for file, data in kept.items():
            file.write_bytes(data)


def test_only_what_is_asked_for_is_read(saved):
    """`about` alone costs no reading of weights, and weights alone none of the optimizer's."""
    file = max((saved / "8").glob("optimizer/ocdbt.process_0/d/*"), key=lambda f: f.stat().st_size)
    data = file.read_bytes()
    try:
        file.write_bytes(b"")
        store = Store(saved, read_only=True)
        assert store.restore({}) == ({}, {"step": 8})
        assert np.array_equal(store.restore({"params": LIKE["params"]})[0]["params"]["w"], STATE["params"]["w"])
        with pytest.raises(DamagedCheckpoint):
            store.restore({"optimizer": LIKE["optimizer"]})
    finally:
        file.write_bytes(data)


@pytest.mark.parametrize("name", ["params/_METADATA", "params/manifest.ocdbt", "about/metadata"])
def test_unverified_damage_is_one_sentence_too(saved, name):
    file = saved / "8" / name
    data = file.read_bytes()
    try:
        file.write_bytes(data[:len(data) // 2])
        with pytest.raises(UserError, match=r"checkpoint .*/run/8 cannot be read: [^\n]*$"):
            Store(saved, read_only=True).restore(LIKE, verify=False)
    finally:
        file.write_bytes(data)


def test_without_digests_as_before_them(tmp_path):
    """Read when it is asked for, never written to, never removed."""
    store = Store(tmp_path)
    for step in (3, 6):
        store.save(step, STATE, {"step": step})
    store.close()
    for step in (3, 6):
        (tmp_path / f"{step}/digests.json").unlink()
        (tmp_path / f"{step}/about").rename(tmp_path / f"{step}/position")      # its name then
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=r"without digests.json \(the last of step 6\).* nothing is written there;"):
        Store(tmp_path)
    old = Store(tmp_path, read_only=True)
    assert old.steps() == [] and old.latest_step() is None
    with pytest.raises(DamagedCheckpoint, match=r"/6 is damaged: digests.json is missing; .*no other checkpoint"):
        old.restore(LIKE)
    assert old.restore(LIKE, verify=False)[1] == {"step": 6} and old.restore(LIKE, 3, verify=False)[1] == {"step": 3}
    assert sorted(tmp_path.rglob("*")) == before


def test_the_newest_that_lost_its_digests_is_not_passed_over(tmp_path):
    store = Store(tmp_path)
    for step in (3, 6):
        store.save(step, STATE, {"step": step})
    store.close()
    (tmp_path / "6/digests.json").unlink()
    store = Store(tmp_path)
    assert store.steps() == [3] and (tmp_path / "6").is_dir()
    with pytest.raises(DamagedCheckpoint, match=r"/6 is damaged: digests.json is missing.* step 3: go on from .*/3"):
        store.restore(LIKE)
    with pytest.raises(UserError, match="holds step 6, so step 5 cannot be saved after it"):
        store.save(5, STATE, {})
    assert store.discard_after(3) == [6]
    assert store.save(5, STATE, {"step": 5})
    store.close()
    assert Store(tmp_path, read_only=True).restore({})[1] == {"step": 5}


def test_damaged_weights_are_not_exported(hf_folder, tmp_path):
    store = Store(tmp_path / "run")
    params = load_params(hf_folder("tied"), dtype="keep", stacked=True)
    for step in (0, 1):
        store.save(step, {"params": params, "optimizer": STATE["optimizer"]}, {})
    store.close()
    files.write_model_files(tmp_path / "run", read_config(hf_folder("tied")))
    file = max((tmp_path / "run/1").glob("params/ocdbt.process_0/d/*"), key=lambda f: f.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    for src in ("run", "run/1", "run/1/params"):
        for read in (lambda src: convert(src, tmp_path / "out", to="safetensors"),
                     lambda src: load_params(src, dtype="keep", stacked=True)):
            with pytest.raises(DamagedCheckpoint, match=f"{file.name} is not what was written.* step 0: go on from"):
                read(tmp_path / src)
    assert not (tmp_path / "out").exists()
    convert(tmp_path / "run/0", tmp_path / "out", to="safetensors")
