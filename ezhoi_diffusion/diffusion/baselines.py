"""Bridges without a network: a gain of any other bridge counts over all of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ezhoi_diffusion.artifact import Artifact, read_config
from ezhoi_diffusion.bridge import Bridge, BridgeError
from ezhoi_diffusion.diffusion.artifact import STATISTICS, read_artifact
from ezhoi_diffusion.features.statistics import TABLE, ModalityStatistics
from ezhoi_diffusion.features.store import FeatureStore

if TYPE_CHECKING:
    from ezhoi_diffusion.features.batch import Pairs


class Identity(Bridge):
    """Returns the features as they are. A comparison in which it differs from `none` is broken."""

    row_by_row = True
    baseline = True

    def forward(self, adapter_feat: Tensor, pairs: Pairs | None = None) -> Tensor:
        """Return `adapter_feat` [P, D] itself."""
        return adapter_feat


MEAN_SHIFT = "mean_shift"


class MeanShift(Bridge):
    """Exchanges the visual mean for the text mean and keeps the norm: |x| · unit(unit(x) − visual mean + text mean).

    Source: Liang et al., "Mind the gap", NeurIPS 2022; there without the norm.
    """

    row_by_row = True
    baseline = True
    shift: Tensor

    def __init__(
        self, statistics: ModalityStatistics, provenance: dict[str, Any], context: Mapping[str, Tensor]
    ) -> None:
        super().__init__()
        self.provenance = provenance
        self.context = context
        self.register_buffer("shift", statistics.text_mean - statistics.visual_mean, persistent=False)

    @torch.no_grad()
    def forward(self, adapter_feat: Tensor, pairs: Pairs | None = None) -> Tensor:
        """Shift features [P, D]."""
        x = adapter_feat.float()
        shifted = F.normalize(F.normalize(x, dim=-1) + self.shift.to(x.device), dim=-1)
        result: Tensor = shifted * x.norm(dim=-1, keepdim=True)
        return result.to(adapter_feat.dtype)

    @classmethod
    def from_pretrained(cls, folder: Path) -> MeanShift:
        """Take the means in `folder`: of a fit, or those stored with a diffusion bridge. Raises BridgeError."""
        fitted = read_config(folder)["bridge"] == MEAN_SHIFT
        artifact = Artifact.load(folder, MEAN_SHIFT, {STATISTICS: TABLE}) if fitted else read_artifact(folder)[1]
        statistics = ModalityStatistics.from_tensors(artifact.files[STATISTICS])
        if not statistics.visual_known:
            raise BridgeError(
                f"mean_shift needs the visual mean, and {folder} was imported without one: import it together with the file "
                f"of visual embeddings, or take a bridge that was trained on captured features"
            )
        return cls(statistics, artifact.provenance, artifact.context)


def fit_mean_shift(features: FeatureStore) -> Artifact:
    """The means of pair features and texts. It has no options and reads no labels."""
    return Artifact(MEAN_SHIFT, files={STATISTICS: features.statistics().tensors()})
