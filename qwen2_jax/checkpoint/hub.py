"""From what the user names to a local folder: a path, or a repository id of the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from qwen2_jax.errors import UserError

# What a conversion or a run needs of a repository; pickled weights are never fetched.
_WANTED = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model", "*.tiktoken", "merges.txt",
           "vocab.txt"]
_UNWANTED = ["*/*", "*.bin.index.json"]
_REPO_ID = re.compile(r"^[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}$")


def local_path(src: str | Path, *, revision: str | None = None) -> Path:
    """The folder or file that `src` names, downloaded (or found in the hub's cache) when it is a repository id.

    A path that exists always wins. Raises UserError, saying what to do, when there is no such path and no such
    repository, when it is gated or private, or when the hub cannot be reached.
    """
    if src == "":
        raise UserError("the checkpoint's name is empty: a folder, a file or a hub repository is needed")
    path = expand_user(src)
    if path.exists():
        if revision is not None:
            raise UserError(f"--revision {revision} goes with a hub repository, but {src} is a local path: leave it"
                            " out")
        return path
    if not isinstance(src, str) or not _REPO_ID.match(src):
        raise UserError(f"{src} does not exist, and it does not look like a hub repository (owner/name)")
    return _download(src, revision)


def expand_user(path: str | Path) -> Path:
    """`path` with a leading `~` or `~user` spelled out; UserError when that user has no home."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{path}: there is no home folder of that user; write the path out") from None


def _download(repo: str, revision: str | None) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    at = f"{repo} at revision {revision}" if revision else repo
    try:
        return Path(huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=_WANTED,
                                                      ignore_patterns=_UNWANTED))
    except errors.GatedRepoError as e:
        raise UserError(f"{repo} is gated on the hub: accept its terms on its page, then log in with `hf auth login`"
                        " or set HF_TOKEN") from e
    except errors.RevisionNotFoundError as e:
        raise UserError(f"{repo} on the hub has no revision {revision}") from e
    except errors.RepositoryNotFoundError as e:
        raise UserError(f"{repo} is neither a local path nor a hub repository you can see: check the spelling, or"
                        " log in with `hf auth login` or HF_TOKEN if it is private") from e
    except errors.HFValidationError as e:
        raise UserError(f"{repo} is neither a local path nor a valid hub repository id") from e
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as e:
        raise UserError(f"{at} is not in the local hub cache and the hub cannot be reached (no connection, or"
                        " HF_HUB_OFFLINE is set): connect, or give a local folder") from e
    except errors.HfHubHTTPError as e:
        status = e.response.status_code if e.response is not None else "an error"
        if status in (401, 403):
            raise UserError(f"the hub refuses {repo} ({status}): log in with `hf auth login` or set HF_TOKEN to a token"
                            " that may read it") from e
        raise UserError(f"the hub answered {status} for {at}: try again later") from e
    except OSError as e:
        raise UserError(f"cannot download {at}: {e}") from e
