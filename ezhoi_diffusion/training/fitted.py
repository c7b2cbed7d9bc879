"""Bridges that plugins fit to captured features."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ezhoi_diffusion.artifact import CONTEXT, Artifact
from ezhoi_diffusion.defaults import torch_defaults
from ezhoi_diffusion.errors import EzhoiDiffusionError, attributed_to
from ezhoi_diffusion.features.store import FeatureStore, FeatureStoreError
from ezhoi_diffusion.features.unlabelled import Unlabelled, split_of
from ezhoi_diffusion.inputs import read_only
from ezhoi_diffusion.plugins import PluginManager
from ezhoi_diffusion.registry import Registry

Fit = Callable[..., Artifact]
SHOWN_AFTER = 2.0  # seconds


def known_fits(plugins: PluginManager) -> Registry[Fit]:
    """The fits that installed plugins register, by name of their bridge."""
    empty: dict[str, Fit] = {}
    return plugins.collect("register_fits", Registry("fit", empty))


def fit_options(fit: Fit) -> dict[str, Any]:
    """Option -> default of a fit: its arguments after the features."""
    return {parameter.name: parameter.default for parameter in list(inspect.signature(fit).parameters.values())[1:]}


def fit_artifact(name: str, fit: Fit, store: FeatureStore, options: Mapping[str, Any]) -> Artifact:
    """Fit a bridge to captured features of training images, or of test images without annotations where the fit is marked.

    Args:
        name: The name of the bridge.
        fit: What a plugin registered under that name.
        store: A capture of the split that the fit learns from.
        options: Values for some of `fit_options(fit)`.

    Returns:
        The artefact, with fingerprint, context vectors, and options.

    Raises:
        EzhoiDiffusionError: An option is unknown, the store is of another split, the fit raises something, or it returns no
            artefact of that bridge.
    """
    known = fit_options(fit)
    if unknown := sorted(options.keys() - known.keys()):
        raise EzhoiDiffusionError(
            f"bridge '{name}' has no option {', '.join(unknown)}; its options are {', '.join(known) or 'none'}"
        )
    learnable = learnable_features(name, fit, store)
    # the tables of EZ-HOI's score are the store's own, and score what is fitted
    unwritten = read_only(f"fit '{name}'", ezhoi=store.ezhoi)
    with unwritten, torch_defaults(), torch.enable_grad(), attributed_to(f"fit '{name}'", EzhoiDiffusionError):
        artifact = fit(_Watched(learnable, name), **options)
    return with_origin(artifact, store, name, options)


class _Watched(FeatureStore):
    """A view of features for a fit. A pass over them that takes longer than `SHOWN_AFTER` shows how far it is."""

    def __init__(self, whole: FeatureStore, name: str) -> None:
        vars(self).update(vars(whole))
        self._whole: FeatureStore = whole
        self._name = name

    def shards(self) -> Iterator[dict[str, Tensor]]:
        shards, total = self._whole.shards(), len(self.index["shards"])
        yield from tqdm(shards, f"fit {self._name}", total, unit="shard", delay=SHOWN_AFTER, leave=False, disable=None)


def learnable_features(name: str, fit: Fit, store: FeatureStore) -> FeatureStore:
    """What a fit may see of a store: all of a train split, or a test split without annotations where the fit is marked.

    Raises:
        FeatureStoreError: The store is of the other split.
    """
    if split_of(fit) == "train":
        store.require_training_images("a bridge is fitted to")
        return store.to_learn_from()
    if store.split != "test":
        raise FeatureStoreError(
            f"{store.folder} holds the {store.split} split: '{name}' learns from unlabelled test images; give the capture of the "
            f"test split"
        )
    return Unlabelled(store)


def with_origin(artifact: Any, store: FeatureStore, name: str, options: Mapping[str, Any]) -> Artifact:
    """What a fit returned, with where it comes from: fingerprint, context vectors, and options.

    Raises:
        EzhoiDiffusionError: It is no Artifact, or one of another bridge.
    """
    if not isinstance(artifact, Artifact) or artifact.bridge != name:
        found = artifact.bridge if isinstance(artifact, Artifact) else type(artifact).__name__
        raise EzhoiDiffusionError(f"fit '{name}' returned {found!r} instead of an Artifact of bridge '{name}'")
    provenance = {
        **artifact.provenance,
        "fingerprint": store.fingerprint,
        "features": {"rows": len(store), "images": len(store.images), "split": store.split},
        "fit": {"name": name, "options": dict(options)},
    }
    context = {CONTEXT: store.context} if store.context else {}
    return Artifact(name, artifact.config, {**artifact.files, **context}, provenance)
