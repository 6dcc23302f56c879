"""`qwen2-jax upcycle`: what it makes, what it says, what it refuses."""

import argparse
import json
from typing import get_args

import pytest

from qwen2_jax.checkpoint import fine_grained
from qwen2_jax.checkpoint.fine_grained import Upcycling
from qwen2_jax.cli import upcycle
from qwen2_jax.presets import PRESETS

SIZES = ("--experts", 8, "--top-k", 2, "--expert-width", 12, "--shared-width", 40)


@pytest.fixture(scope="module")
def parser():
    top = argparse.ArgumentParser()
    upcycle.add_parser(commands := top.add_subparsers())
    return commands.choices["upcycle"]


def experts(parser, *argv):
    args = parser.parse_args(["SRC", "DST", "--to", "orbax", *map(str, argv)])
    return upcycle._experts(args, upcycle._preset(args.like) if args.like else None)


@pytest.mark.smoke
def test_flags_are_the_options_of_upcycling(parser):
    """Names, choices and defaults; the help must be quick, so it cannot ask the room."""
    flags = {action.dest: action for action in parser._actions}
    plain = Upcycling()
    assert set(upcycle.CHOICES) == set(vars(plain))
    for name in upcycle.CHOICES:
        assert flags[name].default == getattr(plain, name), name
    for name, kind in (("cut", fine_grained.Cut), ("reinit", fine_grained.Reinit), ("init", fine_grained.Init),
                       ("shared", fine_grained.Shared)):
        assert tuple(flags[name].choices) == get_args(kind)


@pytest.mark.smoke
def test_like_is_the_published_model_and_a_size_beside_it_wins(parser):
    moe = PRESETS["Qwen2-57B-A14B"].moe
    assert experts(parser, "--like", "qwen/qwen2-57b-a14b") == moe
    found = experts(parser, "--like", "Qwen2-57B-A14B", "--experts", 72, "--norm-topk-prob")
    assert (found.experts, found.top_k, found.d_expert, found.norm_topk_prob) == (72, 8, 2560, True)
    assert experts(parser, "--like", "Qwen2-57B-A14B", "--preserve").top_k == 64


@pytest.mark.smoke
def test_sizes_by_themselves(parser):
    found = experts(parser, *SIZES)
    assert (found.experts, found.top_k, found.d_expert, found.d_shared, found.norm_topk_prob) == (8, 2, 12, 40, False)
    everyone = experts(parser, "--experts", 8, "--expert-width", 12, "--shared-width", 40, "--preserve")
    assert everyone.top_k == 8


@pytest.mark.smoke
@pytest.mark.parametrize("argv, message", [
    ((), "--experts, --top-k, --expert-width, --shared-width are missing: give all sizes of the experts, or --like a "
         "published model"),
    (("--preserve",), "--experts, --expert-width, --shared-width are missing"),
    ((*SIZES[:-2],), "--shared-width is missing"),
    ((*SIZES, "--experts", 0), "--experts must be at least 1, found 0"),
    ((*SIZES, "--expert-width", -3), "--expert-width must be at least 1, found -3"),
    ((*SIZES, "--shared-width", 0), "--shared-width must be at least 1, found 0"),
    ((*SIZES, "--top-k", 9), "--top-k 9 is more than the 8 experts"),
    ((*SIZES, "--preserve"), "--preserve sends every token to all 8 experts, found --top-k 2: leave it out"),
    ((*SIZES, "--like", "Qwen2-7B"), "--like Qwen2-7B is no published mixture of experts; these are Qwen2-57B-A14B"),
    ((*SIZES, "--like", "Qwen2-57B"), "Qwen2-57B is no published mixture"),
    ((*SIZES, "--reinit-share", 2), "reinit_share must lie between 0 and 1, found 2"),
    ((*SIZES[:2], *SIZES[4:], "--preserve", "--reinit-share", 0.5), "preserve keeps the dense model's output"),
    ((*SIZES, "--seed", "one"), "argument --seed: invalid int value: 'one'"),
    ((*SIZES, "--cut", "both"), "--cut 'both' does not exist"),
    (SIZES, "does not exist"),       # SRC
])
def test_refusals_in_one_line(argv, message, call, tmp_path):
    done = call("upcycle", tmp_path / "none", tmp_path / "dst", "--to", "orbax", *argv)
    assert done.returncode == 2 and done.stdout == ""
    assert message in done.stderr and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_dense_checkpoint_becomes_sparse(call, model_folder, tmp_path):
    width = json.loads((model_folder / "config.json").read_text())["intermediate_size"]
    done = call("upcycle", model_folder, tmp_path / "moe", "--to", "safetensors", *SIZES, "--seed", 5)
    assert done.returncode == 0, done.stderr
    assert "upcycle: 100%" in done.stderr and done.stderr.endswith(f"wrote {tmp_path / 'moe'}\n")
    assert done.stdout.startswith("experts     8 of width 12 a layer, 2 for each token; and a shared one of width 40\n"
                                  f"cut out of  copies of {width} units: {-(-8 * 12 // width)}; times that a unit")
    config = json.loads((tmp_path / "moe/config.json").read_text())
    assert config["model_type"] == "qwen2_moe" and config["architectures"] == ["Qwen2MoeForCausalLM"]
    wanted = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 12,
              "shared_expert_intermediate_size": 40, "norm_topk_prob": False, "decoder_sparse_step": 1,
              "mlp_only_layers": [], "intermediate_size": width}
    assert wanted.items() <= config.items()
    again = call("upcycle", model_folder, tmp_path / "moe", "--to", "orbax", *SIZES)
    assert again.returncode == 2 and "already exists" in again.stderr


def test_preserved_all_experts_are_chosen(call, model_folder, tmp_path, caplog):
    sizes = ("--experts", 16, "--expert-width", 20, "--shared-width", 20)
    done = call("upcycle", model_folder, tmp_path / "moe", "--to", "orbax", *sizes, "--preserve", "--dtype", "bfloat16")
    assert done.returncode == 0, done.stderr
    assert "16 of width 20 a layer, 16 for each token" in done.stdout and "--dtype float32" in caplog.text
    config = json.loads((tmp_path / "moe/config.json").read_text())
    assert config["num_experts_per_tok"] == 16 and config["torch_dtype"] == "bfloat16"


def test_a_mixture_is_no_source(call, model_folder, tmp_path):
    assert call("upcycle", model_folder, tmp_path / "moe", "--to", "safetensors", *SIZES).returncode == 0
    done = call("upcycle", tmp_path / "moe", tmp_path / "dst", "--to", "orbax", *SIZES)
    assert done.returncode == 2 and "is a mixture of 8 experts already" in done.stderr
    lost = call("upcycle", model_folder, tmp_path / "dst", "--to", "orbax", "--experts", 2, "--expert-width", 3,
                "--shared-width", 3, "--preserve")
    assert lost.returncode == 2 and "leave out" in lost.stderr and lost.stderr.count("\n") == 1
    assert not (tmp_path / "dst").exists()
