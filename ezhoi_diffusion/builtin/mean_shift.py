"""The control that closes the modality gap without a network: the visual mean is exchanged for the text mean."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ezhoi_diffusion.bridge_plugin import BridgePlugin
from ezhoi_diffusion.errors import EzhoiDiffusionError

if TYPE_CHECKING:
    from torch import Tensor

    from ezhoi_diffusion.features.statistics import ModalityStatistics


@dataclass
class MeanShift:
    """x [P, D] -> |x| · unit(unit(x) − visual mean + text mean): Liang et al., NeurIPS 2022, with the norm kept."""

    statistics: ModalityStatistics
    provenance: dict[str, Any]
    context: dict[str, Tensor]
    row_by_row = True
    control = True

    def __call__(self, adapter_feat: Tensor) -> Tensor:
        """Shift rows, in their dtype and on their device."""
        from ezhoi_diffusion.features.statistics import unit

        shift = (self.statistics.text_mean - self.statistics.visual_mean).to(adapter_feat.device)
        shifted = unit(unit(adapter_feat.float()) + shift) * adapter_feat.float().norm(dim=-1, keepdim=True)
        result: Tensor = shifted.to(adapter_feat.dtype)
        return result


def load(folder: Path | None) -> MeanShift:
    """The shift between the statistics of the bridge in `folder`. Raises BridgeError, EzhoiDiffusionError."""
    from ezhoi_diffusion.artifact import CONTEXT, BridgeError
    from ezhoi_diffusion.diffusion.artifact import STATISTICS, read_artifact
    from ezhoi_diffusion.features.statistics import ModalityStatistics

    if folder is None:
        raise EzhoiDiffusionError("mean_shift takes its means from a trained bridge: give --bridge DIR")
    config, files = read_artifact(folder)
    try:
        statistics = ModalityStatistics.from_tensors(files[STATISTICS])
    except (KeyError, TypeError, ValueError) as error:
        raise BridgeError(f"{folder / STATISTICS} holds no statistics ({error}); train anew") from error
    if not statistics.visual_known:
        raise BridgeError(
            f"mean_shift needs the visual mean, and {folder} was imported without: import it again together with the file of "
            f"visual embeddings, or take a bridge trained on captured features"
        )
    return MeanShift(statistics, config.provenance, files.get(CONTEXT, {}))


plugin = BridgePlugin("mean_shift", load)
