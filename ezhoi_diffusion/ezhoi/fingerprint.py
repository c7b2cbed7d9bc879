"""Which host a feature came from: what has to be equal for a bridge to be valid there."""

from __future__ import annotations

import hashlib
from argparse import Namespace
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import PurePath
from typing import Any

import torch
from torch import Tensor, nn

# Flags that change adapter_feat or the text features and leave no trace in the weights or the context vectors. Not
# among them: what decides which pairs there are, and what changes the score alone.
OPTIONS = ("act_descriptor", "de_txtcls", "finetune_allcls_utpl", "pt_begin_layer", "vlmtxt", "without_unseen_name")


@dataclass(frozen=True)
class Fingerprint:
    """Facts about a host that change adapter_feat or the text features, as JSON holds them."""

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
    options: dict[str, Any]  # OPTIONS as they were given, None where the host lacks one; `unseen_pt_inj` as a zs_type

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return asdict(self)


def context_vectors(model: nn.Module) -> dict[str, Tensor]:
    """The learned vectors that the prompt learner keeps in plain lists, by `name.index`.

    They are in no state dict, no checkpoint and no optimiser: each process draws them anew from the global
    random generator, so two runs agree only where their generators did.
    """
    learner = getattr(getattr(model, "clip_head", None), "prompt_learner", None)
    lists = (
        ((name, value) for name, value in vars(learner).items() if isinstance(value, (list, tuple))) if learner else ()
    )
    return {
        f"{name}.{index}": vector.detach()
        for name, value in lists
        for index, vector in enumerate(value)
        if isinstance(vector, Tensor)
    }


def restore_context(model: nn.Module, stored: dict[str, Tensor]) -> None:
    """Put stored context vectors into a model, in place. Raises ValueError where they do not fit."""
    own = context_vectors(model)
    if {k: v.shape for k, v in own.items()} != {k: v.shape for k, v in stored.items()}:
        raise ValueError(f"the stored context vectors {sorted(stored)} do not fit this host's {sorted(own)}")
    for name, vector in own.items():
        vector.copy_(stored[name])


def _digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        data = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tuple(data.shape)} {data.dtype}\n".encode())
        digest.update(data.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def fingerprint(model: nn.Module, args: Namespace) -> Fingerprint:
    """Read a host's fingerprint off its model and flags."""
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
        weights=_digest(model.state_dict().items()),
        context=_digest(context_vectors(model).items()),
        # without --zs too, zs_type chooses which classes borrow prompts, and from whom
        options={name: getattr(args, name, None) for name in OPTIONS}
        | {"unseen_pt_inj": args.zs_type if getattr(args, "unseen_pt_inj", False) else None},
    )
