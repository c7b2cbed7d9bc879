"""A bridge as a folder: config.json and safetensors files, written together or not at all."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import msgspec
from torch import Tensor
from typing_extensions import NotRequired, TypedDict

from ezhoi_diffusion.bridge import BridgeError as BridgeError
from ezhoi_diffusion.files import current, read_json, read_tensors, replaced_files, write_json, write_tensors
from ezhoi_diffusion.schema import Count, FileFacts, Table, json_problem, tensors_problem

SCHEMA_VERSION = 1
CONFIG = "config.json"
CONTEXT = "context.safetensors"
NAME, FILE = r"[A-Za-z0-9_.-]{1,60}", r"[a-z][a-z0-9_]{0,40}\.safetensors"
RESERVED = ("schema_version", "bridge", "files", "provenance")  # entries of config.json; others are the bridge's own
MEMBERS = "members"  # the entry of a chain
NUM_ATTEMPTS = 3  # to read an artefact that another process may be replacing
REMEDY = "copy the artefact again, or train or fit it again"
BridgeName = Annotated[str, msgspec.Meta(pattern=rf"^{NAME}\Z")]


class FitOrigin(TypedDict):
    """The fit that made an artefact."""

    name: str
    options: dict[str, Any]


class Provenance(TypedDict):
    """Where a bridge comes from, as far as this package reads it."""

    fingerprint: NotRequired[dict[str, Any]]
    overridden: NotRequired[dict[str, Any]]
    fit: NotRequired[FitOrigin]


class MemberEntry(TypedDict):
    """One bridge of a chain, perhaps with an artefact in a folder of its own."""

    bridge: BridgeName
    settings: dict[str, Any]
    has_files: bool


class ArtifactConfig(TypedDict):
    """config.json. A bridge whose loader reads entries of its own derives from it."""

    schema_version: Count
    bridge: BridgeName
    files: dict[Annotated[str, msgspec.Meta(pattern=rf"^{FILE}\Z")], FileFacts]
    provenance: Provenance
    members: NotRequired[list[MemberEntry]]  # of a chain: its bridges in order


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
        if not re.fullmatch(NAME, self.bridge):
            raise BridgeError(f"{self.bridge!r} is not a name for a bridge: use letters, digits, '.', '_' and '-'")
        taken = sorted(set(self.config) & set(RESERVED))
        wrong = sorted(name for name in self.files if not re.fullmatch(FILE, name))
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
    def load(
        cls,
        folder: Path,
        bridge: str | None = None,
        files: Mapping[str, Table | None] | None = None,
        schema: Any = ArtifactConfig,
    ) -> Artifact:
        """Read an artefact, with its tensors on the CPU.

        Args:
            folder: Where `save` wrote it.
            bridge: The kind it must be of; None for any.
            files: The tensors of each file that it must have, beside context.safetensors; None for any.
            schema: What config.json holds: a TypedDict that derives from ArtifactConfig.

        Raises:
            BridgeError: It is incomplete, changed, or of another kind.
        """
        for _ in range(NUM_ATTEMPTS - 1):
            try:
                return cls._load(folder, bridge, files, schema)
            except BridgeError:
                time.sleep(0.02)  # a training may be replacing its best bridge just now
        return cls._load(folder, bridge, files, schema)

    @classmethod
    def _load(cls, folder: Path, bridge: str | None, files: Mapping[str, Table | None] | None, schema: Any) -> Artifact:
        content = read_config(folder, bridge, schema)
        content.pop("schema_version")
        kind, written, provenance = content.pop("bridge"), content.pop("files"), content.pop("provenance")
        wrong = sorted({*files} ^ {*written} - {CONTEXT}) if files is not None else []
        if wrong:
            raise BridgeError(
                f"{current(folder, CONFIG)}: 'files' lacks or should not have {', '.join(wrong)}; {REMEDY}"
            )
        tensors = {
            name: read_tensors(current(folder, name), facts, BridgeError, REMEDY) for name, facts in written.items()
        }
        sizes: dict[str, int] = {}
        for name, table in (files or {}).items():
            problem = tensors_problem(tensors[name], table, sizes) if table is not None else None
            if problem:
                raise BridgeError(f"{current(folder, name)}: {problem}; {REMEDY}")
        return cls(kind, content, tensors, provenance)


def read_config(folder: Path, bridge: str | None = None, schema: Any = ArtifactConfig) -> dict[str, Any]:
    """Read and check config.json of an artefact. The tensor files are not opened.

    Args:
        folder: Where `Artifact.save` wrote it.
        bridge: The kind it must be of; None for any.
        schema: What it holds: a TypedDict that derives from ArtifactConfig.

    Raises:
        BridgeError: It does not describe an artefact, or one of another kind than `bridge`.
    """
    path = current(folder, CONFIG)
    content = read_json(path, ArtifactConfig, BridgeError, "give the folder of a finished training or fit")
    version, kind = content["schema_version"], content["bridge"]
    if version != SCHEMA_VERSION or bridge not in (None, kind):
        raise BridgeError(
            f"{path} describes a {kind!r} of schema version {version}, expected {bridge or kind!r} of version "
            f"{SCHEMA_VERSION}: name the bridge that it is, upgrade the package, or train it again"
        )
    problem = json_problem(content, schema)
    if problem:
        raise BridgeError(f"{path} does not describe a {kind}: {problem}; {REMEDY}")
    return content


def member_folders(config: Mapping[str, Any]) -> list[str | None]:
    """The folder of each member's artefact inside that of a chain, None for a member without one; empty for other bridges."""
    return [
        f"{number}-{member['bridge']}" if member["has_files"] else None
        for number, member in enumerate(config.get(MEMBERS, []), 1)
    ]
