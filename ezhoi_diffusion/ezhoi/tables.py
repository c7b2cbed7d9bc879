"""Read from a run: its classes, which of them are rare or unseen, and the constants of EZ-HOI's score."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from ezhoi_diffusion.ezhoi.run import EzHoiRun

RARE_BELOW = 10  # annotations in the training set, as HICO-DET defines it


def class_groups(run: EzHoiRun) -> dict[str, Tensor]:
    """Return group name -> interaction classes [k]: full, rare, non-rare, and with --zs unseen and seen.

    V-COCO has actions instead of interactions, and only the group `full`.
    """
    counts = getattr(run.engine._train_loader.dataset.dataset, "anno_interaction", None)
    if counts is None:
        return {"full": torch.arange(run.model.num_classes)}
    training = torch.as_tensor(counts)
    every = torch.arange(len(training))
    groups = {"full": every}
    if getattr(run.args, "zs", False):
        unseen = torch.zeros(len(training), dtype=torch.bool)
        unseen[torch.as_tensor(run.model.filtered_hoi_idx, dtype=torch.long)] = True
        groups |= {"unseen": every[unseen], "seen": every[~unseen]}
    rare = training < RARE_BELOW
    groups |= {"rare": every[rare], "non-rare": every[~rare]}
    return {name: index for name, index in groups.items() if len(index)}


def interaction_names(run: EzHoiRun) -> list[str] | None:
    """Return EZ-HOI's name of each interaction class, from its module `hico_text_label`; None where it has none.

    V-COCO's names are those of its data set, e.g. `hit instr`.
    """
    if run.args.dataset == "vcoco":
        return [str(name) for name in run.engine._train_loader.dataset.dataset.actions]
    sentences = getattr(sys.modules.get("hico_text_label"), "hico_text_label", None)
    if not isinstance(sentences, dict) or run.args.dataset != "hicodet":
        return None
    table = score_lookup(run)
    names = [""] * (int(table.max()) + 1)
    for other, verb in (table >= 0).nonzero().tolist():
        sentence = str(sentences.get((verb, other), f"verb {verb}, object {other}"))
        names[int(table[other, verb])] = sentence.removeprefix("a photo of ")
    return names


def score_lookup(run: EzHoiRun) -> Tensor:
    """Return int64 interaction classes [objects, verbs], -1 where an object has no such verb. V-COCO's are its actions."""
    objects = len(run.model.object_class_to_target_class)
    lookup = torch.as_tensor(run.model.object_n_verb_to_interaction)[-objects:]  # V-COCO's has one more, for no object
    classes = torch.arange(lookup.shape[1]) if run.args.dataset == "vcoco" else lookup
    return torch.where(lookup.isnan(), -1, classes).long()


def score_tables(run: EzHoiRun, text: Tensor) -> dict[str, Tensor]:
    """Return the tensors with which EZ-HOI turns adapter_feat into scores.

    Args:
        run: The run.
        text: Text features [N_sel, D].

    Returns:
        text [N_sel, D], label [N_sel, num_classes], sample_lens [num_classes], logit_scale [], hyper_lambda [],
        object_to_target [objects, num_classes] bool, object_n_verb_to_interaction [objects, verbs] with -1 for none,
        for HICO-DET text_interaction [N_sel], and each group of interaction classes as `classes/NAME`; all on the CPU.
    """
    model = run.model
    label = model.label_HO_eval if hasattr(model, "label_HO_eval") else model.label_HO
    objects = model.object_class_to_target_class
    allowed = torch.zeros((len(objects), model.num_classes), dtype=torch.bool)
    for index, targets in enumerate(objects):
        allowed[index, list(targets)] = True
    tables = {
        "text": text.float(),
        "label": label.float(),
        "sample_lens": model.sample_lens_HO.float(),
        "hyper_lambda": torch.tensor(float(model.hyper_lambda)),
        "object_to_target": allowed,
        "object_n_verb_to_interaction": score_lookup(run),
    }
    if hasattr(model, "logit_scale_HO"):  # absent where EZ-HOI predicts weights instead
        tables["logit_scale"] = model.logit_scale_HO.float()
    selected = torch.as_tensor(getattr(model, "select_HOI_index", ()), dtype=torch.long)
    if run.args.dataset == "hicodet" and len(selected) == len(text):
        tables["text_interaction"] = selected
    tables |= {f"classes/{name}": index for name, index in class_groups(run).items()}
    return {name: tensor.detach().cpu() for name, tensor in tables.items()}
