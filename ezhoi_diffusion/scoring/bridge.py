"""What bridges that act on the score have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import torch
from torch import Tensor

from ezhoi_diffusion.artifact import Artifact, ArtifactConfig
from ezhoi_diffusion.bridge import Bridge, BridgeError
from ezhoi_diffusion.features.contents import SCORE as SCORE_TABLE
from ezhoi_diffusion.features.score import NEEDED, EzHoiScore
from ezhoi_diffusion.features.store import FeatureStore
from ezhoi_diffusion.schema import LARGEST, Table

if TYPE_CHECKING:
    from ezhoi_diffusion.features.batch import Pairs

SCORE = "score.safetensors"


class ScoreBridge(Bridge):
    """Maps features to the nearest ones with the logits that `moved_logits` chooses (`EzHoiScore.feature`).

    Args:
        artifact: An artefact with the files of `score_files`.

    Raises:
        ScoreError: Not all logits can be had.
    """

    row_by_row = True
    matrix: Tensor
    inverse: Tensor
    allowed: Tensor

    def __init__(self, artifact: Artifact) -> None:
        super().__init__()
        score = EzHoiScore(**artifact.files[SCORE])
        self.register_buffer("matrix", score.matrix, persistent=False)  # [C, D]
        self.register_buffer("inverse", score.inverse, persistent=False)  # [D, C]
        self.register_buffer("allowed", score.object_to_target, persistent=False)  # [O, C]
        self.provenance, self.context = artifact.provenance, artifact.context

    @abstractmethod
    def moved_logits(self, x: Tensor, logits: Tensor, pairs: Pairs | None) -> Tensor:
        """The logits that the returned features get.

        Args:
            x: Pair features [P, D], float64.
            logits: Their logits [P, C], float64.
            pairs: As in `forward`.

        Returns:
            [P, C] float64.
        """

    def share_constants(self, other: ScoreBridge) -> None:
        """Hold the constants of EZ-HOI's score that equal those of another bridge once for both. Many bridges come of one run."""
        for name in ("matrix", "inverse", "allowed"):
            own, same = getattr(self, name), getattr(other, name)
            if own.device == same.device and torch.equal(own, same):
                setattr(self, name, same)

    def allowed_verbs(self, pairs: Pairs) -> Tensor:
        """[P, C] bool, the verbs of each pair's object."""
        return self.allowed[pairs.objects.to(self.allowed.device)]  # a replay leaves pairs on the CPU

    @torch.no_grad()
    def forward(self, adapter_feat: Tensor, pairs: Pairs | None = None) -> Tensor:
        """Move features [P, D]."""
        with torch.autocast(adapter_feat.device.type, enabled=False):
            x = adapter_feat.double()
            logits = x @ self.matrix.T
            moved = x + (self.moved_logits(x, logits, pairs) - logits) @ self.inverse.T  # EzHoiScore.feature
            return moved.to(adapter_feat.dtype)


class WeightedBridge(ScoreBridge):
    """A bridge on the score with a weight. The tensors of `file` become buffers of the same names."""

    file: str
    settings = ("weight",)

    def __init__(self, artifact: Artifact) -> None:
        super().__init__(artifact)
        self.name = artifact.bridge
        self.weight = float(artifact.config["weight"])
        for name, tensor in artifact.files[self.file].items():
            self.register_buffer(name, tensor, persistent=False)

    def apply_settings(self, settings: Mapping[str, Any]) -> None:
        """Take over a weight of at least 0. Raises BridgeError for another value."""
        self.weight = checked_number(self.name, settings, "weight", self.weight)


def score_files(store: FeatureStore) -> dict[str, dict[str, Tensor]]:
    """The files that `ScoreBridge` reads.

    Raises:
        ScoreError: The store lacks a constant of the score, or not all logits can be had.
    """
    score = EzHoiScore.from_store(store)
    _ = score.inverse  # where it does not exist, the fit ends here and not every later command
    return {SCORE: {name: store.ezhoi[name] for name in NEEDED}}


class WeightConfig(ArtifactConfig):
    """config.json of a bridge with a weight."""

    weight: Annotated[float, msgspec.Meta(ge=0, le=LARGEST)]


def load_artifact(folder: Path | None, name: str, files: Mapping[str, Table], schema: Any = WeightConfig) -> Artifact:
    """Read the artefact of the bridge `name`.

    Args:
        folder: Where it was saved.
        name: The name of the bridge.
        files: The tensors of its files beside score.safetensors.
        schema: What config.json holds.

    Raises:
        BridgeError: There is no such artefact in the folder, or no folder.
    """
    if folder is None:
        raise BridgeError(
            f"{name} needs its folder: `ezhoi-diffusion train FEATURES --bridge {name} --out DIR` makes it"
        )
    return Artifact.load(folder, name, {SCORE: SCORE_TABLE, **files}, schema)


def checked_number(bridge: str, settings: Mapping[str, Any], name: str, default: float) -> float:
    """A setting that is a number of at least 0. Raises BridgeError for another value."""
    value = settings.get(name, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        raise BridgeError(f"{bridge}: {name} is a number of at least 0, not {value!r:.60}")
    return float(value)
