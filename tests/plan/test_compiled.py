"""What the compiler says when a program does not fit."""

from __future__ import annotations

from typing import Any

import pytest

from qwen2_jax.errors import UserError
from qwen2_jax.plan.compiled import Buffer, compile_for_tpu, out_of_memory

EARLY = ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (24.96G) exceeds "
         "available HBM (15.75G).")
LATE = """RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 18.50G \
of 15.75G hbm. Exceeded hbm capacity by 2.75G.

  Largest program allocations in hbm:

  1. Size: 2.03G
     Operator: op_name="jit(step)/loss/dot_general"
     Shape: f32[4096,152064]{1,0:T(8,128)}
     Unpadded size: 2.03G
     ==========================

  2. Size: 896.0M
     Shape: bf16[28,4096,3584]{2,1,0:T(8,128)(2,1)}
     ==========================
"""


def test_before_anything_is_scheduled():
    found = out_of_memory(EARLY)
    assert found is not None
    assert (found.used_bytes, found.hbm_bytes, found.buffers) == (round(24.96 * 2**30), round(15.75 * 2**30), [])


def test_with_its_largest_buffers():
    found = out_of_memory(LATE)
    assert found is not None
    assert (found.used_bytes, found.hbm_bytes) == (round(18.5 * 2**30), round(15.75 * 2**30))
    assert found.buffers == [Buffer(round(2.03 * 2**30), "f32[4096,152064]", "jit(step)/loss/dot_general"),
                             Buffer(896 * 2**20, "bf16[28,4096,3584]", "")]


@pytest.mark.parametrize(("unit", "size"), [("P", 2**50), ("E", 2**60), ("B", 1), ("", 1)])
def test_sizes_of_every_unit(unit, size):
    found = out_of_memory(LATE.replace("18.50G", f"4.00{unit}"))
    assert found is not None and found.used_bytes == 4 * size


FAST = ("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 20.1M of 16.00M vmem. Exceeded vmem capacity "
        "by 4.1M.")


@pytest.mark.parametrize(("message", "told"), [
    (FAST, r"it needs 20\.1M of the memory space vmem, which has 16\.00M; take another --batch"),
    ("INTERNAL: RET_CHECK failure (deepsea_compiler_base.cc:1879) On platforms with limited ICI routing device "
     "assignment should include all slice devices", "must run on all devices; take a --mesh of all of them"),
])
def test_what_others_could_put_right_is_told_in_a_sentence(message, told):
    class Lowered:
        def compile(self, compiler_options):
            raise RuntimeError(message)

    lowered: Any = Lowered()
    with pytest.raises(UserError, match=told):
        compile_for_tpu(lowered, {})


@pytest.mark.parametrize("message", ["INTERNAL: something else", "RESOURCE_EXHAUSTED: too many open files", FAST])
def test_other_failures_are_not_taken_for_it(message):
    assert out_of_memory(message) is None
