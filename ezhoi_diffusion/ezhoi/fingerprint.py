"""The fingerprint of an EZ-HOI run: the facts that must be equal for a bridge to be valid."""

from __future__ import annotations

import hashlib
from argparse import Namespace
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import PurePath
from typing import Any

import torch
from torch import Tensor, nn

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


def fingerprint(model: nn.Module, args: Namespace) -> Fingerprint:
    """Read the fingerprint from an unwrapped detector and EZ-HOI's flags."""
    labels = getattr(model, "label_HO_eval", None)
    labels = labels if labels is not None else getattr(model, "label_HO", None)
    return Fingerprint(
        backbone=PurePath(getattr(args, "clip_dir_vit", "")).stem,
        dim=int(getattr(model, "visual_output_dim", 0)),
        dataset=str(getattr(args, "dataset", "")),
        zs_type=str(args.zs_type) if getattr(args, "zs", False) else None,
        num_classes=int(getattr(model, "num_classes", 0)),
        text_rows=int(labels.shape[0]) if isinstance(labels, Tensor) else 0,
        logits_type=str(getattr(model, "logits_type", "")),
        img_align=bool(getattr(model, "img_align", False)),
        txt_align=bool(getattr(model, "txt_align", False)),
        weights=_sha256(model.state_dict().items()),
        context=_sha256(context_vectors(model).items()),
        # even without --zs, zs_type decides which classes borrow prompts from which others
        options={name: getattr(args, name, None) for name in OPTIONS}
        | {"unseen_pt_inj": args.zs_type if getattr(args, "unseen_pt_inj", False) else None},
    )


def context_vectors(model: nn.Module) -> dict[str, Tensor]:
    """Return the learned vectors that the prompt learner keeps in plain lists, by `name.index`.

    No state dict, checkpoint or optimizer holds them. Each process draws them from the global random generator, so two
    runs have equal vectors only where their generators were in the same state.
    """
    learner = getattr(getattr(model, "clip_head", None), "prompt_learner", None)
    return {
        f"{name}.{index}": vector.detach()
        for name, value in (vars(learner).items() if learner is not None else ())
        if isinstance(value, (list, tuple))
        for index, vector in enumerate(value)
        if isinstance(vector, Tensor)
    }


def restore_context(model: nn.Module, stored: Mapping[str, Tensor]) -> None:
    """Copy stored context vectors into a model, in place.

    Raises:
        ValueError: Their names or shapes differ from the model's.
    """
    own = context_vectors(model)
    if {k: v.shape for k, v in own.items()} != {k: v.shape for k, v in stored.items()}:
        raise ValueError(f"the stored context vectors {sorted(stored)} do not fit this model's {sorted(own)}")
    for name, vector in own.items():
        vector.copy_(stored[name])


def _sha256(tensors: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        data = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tuple(data.shape)} {data.dtype}\n".encode())
        digest.update(data.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
