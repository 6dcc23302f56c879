"""Requests split over devices give what one device gives, to the last bit; weights split over devices what float32
leaves of it; other meshes are refused by name."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import qwen2_jax
from qwen2_jax.errors import UserError
from qwen2_jax.model.decoder import param_specs
from qwen2_jax.serve.lm import LM
from qwen2_jax.sharding.mesh import make_mesh, place
from qwen2_jax.train.losses import NextTokenLoss
from tests.serve.models import random_prompts


@pytest.mark.parametrize("kind, mesh", [("dense", "data=2"), ("moe", "data=4")])
def test_equal_to_one_device(load, kind, mesh):
    """Eleven prompts of unlike lengths: the devices have unequal numbers of them, in unequal chunks."""
    one, many = load(kind), load(kind, mesh=mesh)
    prompts = random_prompts(3, 40, 70, 90, 5, 9, 33, 20, 7, 7, 2)
    for settings in (dict(temperature=0), dict(temperature=1.0, top_p=0.9, seed=4)):
        assert many.generate(prompts, max_new_tokens=30, **settings) == one.generate(prompts, max_new_tokens=30,
                                                                                     **settings)
        assert many.generate(prompts[:1], max_new_tokens=30, **settings) == one.generate(prompts[:1],
                                                                                         max_new_tokens=30, **settings)


def test_samples_stop_strings_and_scores_on_a_mesh(load):
    one, many = load("dense"), load("dense", mesh="data=2")
    draw = dict(max_new_tokens=30, temperature=1.0, seed=4, n=3, stop=["a", " "])
    assert many.generate(random_prompts(9, 5), **draw) == one.generate(random_prompts(9, 5), **draw)
    rows = random_prompts(3, 20, 9)
    for a, b in zip(many.logits(rows), one.logits(rows), strict=True):
        assert (a == b).all()
    pairs = [("import", " os"), ("a", "b"), ("for i", " in x")]
    assert many.loglikelihood(pairs) == one.loglikelihood(pairs)


SUM_ORDER = 5e-5    # of the logits' deviation: what parity with transformers is held to, for the same reason


@pytest.mark.parametrize("kind, mesh", [
    ("dense", "fsdp=2,tensor=2"), ("dense", "tensor=8"), ("moe", "expert=2,fsdp=2,tensor=2"),
    ("moe", "context=2,data=2"), ("window", "tensor=2,context=2"), ("yarn", "tensor=4"),
])
def test_weights_split_over_devices(load, kind, mesh):
    """From a checkpoint: each device holds its pieces only, and prompts, samples and scores are those of one device."""
    one, many = load(kind), load(kind, mesh=mesh)
    specs = param_specs(many.cfg, make_mesh(mesh), stacked=False)
    for leaf, spec in zip(jax.tree.leaves(many.params), jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, P)),
                          strict=True):
        assert leaf.sharding.is_equivalent_to(NamedSharding(make_mesh(mesh), spec), leaf.ndim)
    prompts = random_prompts(3, 40, 200, 90, 5, 9, 33)
    expected = one.logits(prompts)
    near = SUM_ORDER * float(np.concatenate(expected).std())
    for a, b in zip(many.logits(prompts), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=near)
    for settings in (dict(temperature=0), dict(temperature=1.0, top_p=0.9, repetition_penalty=1.1, seed=4)):
        for a, b in zip(many.generate(prompts, max_new_tokens=20, **settings),
                        one.generate(prompts, max_new_tokens=20, **settings), strict=True):
            assert a.token_ids == b.token_ids and a.finish_reason == b.finish_reason
            np.testing.assert_allclose(a.logprobs, b.logprobs, rtol=0, atol=near)
    pairs = [("import", " os"), ("a", "b"), ("for i", " in x")]
    for a, b in zip(many.loglikelihood(pairs), one.loglikelihood(pairs), strict=True):
        assert a == pytest.approx(b, abs=near)


def test_scores_where_context_divides_no_power_of_two(load):
    one, many = load("dense"), load("dense", mesh="context=3")
    rows = random_prompts(3, 32)
    expected = one.logits(rows)
    near = SUM_ORDER * float(np.concatenate(expected).std())
    for a, b in zip(many.logits(rows), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=near)
    pairs = [("import", " os"), ("for i", " in x")]
    for a, b in zip(many.loglikelihood(pairs), one.loglikelihood(pairs), strict=True):
        assert a == pytest.approx(b, abs=near)


def test_weights_that_lie_as_training_has_them_are_moved(load):
    """Training spreads over `expert` what generation wants whole on each device."""
    one, mesh = load("moe"), make_mesh("fsdp=2,expert=2")
    trained = NextTokenLoss(model=one.cfg, stacked=False).param_specs(mesh)
    specs = param_specs(one.cfg, mesh, stacked=False)
    assert trained["layers_0"]["attn"]["q"] != specs["layers_0"]["attn"]["q"]
    many = LM(place(one.params, mesh, trained), one.cfg, mesh=mesh, stacked=False)
    assert many.params["layers_0"]["attn"]["q"].sharding.spec == specs["layers_0"]["attn"]["q"]
    texts = [[a.token_ids for a in lm.generate(random_prompts(3, 40), max_new_tokens=10)] for lm in (one, many)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("mesh, message", [
    ("model=2", "mesh axis 'model' in 'model=2' is not supported: data, fsdp, expert, context, tensor are"),
    ("data=2,fsdp=2,data=1", "mesh axis 'data' appears twice"),
    ("data=16", "needs 16 devices, this machine has 8"),
    (4, "mesh must be a text like 'data=4', a jax.sharding.Mesh or None, found 4"),
])
def test_refused_by_name(checkpoint, mesh, message):
    with pytest.raises(UserError) as error:
        qwen2_jax.load(checkpoint("dense"), mesh=mesh)
    assert message in str(error.value)


def test_a_mesh_object(checkpoint, load):
    devices = jax.devices()[:2]
    with pytest.raises(UserError, match="mesh axis 'model'"):
        qwen2_jax.load(checkpoint("dense"), mesh=jax.make_mesh((2,), ("model",), devices=devices))
    lm = qwen2_jax.load(checkpoint("dense"), mesh=jax.make_mesh((2,), ("data",), devices=devices))
    prompts = random_prompts(3, 20, 9)
    assert lm.generate(prompts, max_new_tokens=5, temperature=0) == load("dense").generate(
        prompts, max_new_tokens=5, temperature=0)
