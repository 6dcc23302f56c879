"""Dense checkpoints made sparse: against the dense model, transformers, and themselves in other pieces."""

import dataclasses
import json
import logging
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

from qwen2_jax.checkpoint import names, pieces
from qwen2_jax.checkpoint.convert import Kind, convert
from qwen2_jax.checkpoint.fine_grained import Upcycling
from qwen2_jax.checkpoint.hf import HfWriter
from qwen2_jax.checkpoint.hf_config import read_config, to_hf
from qwen2_jax.checkpoint.load import load_params
from qwen2_jax.checkpoint.source import open_checkpoint
from qwen2_jax.checkpoint.upcycle import UpcycledReader, standard_deviation, upcycle
from qwen2_jax.config import ModelConfig, MoeConfig, RopeConfig, WindowConfig
from qwen2_jax.errors import UserError
from qwen2_jax.model.decoder import Decoder
from qwen2_jax.ops.dot import matmul

BF16, F32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)
SAME_OUTPUT = 1e-5
"""Largest difference of a logit, logits being of size 1: the promise. Float32 sums in another order take half of it."""
MOE = MoeConfig(experts=4, top_k=2, d_expert=20, d_shared=56)
DENSE = ModelConfig(vocab=64, layers=2, d_model=32, d_ff=74, heads=4, kv_heads=2, head_dim=8, tied=False,
                    norm_eps=1e-6, rope=RopeConfig(theta=1e4), max_position=64, dtype="float32")


def save_dense(folder, cfg=DENSE):
    """A dense model whose feed-forward networks matter to its output."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(to_hf(cfg)))
    slots, rng, dtype = names.slots(cfg), np.random.default_rng(0), BF16 if cfg.dtype == "bfloat16" else F32
    writer = HfWriter(folder, slots, [dtype] * len(slots), max_shard_bytes=2**40)
    for slot in slots:
        scale = 1.5 / np.sqrt(slot.shape[-1]) if len(slot.shape) == 2 else 0.2
        offset = 1.0 if slot.path.endswith("scale") else 0.0
        writer.write(slot, 0, (offset + scale * rng.normal(size=slot.shape)).astype(np.float32).astype(dtype))
    return folder


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory):
    """The published ratio is 18,944 : 2,560 = 592 : 80."""
    return save_dense(tmp_path_factory.mktemp("wide") / "src", dataclasses.replace(DENSE, d_ff=592))


@pytest.fixture(scope="module")
def dense_folder(tmp_path_factory):
    return save_dense(tmp_path_factory.mktemp("dense") / "src")


def logits(folder):
    ids = np.random.default_rng(3).integers(0, DENSE.vocab, (2, 16), dtype=np.int32)
    checkpoint = open_checkpoint(folder)
    params = load_params(checkpoint, dtype="float32", stacked=True)
    out = jax.jit(Decoder(checkpoint.cfg, train=False).apply)({"params": params}, ids)
    return np.asarray(matmul(out.x_BTD, out.head["table"]))


def transformers_logits(folder):
    import torch
    import transformers

    ids = np.random.default_rng(3).integers(0, DENSE.vocab, (2, 16))
    auto: Any = transformers.AutoModelForCausalLM
    model, info = auto.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    assert type(model).__name__ == ("Qwen2MoeForCausalLM" if folder.name == "moe" else "Qwen2ForCausalLM")
    with torch.no_grad():
        return model(torch.tensor(ids)).logits.numpy()


def assert_same_output(sparse, dense):
    """In our program and in transformers'."""
    for run in (logits, transformers_logits):
        expected = run(dense)
        assert 0.5 < expected.std() < 3
        np.testing.assert_allclose(run(sparse), expected, rtol=0, atol=SAME_OUTPUT)


def stored(folder):
    """Name → array of a checkpoint of either kind."""
    checkpoint = open_checkpoint(folder)
    return {slot.name: checkpoint.reader.rows(slot, 0, slot.shape[0]) for slot in checkpoint.slots}


@pytest.mark.parity
@pytest.mark.parametrize("experts, width, normalise, options", [
    (64, 80, False, {}),                                            # the published model's
    (64, 80, True, {"cut": "within", "shared": "cut"}),
    (8, 296, True, {"cut": "within", "shared": "random"}),          # divides
    (2, 400, False, {}),                                            # 1.35 copies: units occur once or twice
])
def test_preserved_the_output_is_the_dense_models(experts, width, normalise, options, wide_folder, tmp_path):
    moe = MoeConfig(experts=experts, top_k=1, d_expert=width, d_shared=640, norm_topk_prob=normalise)
    made = upcycle(wide_folder, tmp_path / "moe", moe, Upcycling(preserve=True, **options), to="safetensors")
    cfg = read_config(tmp_path / "moe")
    assert cfg == made.cfg and cfg.moe == dataclasses.replace(moe, top_k=experts)
    import transformers

    theirs = transformers.AutoConfig.from_pretrained(tmp_path / "moe")
    assert (theirs.model_type, theirs.num_experts, theirs.num_experts_per_tok, theirs.moe_intermediate_size,
            theirs.shared_expert_intermediate_size, theirs.norm_topk_prob, theirs.intermediate_size) == \
           ("qwen2_moe", experts, experts, width, 640, normalise, 592)
    assert_same_output(tmp_path / "moe", wide_folder)


def test_feed_forward_networks_matter_to_these_outputs(dense_folder, tmp_path):
    """Else the test above could not fail: with other experts the output is another."""
    upcycle(dense_folder, tmp_path / "moe", MOE, to="safetensors")
    assert np.abs(logits(tmp_path / "moe") - logits(dense_folder)).max() > 0.1


@pytest.mark.parametrize("how, message", [
    (Upcycling(preserve=True), "every one.* 74 units.* 3 experts of width 20 leave out 14 in layer 0.*more or wider"),
    (Upcycling(preserve=True, cut="within"), r"74 units.*leave out 14"),
])
def test_preserve_refuses_to_lose_units(how, message, dense_folder, tmp_path):
    moe = MoeConfig(experts=3, top_k=3, d_expert=20, d_shared=20)
    with pytest.raises(UserError, match=message):
        upcycle(dense_folder, tmp_path / "moe", moe, how, to="orbax")
    assert not list(tmp_path.iterdir())


def test_preserve_within_copies_says_that_across_loses_none(dense_folder, tmp_path):
    moe = MoeConfig(experts=2, top_k=2, d_expert=50, d_shared=20)
    with pytest.raises(UserError, match="take cut across"):
        upcycle(dense_folder, tmp_path / "moe", moe, Upcycling(preserve=True, cut="within"), to="orbax")


def test_preserve_in_bfloat16_is_rounded_and_says_so(tmp_path, caplog):
    src = save_dense(tmp_path / "src", dataclasses.replace(DENSE, dtype="bfloat16"))
    moe = MoeConfig(experts=16, top_k=1, d_expert=10, d_shared=20)
    with caplog.at_level(logging.WARNING):
        upcycle(src, tmp_path / "rounded", moe, Upcycling(preserve=True), to="safetensors")
        assert "bfloat16 rounds" in caplog.text and "--dtype float32" in caplog.text
        caplog.clear()
        upcycle(src, tmp_path / "exact", moe, Upcycling(preserve=True), to="safetensors", dtype="float32")
        assert not caplog.text
    exact, rounded = (np.abs(logits(tmp_path / name) - logits(src)).max() for name in ("exact", "rounded"))
    assert exact <= SAME_OUTPUT < rounded < 0.1
    assert read_config(tmp_path / "exact").dtype == "float32"


@pytest.mark.parametrize("how", [Upcycling(), Upcycling(cut="within", reinit="units", init="matched", shared="cut")])
def test_both_forms_and_any_pieces_give_the_same_bits(how, dense_folder, tmp_path, monkeypatch):
    convert(dense_folder, tmp_path / "orbax_src", to="orbax")
    upcycle(dense_folder, tmp_path / "whole", MOE, how, to="safetensors")
    expected = stored(tmp_path / "whole")
    routes: list[tuple[Path, Kind, int]] = [
        (dense_folder, "safetensors", 200), (dense_folder, "orbax", 1500),
        (tmp_path / "orbax_src", "safetensors", 5000), (tmp_path / "orbax_src", "orbax", 3000)]
    for src, to, piece in routes:
        monkeypatch.setattr(pieces, "PIECE_BYTES", piece)
        dst = tmp_path / f"from_{src.name}_{to}"
        upcycle(src, dst, MOE, how, to=to)
        got = stored(dst)
        assert {name: (array.dtype, array.tobytes()) for name, array in got.items()} == \
               {name: (array.dtype, array.tobytes()) for name, array in expected.items()}, dst.name
        assert read_config(dst) == read_config(tmp_path / "whole")


def test_tensors_do_not_depend_on_the_order_in_which_they_are_asked_for(dense_folder):
    checkpoint = open_checkpoint(dense_folder)
    cfg = dataclasses.replace(checkpoint.cfg, moe=MOE)
    one, other = (UpcycledReader(checkpoint, cfg, Upcycling(), None) for _ in range(2))
    slots = names.slots(cfg)
    first = {slot.name: one.rows(slot, 0, slot.shape[0]) for slot in slots}
    for slot in reversed(slots):
        np.testing.assert_array_equal(other.rows(slot, 0, slot.shape[0]), first[slot.name])
        if len(slot.shape) == 2:
            np.testing.assert_array_equal(other.rows(slot, 0, 1, slice(3, 9)), first[slot.name][:1, 3:9])


def test_what_is_not_an_experts_is_copied_bit_by_bit(hf_folder, tensors, tmp_path):
    made = upcycle(hf_folder("tied"), tmp_path / "moe", MOE, to="safetensors")
    src, dst = tensors(hf_folder("tied")), tensors(tmp_path / "moe")
    assert {name: value for name, value in dst.items() if ".mlp." not in name} == \
           {name: value for name, value in src.items() if ".mlp." not in name}
    assert {dtype for _, dtype, _ in dst.values()} == {"bfloat16"}
    assert made.copies == 2 and (made.least, made.most) == (1, 2)      # 4 * 20 = 80 units out of copies of 48
    for name in ("tokenizer.json", "merges.txt", "chat_template.jinja"):
        assert (tmp_path / "moe" / name).read_bytes() == (hf_folder("tied") / name).read_bytes()


def test_an_experts_elements_are_the_dense_networks_or_drawn_anew(dense_folder, tmp_path):
    """Each expert's three matrices, found again in the dense ones through what was not drawn anew."""
    upcycle(dense_folder, tmp_path / "moe", MOE, to="safetensors")
    src, dst = stored(dense_folder), stored(tmp_path / "moe")
    for layer in range(DENSE.layers):
        at = f"model.layers.{layer}.mlp"
        dense = {part: src[f"{at}.{part}_proj.weight"] for part in ("gate", "up", "down")}
        dense["down"] = dense["down"].T
        for e in range(MOE.experts):
            expert = {part: dst[f"{at}.experts.{e}.{part}_proj.weight"] for part in ("gate", "up", "down")}
            expert["down"] = expert["down"].T
            units = {part: [int((m == row).sum(1).argmax()) for row in expert[part]] for part, m in dense.items()}
            assert units["gate"] == units["up"] == units["down"]
            for part, m in dense.items():
                kept = np.mean(expert[part] == m[units[part]])
                assert 0.4 < kept < 0.6, f"{kept} of {part} kept"     # 640 coins: 5 sigmas
        shared = {part: dst[f"{at}.shared_expert.{part}_proj.weight"] for part in ("gate", "up", "down")}
        assert all((dense["gate"] == row).all(1).any() for row in shared["gate"])
        assert shared["down"].shape == (DENSE.d_model, MOE.d_shared)


def test_routers_are_drawn_as_told(dense_folder, tmp_path):
    moe = MoeConfig(experts=60, top_k=4, d_expert=5, d_shared=10)
    for name, how, router, gate in (("a", Upcycling(), DENSE.init_std, 0), ("b", Upcycling(router_std=0.5,
                                    shared_gate_std=0.1), 0.5, 0.1), ("c", Upcycling(preserve=True), 0, 0)):
        upcycle(dense_folder, tmp_path / name, moe, how, to="safetensors")
        got = stored(tmp_path / name)
        routers = np.stack([got[f"model.layers.{i}.mlp.gate.weight"] for i in range(2)])
        gates = np.stack([got[f"model.layers.{i}.mlp.shared_expert_gate.weight"] for i in range(2)])
        assert np.isclose(routers.std(), router, rtol=0.06) and np.isclose(gates.std(), gate, rtol=0.4)
        assert not router or len(np.unique(routers)) > 0.9 * routers.size


def test_matched_draws_with_the_deviation_of_the_dense_matrix(dense_folder, tmp_path):
    how = Upcycling(init="matched", reinit_share=1)
    upcycle(dense_folder, tmp_path / "moe", MOE, how, to="safetensors")
    src, dst = stored(dense_folder), stored(tmp_path / "moe")
    for part in ("gate", "up", "down"):
        wanted = src[f"model.layers.1.mlp.{part}_proj.weight"].std()
        drawn = np.stack([dst[f"model.layers.1.mlp.experts.{e}.{part}_proj.weight"] for e in range(4)])
        assert wanted > 0.1 and np.isclose(drawn.std(), wanted, rtol=0.07)


def test_standard_deviation_is_numpys():
    x = np.random.default_rng(0).normal(3, 2, (300, 700)).astype(np.float32)
    assert np.isclose(standard_deviation(x), x.astype(np.float64).std(), rtol=1e-12)


def test_some_layers_may_stay_dense(dense_folder, tmp_path):
    upcycle(dense_folder, tmp_path / "moe", dataclasses.replace(MOE, dense_layers=(0,)), to="orbax")
    src, dst = stored(dense_folder), stored(tmp_path / "moe")
    np.testing.assert_array_equal(dst["model.layers.0.mlp.up_proj.weight"], src["model.layers.0.mlp.up_proj.weight"])
    expert = dst["model.layers.1.mlp.experts.0.up_proj.weight"]
    at_home, elsewhere = (np.isin(expert, src[f"model.layers.{i}.mlp.up_proj.weight"]).mean() for i in (1, 0))
    assert at_home > 0.4 and elsewhere < 0.01


@pytest.mark.parity
def test_windowed_layers_stay_the_same(tmp_path):
    cfg = dataclasses.replace(DENSE, layers=3, window=WindowConfig(enabled=True, size=8, max_window_layers=1))
    src = save_dense(tmp_path / "src", cfg)
    moe = MoeConfig(experts=2, top_k=2, d_expert=40, d_shared=8)
    made = upcycle(src, tmp_path / "moe", moe, Upcycling(preserve=True), to="safetensors")
    assert made.cfg.windowed_layers() == cfg.windowed_layers() == (False, True, True)
    assert read_config(tmp_path / "moe").windowed_layers() == (False, True, True)
    assert_same_output(tmp_path / "moe", src)


def test_like_a_published_model(dense_folder, tmp_path):
    like = dataclasses.replace(DENSE, vocab=60, d_ff=11, moe=MOE, rope=RopeConfig(theta=5.0))
    made = upcycle(dense_folder, tmp_path / "moe", MOE, to="safetensors", like=like)
    assert made.cfg == dataclasses.replace(DENSE, vocab=60, moe=MOE)
    src, dst = stored(dense_folder), stored(tmp_path / "moe")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        np.testing.assert_array_equal(dst[name], src[name][:60])


@pytest.mark.parametrize("change, message", [
    ({"d_model": 64, "head_dim": 16}, "hidden_size 32.*64"), ({"layers": 3}, "num_hidden_layers 2.*3"),
    ({"tied": True}, "tie_word_embeddings False.*True"), ({"vocab": 65}, "vocabulary of 64 rows.*65"),
    ({"kv_heads": 4}, "num_key_value_heads 2.*4"),
])
def test_like_a_model_of_other_shapes(change, message, dense_folder, tmp_path):
    with pytest.raises(UserError, match=message):
        upcycle(dense_folder, tmp_path / "moe", MOE, to="orbax", like=dataclasses.replace(DENSE, moe=MOE, **change))


def test_special_tokens_are_not_dropped_from_the_vocabulary(tmp_path):
    src = save_dense(tmp_path / "src", dataclasses.replace(DENSE, eos_ids=(61,)))
    with pytest.raises(UserError, match=r"special token 61.*60"):
        upcycle(src, tmp_path / "moe", MOE, to="orbax", like=dataclasses.replace(DENSE, vocab=60, moe=MOE))


@pytest.mark.parametrize("kind, message", [("moe", "mixture of 4 experts already.*dense"), ("reward", "reward head"),
                                           ("score", "score head")])
def test_sources_that_are_no_dense_language_model(kind, message, hf_folder, tmp_path):
    with pytest.raises(UserError, match=message):
        upcycle(hf_folder(kind), tmp_path / "dst", MOE, to="orbax")
    assert not list(tmp_path.iterdir())


def test_a_quantised_source(hf_folder, rewrite, tmp_path):
    shutil.copytree(hf_folder("dense"), tmp_path / "src")

    def quantise(arrays):
        name = "model.layers.0.mlp.up_proj.weight"
        arrays[name] = np.ones(arrays[name].shape, np.int8)

    rewrite(tmp_path / "src", quantise)
    with pytest.raises(UserError, match=r"up_proj.*I8.*quantised"):
        upcycle(tmp_path / "src", tmp_path / "dst", MOE, to="orbax")


def test_refusals_that_need_the_source(dense_folder, tmp_path):
    for moe, how, message in (
            (MOE, Upcycling(router_std=0), "zeros.*first 2 of 4"),
            (dataclasses.replace(MOE, d_expert=75), Upcycling(cut="within"), "75.*74.*across"),
            (dataclasses.replace(MOE, sparse_step=3), Upcycling(), "none of the 2 layers"),
    ):
        with pytest.raises(UserError, match=message):
            upcycle(dense_folder, tmp_path / "dst", moe, how, to="orbax")
    chosen = dataclasses.replace(MOE, top_k=4)
    upcycle(dense_folder, tmp_path / "all", chosen, Upcycling(router_std=0), to="safetensors")
    with pytest.raises(UserError, match="already exists"):
        upcycle(dense_folder, tmp_path / "all", MOE, to="safetensors")


def test_layers_of_different_dtypes(dense_folder, rewrite, tmp_path):
    shutil.copytree(dense_folder, tmp_path / "src")

    def narrow(arrays):
        name = "model.layers.1.mlp.down_proj.weight"
        arrays[name] = arrays[name].astype(np.float16)

    rewrite(tmp_path / "src", narrow)
    upcycle(tmp_path / "src", tmp_path / "hf", MOE, to="safetensors")
    got = stored(tmp_path / "hf")
    assert got["model.layers.1.mlp.experts.0.down_proj.weight"].dtype == np.float16
    assert got["model.layers.1.mlp.gate.weight"].dtype == np.float32
    with pytest.raises(UserError, match="one dtype; give --dtype"):
        upcycle(tmp_path / "src", tmp_path / "dst", MOE, to="orbax")
    upcycle(tmp_path / "src", tmp_path / "dst", MOE, to="orbax", dtype="bfloat16")
    assert read_config(tmp_path / "dst").dtype == "bfloat16"


def test_memory_is_two_dense_matrices_and_a_few_pieces(tmp_path, monkeypatch):
    """The experts of a layer, 6 MiB, are never in memory together; numpy's arrays are all counted."""
    cfg = dataclasses.replace(DENSE, layers=2, d_model=128, d_ff=1024)
    checkpoint = open_checkpoint(save_dense(tmp_path / "src", cfg))
    cfg = dataclasses.replace(cfg, moe=MoeConfig(experts=64, top_k=1, d_expert=64, d_shared=64))
    monkeypatch.setattr(pieces, "PIECE_BYTES", 2**15)
    slots, matrix = names.slots(cfg), 128 * 1024 * 4
    size = sum(4 * int(np.prod(slot.shape)) for slot in slots)
    assert size > 24 * matrix
    reader = UpcycledReader(checkpoint, cfg, Upcycling(), None)
    tracemalloc.start()
    try:
        for _ in pieces.read_ahead(reader, slots, [F32] * len(slots)):
            pass
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= 2 * matrix + 24 * pieces.PIECE_BYTES, f"{peak / 2**20:.1f} MiB"
