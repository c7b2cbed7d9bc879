"""Chooses how to bridge by mAP on training images that nothing was learned from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from ezhoi_diffusion.artifact import Artifact, BridgeError
from ezhoi_diffusion.errors import EzhoiDiffusionError
from ezhoi_diffusion.evaluation.bootstrap import REPLICATES
from ezhoi_diffusion.evaluation.comparison import REFERENCE, Comparison
from ezhoi_diffusion.evaluation.replay import replay
from ezhoi_diffusion.evaluation.variants import Variant
from ezhoi_diffusion.features.split import FRACTION, validation_mask
from ezhoi_diffusion.features.store import FeatureStore

AUTO = "auto"
INSIDE = "bridge"  # the chosen bridge's own artefact, in the folder of the choice
GRID: dict[str, list[Any]] = {
    "start_timestep": [50, 100, 200, 400, 1000],
    "num_steps": [1, 5],
    "blend": [0.1, 0.3, 0.6, 1.0],
    "output": ["keep_norm", "unit_norm"],
}


@dataclass(frozen=True)
class Candidate:
    """A bridge at one point of the grid: its mean AP in percent, over seeds where it has several, and its first variant."""

    name: str
    mean_ap: float
    variant: str


class TuneError(EzhoiDiffusionError):
    """A choice cannot be made, or would not be a fair one."""


def tune(
    store: FeatureStore,
    variants: Mapping[str, Variant],
    device: torch.device | str = "cpu",
    forced: list[str] | None = None,
) -> tuple[Comparison, list[Candidate]]:
    """The comparison of `none` and all variants on held-out training images, and the candidates, the best first.

    Scored are seen classes alone; annotations of unseen ones are dropped before anything looks at them. Of a bridge with
    several seeds the mean counts, and the first seed is taken. `none` wins ties, so the choice is never worse than no
    bridge on these images. Raises TuneError for test images, and where a variant learned from the held-out ones.
    """
    if store.split != "train":
        raise TuneError(
            f"{store.folder} holds the {store.split} split: what is chosen by test images cannot be tested on them. Give "
            f"the capture of the train split"
        )
    try:
        apart = validation_mask(len(store.images))
    except ValueError as error:
        raise TuneError(f"{store.folder} has too few images: {error}") from error
    images = set(apart.nonzero().squeeze(1).tolist())
    comparison = replay(
        store,
        variants,
        chosen=images,
        classes=seen_classes(store),
        replicates=REPLICATES,
        timed=False,
        device=device,
        forced=forced,
    )
    comparison.caveats.append(
        f"These are {len(images)} held-out images of the train split, and seen classes alone: to choose by, no result to report."
    )
    members: dict[str, list[str]] = {REFERENCE: [REFERENCE]}
    for name, variant in variants.items():
        members.setdefault(variant.seed_group or name, []).append(name)
    candidates = [
        Candidate(name, fmean(comparison.mean_ap(one, "full") for one in seeds), seeds[0])
        for name, seeds in members.items()
    ]
    return comparison, sorted(candidates, key=lambda candidate: -candidate.mean_ap)


def seen_classes(store: FeatureStore) -> Tensor:
    """[k] int64 the interaction classes whose labels may be looked at. Raises TuneError where the store does not say."""
    if "classes/full" not in store.ezhoi:
        raise TuneError(f"{store.folder} does not say which classes there are: capture it with this version")
    full = store.ezhoi["classes/full"]
    return full[~torch.isin(full, store.ezhoi.get("classes/unseen", full[:0]))]


def require_unseen(bridge: object, name: str, store: FeatureStore) -> None:
    """Raise TuneError where a bridge was trained with labels of images that `tune` chooses by, or may have been."""
    provenance = _dict(getattr(bridge, "provenance", None))
    trained = provenance.get("training") or _dict(provenance.get("distilled")).get("teacher")
    config = _dict(_dict(trained).get("config"))
    labelled = "fit" in provenance or _dict(config.get("recipe")).get("trained_on") == "pairs"
    images = _dict(provenance.get("features")).get("images")
    if labelled and images is not None and images != len(store.images):
        raise TuneError(
            f"bridge '{name}' was made from a capture of {images} images, and {store.folder} has {len(store.images)}: which are "
            f"held out depends on that number, so it may have seen the labels that the choice is made by. Make it from this capture"
        )
    if labelled and config.get("val_fraction", FRACTION) < FRACTION:
        raise TuneError(
            f"bridge '{name}' was trained on pairs with --val-fraction {config['val_fraction']}, so on images that the choice "
            f"is made by: train it with {FRACTION} or more"
        )


def _dict(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def write_choice(
    folder: Path,
    comparison: Comparison,
    candidates: Sequence[Candidate],
    variants: Mapping[str, Variant],
    store: FeatureStore,
) -> None:
    """Write the first candidate, with what speaks for it, as an artefact that the bridge `auto` loads.

    Raises TuneError where the bridge's own folder is no artefact, BridgeError where the disk refuses.
    """
    name, chosen, settings = candidates[0].variant, REFERENCE, dict[str, Any]()
    if name != REFERENCE:
        source = variants[name].source
        if source is None:
            raise TuneError(f"'{name}' is a plugin, not a bridge that can be stored: enable it with --plugin instead")
        chosen, origin, settings = source
        if origin is not None:
            try:
                Artifact.load(origin).save(folder / INSIDE)
            except BridgeError as error:
                raise TuneError(f"the choice is '{name}', which cannot be stored: {error}") from error
    Artifact(
        AUTO,
        {
            "chosen": {"bridge": chosen, "settings": settings, "variant": name},
            "evidence": evidence(comparison, candidates),
        },
        provenance={
            "fingerprint": store.fingerprint,
            "features": {"rows": len(store), "images": len(store.images)},
            "forced": comparison.forced,
        },
    ).save(folder)


class TunedBridge(nn.Module):
    """Another bridge as it is: what was chosen is not to be swept, nor given other steps."""

    def __init__(self, bridge: Any, artifact: Artifact) -> None:
        super().__init__()
        chosen = artifact.config["chosen"]
        self._bridge = bridge
        self.row_by_row = bool(getattr(bridge, "row_by_row", False))
        # what the bridge says of its host counts; one that claims none was chosen for the host of the features
        self.provenance = {**artifact.provenance, **_dict(getattr(bridge, "provenance", None)), "chosen": chosen}
        self.context: dict[str, Tensor] = getattr(bridge, "context", None) or {}

    def forward(self, adapter_feat: Tensor) -> Tensor:
        """[P, D] -> [P, D]."""
        bridged: Tensor = self._bridge(adapter_feat)
        return bridged


def evidence(comparison: Comparison, candidates: Sequence[Candidate]) -> dict[str, Any]:
    """What the choice rests on, as JSON: mean AP of candidates, and every variant's difference to `none`."""
    found = comparison.significance
    return {
        "images": comparison.images,
        "pairs": comparison.pairs,
        "mean_ap": {candidate.name: candidate.mean_ap for candidate in candidates},
        "difference": {
            name: asdict(groups["full"]) for name, groups in (found.difference.items() if found is not None else ())
        },
    }
