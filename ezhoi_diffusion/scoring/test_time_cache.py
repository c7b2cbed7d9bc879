"""`test_time_cache`: the test pairs that EZ-HOI is surest of, as examples of their classes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ezhoi_diffusion.artifact import Artifact
from ezhoi_diffusion.bridge import BridgeError
from ezhoi_diffusion.features.labels import pair_priors
from ezhoi_diffusion.features.rows import StoredRows
from ezhoi_diffusion.features.score import EzHoiScore
from ezhoi_diffusion.features.store import FeatureStore
from ezhoi_diffusion.features.unlabelled import learns_from_test_images
from ezhoi_diffusion.schema import TensorSpec
from ezhoi_diffusion.scoring.bridge import WeightedBridge, checked_number, load_artifact, score_files
from ezhoi_diffusion.scoring.moments import Scatter, std_of
from ezhoi_diffusion.scoring.surest import Surest

if TYPE_CHECKING:
    from ezhoi_diffusion.features.batch import Pairs

NAME = "test_time_cache"
TENSORS = "cache.safetensors"
TABLE = {
    "mean": TensorSpec(torch.float64, "D"),
    "cached": TensorSpec(torch.float64, "C K D", -1, 1),
    "unit": TensorSpec(torch.float64, "", 0),
}
COUNT = 8
SHARPNESS = 5.5  # β of Zhang et al.


class TestTimeCache(WeightedBridge):
    """z -> z + weight·unit·(similarity to the cached pairs of a class), for the classes of the pair's object.

    Source: the cache model of Zhang et al., "Tip-Adapter" (ECCV 2022), filled from test images as in Karmanov et al.,
    "Efficient test-time adaptation of vision-language models" (CVPR 2024). Theirs grows from image to image, so a result depends
    on the order of the images. This one is filled from all of them before the first is scored.
    """

    __test__ = False  # no test case, whatever its name says
    needs_pairs = True
    protocol = "test-transductive"
    file = TENSORS
    mean: Tensor  # [D]
    cached: Tensor  # [C, K, D]
    unit: Tensor  # []

    def moved_logits(self, x: Tensor, logits: Tensor, pairs: Pairs | None) -> Tensor:
        """Add the similarities to the logits of classes that the object allows, [P, C]."""
        assert pairs is not None
        similar = self.weight * self.unit * similarity(x - self.mean, self.cached)
        return logits + torch.where(self.allowed_verbs(pairs), similar, 0.0)


def similarity(x: Tensor, cached: Tensor) -> Tensor:
    """Mean of exp(−β(1 − cos)) between features and the cached features of each class.

    Args:
        x: Features [P, D], float64.
        cached: Directions [C, K, D], float64; zeros where a class has fewer than K.

    Returns:
        [P, C] float64; 0 for a class without cached features.
    """
    filled = cached.any(2)  # [C, K]
    kernel = torch.exp(SHARPNESS * (torch.einsum("pd,ckd->pck", normalize(x), cached) - 1))
    mean: Tensor = (kernel * filled).sum(2) / filled.sum(1).clamp_min(1)
    return mean


def load(folder: Path | None) -> TestTimeCache:
    """Load the bridge in `folder`. Raises BridgeError."""
    return TestTimeCache(load_artifact(folder, NAME, {TENSORS: TABLE}))


@learns_from_test_images
def fit(features: FeatureStore, weight: float = 0.1, count: int = COUNT) -> Artifact:
    """Cache the test pairs that EZ-HOI is surest of, as examples of their classes.

    It needs a capture of the test split, and sees no annotation. Results are test-transductive: compare them with methods that
    see all test images before they score one.

    Args:
        features: A capture of the test split.
        weight: Of the similarities, which vary as much as EZ-HOI's logits at 1.
        count: The most examples of a class.

    Raises:
        BridgeError: `count` is no whole number from 1.
    """
    weight = checked_number(NAME, {}, "weight", weight)
    if type(count) is not int or count < 1:
        raise BridgeError(f"{NAME}: count is a whole number from 1, not {count!r:.60}")
    score = EzHoiScore.from_store(features)
    total, spread, seen = torch.zeros(features.text.shape[1], dtype=torch.float64), Scatter.of(torch.zeros(0, 1)), 0
    surest = Surest.none(len(score.matrix))
    for x, possible, prior in _blocks(features, score):
        logits = x @ score.matrix.T
        total, spread = total + x.sum(0), spread + Scatter.of(logits.reshape(-1, 1))
        confidence = logits.sigmoid() * prior.unsqueeze(1) * possible
        surest, seen = surest.among(seen + torch.arange(len(x)), confidence, count), seen + len(x)
    mean = total / seen
    cached = examples(surest, StoredRows(features), mean)
    similar = std_of(similarity(x - mean, cached)[possible] for x, possible, _ in _blocks(features, score))
    unit = spread.std / similar if similar > 0 else torch.zeros(())
    tensors = {"mean": mean, "cached": cached, "unit": unit.double()}
    return Artifact(NAME, {"weight": weight, "count": count}, {**score_files(features), TENSORS: tensors})


def _blocks(features: FeatureStore, score: EzHoiScore) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield features [n, D] float64, the classes that the pairs may have [n, C], and their priors [n]."""
    for entry, shard in zip(features.index["shards"], features.shards(), strict=True):
        possible = score.object_to_target[shard["objects"].long()]
        yield shard["adapter_feat"].double(), possible, pair_priors(entry, shard)


def examples(surest: Surest, features: Tensor | StoredRows, mean: Tensor) -> Tensor:
    """[C, K, D] float64, directions from the mean [D] of the surest features of each class; 0 for those of confidence 0."""
    classes_first = surest.rows.T
    directions = normalize(features[classes_first.flatten()].double() - mean)
    found: Tensor = directions.unflatten(0, classes_first.shape) * (surest.confidence.T > 0).unsqueeze(2)
    return found
