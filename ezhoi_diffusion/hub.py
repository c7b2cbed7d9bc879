"""Bridges on the Hugging Face Hub: upload an artifact with its model card, and fetch it again.

Only what config.json names is sent or fetched, whatever else a folder or a repository holds: JSON and safetensors. The
bridge's own reader checks what came, as it does for any folder.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from errno import ENOSPC
from os import PathLike
from pathlib import Path

from ezhoi_diffusion.artifact import CONFIG, member_folders, read_config
from ezhoi_diffusion.errors import EzhoiDiffusionError
from ezhoi_diffusion.files import current, json_bytes, read_bytes, read_tensors

CARD = "README.md"
PREFIX = "hf:"
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
NOT_WHOLE = "give the folder of a finished bridge"
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"
MAX_MESSAGE = 300  # characters of a message of the Hub's client


class SharingError(EzhoiDiffusionError):
    """A bridge cannot be pushed to the Hub or fetched from it: not whole, no network, no permission, no repository."""


def push(folder: Path, repo_id: str, *, card: str, private: bool = False) -> str:
    """Upload the artifact in `folder` with a model card, in one commit.

    Args:
        folder: Of a finished bridge.
        repo_id: USER/NAME; created if it does not exist.
        card: Markdown of the model card.
        private: Create a private repository, and refuse a public one.

    Returns:
        The URL of the commit.

    Raises:
        SharingError: The Hub refuses, or `repo_id` is public and `private` is set. Nothing was sent then.
        BridgeError: The artifact is not whole.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    files = build_upload(folder, repo_id, card=card)
    with _hub(f"{repo_id} did not take the bridge"):
        api = HfApi()
        if private:
            api.create_repo(repo_id, exist_ok=True, private=True)
            if not api.model_info(repo_id).private:
                raise SharingError(
                    f"{repo_id} exists and is public, so nothing was uploaded: make it private on the Hub, or give another name"
                )
        else:
            api.create_repo(repo_id, exist_ok=True)  # its owner's default: an organisation's may be private
        operations = [CommitOperationAdd(name, content) for name, content in files.items()]
        return str(api.create_commit(repo_id, operations, commit_message="A bridge of ezhoi-diffusion").commit_url)


def build_upload(folder: Path, repo_id: str, *, card: str) -> dict[str, bytes]:
    """The files that `push` uploads, by name. All of them were read and checked.

    Raises:
        SharingError: `repo_id` is not USER/NAME.
        BridgeError: The artifact is not whole.
    """
    _require_name(repo_id)
    return {**_files_of(folder), CARD: card.encode()}


def _files_of(folder: Path) -> dict[str, bytes]:
    """The files of an artifact by name, with those of the members of a chain."""
    config = read_config(folder)
    files = {CONFIG: json_bytes(config)}
    for name, facts in config["files"].items():
        path = current(folder, name)
        read_tensors(path, facts, SharingError, NOT_WHOLE)  # refused here as its reader would refuse it
        files[name] = read_bytes(path, facts, SharingError, NOT_WHOLE)
    for member in filter(None, member_folders(config)):
        files |= {f"{member}/{name}": content for name, content in _files_of(folder / member).items()}
    return files


def fetch(repo_id: str, revision: str | None = None) -> Path:
    """Download config.json, the safetensors that it names, and those of the members of a chain, and nothing else.

    Args:
        repo_id: USER/NAME.
        revision: A branch, tag or commit. All files are of the commit that it is now.

    Returns:
        The folder in the Hub's cache. Without a network, what was fetched before.

    Raises:
        SharingError: The Hub does not give it.
    """
    from huggingface_hub import hf_hub_download

    _require_name(repo_id)
    with _hub(f"{repo_id}{f' at {revision}' if revision else ''} cannot be fetched"):
        folder = Path(hf_hub_download(repo_id, CONFIG, revision=revision)).parent
        config = read_config(folder)
        for name in config["files"]:
            hf_hub_download(repo_id, name, revision=folder.name)
        for member in filter(None, member_folders(config)):
            hf_hub_download(repo_id, f"{member}/{CONFIG}", revision=folder.name)
            for name in read_config(folder / member)["files"]:
                hf_hub_download(repo_id, f"{member}/{name}", revision=folder.name)
    return folder


def resolve_path(where: str | PathLike[str], revision: str | None = None, *, bare: bool = False) -> Path:
    """The folder `where`, or the fetched folder of the Hub's hf:USER/NAME[@REVISION].

    Args:
        where: A folder or a name on the Hub.
        revision: A branch, tag or commit on the Hub.
        bare: A string USER/NAME[@REVISION] is a name on the Hub too, unless that folder exists.

    Raises:
        SharingError: The Hub does not give it, or `revision` is given for a local folder.
    """
    name, _, tag = os.fspath(where).removeprefix(PREFIX).partition("@")
    on_hub = os.fspath(where).startswith(PREFIX)
    if on_hub or (bare and isinstance(where, str) and REPOSITORY.fullmatch(name) and not Path(where).exists()):
        return fetch(name, revision or tag or None)
    if revision is not None:
        raise SharingError(
            f"revision {revision!r} is for a bridge on the Hub, and {where} is a local folder: drop it, or give hf:USER/NAME"
        )
    return Path(where)


def _require_name(repo_id: str) -> None:
    if not REPOSITORY.fullmatch(repo_id):
        raise SharingError(f"{repo_id!r} is not the name of a repository on the Hub: give USER/NAME")


@contextmanager
def _hub(what: str) -> Iterator[None]:
    """Turn whatever the Hub's client raises into a SharingError. Its HTTP library differs between its versions."""
    from huggingface_hub import errors

    try:
        yield
    except EzhoiDiffusionError:
        raise
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        message = " ".join(f"{type(error).__name__}: {error}".split())[:MAX_MESSAGE]
        if isinstance(error, errors.RevisionNotFoundError):
            why = "the repository has no such revision: give a branch, a tag or a commit of it"
        elif isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
            why = f"the repository lacks {CONFIG} or a file that it names: it holds no whole bridge of ezhoi-diffusion"
        elif isinstance(error, errors.RepositoryNotFoundError) or status == 404:
            why = f"the Hub shows no such repository: check the name; for a private or gated one {LOG_IN}"
        elif status in (401, 403):
            why = f"the Hub refused the token, or there is none: {LOG_IN} to one with this permission ({message})"
        elif isinstance(error, OSError) and (error.filename is not None or error.errno == ENOSPC):
            why = f"the disk refused ({error}): free space there, or set HF_HOME to another folder"
        elif isinstance(error, errors.HFValidationError) or isinstance(error.__cause__, errors.HfHubHTTPError):
            why = f"the Hub does not accept that: correct what it names ({message})"
        else:
            why = f"check network, HF_ENDPOINT and HF_HUB_OFFLINE, and try again ({message})"
        raise SharingError(f"{what}: {why}") from error
