"""JSON that somebody else wrote: damaged files, and values of the wrong type."""

import math

import pytest

from qwen2_jax.checkpoint.json_fields import Fields, is_number, is_whole, read_object, shown
from qwen2_jax.errors import UserError


@pytest.mark.parametrize(("content", "message"), [
    (b"{", r"is not valid JSON"),
    (b"", r"is not valid JSON"),
    (b"\xff\xfe\xfa", r"is not valid JSON"),
    (b"[1, 2]", r"must hold a JSON object, found \[1, 2\]"),
    (b"null", r"must hold a JSON object, found null"),
    (b"[" * 100_000, r"nested too deeply"),
    (b'{"vocab_size": ' + b"9" * 5000 + b"}", r"is not valid JSON"),
    (b'{"vocab_size": 1, "vocab_size": 2}', r'key "vocab_size" stands there twice'),
])
def test_files_without_a_usable_object(tmp_path, content, message):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_object(path)
    assert str(path) in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*absent.json: No such file"):
        read_object(tmp_path / "absent.json")


def test_a_usable_object(tmp_path):
    (tmp_path / "x.json").write_text('{"é": [1, 2.5, null]}', "utf-8")
    assert read_object(tmp_path / "x.json") == {"é": [1, 2.5, None]}


def test_what_counts_as_a_number():
    assert [is_whole(v) for v in (0, -3, True, 1.0, "1", None, 2**63)] == [True, True, *[False] * 5]
    assert [is_number(v) for v in (0, 1.5, True, "1", math.nan, math.inf, 10**400)] == [True, True, *[False] * 5]


def test_a_null_counts_as_absent():
    fields = Fields({"a": None, "b": 3}, "outer.")
    assert fields.number("a", None) is None
    assert fields.whole("a", 7) == 7
    assert isinstance(fields.number("b"), float)
    assert (fields.has("a"), fields.has("b")) == (False, True)
    with pytest.raises(UserError, match=r"outer.a is missing; needed: true or false"):
        fields.flag("a")
    with pytest.raises(UserError, match=r"outer.b must be a list of strings, found 3"):
        fields.list_of(str, "b")


def test_values_are_shown_on_one_line_of_a_message():
    assert shown("a\nb") == r'"a\nb"'
    assert len(shown(list(range(1000)))) == 80
