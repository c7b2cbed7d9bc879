"""What `tune` chose, as a bridge."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from ezhoi_diffusion.artifact import Artifact
from ezhoi_diffusion.bridge import Bridge
from ezhoi_diffusion.errors import EzhoiDiffusionError
from ezhoi_diffusion.evaluation.chain import ChainBridge, ChainConfig, Member, load_members, own_settings, save_chain
from ezhoi_diffusion.evaluation.tune import Candidates, Tuning
from ezhoi_diffusion.evaluation.variants import SEED_PREFIX, load_bridge
from ezhoi_diffusion.features.store import FeatureStore
from ezhoi_diffusion.plugins import PluginManager

TUNED = "tuned"


def write_choice(folder: Path, tuning: Tuning, candidates: Candidates, store: FeatureStore) -> None:
    """Write what was chosen, made from all training images, as an artefact that the bridge `tuned` loads.

    A choice with several seeds gets a folder for each, `seed-0` and so on.

    Raises:
        BridgeError: Something cannot be stored, or the disk refuses.
    """
    chain = tuning.choice.trial.chain
    seeds = max((len(candidates.artifacts[step.part]) for step in chain), default=1)
    config = {
        "chosen": {"name": tuning.choice.trial.name, "helps": tuning.choice.helps, "why": tuning.choice.why},
        "evidence": tuning.evidence(),
    }
    provenance = {
        "fingerprint": store.fingerprint,
        "features": {"rows": len(store), "images": len(store.images)},
        "forced": tuning.forced,
    }
    for seed in range(seeds):
        members = []
        for step in chain:
            recipes, artifacts = candidates.recipes[step.part], candidates.artifacts[step.part]
            bridge = candidates.bridges[step.part]
            settings = own_settings(recipes.name, bridge, recipes.settings)
            members.append(Member(recipes.name, artifacts[seed % len(artifacts)], {**settings, **dict(step.settings)}))
        inside = folder if seeds == 1 else folder / f"{SEED_PREFIX}{seed}"
        save_chain(inside, members, kind=TUNED, config=config, provenance=provenance)


class Chosen(TypedDict):
    """What `tune` chose, and why."""

    name: str
    helps: bool
    why: str


class TunedConfig(ChainConfig):
    """config.json of a choice."""

    chosen: Chosen
    evidence: dict[str, Any]


class TunedBridge(ChainBridge):
    """The chain that `tune` chose, as it was chosen: it has no settings. It is a baseline where `none` or one was chosen."""

    def __init__(self, members: Mapping[str, Bridge], artifact: Artifact) -> None:
        super().__init__(members)
        self.settings = ()
        # The members' own fingerprints count. Members without one were chosen for the run of the features.
        self.provenance = {**artifact.provenance, **(self.provenance or {}), "chosen": artifact.config["chosen"]}


def load_choice(folder: Path | None, plugins: PluginManager) -> TunedBridge:
    """Load what `tune` wrote into `folder`. Raises BridgeError, or EzhoiDiffusionError without a folder."""
    if folder is None:
        raise EzhoiDiffusionError("tuned needs the folder of a choice: run `ezhoi-diffusion tune`, then give tuned=DIR")
    members, artifact = load_members(folder, TUNED, functools.partial(load_bridge, plugins), TunedConfig)
    return TunedBridge(members, artifact)
