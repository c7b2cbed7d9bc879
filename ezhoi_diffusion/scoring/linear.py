"""`eszsl` and `gaussian_classes`: closed-form classifiers of unseen classes, added to EZ-HOI's logits.

Both learn a linear map from features to classes by way of the texts, without any iteration: the bar for learned maps.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from operator import add
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ezhoi_diffusion.artifact import Artifact
from ezhoi_diffusion.bridge import BridgeError
from ezhoi_diffusion.features.labels import labelled_shards
from ezhoi_diffusion.features.score import EzHoiScore
from ezhoi_diffusion.features.store import FeatureStore
from ezhoi_diffusion.rng import generator
from ezhoi_diffusion.schema import TensorSpec
from ezhoi_diffusion.scoring.bridge import WeightConfig, WeightedBridge, checked_number, load_artifact, score_files
from ezhoi_diffusion.scoring.moments import LabelMoments

if TYPE_CHECKING:
    from ezhoi_diffusion.features.batch import Pairs

ESZSL, GAUSSIAN_CLASSES = "eszsl", "gaussian_classes"
TENSORS = "linear.safetensors"
TABLE = {"centre": TensorSpec(torch.float64, "D"), "map": TensorSpec(torch.float64, "D C")}
PENALTY = 1.0  # of the maps, in units of the mean eigenvalue
SHRINKAGE = 0.5  # of the covariance towards a multiple of the identity
GRID = {"weight": (0.05, 0.1, 0.2)}


class LinearConfig(WeightConfig):
    """config.json."""

    permute_texts: bool


class LinearScore(WeightedBridge):
    """z -> z + weight · (x − centre)·M, with M [D, C] in units that make both terms vary equally at weight 1."""

    file = TENSORS
    grid = GRID
    centre: Tensor
    map: Tensor

    def __init__(self, artifact: Artifact) -> None:
        super().__init__(artifact)
        self.baseline = artifact.config["permute_texts"]

    def moved_logits(self, x: Tensor, logits: Tensor, pairs: Pairs | None) -> Tensor:
        """Add the linear term to logits [P, C]."""
        return logits + self.weight * (x - self.centre) @ self.map


def eszsl_map(moments: LabelMoments, texts: Tensor) -> tuple[Tensor, Tensor]:
    """Centre [D] and map [D, C] of Romera-Paredes & Torr, "An embarrassingly simple approach to zero-shot learning", ICML 2015.

    V = (XᵀX + γI)⁻¹ XᵀY S (SᵀS + λI)⁻¹ and M = V Sᵀ, for centred features X [N, D], labels Y [N, C'], and texts S [C', D] of
    the seen classes. A label has mean 0 and variance 1 over the pairs that know it, and is 0 for the others.

    Args:
        moments: Those of N pairs.
        texts: [C, D] float64, of all classes.
    """
    everything, seen = moments.background + moments.annotated, moments.positives > 0
    share = moments.positives[seen] / moments.known[seen]
    spread = (share * (1 - share)).clamp_min(1e-6).sqrt()
    # XᵀY; features need not be centred for it, as each label has the sum 0
    product = (moments.of_positives[seen].T - share * moments.of_known[seen].T) / spread
    half = torch.linalg.solve(penalized(everything.products), product @ texts[seen])
    return everything.mean, torch.linalg.solve(penalized(texts[seen].T @ texts[seen]), half.T).T @ texts.T


def gaussian_map(moments: LabelMoments, texts: Tensor) -> tuple[Tensor, Tensor]:
    """Centre [D] and map [D, C]: log-odds of each class against background, for Gaussians with a shared covariance Σ.

    M = Σ⁻¹(μ − μ_background) as in linear discriminant analysis (Hastie et al., "The elements of statistical learning", 4.3). The
    mean of a class without labels is predicted from its text, by ridge regression over the classes with labels.

    Args:
        moments: Those of N pairs.
        texts: [C, D] float64, of all classes.
    """
    background, labelled, count = moments.background, moments.labelled, moments.positives
    mean = moments.of_positives / count.clamp_min(1).unsqueeze(1)
    between = (mean - labelled.mean) * count.sqrt().unsqueeze(1)
    within = background.products + labelled.products - between.T @ between
    covariance = shrunk(within / (background.count + labelled.count))

    share = (count / count.sum()).unsqueeze(1)
    middle_text, middle = (share * texts).sum(0), (share * mean).sum(0)
    from_text = texts - middle_text
    moment = from_text.T @ (share * from_text)
    predicted = middle + from_text @ torch.linalg.solve(penalized(moment), from_text.T @ (share * (mean - middle)))
    mean = torch.where(count.unsqueeze(1) > 0, mean, predicted)
    return background.mean, torch.linalg.solve(covariance, (mean - background.mean).T)


def shrunk(covariance: Tensor) -> Tensor:
    """A covariance [D, D], moved by `SHRINKAGE` towards the multiple of the identity with the same trace."""
    typical = covariance.diagonal().mean()
    return (1 - SHRINKAGE) * covariance + SHRINKAGE * typical * torch.eye(len(covariance), dtype=covariance.dtype)


def penalized(moment: Tensor) -> Tensor:
    """A matrix of second moments [D, D] plus `PENALTY` times its mean eigenvalue."""
    return moment + PENALTY * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype)


def fit_eszsl(features: FeatureStore, weight: float = 0.1, permute_texts: bool = False) -> Artifact:
    """Learn a map from features by way of the texts to the labels of seen classes, background included, in closed form.

    Args:
        features: A capture of the train split.
        weight: Of the map's logits, which vary as much as EZ-HOI's at 1.
        permute_texts: Fit to the texts of other classes: a baseline that shows what the texts are worth.
    """
    return _fit(ESZSL, eszsl_map, features, weight, permute_texts)


def fit_gaussian_classes(features: FeatureStore, weight: float = 0.1, permute_texts: bool = False) -> Artifact:
    """Describe each class by a Gaussian with a shared covariance; texts predict the means of unseen classes.

    Args:
        features: A capture of the train split.
        weight: Of the log-odds against background, which vary as much as EZ-HOI's logits at 1.
        permute_texts: Fit to the texts of other classes: a baseline that shows what the texts are worth.
    """
    return _fit(GAUSSIAN_CLASSES, gaussian_map, features, weight, permute_texts)


def _fit(
    name: str,
    closed_form: Callable[[LabelMoments, Tensor], tuple[Tensor, Tensor]],
    features: FeatureStore,
    weight: float,
    permute_texts: bool,
) -> Artifact:
    if not isinstance(permute_texts, bool):
        raise BridgeError(f"{name}: permute_texts is true or false, not {permute_texts!r:.60}")
    config = {"weight": checked_number(name, {}, "weight", weight), "permute_texts": permute_texts}
    features.require_all_texts(f"{name} is fitted with")
    score, files = EzHoiScore.from_store(features), score_files(features)
    texts = normalize(score.matrix - score.matrix.mean(0))
    if permute_texts:
        texts = texts[torch.randperm(len(texts), generator=generator(0, "permuted texts"))]
    parts = (LabelMoments.of(shard["adapter_feat"], labels) for _, shard, labels in labelled_shards(features))
    moments = reduce(add, parts)
    centre, linear = closed_form(moments, texts)
    everything = moments.background + moments.annotated
    unit = everything.std_of(score.matrix.T) / everything.std_of(linear, centre).clamp_min(1e-12)
    return Artifact(name, config, {**files, TENSORS: {"centre": centre, "map": unit * linear}})


def load_eszsl(folder: Path | None) -> LinearScore:
    """Load the bridge in `folder`. Raises BridgeError."""
    return LinearScore(load_artifact(folder, ESZSL, {TENSORS: TABLE}, LinearConfig))


def load_gaussian_classes(folder: Path | None) -> LinearScore:
    """Load the bridge in `folder`. Raises BridgeError."""
    return LinearScore(load_artifact(folder, GAUSSIAN_CLASSES, {TENSORS: TABLE}, LinearConfig))
