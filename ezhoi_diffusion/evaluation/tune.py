"""Choose a bridge and its settings by mAP on held-out training images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from ezhoi_diffusion.artifact import Artifact
from ezhoi_diffusion.bridge import Bridge, BridgeError
from ezhoi_diffusion.diffusion.baselines import Identity
from ezhoi_diffusion.errors import EzhoiDiffusionError
from ezhoi_diffusion.evaluation.bootstrap import REPLICATES
from ezhoi_diffusion.evaluation.comparison import REFERENCE, Comparison
from ezhoi_diffusion.evaluation.protocols import hicodet
from ezhoi_diffusion.evaluation.replay import replay
from ezhoi_diffusion.evaluation.variants import Variant, load_bridge
from ezhoi_diffusion.features.batch import Pairs
from ezhoi_diffusion.features.split import FRACTION, validation_mask
from ezhoi_diffusion.features.store import FeatureStore
from ezhoi_diffusion.plugins import PluginManager

TUNED = "tuned"
CHOSEN_FOLDER = "bridge"  # the chosen bridge's own artefact, inside the folder of the choice
DEFAULT_SWEEP: dict[str, list[Any]] = {
    "start_timestep": [50, 100, 200, 400, 1000],
    "num_steps": [1, 5],
    "blend": [0.1, 0.3, 0.6, 1.0],
    "output": ["keep_norm", "unit_norm"],
}


class TuneError(EzhoiDiffusionError):
    """A choice cannot be made, or would not be a fair one."""


@dataclass(frozen=True)
class Candidate:
    """A bridge at one point of the sweep.

    Attributes:
        name: Its name; that of the seed group where it has several seeds.
        mean_ap: Mean AP in percent, over its seeds.
        variant: The name of its first variant.
    """

    name: str
    mean_ap: float
    variant: str


def tune(
    store: FeatureStore,
    variants: Mapping[str, Variant],
    device: torch.device | str = "cpu",
    forced: list[str] | None = None,
) -> tuple[Comparison, list[Candidate]]:
    """Compare `none` and all variants on held-out training images.

    Only seen classes are scored: annotations of unseen ones are dropped before anything looks at them. `none` wins ties.

    Args:
        store: A capture of the train split.
        variants: The candidates. Each passed `require_labels_unseen`.
        device: Where the variants are.
        forced: Messages of fingerprint checks that were forced.

    Returns:
        The comparison, and the candidates, best first.

    Raises:
        TuneError: The store holds test images, or too few images.
    """
    if store.split != "train":
        raise TuneError(
            f"{store.folder} holds the {store.split} split. What is chosen on test images cannot be tested on them: give the "
            f"capture of the train split"
        )
    try:
        held_out = validation_mask(len(store.images))
    except ValueError as error:
        raise TuneError(f"{store.folder} has too few images: {error}") from error
    images = set(held_out.nonzero().squeeze(1).tolist())
    comparison = replay(
        store,
        variants,
        protocol=hicodet(store, classes=seen_classes(store)),
        chosen=images,
        replicates=REPLICATES,
        device=device,
    )
    comparison.forced += forced or []
    comparison.caveats.append(
        f"Chosen on {len(images)} held-out images of the train split, seen classes only. This is no result to report."
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
    """Interaction classes [k] int64 whose labels may be used. Raises TuneError where the store does not say."""
    if "classes/full" not in store.ezhoi:
        raise TuneError(f"{store.folder} does not say which classes there are: capture it again, into a new folder")
    full = store.ezhoi["classes/full"]
    return full[~torch.isin(full, store.ezhoi.get("classes/unseen", full[:0]))]


def require_labels_unseen(bridge: Bridge, name: str, store: FeatureStore) -> None:
    """Raise TuneError where a bridge learned from labels of the images that `tune` chooses by, or may have."""
    provenance = bridge.provenance or {}
    trained = provenance.get("training") or _dict(provenance.get("distilled")).get("teacher")
    config = _dict(_dict(trained).get("config"))
    labelled = "fit" in provenance or _dict(config.get("recipe")).get("trained_on") in ("pairs", "score")
    images = _dict(provenance.get("features")).get("images")
    if labelled and images is not None and images != len(store.images):
        raise TuneError(
            f"bridge '{name}' was made from a capture of {images} images, and {store.folder} has {len(store.images)}. The "
            f"number decides which images are held out, so the bridge may know their labels: make it from this capture"
        )
    if labelled and config.get("val_fraction", FRACTION) < FRACTION:
        raise TuneError(
            f"bridge '{name}' was trained on labels with --val-fraction {config['val_fraction']}, so it knows labels of the "
            f"images that decide: train it with {FRACTION} or more"
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
    """Write the best candidate and its evidence as an artefact that the bridge `tuned` loads.

    Raises:
        TuneError: The chosen bridge cannot be stored.
        BridgeError: The disk refuses.
    """
    name, chosen, settings = candidates[0].variant, REFERENCE, dict[str, Any]()
    if name != REFERENCE:
        source = variants[name].source
        if source is None:
            raise TuneError(f"'{name}' is a plugin, not a bridge that can be stored: enable it with --plugin instead")
        chosen, settings = source.name, source.settings
        if source.folder is not None:
            try:
                Artifact.load(source.folder).save(folder / CHOSEN_FOLDER)
            except BridgeError as error:
                raise TuneError(f"the choice is '{name}', which cannot be stored: {error}") from error
    Artifact(
        TUNED,
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


def evidence(comparison: Comparison, candidates: Sequence[Candidate]) -> dict[str, Any]:
    """Evidence of the choice, as JSON: mean AP of the candidates, and the difference of every variant to `none`."""
    return {
        "images": comparison.images,
        "pairs": comparison.pairs,
        "mean_ap": {candidate.name: candidate.mean_ap for candidate in candidates},
        "difference": {
            name: asdict(result.bootstrap.difference["full"])
            for name, result in comparison.variants.items()
            if result.bootstrap is not None and name != REFERENCE
        },
    }


class TunedBridge(Bridge):
    """The bridge that `tune` chose, as it was chosen: it has no settings."""

    def __init__(self, bridge: Bridge, artifact: Artifact) -> None:
        super().__init__()
        self.bridge = bridge
        self.row_by_row, self.needs_pairs = bridge.row_by_row, bridge.needs_pairs
        # The bridge's own fingerprint counts. One without was chosen for the run of the features.
        self.provenance = {
            **artifact.provenance, **(bridge.provenance or {}), "chosen": artifact.config["chosen"]
        }  # fmt: skip
        self.context = bridge.context

    def forward(self, adapter_feat: Tensor, pairs: Pairs | None = None) -> Tensor:
        """Bridge features [P, D] with what was chosen."""
        bridged: Tensor = self.bridge(adapter_feat, pairs)
        return bridged


def load_choice(folder: Path | None, plugins: PluginManager) -> TunedBridge:
    """Load what `tune` wrote into `folder`. Raises BridgeError, or EzhoiDiffusionError without a folder."""
    if folder is None:
        raise EzhoiDiffusionError("tuned needs the folder of a choice: run `ezhoi-diffusion tune`, then give tuned=DIR")
    artifact = Artifact.load(folder, TUNED)
    try:
        chosen = artifact.config["chosen"]
        name, settings = chosen["bridge"], dict(chosen["settings"])
    except (KeyError, TypeError, ValueError) as error:
        raise BridgeError(
            f"{folder} does not say what was chosen ({error}): run `ezhoi-diffusion tune` again"
        ) from error
    if name == REFERENCE:
        return TunedBridge(Identity(), artifact)
    inside = folder / CHOSEN_FOLDER
    bridge = load_bridge(plugins, name, inside if inside.exists() else None)
    return TunedBridge(bridge.override(**settings), artifact)
