"""What the tensors of a feature store are: of a shard, and of ezhoi.safetensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ezhoi_diffusion.schema import LARGEST, Table, TensorSpec, box_problem, table_of, tensors_problem

FLOAT, WHOLE, INDEX, BOOL = torch.float32, torch.int32, torch.int64, torch.bool
MAX_PIXELS = 65_536.0
MAX_FEATURE = 1e6  # of features, texts and logits; those of EZ-HOI stay below 100
# Sizes: N_sel texts, width D, C target classes, O object classes, V verbs, A options of an annotation.
SCORE: Table = {
    "text": TensorSpec(FLOAT, "N_sel D", -MAX_FEATURE, MAX_FEATURE),
    "label": TensorSpec(FLOAT, "N_sel C", 0, 1),
    "sample_lens": TensorSpec(FLOAT, "C", 1e-6, MAX_FEATURE),  # logits are divided by it
    "logit_scale": TensorSpec(FLOAT, "", -MAX_FEATURE, MAX_FEATURE),
    "hyper_lambda": TensorSpec(FLOAT, "", 0, 100),  # an exponent
    "object_to_target": TensorSpec(BOOL, "O C"),
}
EZHOI: Table = {
    "text_mean": TensorSpec(FLOAT, "D", -1, 1, optional=True),
    **{name: spec._replace(optional=name != "text") for name, spec in SCORE.items()},
    "object_n_verb_to_interaction": TensorSpec(INDEX, "O V", -1, optional=True),
    "text_interaction": TensorSpec(INDEX, "N_sel", 0, optional=True),
}
SHARD: Table = {
    "adapter_feat": TensorSpec(FLOAT, "rows D", -MAX_FEATURE, MAX_FEATURE),
    "logits": TensorSpec(FLOAT, "rows C", -MAX_FEATURE, MAX_FEATURE),
    "labels": TensorSpec(BOOL, "rows C"),
    "pairing": TensorSpec(WHOLE, "rows 2", 0, "boxes"),
    "objects": TensorSpec(WHOLE, "rows", 0, "O"),
    "boxes": TensorSpec(FLOAT, "boxes 4", -MAX_PIXELS, MAX_PIXELS),  # a detector may look beyond the image
    "scores": TensorSpec(FLOAT, "boxes", 0, 1),
    "classes": TensorSpec(WHOLE, "boxes", 0, "O"),
    "sizes": TensorSpec(WHOLE, "images 2", 1, MAX_PIXELS),
    "gt_boxes": TensorSpec(FLOAT, "annotations 2 4", -MAX_PIXELS, MAX_PIXELS),
    "gt_hoi": TensorSpec(WHOLE, "annotations", 0, "K"),
}
PARTITIONS = (("rare", "non-rare"), ("unseen", "seen"))  # of all interaction classes


def ezhoi_problem(tensors: Mapping[str, Tensor], *, imported: bool) -> str | None:
    """The problem with the content of ezhoi.safetensors, or None. Most of it is absent where no score can be computed."""
    sizes: dict[str, int] = {}
    groups = {name: TensorSpec(INDEX, f"of_{name}", 0) for name in tensors if name.startswith("classes/")}
    context = table_of({name: x for name, x in tensors.items() if name.startswith("context/")})
    table = {**EZHOI, **groups, **context}
    if "logit_scale" not in tensors:  # EZ-HOI predicts weights then, and its labels may be of other rows
        table["label"] = table["label"]._replace(shape="labels C")
    problem = tensors_problem(tensors, table, sizes)
    if problem is None and not imported and not tensors["text"].numel():
        problem = "text is empty"
    return problem or _table_problem(tensors, sizes) or _groups_problem(tensors)


def _table_problem(tensors: Mapping[str, Tensor], sizes: Mapping[str, int]) -> str | None:
    """The problem with the interaction of each text, or of each object and verb, or None."""
    interaction, count = tensors.get("text_interaction"), num_interactions(tensors)
    if interaction is not None and count is not None and (interaction >= count).any():
        return f"text_interaction has interaction {int(interaction.max())} of {count}"
    table = tensors.get("object_n_verb_to_interaction")
    if table is None or not table.numel():
        return None
    if int(table.max()) >= sizes["O"] * sizes["V"]:
        return f"object_n_verb_to_interaction has interaction {int(table.max())} of {sizes['O']} objects and {sizes['V']} verbs"
    return None


def num_interactions(tensors: Mapping[str, Tensor]) -> int | None:
    """K, the number of interaction classes; None where nothing tells."""
    table, full = tensors.get("object_n_verb_to_interaction"), tensors.get("classes/full")
    return len(full) if full is not None else int(table.max()) + 1 if table is not None and table.numel() else None


def _groups_problem(tensors: Mapping[str, Tensor]) -> str | None:
    """The problem with the groups of interaction classes, or None."""
    groups = {name.removeprefix("classes/"): x for name, x in tensors.items() if name.startswith("classes/")}
    if not groups:
        return None
    full, table = groups.get("full"), tensors.get("object_n_verb_to_interaction")
    if full is None:
        return "it has groups of classes without classes/full"
    last = int(table.max()) if table is not None and table.numel() else -1
    if not torch.equal(full, torch.arange(len(full), device=full.device)) or len(full) <= last:
        return f"classes/full has {len(full)} classes, and is not 0, 1, 2, … with the last interaction, {last}, in it"
    for parts in PARTITIONS:
        found = [groups[part] for part in parts if part in groups]
        if found and not torch.equal(torch.cat(found).sort().values, full):
            return f"classes/{parts[0]} and classes/{parts[1]} do not make up classes/full"
    return None


def shard_problem(
    tensors: Mapping[str, Tensor], images: Sequence[Mapping[str, Any]], ezhoi: Mapping[str, Tensor], *, imported: bool
) -> str | None:
    """The problem with the content of a shard, or None.

    Args:
        tensors: What it holds.
        images: Its entries in the index.
        ezhoi: Content of ezhoi.safetensors, which says how many classes there are.
        imported: An imported shard may lack all but adapter_feat.
    """
    sizes = {key: sum(image[key] for image in images) for key in ("rows", "boxes", "annotations")}
    sizes |= {"images": len(images), "D": ezhoi["text"].shape[1]}
    interactions, allowed = num_interactions(ezhoi), ezhoi.get("object_to_target")
    many = int(LARGEST)  # where nothing tells, nothing is looked up either
    sizes |= {"K": many if interactions is None else interactions, "O": many if allowed is None else len(allowed)}
    if allowed is not None:
        sizes["C"] = allowed.shape[1]
    table = SHARD
    if imported:
        table = {name: spec._replace(optional=name != "adapter_feat") for name, spec in SHARD.items()}
    problem = tensors_problem(tensors, table, sizes)
    for name in ("boxes", "gt_boxes"):
        if problem is None and name in tensors:
            problem = box_problem(name, tensors[name])
    if problem is None and "pairing" in tensors:
        boxes, rows = (torch.tensor([image[key] for image in images], device="cpu") for key in ("boxes", "rows"))
        limit = boxes.repeat_interleave(rows)
        if (tensors["pairing"] >= limit[:, None]).any():
            problem = "pairing names boxes that do not exist"
    return problem
