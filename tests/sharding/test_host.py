"""What a host is found to have, read from a made-up file system."""

from __future__ import annotations

import os

import pytest

from qwen2_jax.sharding import host


@pytest.fixture
def root(tmp_path):
    """A v5e worker with two chips and a network card; process 4711 has one of the chips, 4712 has none."""
    for name, vendor, device in (("0000:00:04.0", "0x1ae0", "0x0063"), ("0000:00:05.0", "0x1ae0", "0x0063"),
                                 ("0000:00:06.0", "0x1ae0", "0x0042"), ("0000:00:07.0", "0x8086", "0x0063")):
        folder = tmp_path / "sys/bus/pci/devices" / name
        folder.mkdir(parents=True)
        (folder / "vendor").write_text(vendor + "\n")
        (folder / "device").write_text(device + "\n")
    for pid, target, command in ((4711, "/dev/vfio/0", b"python\0train.py\0"), (4712, "/dev/null", b"sh\0"),
                                 (os.getpid(), "/dev/vfio/1", b"pytest\0")):
        folder = tmp_path / f"proc/{pid}"
        (folder / "fd").mkdir(parents=True)
        (folder / "fd/3").symlink_to(target)
        (folder / "cmdline").write_bytes(command)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 2048 kB\nMemFree: 1 kB\nMemAvailable: 1024 kB\n")
    (tmp_path / "tmp").mkdir()
    (tmp_path / "tmp/libtpu_lockfile").touch()
    return tmp_path


def test_a_tpu_host(root):
    found = host.host_facts({"XLA_FLAGS": "--a", "PATH": "/bin", "TPU_API_TOKEN": "x", "JAX_PLATFORMS": "tpu"},
                            root=root)
    assert (found["tpu_chips"], found["tpu_kind"]) == (2, "v5e")
    assert found["tpu_holders"] == [{"pid": 4711, "command": "python train.py", "files": ["/dev/vfio/0"]}]
    assert found["tpu_lockfile"] and not found["gpu"]
    assert found["settings"] == {"JAX_PLATFORMS": "tpu", "XLA_FLAGS": "--a"}    # no secrets, nothing that is not ours
    assert found["ram_bytes"] == {"total": 2048 * 1024, "available": 1024 * 1024}
    assert found["cache"] == {"folder": None, "entries": 0, "bytes": 0, "writable": False}


def test_a_host_without_anything(tmp_path):
    found = host.host_facts({}, root=tmp_path)
    assert (found["tpu_chips"], found["tpu_kind"], found["tpu_holders"], found["ram_bytes"]) == (0, None, [], None)
    assert not found["tpu_lockfile"] and not found["gpu"] and not found["settings"]


def test_device_files_of_the_older_chips(tmp_path):
    (tmp_path / "dev").mkdir()
    for n in range(4):
        (tmp_path / f"dev/accel{n}").touch()
    (tmp_path / "dev/nvidia0").touch()
    found = host.host_facts({}, root=tmp_path)
    assert (found["tpu_chips"], found["tpu_kind"], found["gpu"]) == (4, None, True)


def test_the_cache(tmp_path):
    folder = tmp_path / "cache"
    assert host.cache({"JAX_COMPILATION_CACHE_DIR": str(folder)})["writable"]
    folder.mkdir()
    for name, size in (("a-cache", 10), ("b-cache", 20), ("a-atime", 8)):
        (folder / name).write_bytes(bytes(size))
    assert host.cache({"JAX_COMPILATION_CACHE_DIR": str(folder)}) == {
        "folder": str(folder), "entries": 2, "bytes": 30, "writable": True}
    assert host.cache({"JAX_COMPILATION_CACHE_DIR": "/dev/null/x"})["writable"] is False


def test_versions_and_what_jax_wants():
    import jax

    from qwen2_jax import __version__

    found = host.versions()
    assert (found["jax"], found["qwen2_jax"]) == (jax.__version__, __version__)
    assert host.libtpu_wanted().startswith("==0.0.")
