"""The arithmetic of cutting experts: properties that hold for every size."""

import hashlib
import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2_jax.checkpoint import fine_grained
from qwen2_jax.checkpoint.fine_grained import Expert, Upcycling, cut_units, draws, expert_rows, layer_experts
from qwen2_jax.config import MoeConfig
from qwen2_jax.errors import UserError

pytestmark = pytest.mark.smoke

BF16, F32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)
STD = 0.02
SIGMAS = 5      # of a count of coin tosses, or of a sample's standard deviation: once in two million

sizes = st.fixed_dictionaries({"width": st.integers(1, 60), "experts": st.integers(1, 12),
                               "expert_width": st.integers(1, 30)})


def moe(experts=8, d_expert=10, d_shared=24, top_k=2) -> MoeConfig:
    return MoeConfig(experts=experts, top_k=top_k, d_expert=d_expert, d_shared=d_shared)


def copy_of(width):
    return lambda c: fine_grained.permutation(0, f"copy {c}", width)


def dense_of(width, D=3, dtype=F32):
    """gate, up and down whose values tell the unit: unit u is u + 0.25, u + 0.5, u + 0.75."""
    unit_U = np.arange(width, dtype=np.float32)
    gate, up, down = (np.tile(unit_U[:, None] + offset, D).astype(dtype) for offset in (0.25, 0.5, 0.75))
    return {"gate": gate, "up": up, "down": np.ascontiguousarray(down.T)}


def matrices(expert, dense, std=STD, dtype=F32, pieces=None):
    """The three matrices of an expert, [F, D] each (down transposed), put together of pieces of so many rows."""
    out = {}
    for part, matrix in dense.items():
        rows = matrix.shape[0] if part == "down" else len(expert.units_F)
        step = pieces or rows
        made = [expert_rows(part, expert, start, min(start + step, rows), matrix, std,
                            lambda row, part=part: draws(7, f"expert {part}", row), dtype)
                for start in range(0, rows, step)]
        out[part] = np.concatenate(made)
        assert out[part].dtype == dtype
    return out | {"down": out["down"].T}


@given(sizes)
def test_across_copies_each_unit_occurs_as_often_as_any_other_up_to_one(sizes):
    width, experts, expert_width = sizes.values()
    units_EF = cut_units(width, experts, expert_width, "across", copy_of(width))
    assert units_EF.shape == (experts, expert_width)
    times_U = np.bincount(units_EF.ravel(), minlength=width)
    assert len(times_U) == width and times_U.max() - times_U.min() <= 1
    assert times_U.max() == math.ceil(experts * expert_width / width)       # the report's number of copies
    for c in range(experts * expert_width // width):
        assert sorted(units_EF.ravel()[c * width:(c + 1) * width]) == list(range(width))


@given(sizes)
def test_within_copies_no_expert_has_a_unit_twice_and_those_of_one_copy_share_none(sizes):
    width, experts, expert_width = sizes.values()
    if expert_width > width:
        with pytest.raises(UserError, match=f"{expert_width}.*{width}.*across"):
            cut_units(width, experts, expert_width, "within", copy_of(width))
        return
    units_EF = cut_units(width, experts, expert_width, "within", copy_of(width))
    assert units_EF.shape == (experts, expert_width)
    whole = width // expert_width
    for first in range(0, experts, whole):
        together = units_EF[first:first + whole].ravel()
        assert len(set(together)) == len(together) and set(together) <= set(range(width))


@pytest.mark.parametrize("cut, shared, copies", [("across", "copy", 9), ("across", "cut", 10), ("within", "copy", 10),
                                                 ("within", "cut", 11)])
def test_copies_for_the_published_sizes(cut, shared, copies):
    """64 experts of 2,560 out of 18,944 units: 8.65 copies, of which one holds 7; with eight shared ones 9.73."""
    how = Upcycling(cut=cut, shared=shared)
    assert fine_grained.layer_copies(how, moe(64, 2560, 20480, 8), 18944) == copies


@given(sizes, st.integers(0, 3), st.integers(0, 2))
def test_a_unit_keeps_its_row_of_gate_and_up_and_its_column_of_down(sizes, layer, seed):
    width, experts, expert_width = sizes.values()
    routed, shared = layer_experts(Upcycling(reinit_share=0, seed=seed), moe(experts, expert_width, 7, 1), width, layer)
    for expert in (*routed, shared):
        got = matrices(expert, dense_of(width))
        kept = ~expert.fresh_F
        for part, offset in (("gate", 0.25), ("up", 0.5), ("down", 0.75)):
            np.testing.assert_array_equal(got[part][kept], np.tile(expert.units_F[kept, None] + offset, 3))


@given(st.sampled_from(["elements", "units"]), st.floats(0, 1), st.integers(1, 9), st.sampled_from([BF16, F32]))
def test_any_pieces_give_the_same_bits(reinit, share, pieces, dtype):
    routed, shared = layer_experts(Upcycling(reinit=reinit, reinit_share=share), moe(4, 9, 30), 20, layer=0)
    for expert in (routed[1], shared):
        whole, cut = (matrices(expert, dense_of(20, D=11), dtype=dtype, pieces=n) for n in (None, pieces))
        assert {part: m.tobytes() for part, m in whole.items()} == {part: m.tobytes() for part, m in cut.items()}


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_elements_are_drawn_anew_with_their_probability_and_deviation_and_the_others_keep_their_bits(share, dtype):
    F, D = 400, 300
    expert = layer_experts(Upcycling(reinit_share=share), moe(1, F, 10, 1), F, layer=0)[0][0]
    dense = {part: (m + 1000).astype(dtype) for part, m in dense_of(F, D).items()}      # nowhere near a drawn number
    kept = matrices(Expert(expert.units_F, np.zeros(F, bool)), dense, dtype=dtype)
    for part, got in matrices(expert, dense, dtype=dtype).items():
        anew = np.abs(got.astype(np.float32)) < 10
        assert abs(anew.sum() - share * F * D) <= SIGMAS * math.sqrt(share * (1 - share) * F * D), part
        assert got[~anew].tobytes() == kept[part][~anew].tobytes()
        if share:
            drawn = got[anew].astype(np.float64)
            assert abs(drawn.std() / STD - 1) <= SIGMAS / math.sqrt(2 * drawn.size) + 2**-9     # bfloat16's rounding
            assert abs(drawn.mean()) <= SIGMAS * STD / math.sqrt(drawn.size)
        if 0 < share < 1:   # each by itself: no row or column is more anew than the others
            for counts in (anew.sum(0), anew.sum(1)):
                n = anew.size // len(counts)
                assert np.abs(counts - share * n).max() <= SIGMAS * math.sqrt(share * (1 - share) * n)


@given(st.integers(1, 40), st.floats(0, 1))
def test_units_drawn_anew_are_whole_and_exactly_as_many(F, share):
    expert = layer_experts(Upcycling(reinit="units", reinit_share=share), moe(1, F, 10, 1), F, layer=0)[0][0]
    dense = {part: m + 1000 for part, m in dense_of(F).items()}
    anew = {part: np.abs(m) < 10 for part, m in matrices(expert, dense).items()}
    for mask_FD in anew.values():
        np.testing.assert_array_equal(mask_FD, np.tile(expert.fresh_F[:, None], 3))
    assert expert.fresh_F.sum() == round(share * F)


def test_everything_random_differs_by_seed_layer_expert_copy_matrix_and_row():
    routed = [e for seed in (0, 1) for layer in (0, 1) for e in
              layer_experts(Upcycling(reinit="units", seed=seed), moe(4, 40), 80, layer)[0]]
    assert len({e.units_F.tobytes() for e in routed}) == len(routed)
    assert len({e.fresh_F.tobytes() for e in routed}) == len(routed)
    streams = {draws(seed, what, row).bit_generator.random_raw(4).tobytes()
               for seed in (0, 1) for what in ("a", "b") for row in (0, 1, 2)}
    assert len(streams) == 12


def test_neighbouring_units_of_the_dense_network_do_not_stay_together():
    units_EF = np.stack([e.units_F for e in layer_experts(Upcycling(), moe(8, 250, 10), 1000, layer=0)[0]])
    neighbours = np.mean(np.abs(np.diff(units_EF.ravel())) == 1)
    assert neighbours < 0.02, "copies are not shuffled"


@given(st.sampled_from(["across", "within"]), st.integers(1, 40), st.integers(1, 12), st.integers(1, 30))
def test_preserved_every_unit_counts_once(cut, width, experts, expert_width):
    """Each expert is weighted 1/n, so the factors of a unit's columns add up to n; the shared expert adds nothing."""
    if cut == "within" and expert_width > width:
        return
    routed, shared = layer_experts(Upcycling(preserve=True, cut=cut), moe(experts, expert_width, 7, 1), width, layer=2)
    sum_U = np.zeros(width)
    for expert in routed:
        assert not expert.share and not expert.fresh_F.any() and expert.down_F is not None
        np.add.at(sum_U, expert.units_F, expert.down_F)
    occurs_U = np.isin(np.arange(width), np.stack([e.units_F for e in routed]))
    np.testing.assert_allclose(sum_U, np.where(occurs_U, experts, 0), rtol=1e-6)    # float32 factors
    if cut == "across" and experts * expert_width >= width:
        assert occurs_U.all()
    assert not matrices(shared, dense_of(width))["down"].any()


@pytest.mark.parametrize("size", [5, 24, 31])
def test_shared_copy_has_every_unit_once_and_units_beyond_add_nothing(size):
    shared = layer_experts(Upcycling(), moe(d_shared=size), 24, layer=0)[1]
    got = matrices(shared, dense_of(24))
    assert len(shared.units_F) == size and not shared.share
    own = min(size, 24)
    assert len(set(shared.units_F[:own])) == own and not shared.fresh_F[:own].any()
    np.testing.assert_array_equal(got["down"][:own, 0], shared.units_F[:own] + 0.75)
    assert shared.fresh_F[own:].all() and not got["down"][own:].any()
    assert (np.abs(got["gate"][own:]) < 1).all() and got["gate"][own:].all()


@pytest.mark.parametrize("cut", ["across", "within"])
def test_shared_cut_goes_on_where_routed_experts_end(cut):
    how, plain = Upcycling(shared="cut", cut=cut, reinit_share=0.25), Upcycling(cut=cut)
    routed, shared = layer_experts(how, moe(5, 10, 24), 37, layer=0)
    for expert, alone in zip(routed, layer_experts(plain, moe(5, 10, 24), 37, layer=0)[0], strict=True):
        np.testing.assert_array_equal(expert.units_F, alone.units_F)
    more = layer_experts(plain, moe(8, 10, 24), 37, layer=0)[0][5:]
    np.testing.assert_array_equal(shared.units_F, np.concatenate([e.units_F for e in more])[:24])
    assert shared.share == 0.25


def test_shared_random_holds_nothing_of_the_dense_network():
    shared = layer_experts(Upcycling(shared="random"), moe(d_shared=300), 24, layer=0)[1]
    for m in matrices(shared, {part: m + 1000 for part, m in dense_of(24).items()}).values():
        assert np.abs(m).max() < 10 * STD and abs(m.std() / STD - 1) < 0.1


def test_random_numbers_are_the_same_everywhere():
    """A change here changes what a seed means: every user's experts."""
    rng = draws(3, "model.layers.0.mlp.experts.1.gate_proj.weight", 5)
    raw, normal = rng.bit_generator.random_raw(8), rng.standard_normal(8, dtype=np.float32)
    assert hashlib.sha256(raw.tobytes() + normal.tobytes()).hexdigest()[:16] == "09445e5592759046"


@pytest.mark.parametrize("options, message", [
    ({"cut": "sideways"}, "cut 'sideways'.*across, within"), ({"reinit": "rows"}, "reinit 'rows'"),
    ({"init": "he"}, "init 'he'"), ({"shared": "none"}, "shared 'none'"),
    ({"reinit_share": 1.5}, "reinit_share.*1.5"), ({"reinit_share": -0.1}, "reinit_share"),
    ({"reinit_share": math.nan}, "reinit_share"), ({"router_std": -1.0}, "router_std.*-1"),
    ({"router_std": math.inf}, "router_std"), ({"shared_gate_std": math.nan}, "shared_gate_std"),
    ({"preserve": True, "reinit_share": 0.5}, "preserve.*reinit_share 0.5"),
    ({"preserve": True, "router_std": 0.1}, "preserve.*router_std 0.1"),
])
def test_options_out_of_range(options, message):
    with pytest.raises(UserError, match=message):
        Upcycling(**options)


def test_the_report_is_the_default_and_preserve_draws_nothing():
    assert Upcycling().share == 0.5 and Upcycling(preserve=True).share == 0 and Upcycling(reinit_share=0.1).share == 0.1
