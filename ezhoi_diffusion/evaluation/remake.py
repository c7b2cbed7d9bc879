"""Bridges that can be made again from any part of a capture, so that held-out images and classes stay out of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
import torch
from safetensors.torch import save

from ezhoi_diffusion.artifact import Artifact
from ezhoi_diffusion.bridge import Bridge, BridgeError
from ezhoi_diffusion.diffusion.artifact import BRIDGE as DIFFUSION
from ezhoi_diffusion.diffusion.artifact import STATISTICS
from ezhoi_diffusion.diffusion.components import components
from ezhoi_diffusion.errors import EzhoiDiffusionError
from ezhoi_diffusion.evaluation.chain import own_settings
from ezhoi_diffusion.evaluation.folds import Folds
from ezhoi_diffusion.evaluation.processes import in_processes
from ezhoi_diffusion.evaluation.variants import Named, load_bridge, seed_folders
from ezhoi_diffusion.features.store import FeatureStore
from ezhoi_diffusion.features.unlabelled import split_of
from ezhoi_diffusion.plugins import PluginManager
from ezhoi_diffusion.scoring.bridge import ScoreBridge
from ezhoi_diffusion.training.config import TrainConfig
from ezhoi_diffusion.training.data import TrainingData
from ezhoi_diffusion.training.fitted import fit_artifact, fit_options, known_fits
from ezhoi_diffusion.training.trainer import train

Learn = Callable[[FeatureStore], Artifact]
NOT_CANDIDATES = ("tuned", "chain")
# Only where `--bridges` names them: comparisons for papers, which would be made many times, and transductive bridges.
ONLY_NAMED = ("eszsl", "gaussian_classes", "pseudo", "test_time_cache")


class RemakeError(EzhoiDiffusionError):
    """A bridge cannot be made again from a part of the features."""


@dataclass(frozen=True, eq=False)
class Recipes:
    """How a bridge is made from features, once for each of its seeds.

    Attributes:
        name: Its registered name.
        label: What the command and its tables call it.
        learn: One function for each seed; empty for a bridge that learns nothing.
        settings: Applied to what was made.
    """

    name: str
    label: str
    learn: tuple[Learn, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)

    def make(self, store: FeatureStore, plugins: PluginManager, seed: int = 0) -> tuple[Bridge, Artifact | None]:
        """Make the bridge from features. `seed` counts modulo the number of seeds.

        Raises:
            RemakeError: It cannot be made from these.
        """
        try:
            if not self.learn:
                return self._applied(load_bridge(plugins, self.name, None)), None
            artifact = self.learn[seed % len(self.learn)](store)
            with TemporaryDirectory() as folder:
                artifact.save(Path(folder))
                bridge = load_bridge(plugins, self.name, Path(folder))
            return self._applied(bridge), artifact
        except EzhoiDiffusionError as error:
            raise RemakeError(f"'{self.label}' cannot be made from {len(store.images)} images: {error}") from error

    def _applied(self, bridge: Bridge) -> Bridge:
        own = own_settings(self.name, bridge, self.settings)
        return bridge.override(**own) if own else bridge


def recipes_of(
    named: Named, plugins: PluginManager, settings: Mapping[str, Any], seeds: int, check: Callable[[Bridge, str], None]
) -> Recipes:
    """How the bridge NAME or NAME=DIR is made again.

    NAME alone is fitted by its plugin, or learns nothing. The artefact in DIR says how it was made: by a fit or a training,
    which is repeated. A diffusion bridge that was trained on texts keeps its network, and gets the means of the features.

    Args:
        named: The bridge.
        plugins: The plugin manager.
        settings: Applied to it, where it has them.
        seeds: Number of seeds of a fit that has an option `seed`.
        check: Called as check(bridge, name) for each bridge in DIR; raises where it does not fit the run.

    Raises:
        RemakeError: Nobody can say how it was made.
    """
    name, label = named.name, f"{named.name}={named.folder}" if named.folder else named.name
    if name in NOT_CANDIDATES:
        raise RemakeError(f"'{label}' is made of other bridges: name these, joined by + for a chain")
    if not named.folder:
        fits = known_fits(plugins)
        if name not in fits.names():
            return Recipes(name, label, settings=dict(settings))
        if split_of(fits[name]) == "test":
            raise RemakeError(
                f"'{label}' learns from test images, so it cannot be chosen on training images: compare it"
            )
        has_seeds = seeds > 1 and "seed" in fit_options(fits[name])
        options: list[dict[str, Any]] = [{"seed": seed} for seed in range(seeds)] if has_seeds else [{}]
        return Recipes(name, label, tuple(_fit(name, plugins, one) for one in options), dict(settings))
    learn = []
    before: dict[str, Any] = {}
    for seed, folder in seed_folders(named.folder):
        bridge = load_bridge(plugins, name, folder)
        check(bridge, f"{label}/{seed}" if seed else label)
        artifact = Artifact.load(folder)
        learn.append(_learn_again(artifact, name, label, plugins))
        if artifact.bridge == DIFFUSION and artifact.bridge == name:  # how it is applied may have been set since
            recipe = artifact.config["recipe"]
            before = {key: recipe[key] for key in bridge.settings if key in recipe}
        if not bridge.seeded:
            break
    return Recipes(name, label, tuple(learn), {**before, **settings})


def _fit(name: str, plugins: PluginManager, options: Mapping[str, Any]) -> Learn:
    return lambda store: fit_artifact(name, known_fits(plugins)[name], store, options)


def _learn_again(artifact: Artifact, name: str, label: str, plugins: PluginManager) -> Learn:
    provenance = artifact.provenance
    fit, training = provenance.get("fit"), provenance.get("training")
    if isinstance(fit, dict) and fit.get("name") in known_fits(plugins).names():
        return _fit(fit["name"], plugins, fit["options"])
    if artifact.bridge == DIFFUSION and isinstance(training, dict) and "config" in training:
        config = _train_config(training["config"], label)
        if config.recipe.trained_on == "text":
            return lambda store: _with_means_of(artifact, store)
        return lambda store: _trained(config, store, plugins)
    if not provenance:
        return lambda store: artifact
    why = "it was distilled" if "distilled" in provenance else "its files do not say how"
    raise RemakeError(
        f"'{label}' cannot be made again without the held-out images: {why}. Only then is its score on them fair; name a bridge "
        f"that `ezhoi-diffusion train` made"
    )


def _train_config(stored: Mapping[str, Any], label: str) -> TrainConfig:
    try:
        return msgspec.convert(stored, TrainConfig)
    except (EzhoiDiffusionError, ValueError, msgspec.ValidationError) as error:
        raise RemakeError(f"'{label}' does not say how it was trained ({error}): train it again") from error


def _trained(config: TrainConfig, store: FeatureStore, plugins: PluginManager) -> Artifact:
    with TemporaryDirectory() as folder:
        data = TrainingData.from_store(store, config.recipe.trained_on)
        train(data, config, Path(folder) / "bridge", registry=components(plugins))
        return Artifact.load(Path(folder) / "bridge")


def _with_means_of(artifact: Artifact, store: FeatureStore) -> Artifact:
    files = {**artifact.files, STATISTICS: store.to_learn_from().statistics().tensors()}
    provenance = {**artifact.provenance, "features": {"rows": len(store), "images": len(store.images)}}
    return Artifact(artifact.bridge, artifact.config, files, provenance)


Known = tuple[int, int, frozenset[int], int | None]
"""A part of the data, and who knows it: position of the recipes, seed, the folds of images that are left out, and the fold of
classes whose labels are."""


class Remade:
    """Bridges made for every part of the data that they may know, each once.

    Args:
        store: A capture of the train split.
        recipes: How the bridges are made.
        bridges: Each of them made from all data, which stands for those that learn nothing.
        folds: The folds.
        plugins: The plugin manager.
        device: Where the bridges go.
        jobs: Number of processes that make them.
    """

    def __init__(
        self,
        store: FeatureStore,
        recipes: Sequence[Recipes],
        bridges: Sequence[Bridge],
        folds: Folds,
        plugins: PluginManager,
        device: torch.device | str,
        jobs: int,
    ) -> None:
        self._store, self._recipes, self._bridges = store, recipes, bridges
        self._folds, self._plugins, self._device, self._jobs = folds, plugins, device, jobs
        self._made: dict[Known, tuple[Bridge, bytes] | RemakeError] = {}  # with what tells it from others

    def __getitem__(self, known: Known) -> Bridge:
        """The bridge. Where the labels make no difference it is the one that was made with them. Raises RemakeError."""
        if not self._recipes[known[0]].learn:
            return self._bridges[known[0]]
        self.prepare([known])
        found = self._made[self._key(known)]
        if isinstance(found, RemakeError):
            raise found
        return found[0]

    def problem(self, known: Known) -> RemakeError | None:
        """Why a bridge that was prepared could not be made, or None."""
        found = self._made.get(self._key(known))
        return found if isinstance(found, RemakeError) else None

    def prepare(self, wanted: Sequence[Known]) -> None:
        """Make those that are not there yet.

        All are made with the same number of threads, on which rounding depends: with and without labels, the same numbers must
        give the same bits.

        Raises:
            EzhoiDiffusionError: A bridge cannot come from another process.
        """
        keys = [self._key(known) for known in wanted if self._recipes[known[0]].learn]
        with_labels = [(*key[:3], None) for key in keys]  # the others are compared with these
        new = [key for key in dict.fromkeys([*with_labels, *keys]) if key not in self._made]
        for key, found in zip(
            new, in_processes(_made_or_problem, map(self._task, new), self._jobs, here=0), strict=True
        ):
            if isinstance(found, RemakeError):
                self._made[key] = found
                continue
            bridge, content = found
            with_them = self._made.get((key[0], key[1], key[2], None))
            is_same = isinstance(with_them, tuple) and content == with_them[1]
            bridge, of_all = bridge.to(self._device), self._bridges[key[0]]
            if isinstance(bridge, ScoreBridge) and isinstance(of_all, ScoreBridge):
                bridge.share_constants(of_all)
            self._made[key] = with_them if with_them and is_same else (bridge, content)

    def _key(self, known: Known) -> Known:
        part, seed, without, hidden = known
        return part, seed % max(1, len(self._recipes[part].learn)), without, hidden

    def _task(self, key: Known) -> tuple[Recipes, FeatureStore, PluginManager, int]:
        part, seed, without, hidden = key
        left = {position for fold in without for position in self._folds.images[fold]}
        kept = [position for position in range(len(self._store.images)) if position not in left]
        known = self._store.subset(kept, None if hidden is None else self._folds.classes[hidden])
        return self._recipes[part], known, self._plugins, seed


def _made_or_problem(
    recipes: Recipes, store: FeatureStore, plugins: PluginManager, seed: int
) -> tuple[Bridge, bytes] | RemakeError:
    try:
        bridge, artifact = recipes.make(store, plugins, seed)
        return bridge, _content(artifact)
    except RemakeError as error:
        return error


def _content(artifact: Artifact | None) -> bytes:
    """SHA-256 of what an artefact says and holds, whatever it comes from."""
    digest = hashlib.sha256()
    if artifact is not None:
        config = json.loads(json.dumps(artifact.config))  # all keys are texts, and can be sorted
        digest.update(json.dumps(config, sort_keys=True).encode())
        for name, tensors in sorted(artifact.files.items()):
            digest.update(name.encode() + save({key: x.detach().cpu().contiguous() for key, x in tensors.items()}))
    return digest.digest()


def grid_of(bridge: Bridge, name: str, sweep: Mapping[str, Sequence[Any]] | None) -> dict[str, list[Any]]:
    """The values of each setting that are tried: those of `sweep`, by default the bridge's own grid.

    Values that the bridge refuses are left out of its own grid, and raise BridgeError in a sweep.
    """
    if sweep is None:
        own = {key: values for key, values in bridge.grid.items() if key in bridge.settings}
        return {key: [value for value in values if _accepts(bridge, key, value)] for key, values in own.items()}
    found = {key: list(values) for key, values in own_settings(name, bridge, sweep).items()}
    for key, values in found.items():
        for value in values:
            bridge.override(**{key: value})
    return found


def _accepts(bridge: Bridge, key: str, value: Any) -> bool:
    try:
        bridge.override(**{key: value})
    except BridgeError:
        return False
    return True
