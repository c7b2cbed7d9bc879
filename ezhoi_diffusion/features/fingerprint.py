"""The fingerprint of an EZ-HOI run: facts that must be equal for a bridge to be valid."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

# Flags that change adapter_feat or the text features and leave no trace in the weights or the context vectors.
# Flags that choose the pairs, or change the score only, do not belong here.
OPTIONS = ("act_descriptor", "de_txtcls", "finetune_allcls_utpl", "pt_begin_layer", "vlmtxt", "without_unseen_name")


@dataclass(frozen=True)
class Fingerprint:
    """Facts about a run that change adapter_feat or the text features."""

    backbone: str
    dim: int
    dataset: str
    zs_type: str | None  # None without --zs
    num_classes: int
    text_rows: int  # N_sel
    logits_type: str
    img_align: bool
    txt_align: bool
    weights: str  # SHA-256 of the loaded state dict
    context: str  # SHA-256 of the context vectors, which no checkpoint holds
    options: dict[str, Any]  # OPTIONS, None where the script lacks the flag; and zs_type under `unseen_pt_inj`

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return asdict(self)
