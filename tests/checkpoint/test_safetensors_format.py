import json
import os
import struct

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import deserialize
from safetensors.numpy import save_file

from qwen2_jax.checkpoint import safetensors_format
from qwen2_jax.checkpoint.safetensors_format import DTYPES, plan_header, read_header
from qwen2_jax.errors import UserError


def write(path, header, data=b""):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from([1, 6, 4096]), st.data())
def test_any_columns_of_any_rows(tmp_path_factory, rows, width, page, data):
    """The same numbers, whether read row by row or cut from whole rows; and in the first case, no others."""
    array = np.arange(rows * width, dtype=np.float16).reshape(rows, width)
    file = tmp_path_factory.mktemp("columns") / "model.safetensors"
    save_file({"w": array}, file)
    start, first = data.draw(st.integers(0, rows)), data.draw(st.integers(0, width))
    stop, last = data.draw(st.integers(start, rows)), data.draw(st.integers(first, width))
    read, seen = os.preadv, []

    def noted(fd, buffers, offset):
        seen.append(sum(map(len, buffers)))
        return read(fd, buffers, offset)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(safetensors_format, "SMALLEST_READ", page)
        patch.setattr(os, "preadv", noted)
        found = read_header(file)["w"].rows(start, stop, slice(first, last))
    assert found.tobytes() == array[start:stop, first:last].tobytes() and found.shape == (stop - start, last - first)
    whole = 2 * (last - first) < page and last - first < width
    assert sum(seen) == 2 * (stop - start) * (width if whole else last - first)


@given(st.lists(st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 4), max_size=3)), max_size=5))
def test_planned_header_is_read_by_the_library_and_by_us(tmp_path_factory, specs):
    rng = np.random.default_rng(0)
    arrays = {f"t{n}": rng.normal(size=shape).astype(DTYPES[code]) for n, (code, shape) in enumerate(specs)}
    lead, offsets = plan_header({name: (array.dtype, array.shape) for name, array in arrays.items()})
    raw = lead + b"".join(array.tobytes() for array in arrays.values())
    assert len(lead) % 8 == 0
    theirs = dict(deserialize(raw))
    assert theirs.keys() == arrays.keys()
    for name, entry in theirs.items():
        assert bytes(entry["data"]) == arrays[name].tobytes() and tuple(entry["shape"]) == arrays[name].shape
    file = tmp_path_factory.mktemp("st") / "x.safetensors"
    file.write_bytes(raw)
    header = read_header(file)
    assert header.keys() == arrays.keys()
    for name, stored in header.items():
        assert (stored.shape, stored.dtype, stored.begin) == (arrays[name].shape, arrays[name].dtype, offsets[name])


def test_rows_of_a_file_that_the_library_wrote(tmp_path):
    array = np.arange(24, dtype=np.float32).reshape(6, 4).astype(ml_dtypes.bfloat16)
    save_file({"a": np.float32([1, 2]), "b": array}, tmp_path / "x.safetensors")
    stored = read_header(tmp_path / "x.safetensors")["b"]
    assert stored.rows(2, 5).tobytes() == array[2:5].tobytes()


SOUND = {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}


@pytest.mark.parametrize(("header", "data", "message"), [
    (SOUND, bytes(20), "needs? .* bytes, the file has"),
    (SOUND, bytes(28), "bytes, the file has"),
    (b"{not json", b"", "not valid JSON"),
    (b"[" * 10_000, b"", "not valid JSON"),
    (b"\xff\xfe{}", b"", "not valid JSON"),
    (b"[]", b"", "not a JSON object"),
    (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
     bytes(8), "twice"),
    ({"a": {"dtype": "F32", "shape": [2, 3]}}, bytes(24), "entry of a"),
    ({"a": {"dtype": "F32", "shape": [-2, 3], "data_offsets": [0, 24]}}, bytes(24), "entry of a"),
    ({"a": {"dtype": "F32", "shape": [2.0, 3], "data_offsets": [0, 24]}}, bytes(24), "entry of a"),
    ({"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [24, 0]}}, bytes(24), "entry of a"),
    ({"a": {"dtype": 7, "shape": [2, 3], "data_offsets": [0, 24]}}, bytes(24), "entry of a"),
    ({"a": "F32"}, bytes(24), "entry of a"),
    ({"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 20]}}, bytes(20), "has 20 bytes where F32"),
    (SOUND | {"b": {"dtype": "F32", "shape": [1], "data_offsets": [20, 24]}}, bytes(24), "b starts at byte 20"),
    (SOUND | {"b": {"dtype": "F32", "shape": [1], "data_offsets": [28, 32]}}, bytes(32), "b starts at byte 28"),
    ({"a\nb": SOUND["a"]}, bytes(24), "unprintable"),
    ({"a" * 1000: SOUND["a"]}, bytes(24), "unprintable characters, or more than 500"),
    # Numbers that Python would not even print.
    ({"a": {"dtype": "F32", "shape": [10**4000, 10**4000], "data_offsets": [0, 24]}}, bytes(24), "entry of a.*range"),
    ({"a": {"dtype": "F32", "shape": [2**40] * 1000, "data_offsets": [0, 24]}}, bytes(24), "entry of a.*range"),
    ({"a": {"dtype": "?", "shape": [1], "data_offsets": [0, 10**4300 - 1]}}, bytes(24), "entry of a.*range"),
    ({"a": {"dtype": "F" * 1000, "shape": [1], "data_offsets": [0, 24]}}, bytes(24), "entry of a.*range"),
])
def test_damage_is_named(header, data, message, tmp_path):
    file = write(tmp_path / "x.safetensors", header, data)
    with pytest.raises(UserError, match=message) as error:
        read_header(file)
    assert str(file) in str(error.value) and "\n" not in str(error.value)


def test_a_pipe_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"x\.safetensors: it is no regular file"):
        read_header(tmp_path / "x.safetensors")


@pytest.mark.parametrize("raw", [b"", b"\x05\0\0", struct.pack("<Q", 2**60), struct.pack("<Q", 9) + b"{}"])
def test_a_header_beyond_the_file_is_named(raw, tmp_path):
    file = tmp_path / "x.safetensors"
    file.write_bytes(raw)
    with pytest.raises(UserError, match=r"header claims .* bytes, the file has"):
        read_header(file)


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    file = write(tmp_path / "x.safetensors", SOUND, bytes(24))
    stored = read_header(file)["a"]
    file.write_bytes(file.read_bytes()[:-1])
    assert (stored.rows(0, 1) == 0).all()
    with pytest.raises(UserError, match="cut short"):
        stored.rows(1, 2)
    file.unlink()
    with pytest.raises(UserError, match="No such file"):
        stored.rows(0, 1)
