"""A model with int8 matrices answers as the float32 matrices that they mean, on one device and on meshes; loading makes
the same int8 as quantizing what was loaded, in a quarter of the memory."""

from __future__ import annotations

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import qwen2_jax
from qwen2_jax.checkpoint.export import export_hf, save_params
from qwen2_jax.checkpoint.store import Store
from qwen2_jax.errors import UserError
from qwen2_jax.model.decoder import Decoder, abstract_params, init_params, param_specs
from qwen2_jax.ops.quant import Int8, dequantize, on_matrices, quantize
from qwen2_jax.ops.vocab import target_logprobs
from qwen2_jax.serve.lm import LM
from qwen2_jax.sharding.axes import BATCH
from qwen2_jax.sharding.mesh import REPLICATED, TOKENS_SPEC, make_mesh, per_device, place, shardings
from tests.serve.models import CONFIGS, random_prompts

SUM_ORDER = 5e-5
"""Of the logits' deviation: what the meshes are held to, for the same reason (tests/serve/test_mesh.py)."""
BFLOAT16, QUANTIZATION = 0.015, 0.04
"""Of the logits' deviation, root mean square: what rounding activations, and matrices, makes of these random models.
Measured at 0.006 and 0.02."""
LM_KINDS = {name: dataclasses.replace(CONFIGS[kind], tied=tied)
            for name, kind, tied in (("dense", "dense", False), ("tied", "dense", True), ("moe", "moe", False))}
STRONG = 3
"""Times the usual initialization: logits deviate by 0.6, and float32's rounding does not grow to something."""


@functools.cache
def weights(kind: str, stacked: bool) -> dict:
    params = init_params(LM_KINDS[kind], jax.random.key(1), stacked=stacked)
    return on_matrices(params, lambda w: STRONG * w)


def lm(params: dict, kind: str, stacked: bool, mesh: str | None = None, dtype=jnp.float32) -> LM:
    quant = "int8" if any(isinstance(a, Int8) for a in jax.tree.leaves(params, is_leaf=is_int8)) else None
    cfg, grid = LM_KINDS[kind], make_mesh(mesh)
    placed = params if grid is None else place(params, grid, param_specs(cfg, grid, stacked=stacked, quant=quant))
    return LM(placed, cfg, dtype=dtype, stacked=stacked, mesh=grid)


def is_int8(leaf) -> bool:
    return isinstance(leaf, Int8)


def deviation(a: list[np.ndarray], b: list[np.ndarray]) -> float:
    """Root mean square of the difference, in standard deviations of b."""
    x, y = np.concatenate(a), np.concatenate(b)
    return float(np.sqrt(np.mean((x - y) ** 2)) / y.std())


PROMPTS = random_prompts(3, 40)


@functools.cache
def meant(kind: str) -> tuple:
    """(logits, greedy generations) of the float32 matrices that int8 means, on one device."""
    model = lm(dequantize(quantize(weights(kind, False))), kind, False)
    return model.logits(PROMPTS), model.generate(PROMPTS, max_new_tokens=12, temperature=0)


@pytest.mark.parametrize("kind, stacked, mesh", [
    ("dense", False, None), ("moe", False, None),
    ("tied", True, "tensor=2"), ("dense", True, "fsdp=2,tensor=4"), ("moe", True, "fsdp=2,expert=2"),
])
def test_answers_as_the_matrices_that_it_means(kind, stacked, mesh):
    """Prefill in chunks, decoding, whole rows. `tensor=4`: two devices share each key-value head."""
    logits, generations = meant(kind)
    model = lm(quantize(weights(kind, stacked)), kind, stacked, mesh)
    near = SUM_ORDER * float(np.concatenate(logits).std())
    for a, b in zip(model.logits(PROMPTS), logits, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=near)
    for a, b in zip(model.generate(PROMPTS, max_new_tokens=12, temperature=0), generations, strict=True):
        assert a.token_ids == b.token_ids
        np.testing.assert_allclose(a.logprobs, b.logprobs, rtol=0, atol=near)


@pytest.mark.parametrize("kind", ["tied", "moe"])
def test_what_rounding_costs(kind, capsys):
    """Int8 beside the weights themselves, in float32 and in bfloat16."""
    exact = lm(weights(kind, False), kind, False).logits(PROMPTS)
    int8, rounded = meant(kind)[0], lm(quantize(weights(kind, False)), kind, False, dtype=jnp.bfloat16).logits(PROMPTS)
    with capsys.disabled():
        print(f"\n{kind}: int8 is off by {deviation(int8, exact):.4f} of the logits' deviation, bfloat16 activations by"
              f" {deviation(rounded, int8):.4f}")
    assert 0 < deviation(int8, exact) < QUANTIZATION and 0 < deviation(rounded, int8) < BFLOAT16


@pytest.mark.parametrize("kind, mesh", [("dense", "fsdp=2,tensor=2"), ("moe", "data=2,expert=2,tensor=2")])
def test_loading(load, kind, mesh):
    """What quantizing the loaded weights gives, in the bytes that it should be; on a mesh the same bits, each piece
    where it belongs."""
    one, many = load(kind, quant="int8"), load(kind, quant="int8", mesh=mesh)
    for (path, found), (_, expected) in zip(*(jax.tree.leaves_with_path(tree) for tree in (
            one.params, quantize(load(kind).params))), strict=True):
        assert found.dtype == expected.dtype
        if found.dtype == jnp.int8:     # in the middle between two numbers either will do
            assert np.abs(np.asarray(found, int) - np.asarray(expected, int)).max() <= 1
            assert np.mean(found != expected) < 1e-3, path
        else:
            assert (found == expected).all(), path
    planned = jax.tree.leaves(abstract_params(one.cfg, stacked=False, quant="int8"))
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(one.params)) == sum(a.size * a.dtype.itemsize for a in planned)
    specs = param_specs(one.cfg, make_mesh(mesh), stacked=False, quant="int8")
    for leaf, same, spec in zip(jax.tree.leaves(many.params), jax.tree.leaves(one.params),
                                jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, P)), strict=True):
        assert leaf.sharding.is_equivalent_to(NamedSharding(make_mesh(mesh), spec), leaf.ndim)
        assert (np.asarray(leaf) == np.asarray(same)).all()


def test_gradients_go_through_frozen_int8():
    """Of what is not quantized, on a mesh with recomputation: as with the matrices that are meant, on one device."""
    cfg, mesh = LM_KINDS["moe"], make_mesh("fsdp=2,tensor=2")
    ids = np.random.default_rng(0).integers(0, cfg.vocab, (4, 16), dtype=np.int32)

    def loss(free, frozen, mesh):
        params = jax.tree.map(lambda a, b: b if a is None else a, free, frozen,
                              is_leaf=lambda x: x is None or is_int8(x))
        quant = "int8" if is_int8(frozen["embed"]["table"]) else None
        specs = param_specs(cfg, mesh, quant=quant)

        def local(params, ids_BT, *, ax):
            out = Decoder(cfg, ax, remat="full").apply({"params": params}, ids_BT)
            return ax.psum(target_logprobs(out.x_BTD, out.head["table"], ids_BT, out.vocab)[0].sum(), BATCH)

        return per_device(local, mesh, (specs, TOKENS_SPEC), REPLICATED)(params, ids)

    tree = quantize(weights("moe", True))
    free = jax.tree.map(lambda a: None if is_int8(a) else a, tree, is_leaf=is_int8)
    expected = jax.grad(loss)(free, dequantize(tree), None)
    specs = param_specs(cfg, mesh, quant="int8")
    placed = jax.device_put(tree, shardings(specs, mesh))
    found = jax.jit(jax.grad(functools.partial(loss, mesh=mesh)))(free, placed)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(a - b) <= SUM_ORDER * np.linalg.norm(b) and np.linalg.norm(b) > 0


def test_not_saved(load, tmp_path):
    found = load("dense", quant="int8")
    for save in (save_params, export_hf):
        with pytest.raises(UserError, match="out: a checkpoint takes the weights themselves, found a tree quantized"):
            save(found.params, found.cfg, tmp_path / "out")
    store = Store(tmp_path / "run")
    with pytest.raises(UserError, match="run: a checkpoint takes the weights themselves"):
        store.save(1, {"params": found.params}, {})
    store.close()
    assert not (tmp_path / "out").exists() and not list((tmp_path / "run").iterdir())


def test_unknown(checkpoint):
    with pytest.raises(UserError, match="quant 'int4' is not supported: int8 is"):
        qwen2_jax.load(checkpoint("dense"), quant="int4")


def test_numbers_that_are_none_are_still_said():
    params = weights("dense", False)
    norm = {"norm": {"scale": params["norm"]["scale"]}}
    bad = on_matrices(params, lambda w: w.at[..., 1, 4].set(jnp.nan)) | norm
    with pytest.raises(UserError, match="logits are not numbers"):
        LM(quantize(bad), LM_KINDS["dense"], stacked=False).generate([[5, 6]], max_new_tokens=2, temperature=0)


def test_command(run_cli, checkpoint, load):
    done = run_cli("generate", "--model", checkpoint("dense"), "--prompt", "import", "--temperature", "0",
                   "--max-new-tokens", "6", "--json", "--quant", "int8")
    assert done.returncode == 0, done.stderr
    expected = load("dense", quant="int8").generate("import", max_new_tokens=6, temperature=0)[0]
    assert json.loads(done.stdout)["token_ids"] == expected.token_ids
