"""Requests split over devices give what one device gives, to the last bit; other meshes are refused by name."""

from __future__ import annotations

import jax
import pytest

import qwen2_jax
from qwen2_jax.errors import UserError
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


@pytest.mark.parametrize("mesh, message", [
    ("tensor=2", "mesh axis 'tensor' in 'tensor=2' is not supported: data is"),
    ("data=2,fsdp=2", "mesh axis 'fsdp'"),
    ("data=16", "needs 16 devices, this machine has 8"),
    (4, "mesh must be a text like 'data=4', a jax.sharding.Mesh or None, found 4"),
])
def test_refused_by_name(checkpoint, mesh, message):
    with pytest.raises(UserError) as error:
        qwen2_jax.load(checkpoint("dense"), mesh=mesh)
    assert message in str(error.value)


def test_a_mesh_object(checkpoint, load):
    devices = jax.devices()[:2]
    with pytest.raises(UserError, match="mesh axis 'tensor'"):
        qwen2_jax.load(checkpoint("dense"), mesh=jax.make_mesh((2,), ("tensor",), devices=devices))
    lm = qwen2_jax.load(checkpoint("dense"), mesh=jax.make_mesh((2,), ("data",), devices=devices))
    prompts = random_prompts(3, 20, 9)
    assert lm.generate(prompts, max_new_tokens=5, temperature=0) == load("dense").generate(
        prompts, max_new_tokens=5, temperature=0)
