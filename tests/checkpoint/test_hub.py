from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import errors

from qwen2_jax.checkpoint import hub
from qwen2_jax.errors import UserError


def http_error(kind, status):
    return kind("refused", response=SimpleNamespace(status_code=status, headers={}, request=None))


@pytest.mark.parametrize(("error", "message"), [
    (lambda: http_error(errors.GatedRepoError, 403), r"is gated.*accept its terms.*HF_TOKEN"),
    (lambda: http_error(errors.RepositoryNotFoundError, 404), r"neither a local path nor a hub repository you can see"),
    (lambda: http_error(errors.RevisionNotFoundError, 404), r"has no revision v9"),
    (lambda: http_error(errors.HfHubHTTPError, 401), r"refuses some/model \(401\).*HF_TOKEN"),
    (lambda: http_error(errors.HfHubHTTPError, 503), r"answered 503 for some/model at revision v9"),
    (lambda: errors.LocalEntryNotFoundError("offline"), r"not in the local hub cache and the hub cannot be reached"),
    (lambda: errors.OfflineModeIsEnabled("offline"), r"the hub cannot be reached"),
    (lambda: errors.HFValidationError("x"), r"nor a valid hub repository id"),
    (lambda: OSError(28, "No space left on device"), r"cannot download some/model.*No space left"),
])
def test_what_the_hub_answers_becomes_a_sentence(error, message, monkeypatch):
    def fail(*_, **__):
        raise error()

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError, match=message) as caught:
        hub.local_path("some/model", revision="v9")
    assert "\n" not in str(caught.value)


def test_only_what_is_needed_is_fetched(monkeypatch, tmp_path):
    from fnmatch import fnmatch

    asked = {}

    def record(repo, **options):
        asked.update(options, repo=repo)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", record)
    assert hub.local_path("some/model", revision="main") == tmp_path
    assert asked["repo"] == "some/model" and asked["revision"] == "main"

    def fetched(name):
        return (any(fnmatch(name, p) for p in asked["allow_patterns"])
                and not any(fnmatch(name, p) for p in asked["ignore_patterns"]))

    wanted = ("config.json", "generation_config.json", "model.safetensors", "model-00001-of-00002.safetensors",
              "model.safetensors.index.json", "tokenizer.json", "vocab.json", "merges.txt", "chat_template.jinja")
    assert all(fetched(name) for name in wanted)
    assert not any(fetched(name) for name in ("pytorch_model.bin", "onnx/model.safetensors", "README.md", "modeling.py",
                                              "pytorch_model.bin.index.json"))


def test_offline_without_a_cached_copy(run_cli, process_env, tmp_path):
    env = process_env | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    done = run_cli("convert", "nobody/nothing", tmp_path / "dst", "--to", "orbax", env=env)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "nobody/nothing is not in the local hub cache and the hub cannot be reached" in done.stderr


@pytest.mark.parametrize("src", ["/no/such/folder", "./missing", "folder/sub/model", "missing.safetensors", "~/no/such",
                                 "owner/na me"])
def test_a_path_that_does_not_exist(src, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(UserError, match=r"does not exist, and it does not look like a hub repository"):
        hub.local_path(src)


def test_the_home_of_a_user_who_is_not_there():
    with pytest.raises(UserError, match="no home folder of that user"):
        hub.local_path("~no-such-user/model")


def test_an_empty_name_is_not_the_current_folder():
    with pytest.raises(UserError, match="the checkpoint's name is empty"):
        hub.local_path("")


def test_a_local_path_wins_and_takes_no_revision(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner/name").mkdir(parents=True)
    assert hub.local_path("owner/name").is_dir()
    with pytest.raises(UserError, match="--revision v1 goes with a hub repository"):
        hub.local_path("owner/name", revision="v1")
