"""Bridges one after the other: `a+b` on the command line, and as a folder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ezhoi_diffusion.artifact import CONFIG, MEMBERS, Artifact, ArtifactConfig, MemberEntry, member_folders
from ezhoi_diffusion.bridge import PROTOCOLS, Bridge, BridgeError
from ezhoi_diffusion.errors import EzhoiDiffusionError
from ezhoi_diffusion.features.batch import Pairs

CHAIN = "chain"
LoadMember = Callable[[str, Path | None], Bridge]  # (name, folder) -> the bridge


class ChainBridge(Bridge):
    """Applies its members in order. All that it says of itself follows from them.

    A setting of a member is called NAME.KEY, and KEY alone where no other member has it. Without members nothing changes.

    Args:
        members: Bridges by name, in the order of their application.
    """

    def __init__(self, members: Mapping[str, Bridge]) -> None:
        super().__init__()
        self.names = tuple(members)
        self._take(list(members.values()))

    def _take(self, bridges: Sequence[Bridge]) -> None:
        self._modules = {}  # copy.copy shares this dictionary with the original
        self.bridges = nn.ModuleList(bridges)
        self.row_by_row = all(bridge.row_by_row for bridge in bridges)
        self.baseline = all(bridge.baseline for bridge in bridges)
        self.seeded = any(bridge.seeded for bridge in bridges)
        self.needs_pairs = any(bridge.needs_pairs for bridge in bridges)
        protocols = [bridge.protocol for bridge in bridges]
        self.protocol = max(protocols, key=[*PROTOCOLS, *protocols].index, default="inductive")
        having = Counter(key for bridge in bridges for key in bridge.settings)
        self.settings = (
            *(key for key, number in having.items() if number == 1),
            *(f"{name}.{key}" for name, bridge in self.members.items() for key in bridge.settings),
        )
        self.context = next((bridge.context for bridge in bridges if bridge.context), {})
        known = {name: bridge.provenance for name, bridge in self.members.items() if bridge.provenance is not None}
        self.provenance = None
        if known:
            fingerprints = [provenance["fingerprint"] for provenance in known.values() if "fingerprint" in provenance]
            self.provenance = {MEMBERS: known, **({"fingerprint": fingerprints[0]} if fingerprints else {})}

    @property
    def members(self) -> dict[str, Bridge]:
        """The bridges by name, in order."""
        return {
            name: bridge for name, bridge in zip(self.names, self.bridges, strict=True) if isinstance(bridge, Bridge)
        }

    def apply_settings(self, settings: Mapping[str, Any]) -> None:
        """Hand each setting to the member that it belongs to. Raises BridgeError for values that a member refuses."""
        self._take([bridge.override(**own_settings(name, bridge, settings)) for name, bridge in self.members.items()])

    def forward(self, adapter_feat: Tensor, pairs: Pairs | None = None) -> Tensor:
        """Bridge features [P, D] with one member after the other."""
        for bridge in self.bridges:
            adapter_feat = bridge(adapter_feat, pairs)
        return adapter_feat


def own_settings(name: str, bridge: Bridge, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What `settings` has for the bridge called `name`, as KEY or NAME.KEY. NAME.KEY counts where both are given."""
    plain = {key: value for key, value in settings.items() if key in bridge.settings}
    named = {key.removeprefix(f"{name}."): value for key, value in settings.items() if key.startswith(f"{name}.")}
    return plain | {key: value for key, value in named.items() if key in bridge.settings}


def with_members(bridge: Bridge, label: str) -> Iterator[tuple[Bridge, str]]:
    """Every bridge whose fingerprint counts, with its name in messages.

    Those are the members of a chain. A bridge, and a chain whose members fit every run, counts by itself.
    """
    if not isinstance(bridge, ChainBridge) or all(member.provenance is None for member in bridge.members.values()):
        yield bridge, label
        return
    for name, member in bridge.members.items():
        yield from with_members(member, f"{label}: {name}")


# -- folders -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Member:
    """What is stored of one bridge of a chain.

    Attributes:
        bridge: Its registered name.
        artifact: Its artefact; None for a bridge that needs none.
        settings: Values for some of its settings.
    """

    bridge: str
    artifact: Artifact | None = None
    settings: dict[str, Any] = field(default_factory=dict)


def save_chain(
    folder: Path,
    members: Sequence[Member],
    *,
    kind: str = CHAIN,
    config: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Write a chain: config.json, and the artefact of each member in a folder of its own.

    Args:
        folder: A new folder.
        members: In the order of their application.
        kind: The name of the loader.
        config: Further entries of config.json.
        provenance: Where the chain comes from, as JSON.

    Raises:
        BridgeError: A bridge is named twice, something cannot be stored, or the disk refuses.
    """
    if len({member.bridge for member in members}) < len(members):
        raise BridgeError(f"a chain has each bridge once, not {', '.join(member.bridge for member in members)}")
    listed = [
        {"bridge": member.bridge, "settings": member.settings, "has_files": member.artifact is not None}
        for member in members
    ]
    content = {MEMBERS: listed, **(config or {})}
    for inside, member in zip(member_folders(content), members, strict=True):
        if inside is not None and member.artifact is not None:
            member.artifact.save(folder / inside)
    Artifact(kind, content, provenance=dict(provenance or {})).save(folder)  # last: without it the chain is not whole


class ChainConfig(ArtifactConfig):
    """config.json of a chain."""

    members: list[MemberEntry]  # type: ignore[misc]  # required here, as PEP 705 will allow


def load_members(
    folder: Path, kind: str, load: LoadMember, schema: Any = ChainConfig
) -> tuple[dict[str, Bridge], Artifact]:
    """The members of the chain in `folder` by name, with their settings, and the artefact of the chain itself.

    Raises:
        BridgeError: It is incomplete, changed, or of another kind.
    """
    artifact = Artifact.load(folder, kind, {}, schema)
    members: dict[str, Bridge] = {}
    for inside, member in zip(member_folders(artifact.config), artifact.config[MEMBERS], strict=True):
        name = member["bridge"]
        if name in (kind, *members):
            raise BridgeError(f"{folder / CONFIG} chains '{name}' twice, or itself: make it again")
        try:
            members[name] = load(name, None if inside is None else folder / inside).override(**member["settings"])
        except EzhoiDiffusionError as error:
            raise BridgeError(f"{folder / CONFIG} chains '{name}', which cannot be used: {error}") from error
    return members, artifact
