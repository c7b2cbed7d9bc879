"""A bridge as a folder: config.json, and its tensors as safetensors beside it, written together or not at all."""

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
OURS = ("schema_version", "bridge", "files", "provenance")  # entries of config.json beside the bridge's own
ATTEMPTS = 3  # to read an artefact that does not fit together
REMEDY = "restore the artefact from where it came, or make it anew"


@dataclass(frozen=True, eq=False)
class Artifact:
    """What a bridge of any kind is stored as.

    bridge: the registered name of what can load it. config: JSON of the bridge's own. files: "NAME.safetensors" -> its
    tensors; context.safetensors is kept for the host's context vectors. provenance: JSON, where it comes from; with the
    host's `fingerprint` in it, the bridge is held against every host it meets. Raises BridgeError for names that cannot be.
    """

    bridge: str
    config: dict[str, Any] = field(default_factory=dict)
    files: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.bridge):
            raise BridgeError(f"{self.bridge!r} is no name of a bridge: use letters, digits, '.', '_' and '-'")
        taken = sorted(set(self.config) & set(OURS))
        wrong = sorted(name for name in self.files if not FILE.fullmatch(name))
        if taken or wrong:
            raise BridgeError(
                f"a '{self.bridge}' cannot be stored: "
                + (f"{', '.join(taken)} are entries of the package itself" if taken else "")
                + (f"{', '.join(wrong)} should be lower-case names that end in .safetensors" if wrong else "")
            )

    @property
    def context(self) -> dict[str, Tensor]:
        """The host's context vectors, where they were kept."""
        return self.files.get(CONTEXT, {})

    def save(self, folder: Path) -> None:
        """Write it into `folder`, all of it or nothing; other entries of the folder stay.

        Raises BridgeError where a tensor is not finite, or the disk refuses.
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
                f"{folder} could not take the bridge ({error}): free space there, or give another folder, and try again; "
                f"what was there is unharmed"
            ) from error

    @classmethod
    def load(cls, folder: Path, bridge: str | None = None) -> Artifact:
        """The artefact in `folder`, its tensors on the CPU; of any kind, or of `bridge`.

        Raises BridgeError unless it is whole, and of that kind.
        """
        for _ in range(ATTEMPTS - 1):
            try:
                return cls._load(folder, bridge)
            except BridgeError:
                time.sleep(0.02)  # a training may be replacing its best bridge just now
        return cls._load(folder, bridge)

    @classmethod
    def _load(cls, folder: Path, bridge: str | None) -> Artifact:
        content = describe(folder, bridge)
        content.pop("schema_version")
        kind, files, provenance = content.pop("bridge"), content.pop("files"), content.pop("provenance")
        tensors = {
            name: read_tensors(current(folder, name), facts, BridgeError, REMEDY) for name, facts in files.items()
        }
        return cls(kind, content, tensors, provenance)


def describe(folder: Path, bridge: str | None = None) -> dict[str, Any]:
    """What config.json in `folder` says: the entries of `OURS`, checked, and the bridge's own. Its files are not looked at.

    Raises BridgeError unless it describes an artefact, of kind `bridge` where one is given.
    """
    path = current(folder, CONFIG)
    content = read_json(path, BridgeError, "give the folder of a finished training or fit")
    try:
        version, kind, files, provenance = (content[name] for name in OURS)
        if not isinstance(kind, str) or not NAME.fullmatch(kind):
            raise ValueError(f"{kind!r:.100} is no name of a bridge")
        if version != SCHEMA_VERSION or bridge not in (None, kind):
            raise ValueError(
                f"it is a {kind!r} of schema version {version!r}, and what reads it here is {bridge!r} of version "
                f"{SCHEMA_VERSION}: name the bridge that it is, upgrade the package, or make it anew"
            )
        if not isinstance(files, dict) or not all(_is_size_and_hash(facts) for facts in files.values()):
            raise ValueError(f"'files' must give each file's size and SHA-256, not {files!r:.100}")
        if not all(FILE.fullmatch(name) for name in files):
            raise ValueError(f"'files' names {', '.join(sorted(files))!r:.200}, which cannot be")
        if not isinstance(provenance, dict):
            raise ValueError(f"provenance must be an object, not {provenance!r:.100}")
    except (KeyError, ValueError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise BridgeError(
            f"{path} does not describe a {f'{bridge} bridge' if bridge else 'bridge'}: {reason}"
        ) from error
    return content


def _is_size_and_hash(facts: Any) -> bool:
    return (
        isinstance(facts, dict)
        and type(facts.get("bytes")) is int
        and facts["bytes"] >= 0
        and isinstance(facts.get("sha256"), str)
        and len(facts["sha256"]) == 64
    )
