"""The features that a bridge is trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ezhoi_diffusion.diffusion.normalization import normalize, rescale
from ezhoi_diffusion.diffusion.recipes import Source
from ezhoi_diffusion.features.labels import PackedLabels, pair_labels, seen_labels
from ezhoi_diffusion.features.rows import RepeatedRows, Rows, StoredRows
from ezhoi_diffusion.features.split import validation_mask
from ezhoi_diffusion.features.statistics import ModalityStatistics
from ezhoi_diffusion.features.store import FeatureStore
from ezhoi_diffusion.training.config import TrainConfig, TrainingError

BLOCK = 65536
PART = 4096  # features that are read together: 8 MB at D = 512


@dataclass(frozen=True, eq=False)
class TrainingData:
    """Captured features as they are, not normalised, on the CPU."""

    visual: Rows
    """[N, D]. Those of a store stay on disk, and only a batch of them is in memory at a time."""
    image: Tensor
    """[N] int64, the image of each visual feature."""
    text: Tensor
    """[N_sel, D]."""
    statistics: ModalityStatistics
    provenance: dict[str, Any] = field(default_factory=dict)
    """JSON; it goes into the artefact."""
    context: Mapping[str, Tensor] = field(default_factory=dict)
    """EZ-HOI's context vectors; they go into the artefact."""
    own_text: Rows | None = None
    """[N, D], the text of each visual feature's own class, for training on pairs."""
    labelled: PackedLabels | None = None
    """The labels of each visual feature, for training on the score."""
    images: int | None = None
    """Number of captured images, with those that have no pair."""

    @classmethod
    def from_store(cls, store: FeatureStore, trained_on: Source) -> TrainingData:
        """Take what a recipe learns from. Visual features are not read for "text".

        Raises:
            EzhoiDiffusionError: The store is a capture of test images.
        """
        store.require_training_images("a bridge is trained on")
        store = store.to_learn_from()
        provenance = {"fingerprint": store.fingerprint, "features": {"rows": len(store), "images": len(store.images)}}
        visual: Rows = store.text[:0]
        image, own_text, labelled = torch.zeros(0, dtype=torch.long), None, None
        if trained_on == "visual":
            visual, image = StoredRows(store), store.image_index()
        elif trained_on == "pairs":
            found = seen_labels(store, held_out=None)
            visual, image = StoredRows(store, found.pair), found.image
            own_text = RepeatedRows(found.class_text, found.target)
        elif trained_on == "score":
            labelled = pair_labels(store)
            visual, image = StoredRows(store), labelled.image
        return cls(
            visual,
            image,
            store.text,
            store.statistics(),
            provenance,
            store.context,
            own_text,
            labelled,
            len(store.images),
        )


@dataclass(frozen=True, eq=False)
class TrainingSet:
    """The features that a network learns to return, their mean, and their split."""

    source: Rows
    mean: Tensor
    scale_factor: float
    training: Tensor
    """Indices of what is learned from."""
    validation: Tensor
    """Indices of the held-out part."""
    fingerprint: str
    """SHA-256 of the features, the means and the labels."""
    endpoint: tuple[Rows, Tensor] | None = None
    """Replaces Gaussian noise at the last timestep: for pairs, visual features [N, D] and their mean [D]."""
    noise_scale: float = 0.0
    """Norm of the Gaussian noise added to the endpoint, as a share of the endpoint's norm. With labels: share of the noise."""
    labelled: PackedLabels | None = None
    """The labels of `source`, for training on the score."""
    num_timesteps: int = 1000
    """Timesteps from this one on are not learned."""

    @classmethod
    def from_data(cls, data: TrainingData, config: TrainConfig) -> TrainingSet:
        """Select features by the recipe. Text is split by feature, visual features and pairs by image.

        Raises:
            TrainingError: The data have another shape, are not finite, or are too few to split.
        """
        recipe, statistics = config.recipe, data.statistics
        endpoint, labelled = None, None
        source: Rows
        if recipe.trained_on == "text":
            source, mean, what = data.text, statistics.text_mean, "text features"
            groups, count, seed = torch.arange(len(data.text)), len(data.text), config.seed
        else:
            means = {"visual": statistics.visual_mean, "text": statistics.text_mean}
            source, mean, what = data.visual, means[recipe.input_mean], "images"
            groups, seed = data.image, 0
            count = data.images if data.images is not None else int(groups.max()) + 1 if len(groups) else 0
            if recipe.trained_on == "pairs":
                if data.own_text is None:
                    raise TrainingError(
                        f"recipe {recipe.name!r} learns from pairs, and the data hold no text of a feature's own class"
                    )
                endpoint = (source, mean)
                source, mean = data.own_text, statistics.text_mean
            elif recipe.trained_on == "score":
                labelled = data.labelled
                if labelled is None:
                    raise TrainingError(f"recipe {recipe.name!r} learns from labels, and the data hold none")
        if len(source.shape) != 2 or source.shape[1] != statistics.dim or groups.shape != source.shape[:1]:
            raise TrainingError(
                f"{recipe.trained_on} features must be [N, {statistics.dim}] with one group each, "
                f"not {list(source.shape)} with {list(groups.shape)}"
            )
        digest = hashlib.sha256()
        for part in (source, *(endpoint or ())):
            for block in chain(part.split(PART), [mean]):
                if not torch.isfinite(block).all():
                    raise TrainingError(f"{recipe.trained_on} features hold NaN or infinity: capture them again")
                digest.update(block.contiguous().numpy().data)
        if labelled is not None:
            for labels in (labelled.target, labelled.valid, labelled.prior, labelled.class_weight):
                digest.update(labels.contiguous().numpy().data)
        try:
            held_out = validation_mask(count, config.val_fraction, seed)[groups]
        except ValueError as error:
            raise TrainingError(f"too few {what}: {error}") from error
        training, validation = (part.nonzero().squeeze(1) for part in (~held_out, held_out))
        if len(training) == 0 or len(validation) == 0:
            raise TrainingError(
                f"of {len(groups)} features {len(training)} are left to train on and {len(validation)} to validate with: "
                f"capture more images, or give another --val-fraction"
            )
        return cls(
            source,
            mean,
            recipe.scale_factor,
            training,
            validation,
            digest.hexdigest(),
            endpoint,
            recipe.noise_augmentation,
            labelled,
            # The score says little of features that are mostly noise, and no feature enters there.
            config.num_timesteps if labelled is None else recipe.start_timestep,
        )

    def whole(self) -> TrainingSet:
        """The same features, all of them to learn from."""
        return replace(self, training=torch.arange(len(self.source)))

    @property
    def dim(self) -> int:
        """D."""
        return self.source.shape[1]

    @property
    def paired(self) -> bool:
        """Whether it holds pairs."""
        return self.endpoint is not None

    @cached_property
    def positives(self) -> int:
        """How many annotations `training` has, at least 1. Needs labels."""
        assert self.labelled is not None
        return max(1, self.labelled.positives(self.training))

    def resident(self, device: torch.device) -> Tensor | None:
        """Return all normalised features [N, D] on the device, or None where batches are taken one by one.

        Those are pairs, features with labels, and many features on a CPU: they may be on disk and larger than its memory.
        """
        if self.paired or self.labelled is not None or (device.type == "cpu" and len(self.source) > BLOCK):
            return None
        return torch.cat([self[indices].to(device) for indices in torch.arange(len(self.source)).split(BLOCK)])

    def __getitem__(self, indices: Tensor) -> Tensor:
        """Return normalised features [n, D] of norm `scale_factor`, float32."""
        return normalize(self.source[indices].float(), self.mean, self.scale_factor)[0]

    def noise(self, indices: Tensor, gaussian: Tensor) -> Tensor:
        """Return what features are mixed with [n, D].

        It is standard normal `gaussian`, or with labels a share of it. Of pairs it is their endpoint with a noise of norm
        `noise_scale`·`scale_factor`.
        """
        if self.labelled is not None:
            return self.noise_scale * gaussian
        if self.endpoint is None:
            return gaussian
        visual, mean = self.endpoint
        z = normalize(visual[indices].float(), mean, self.scale_factor)[0]
        noise_norm = self.noise_scale * self.scale_factor / gaussian.shape[1] ** 0.5
        return rescale(z + noise_norm * gaussian, self.scale_factor)
