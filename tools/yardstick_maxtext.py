"""MaxText's training step for a TPU slice, compiled without a TPU; run by MaxText's own Python.

    python tools/yardstick_maxtext.py OUT TOPOLOGY DEVICES name=value …

Writes OUT.hlo, the program, and OUT.json: {"mesh": {axis: size}, "places": [[x, y, z, core], …] of its devices in
order, "argument_bytes", "temp_bytes", "peak_bytes"}; or {"error": message} where it does not compile. It follows
maxtext.trainers.pre_train.train_compile of MaxText 0.2.4, which prints these but writes no program.
"""

# What is imported here is of MaxText's environment.
# pyright: reportMissingImports=false, reportPrivateImportUsage=false

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_MIN_LOG_LEVEL": "3",
               "JAX_PLATFORMS": "cpu", "DECOUPLE_GCLOUD": "TRUE"}
NO_RUN = ("compile_topology_num_slices=1", "run_name=yardstick", "base_output_directory=unused",
          "enable_checkpointing=false", "dataset_type=synthetic", "skip_jax_distributed_system=true",
          "internal_compile=true")


def compiled(topology: str, devices: str, settings: list[str]):
    """(the compiled step, its mesh)."""
    import jax
    from flax.linen import partitioning
    from maxtext.configs import pyconfig
    from maxtext.trainers.pre_train import train, train_compile
    from maxtext.utils import maxtext_utils, sharding

    jax.config.update("jax_default_prng_impl", "unsafe_rbg")
    base = Path(train_compile.__file__).parents[2] / "configs" / "base.yml"
    config = pyconfig.initialize(["train_compile", str(base), f"compile_topology={topology}",
                                  f"internal_compile_num_devices={devices}", *NO_RUN, *settings])
    mesh = train_compile.get_topology_mesh(config)
    args, kwargs, shardings, _, model = train_compile.get_shaped_inputs(mesh, config)
    params_shardings, shardings = sharding.maybe_update_params_sharding_with_opt(config, shardings)
    shardings = sharding.build_zero1_input_state_mesh_shardings(config, shardings, params_shardings)
    step = maxtext_utils.get_functional_train_with_signature(
        train.train_step, sharding.get_input_data_sharding(config, mesh), shardings, model, config, params_shardings)
    function, *how = step
    return train_compile.jit_and_compile(function, args, kwargs, mesh, *how, config,
                                         partitioning.axis_rules(config.logical_axis_rules)), mesh


def main() -> None:
    out, topology, devices, *settings = sys.argv[1:]
    try:
        step, mesh = compiled(topology, devices, settings)
        memory = step.memory_analysis()
        found = {"mesh": dict(mesh.shape), "places": [[*d.coords, d.core_on_chip] for d in mesh.devices.flat],
                 "argument_bytes": memory.argument_size_in_bytes, "temp_bytes": memory.temp_size_in_bytes,
                 "peak_bytes": memory.peak_memory_in_bytes}
        Path(out + ".hlo").write_text(step.as_text(), encoding="utf-8")
    except Exception as error:      # of any type: what it says is the result
        found = {"error": str(error)}
    Path(out + ".json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
