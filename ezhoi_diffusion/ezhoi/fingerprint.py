"""The fingerprint of an EZ-HOI run: the facts that must be equal for a bridge to be valid."""

from __future__ import annotations

import hashlib
from argparse import Namespace
from collections.abc import Iterable, Mapping
from pathlib import PurePath

import torch
from torch import Tensor, nn

from ezhoi_diffusion.features.fingerprint import OPTIONS, Fingerprint


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
