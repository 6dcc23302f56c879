"""What this host has, found without starting JAX: chips, who holds them, versions, settings, room. Standard library
only, plain data that becomes JSON."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "tensorstore", "numpy")
SETTINGS = ("JAX_", "XLA_", "LIBTPU_", "TPU_", "MEGASCALE_", "PJRT_", "QWEN2_JAX_", "NCCL_", "CUDA_VISIBLE_DEVICES",
            "ALLOW_MULTIPLE_LIBTPU_LOAD", "LD_PRELOAD", "HF_HOME", "HF_HUB_OFFLINE", "TF_CPP_MIN_LOG_LEVEL")
"""Beginnings of the environment variables that change what a run does."""
SECRET = ("TOKEN", "SECRET", "PASSWORD", "CREDENTIAL", "_KEY")
LOCKFILE = "tmp/libtpu_lockfile"
"""libtpu makes it while a process has the chips, and refuses a second process that finds it."""
GOOGLE = "0x1ae0"
TPU_CHIPS = {"0x0027": "v2 or v3", "0x005e": "v4", "0x0062": "v5p", "0x0063": "v5e", "0x006f": "v6e", "0x0076": "tpu7x"}
"""PCI device numbers; the vendor's network cards have others. As in JAX 0.10's `hardware_utils`."""


def host_facts(environment: Mapping[str, str] = os.environ, *, root: Path = Path("/")) -> dict[str, Any]:
    """`root`: where dev/, proc/, sys/ and tmp/ lie. Bytes are whole numbers; what cannot be known is None."""
    chips, kind = tpu_chips(root)
    return {
        "host": platform.node(), "system": platform.platform(), "cpus": os.cpu_count(),
        "versions": versions(), "libtpu_wanted": libtpu_wanted(),
        "tpu_chips": chips, "tpu_kind": kind, "gpu": (root / "dev/nvidia0").exists(),
        "tpu_holders": list(tpu_holders(root)), "tpu_lockfile": (root / LOCKFILE).exists(),
        "settings": {name: value for name, value in sorted(environment.items())
                     if name.startswith(SETTINGS) and not any(word in name for word in SECRET)},
        "ram_bytes": ram(root), "disk": disk(Path.cwd()), "cache": cache(environment),
    }


def versions() -> dict[str, str | None]:
    from qwen2_jax import __version__

    found: dict[str, str | None] = {"python": platform.python_version(), "qwen2_jax": __version__}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def libtpu_wanted() -> str | None:
    """Which libtpu the installed JAX asks for in its extra `tpu`, such as "==0.0.42.*"."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        for line in metadata.requires("jax") or ():
            requirement, _, marker = line.partition(";")
            if requirement.strip().startswith("libtpu") and "tpu" in marker:
                return requirement.strip().removeprefix("libtpu").strip(" ()")
    return None


def tpu_chips(root: Path) -> tuple[int, str | None]:
    """(TPU chips that the system shows, their kind): by PCI numbers, else by the device files of v2 to v4."""
    kinds = []
    for vendor in sorted(root.glob("sys/bus/pci/devices/*/vendor")):
        with contextlib.suppress(OSError):
            if vendor.read_text().strip() == GOOGLE:
                kinds.append(TPU_CHIPS.get((vendor.parent / "device").read_text().strip()))
    known = [kind for kind in kinds if kind]
    return len(known) or len(list(root.glob("dev/accel[0-9]*"))), known[0] if known else None


def tpu_holders(root: Path) -> Iterator[dict[str, Any]]:
    """Other processes that hold a TPU's device file open: pid, command, files. Those of other users stay unseen."""
    for folder in sorted(root.glob("proc/[0-9]*")):
        if int(folder.name) == os.getpid():
            continue
        files = set()
        with contextlib.suppress(OSError):      # ended meanwhile, or another user's
            for link in (folder / "fd").iterdir():
                with contextlib.suppress(OSError):
                    files.add(os.readlink(link))
        held = sorted(f for f in files if f.startswith(("/dev/accel", "/dev/vfio/")))
        if held:
            command = "unknown"
            with contextlib.suppress(OSError):
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            yield {"pid": int(folder.name), "command": command, "files": held}


def ram(root: Path) -> dict[str, int] | None:
    """{"total", "available"} in bytes."""
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    sizes = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
    return {"total": sizes["MemTotal"], "available": sizes["MemAvailable"]}


def disk(folder: Path) -> dict[str, Any]:
    usage = shutil.disk_usage(folder)
    return {"folder": str(folder), "total": usage.total, "free": usage.free}


def cache(environment: Mapping[str, str]) -> dict[str, Any]:
    """JAX's persistent compilation cache, as the command line has set it up by now."""
    folder = environment.get("JAX_COMPILATION_CACHE_DIR")
    if not folder:
        return {"folder": None, "entries": 0, "bytes": 0, "writable": False}
    found = [0, 0]
    if "://" not in folder:
        with contextlib.suppress(OSError):
            for file in Path(folder).glob("*-cache"):
                found = [found[0] + 1, found[1] + file.stat().st_size]
    nearest = next(p for p in (Path(folder).absolute(), *Path(folder).absolute().parents) if p.exists())
    writable = "://" in folder or (nearest.is_dir() and os.access(nearest, os.W_OK))
    return {"folder": folder, "entries": found[0], "bytes": found[1], "writable": writable}
