"""MinHash against the true Jaccard similarity."""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys

import datasketch
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2_jax.data.quality.minhash import RECALL, Signer, band_rows, near_duplicates
from qwen2_jax.data.quality.rules import MinHashRule
from qwen2_jax.errors import UserError

# Estimates of 128 hashes stray by at most 0.5/sqrt(128) = 0.044 (one standard deviation); five of them hold for all.
FIVE_DEVIATIONS = 5 * 0.5 / math.sqrt(128)


def pair(shared: int, own: int, salt: int = 0) -> tuple[str, str, float]:
    """Two texts that share one run of words, and the true similarity of their 5-word shingles."""
    words = [f"w{salt}x{i}" for i in range(shared)]
    a = words + [f"a{salt}x{i}" for i in range(own)]
    b = words + [f"b{salt}x{i}" for i in range(own)]
    sets = [{tuple(text[i : i + 5]) for i in range(len(text) - 4)} for text in (a, b)]
    return " ".join(a), " ".join(b), len(sets[0] & sets[1]) / len(sets[0] | sets[1])


@pytest.mark.parametrize(("shared", "own"), [(200, 0), (180, 10), (150, 30), (60, 60), (8, 100), (0, 50)])
def test_equal_hashes_estimate_the_jaccard_similarity(shared, own):
    signer = Signer(MinHashRule())
    estimates = []
    for salt in range(20):
        a, b, true = pair(shared, own, salt)
        estimates.append(np.mean(signer(a) == signer(b)))
        assert abs(estimates[-1] - true) < FIVE_DEVIATIONS
    assert abs(np.mean(estimates) - true) < FIVE_DEVIATIONS / math.sqrt(20)    # and without bias


@settings(max_examples=40)
@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=12), st.integers(1, 6))
def test_signatures_are_of_every_shingle(words, shingle):
    sketch = datasketch.MinHash(16, seed=7, scheme="affine32")
    for i in range(max(len(words) - shingle + 1, 1)):
        sketch.update(" ".join(words[i : i + shingle]).encode())
    signer = Signer(MinHashRule(shingle=shingle, permutations=16, seed=7))
    assert (signer(" ".join(words)) == sketch.hashvalues).all()


def test_signatures_are_of_the_set_of_shingles():
    signer = Signer(MinHashRule())
    text = "one two three four five six " * 2000        # longer than what is hashed at once
    assert (signer(text) == signer("One, two — three four five six! " * 2)).all()
    assert (signer("a b") == signer("A b.")).all()      # fewer words than a shingle
    assert not (signer("a b") == signer("a c")).all()
    assert signer("?!") is None


def test_a_long_text_is_hashed_in_parts_that_add_up():
    words = [f"w{i}" for i in range(9000)]
    whole = Signer(MinHashRule())(" ".join(words))
    parts = [Signer(MinHashRule())(" ".join(words[i : i + 3000 + 4])) for i in (0, 3000, 6000)]
    assert (whole == np.minimum.reduce(parts)).all()


def test_signatures_do_not_depend_on_the_process():
    program = ("from qwen2_jax.data.quality.minhash import Signer; from qwen2_jax.data.quality.rules import "
               "MinHashRule; print(Signer(MinHashRule(permutations=8))('to be or not to be that is').tolist())")
    here = f"{Signer(MinHashRule(permutations=8))('to be or not to be that is').tolist()}\n"
    for seed in ("1", "2"):
        env = {"PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        assert subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True,
                              check=True).stdout == here


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.8, 0.9, 0.95])
def test_bands_see_pairs_at_the_threshold(threshold):
    rows = band_rows(threshold, 128)
    assert 1 - (1 - threshold**rows) ** (128 // rows) >= RECALL
    assert 1 - (1 - threshold ** (rows + 1)) ** (128 // (rows + 1)) < RECALL    # and no narrower than they must be


def brute_force(signatures, threshold):
    """Every pair compared."""
    staying, found = [], []
    for d, signature in enumerate(signatures):
        shares = [(float(np.mean(signatures[k] == signature)), -k) for k in staying]
        best = max(shares, default=(0.0, 0))
        if best[0] >= threshold:
            found.append((d, -best[1], best[0]))
        else:
            staying.append(d)
    return found


def test_finds_what_comparing_every_pair_finds():
    """Groups of variants of one text, well above and well below the threshold, between texts of their own."""
    generator = random.Random(3)
    texts = []
    for group in range(12):
        words = [f"g{group}x{i}" for i in range(300)]
        for _ in range(6):
            changed = words[:]
            for place in generator.sample(range(300), generator.choice([0, 1, 4, 60])):
                changed[place] = f"r{generator.random()}"
            texts.append(" ".join(changed))
    generator.shuffle(texts)
    signatures = np.stack([Signer(MinHashRule())(text) for text in texts])
    found = list(near_duplicates(signatures, 0.8))
    assert found == brute_force(signatures, 0.8)
    assert 20 < len(found) < 60


@pytest.mark.parametrize("band", range(42))
def test_one_equal_band_is_enough_to_be_compared(band):
    """Two of every three hashes are equal, and in one band the third."""
    assert band_rows(0.5, 128) == 3
    a = np.arange(128, dtype=np.uint32)
    b = np.where((a % 3 < 2) | (a == 3 * band + 2), a, a + 500).astype(np.uint32)
    assert list(near_duplicates(np.stack([a, b]), 0.5)) == [(1, 0, 87 / 128)]


def test_the_first_stays_and_what_is_like_a_removed_one_alone_stays_too():
    """0 and 1 are alike, 1 and 2 are, 0 and 2 are not: 1 goes for 0, and 2 stays, as what it is like is gone."""
    base = np.arange(128, dtype=np.uint32)
    drifted = [np.where(base < 20 * k, base + 1000 * k, base).astype(np.uint32) for k in range(3)]
    assert list(near_duplicates(np.stack(drifted), 0.8)) == [(1, 0, 108 / 128)]


@pytest.mark.parametrize(("equal", "goes"), [(63, False), (64, True), (65, True)])
def test_the_threshold_itself_is_enough(equal, goes):
    a = np.arange(128, dtype=np.uint32)
    b = np.where(a < equal, a, a + 500).astype(np.uint32)
    assert bool(list(near_duplicates(np.stack([a, b]), 0.5))) is goes


def test_nothing_to_compare():
    assert list(near_duplicates(np.zeros((0, 128), np.uint32), 0.8)) == []
    assert list(near_duplicates(np.zeros((1, 128), np.uint32), 0.8)) == []


def test_datasketch_missing_is_said_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(UserError, match=r"datasketch.*pip install \"qwen2_jax\[data\]\""):
        Signer(MinHashRule())
