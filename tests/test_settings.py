"""Settings: what is listed can be set, what is set is read back, what is mistyped is named."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2_jax.errors import UserError
from qwen2_jax.settings import differences, from_plain, plain, settings, with_settings


@dataclass(frozen=True, kw_only=True)
class Adam:
    peak: float
    """Learning rate after
    the warm-up."""
    clip: float | None = 1.0


@dataclass(frozen=True, kw_only=True)
class Muon:
    momentum: float = 0.95
    """Share kept."""
    nesterov: bool = True
    clip: float | None = 1.0


@dataclass(frozen=True, kw_only=True)
class Lion:
    beta: float


@dataclass(frozen=True, kw_only=True)
class Source:
    path: str
    kind: str = "a field's own name"
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Run:
    steps: int = 10
    mesh: str = ""
    remat: Literal["full", "none"] = "full"
    optimizer: Adam | Muon | Lion = Adam(peak=1e-3)
    sources: tuple[Source, ...] = (Source(path="a"), Source(path="b"))
    prompts: tuple[str, ...] = ()

    def __post_init__(self):
        if self.steps < 1:
            raise UserError(f"steps must be at least 1, found {self.steps}")


RUN = Run()


@dataclass(frozen=True, kw_only=True)
class NestedMuon(Muon):
    steps: int = 5
    """Iterations."""


def test_what_a_class_extends_is_listed_first():
    listed = {setting.name: setting for setting in settings(NestedMuon())}
    assert list(listed) == ["momentum", "nesterov", "clip", "steps"]
    assert [listed[name].help for name in ("momentum", "steps")] == ["Share kept.", "Iterations."]


def test_everything_is_listed_with_its_meaning():
    listed = {setting.name: setting for setting in settings(RUN)}
    assert list(listed) == ["steps", "mesh", "remat", "optimizer.peak", "optimizer.clip", "sources.0.path",
                            "sources.0.kind", "sources.0.weight", "sources.1.path", "sources.1.kind",
                            "sources.1.weight", "prompts"]
    assert listed["optimizer.peak"].help == "Learning rate after the warm-up."
    assert listed["optimizer.clip"].type == "float or none"
    assert listed["remat"].type == "full | none"


@pytest.mark.parametrize(("text", "name", "value"), [
    ("steps=200", "steps", 200), ("steps=1e3", "steps", 1000), ("steps=1_000", "steps", 1000),
    ("mesh=fsdp=2,tensor=2", "mesh", "fsdp=2,tensor=2"), ("mesh=", "mesh", ""), ("remat=none", "remat", "none"),
    ("optimizer.peak=2e-4", "optimizer.peak", 2e-4), ("optimizer.clip=none", "optimizer.clip", None),
    ("sources.1.weight=3", "sources.1.weight", 3.0), ("prompts=a, b", "prompts", ("a", "b")),
    ('prompts=["a, b"]', "prompts", ("a, b",))])
def test_one_setting(text, name, value):
    found = {setting.name: setting.value for setting in settings(with_settings(RUN, [text]))}
    assert found.pop(name) == value
    assert all(found[s.name] == s.value for s in settings(RUN) if s.name != name)


def test_another_kind_and_its_settings_together():
    found = with_settings(RUN, ["optimizer=Muon", "optimizer.nesterov=false", "steps=3"])
    assert found == dataclasses.replace(RUN, optimizer=Muon(nesterov=False), steps=3)


def test_another_kind_takes_over_what_it_shares():
    clipped = with_settings(RUN, ["optimizer.clip=0.5"])
    assert with_settings(clipped, ["optimizer=Muon"]).optimizer == Muon(clip=0.5)
    assert with_settings(clipped, ["optimizer=Adam"]) == clipped


@pytest.mark.parametrize(("text", "message"), [
    ("stesp=3", "there is no setting 'stesp'; did you mean steps"),
    ("peak=3", "there is no setting 'peak'; did you mean optimizer.peak"),
    ("optimizer.paek=3", "there is no setting 'optimizer.paek'; did you mean optimizer.peak"),
    ("sources.2.path=x", "there is no setting 'sources.2.path'; did you mean sources.1.path"),
    ("steps.x=3", "there is no setting 'steps.x'"),
    ("sources=x", "sources must be Source, …, found 'x'"),
    ("steps=3.5", "steps must be int, found '3.5'"),
    ("steps=-1", "steps must be at least 1, found -1"),
    ("optimizer.peak=fast", "optimizer.peak must be float, found 'fast'"),
    ("remat=some", "remat must be full | none, found 'some'"),
    ("optimizer=Lion", "optimizer=Lion needs values that have no default"),
    ("optimizer=SGD", "optimizer must be Adam or Muon or Lion, found 'SGD'"),
    ('prompts=["a', "prompts begins with [ and is no list in JSON"), ("prompts=[1]", "prompts.0 must be text, found 1"),
    ("steps", "a setting is written name=value, found 'steps'")])
def test_what_is_wrong_is_named(text, message):
    with pytest.raises(UserError) as error:
        with_settings(RUN, [text])
    assert str(error.value).startswith(message)


def test_a_name_twice_is_refused():
    with pytest.raises(UserError, match="steps is set twice"):
        with_settings(RUN, ["steps=3", "steps=4"])


@given(st.builds(Run, steps=st.integers(1, 10**9), mesh=st.text(), remat=st.sampled_from(["full", "none"]),
                 optimizer=st.builds(Adam, peak=st.floats(allow_nan=False),
                                     clip=st.none() | st.floats(allow_nan=False)) | st.builds(Muon),
                 sources=st.lists(st.builds(Source, path=st.text())).map(tuple),
                 prompts=st.lists(st.text()).map(tuple)))
def test_json_and_back(run):
    assert from_plain(json.loads(json.dumps(plain(run))), Run) == run


@pytest.mark.parametrize(("change", "message"), [
    ({"steps": "3"}, 'steps must be int, found "3"'), ({"stesp": 3}, "there is no setting 'stesp'"),
    ({"steps": True}, "steps must be int, found true"), ({"mesh": [1]}, "mesh must be text, found a list"),
    ({"optimizer": {"class": "SGD"}}, "optimizer must be one of Adam, Muon, Lion")])
def test_a_plain_form_that_does_not_fit(change, message):
    with pytest.raises(UserError, match=message):
        from_plain(plain(RUN) | change, Run)


def test_differences_go_field_by_field():
    other = with_settings(RUN, ["optimizer.peak=2", "sources.1.path=c"])
    assert differences(plain(RUN), plain(other)) == {"optimizer.peak": (1e-3, 2.0), "sources.1.path": ("b", "c")}
    kinds = differences(plain(RUN), plain(with_settings(RUN, ["optimizer=Muon"])))
    assert kinds["optimizer.class"] == ("Adam", "Muon") and kinds["optimizer.momentum"] == (None, 0.95)
    assert differences(plain(RUN), plain(Run())) == {}
