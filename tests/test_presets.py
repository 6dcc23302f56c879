"""Presets against the published configurations, where those are at hand."""

import json
from pathlib import Path

import pytest

from qwen2_jax.checkpoint.hf_config import from_hf, generation_config, to_hf
from qwen2_jax.errors import UserError
from qwen2_jax.presets import PRESETS, preset
from qwen2_jax.shapes import count_params, kv_bytes_per_token

PUBLISHED = Path(__file__).resolve().parents[1] / ".." / "shared" / "reference" / "configs.json"
NOT_CONFIG = {"source", "verification", "note", "computed_params"}
# Facts of a file that a model does not depend on, and that an exported file does not repeat.
NOT_WRITTEN = {"transformers_version", "use_mrope"}


@pytest.fixture(scope="module")
def published() -> dict[str, dict]:
    if not PUBLISHED.exists():
        pytest.skip(f"the published configurations are not at {PUBLISHED}")
    return json.loads(PUBLISHED.read_text())


def test_every_published_model_is_a_preset_and_no_other(published):
    assert set(PRESETS) == set(published)
    assert len(PRESETS) == 48


@pytest.mark.parametrize("name", PRESETS)
def test_preset_is_the_published_configuration(published, name):
    entry = {key: value for key, value in published[name].items() if key not in NOT_CONFIG}
    cfg = PRESETS[name]
    assert from_hf(entry) == cfg
    written = to_hf(cfg)
    assert entry.keys() - written.keys() <= NOT_WRITTEN
    assert {key: written[key] for key in entry.keys() & written.keys()} == {
        key: value for key, value in entry.items() if key in written}


@pytest.mark.parametrize("name", PRESETS)
def test_parameter_counts_are_the_published_ones(published, name):
    expected = published[name]["computed_params"]
    count, cfg = count_params(PRESETS[name]), PRESETS[name]
    assert {
        "total": count.total, "non_embedding": count.non_embedding, "activated_total": count.active,
        "activated_non_embedding": count.active_non_embedding,
        "kv_cache_bytes_per_token_bf16": kv_bytes_per_token(cfg), "head_dim": cfg.head_dim,
    } == expected


# From Qwen's reports, for the checkouts that have no file to compare with.
@pytest.mark.smoke
@pytest.mark.parametrize(("name", "total", "active"), [
    ("Qwen2-0.5B", 494_032_768, 494_032_768),
    ("Qwen2-7B", 7_615_616_512, 7_615_616_512),
    ("Qwen2-57B-A14B", 57_408_658_944, 14_249_270_784),
    ("Qwen1.5-MoE-A2.7B", 14_315_784_192, 2_689_173_504),
])
def test_well_known_sizes(name, total, active):
    count = count_params(preset(name))
    assert (count.total, count.active) == (total, active)


@pytest.mark.smoke
@pytest.mark.parametrize("name", PRESETS)
def test_a_written_preset_is_read_back(name):
    assert from_hf(json.loads(json.dumps(to_hf(PRESETS[name])))) == PRESETS[name]


@pytest.mark.parametrize("name", PRESETS)
def test_no_published_model_has_a_window_and_all_stop_on_both_ids(name):
    cfg = PRESETS[name]
    assert not any(cfg.windowed_layers())
    assert generation_config(cfg)["eos_token_id"] == [151645, 151643]
    assert generation_config(cfg)["pad_token_id"] == 151643


def test_one_million_models_take_one_chunk():
    for name in ("Qwen2.5-7B-Instruct-1M", "Qwen2.5-14B-Instruct-1M"):
        assert PRESETS[name].max_position == 1_010_000
        assert PRESETS[name].longest_context == 262_144
    assert PRESETS["Qwen2-7B"].longest_context == 131_072


@pytest.mark.parametrize("name", ["Qwen2-7B", "qwen2-7b", "Qwen/Qwen2-7B", "qwen/QWEN2-7B"])
def test_names_are_found_whatever_their_case(name):
    assert preset(name) is PRESETS["Qwen2-7B"]


@pytest.mark.parametrize(("name", "message"), [
    ("Qwen2-7B-Instuct", r"no model is named 'Qwen2-7B-Instuct'; did you mean Qwen2-7B-Instruct"),
    ("Qwen/Qwen2.5-8B", r"did you mean .*Qwen2.5-7B"),
    ("llama", r"there are Qwen2-0.5B, .*Qwen2.5-14B-Instruct-1M"),
    ("someone/Qwen2-7B", r"no model is named 'someone/Qwen2-7B'"),
])
def test_an_unknown_name_lists_what_resembles_it(name, message):
    with pytest.raises(UserError, match=message):
        preset(name)
