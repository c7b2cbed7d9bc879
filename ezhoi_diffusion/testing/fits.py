"""The rules for fits, checked on made-up captures that differ in what a fit must not see."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ezhoi_diffusion.artifact import Artifact
from ezhoi_diffusion.features.batch import FeatureBatch
from ezhoi_diffusion.features.score import targets_of
from ezhoi_diffusion.features.store import FeatureStore
from ezhoi_diffusion.features.unlabelled import split_of
from ezhoi_diffusion.testing.bridges import seeded
from ezhoi_diffusion.testing.rules import Rule, apply_rules
from ezhoi_diffusion.testing.synthetic import synthetic_store
from ezhoi_diffusion.training.fitted import learnable_features, with_origin

Fit = Callable[..., Artifact]
IMAGES = 40


@dataclass(frozen=True)
class FitTrial:
    """A fit under test, and the folder in which stores for it are made."""

    name: str
    fit: Fit
    folder: Path
    dim: int

    def store(
        self, name: str, *, unseen: bool = True, alter: Callable[[FeatureBatch], FeatureBatch] | None = None
    ) -> FeatureStore:
        """What the fit may see of a new store."""
        made = synthetic_store(
            self.folder / name, split=split_of(self.fit), images=IMAGES, dim=self.dim, unseen=unseen, alter=alter
        )
        return learnable_features(self.name, self.fit, made)

    @cached_property
    def features(self) -> FeatureStore:
        """The store that all others differ from."""
        return self.store("features")

    @cached_property
    def artifact(self) -> Artifact:
        """The result of the fit on that store."""
        return self.fit(self.features)


def check_fit(name: str, fit: Fit, folder: Path, *, dim: int = 32) -> Path:
    """Check `fit` of the bridge `name` against every rule of `FIT_RULES`, on synthetic stores.

    Args:
        name: The name the bridge is registered under.
        fit: As for BridgePlugin. For options give functools.partial(fit, KEY=VALUE).
        folder: Where stores and bridge are made.
        dim: D, the width of the features.

    Returns:
        The folder of the fitted bridge, for `check_bridge`.

    Raises:
        ConformanceError: Some rules are broken; it lists them all.
        FeatureStoreError: `folder` is in use.
    """
    trial = FitTrial(name, fit, folder, dim)
    assert len(trial.features)  # made before the first rule, so that a folder in use is no broken rule
    apply_rules(f"fit '{name}'", trial, FIT_RULES, basic=("artefact",))
    with_origin(trial.artifact, trial.features, name, {}).save(folder / "bridge")
    return folder / "bridge"


def _artefact(trial: FitTrial) -> str | None:
    """The fit returns an Artifact of the name it is registered under."""
    found: Any = trial.artifact
    if not isinstance(found, Artifact):
        return f"a {type(found).__name__} was returned"
    return None if found.bridge == trial.name else f"it is one of {found.bridge!r} instead of {trial.name!r}"


def _stored(trial: FitTrial) -> str | None:
    """The artefact can be stored, and is the same when loaded again."""
    trial.artifact.save(trial.folder / "stored")
    return _difference(trial.artifact, Artifact.load(trial.folder / "stored", trial.name))


def _deterministic(trial: FitTrial) -> str | None:
    """The same features give the same artefact, bit for bit, whatever the random generators' state."""
    fitted = []
    for seed in (1, 2):
        with seeded(seed):
            fitted.append(trial.fit(trial.features))
    return _difference(*fitted)


def _unseen(trial: FitTrial) -> str | None:
    """Annotations of interactions that the split hides have no effect."""
    table, targets = trial.features.ezhoi["object_n_verb_to_interaction"], targets_of(trial.features)
    unseen = trial.features.ezhoi["classes/unseen"]

    def alter(batch: FeatureBatch) -> FeatureBatch:
        own, secret = table[batch.pairs.objects], torch.isin(batch.gt_hoi, unseen)
        labels = batch.labels ^ torch.isin(own, unseen)
        boxes, hoi = batch.gt_boxes.clone(), batch.gt_hoi.clone()
        boxes[:, secret] /= 2
        # Another object with the same verb: seen_pairs drops that verb in this image, whatever the object.
        for annotation in secret.nonzero().flatten():
            alike = unseen[targets[unseen] == targets[hoi[annotation]]]
            hoi[annotation] = alike.roll(1)[alike == hoi[annotation]]
        return replace(batch, labels=labels, gt_boxes=boxes, gt_hoi=hoi)

    other = _difference(trial.artifact, trial.fit(trial.store("unseen", alter=alter)))
    return other and f"{other} where they say something else; take labels from seen_pairs(features)"


def _without_split(trial: FitTrial) -> str | None:
    """Features captured without --zs, where no class is hidden, can be fitted to."""
    trial.fit(trial.store("no-split", unseen=False))
    return None


def same_artifact(a: Artifact, b: Artifact) -> bool:
    """Whether two artefacts are equal bit for bit, apart from their provenance."""
    return a.bridge == b.bridge and _difference(a, b) is None


def _difference(expected: Artifact, found: Artifact) -> str | None:
    """The first difference between two artefacts, apart from their provenance."""
    if found.config != expected.config:
        return f"config is {found.config!r:.200} instead of {expected.config!r:.200}"
    if found.files.keys() != expected.files.keys():
        return f"the files are {sorted(found.files)} instead of {sorted(expected.files)}"
    for file, tensors in expected.files.items():
        for name in sorted({*tensors, *found.files[file]}):
            a, b = tensors.get(name), found.files[file].get(name)
            if a is None or b is None or a.dtype != b.dtype or not torch.equal(a, b):
                return f"{name} in {file} differs"
    return None


FIT_RULES: dict[str, Rule[FitTrial]] = {
    "artefact": _artefact,
    "stored": _stored,
    "deterministic": _deterministic,
    "unseen": _unseen,
    "without split": _without_split,
}
