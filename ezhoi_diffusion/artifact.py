"""A bridge as a folder: config.json and safetensors files, written together or not at all."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ezhoi_diffusion.bridge import BridgeError as BridgeError
from ezhoi_diffusion.files import current, read_json, read_tensors, replaced_files, write_json, write_tensors

SCHEMA_VERSION = 1
CONFIG = "config.json"
CONTEXT = "context.safetensors"
NAME, FILE = re.compile(r"[\w.-]{1,60}", re.ASCII), re.compile(r"[a-z][a-z0-9_]{0,40}\.safetensors")
RESERVED = (
    "schema_version",
    "bridge",
    "files",
    "provenance",
)  # entries of config.json; all others are the bridge's own
MEMBERS = (
    "members"  # of config.json of a chain: its bridges in order, each perhaps with an artefact in a folder of its own
)
NUM_ATTEMPTS = 3  # to read an artefact that another process may be replacing
REMEDY = "copy the artefact again, or train or fit it again"


@dataclass(frozen=True, eq=False)
class Artifact:
    """The stored form of every bridge. Raises BridgeError for invalid names.

    Attributes:
        bridge: Registered name of the loader.
        config: The bridge's own entries of config.json.
        files: Tensors by file name, NAME.safetensors. context.safetensors is for the context vectors of the run.
        provenance: Where the bridge comes from, as JSON. With a `fingerprint` of the run in it, every other run is checked.
    """

    bridge: str
    config: dict[str, Any] = field(default_factory=dict)
    files: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.bridge):
            raise BridgeError(f"{self.bridge!r} is not a name for a bridge: use letters, digits, '.', '_' and '-'")
        taken = sorted(set(self.config) & set(RESERVED))
        wrong = sorted(name for name in self.files if not FILE.fullmatch(name))
        if taken or wrong:
            raise BridgeError(
                f"a '{self.bridge}' cannot be stored: "
                + (f"{', '.join(taken)} are reserved entries of config.json" if taken else "")
                + (f"{', '.join(wrong)} should be lower-case names that end in .safetensors" if wrong else "")
            )

    @property
    def context(self) -> dict[str, Tensor]:
        """Context vectors of the run, by name; empty where none were stored."""
        return self.files.get(CONTEXT, {})

    def save(self, folder: Path) -> None:
        """Write all files into `folder`, or none. Other entries of the folder stay.

        Raises:
            BridgeError: A tensor is not finite, something cannot be stored, or the disk refuses.
        """
        broken = [
            f"{key} in {name}"
            for name, tensors in self.files.items()
            for key, tensor in tensors.items()
            if tensor.is_floating_point() and not tensor.isfinite().all()
        ]
        if broken:
            raise BridgeError(f"the '{self.bridge}' was not stored: {broken[0]} holds NaN or infinity")
        try:
            with replaced_files(folder) as staged:
                written = {name: write_tensors(staged / name, tensors) for name, tensors in self.files.items()}
                head = {"schema_version": SCHEMA_VERSION, "bridge": self.bridge}
                write_json(staged / CONFIG, {**head, **self.config, "provenance": self.provenance, "files": written})
        except (RuntimeError, TypeError, ValueError) as error:
            raise BridgeError(f"the '{self.bridge}' cannot be stored as JSON and safetensors: {error}") from error
        except OSError as error:
            raise BridgeError(
                f"{folder} could not take the bridge ({error}): free space there, or give another folder. "
                f"What was there is unchanged"
            ) from error

    @classmethod
    def load(cls, folder: Path, bridge: str | None = None) -> Artifact:
        """Read an artefact, with its tensors on the CPU.

        Args:
            folder: Where `save` wrote it.
            bridge: The kind it must be of; None for any.

        Raises:
            BridgeError: It is incomplete, changed, or of another kind.
        """
        for _ in range(NUM_ATTEMPTS - 1):
            try:
                return cls._load(folder, bridge)
            except BridgeError:
                time.sleep(0.02)  # a training may be replacing its best bridge just now
        return cls._load(folder, bridge)

    @classmethod
    def _load(cls, folder: Path, bridge: str | None) -> Artifact:
        content = read_config(folder, bridge)
        content.pop("schema_version")
        kind, files, provenance = content.pop("bridge"), content.pop("files"), content.pop("provenance")
        tensors = {
            name: read_tensors(current(folder, name), facts, BridgeError, REMEDY) for name, facts in files.items()
        }
        return cls(kind, content, tensors, provenance)


def read_config(folder: Path, bridge: str | None = None) -> dict[str, Any]:
    """Read and check config.json of an artefact. The tensor files are not opened.

    Raises:
        BridgeError: It does not describe an artefact, or one of another kind than `bridge`.
    """
    path = current(folder, CONFIG)
    content = read_json(path, BridgeError, "give the folder of a finished training or fit")
    try:
        version, kind, files, provenance = (content[name] for name in RESERVED)
        if not isinstance(kind, str) or not NAME.fullmatch(kind):
            raise ValueError(f"{kind!r:.100} is not a name of a bridge")
        if version != SCHEMA_VERSION or bridge not in (None, kind):
            raise ValueError(
                f"it is a {kind!r} of schema version {version!r}, expected {bridge or kind!r} of version "
                f"{SCHEMA_VERSION}: name the bridge that it is, upgrade the package, or train it again"
            )
        if not isinstance(files, dict) or not all(_is_size_and_hash(facts) for facts in files.values()):
            raise ValueError(f"'files' must give each file's size and SHA-256, not {files!r:.100}")
        if not all(FILE.fullmatch(name) for name in files):
            raise ValueError(
                f"'files' names {', '.join(sorted(files))!r:.200}: expected lower-case names that end in .safetensors"
            )
        if not isinstance(provenance, dict):
            raise ValueError(f"provenance must be an object, not {provenance!r:.100}")
    except (KeyError, ValueError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise BridgeError(
            f"{path} does not describe a {f'{bridge} bridge' if bridge else 'bridge'}: {reason}"
        ) from error
    return content


def member_folders(config: dict[str, Any]) -> list[str | None]:
    """The folder of each member's artefact inside that of a chain, None for a member without one; empty for other bridges.

    Raises:
        BridgeError: config.json does not describe its members.
    """
    folders: list[str | None] = []
    try:
        for number, member in enumerate(config.get(MEMBERS, []), 1):
            name, has_files = member["bridge"], member["has_files"]
            if not isinstance(name, str) or not NAME.fullmatch(name) or not isinstance(member["settings"], dict):
                raise ValueError(f"{name!r:.100} is not a name of a bridge, or its settings are no object")
            folders.append(f"{number}-{name}" if has_files is True else None)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BridgeError(
            f"{CONFIG} does not describe the members of a chain ({type(error).__name__}: {error}); {REMEDY}"
        ) from error
    return folders


def _is_size_and_hash(facts: Any) -> bool:
    return (
        isinstance(facts, dict)
        and type(facts.get("bytes")) is int
        and facts["bytes"] >= 0
        and isinstance(facts.get("sha256"), str)
        and len(facts["sha256"]) == 64
    )
