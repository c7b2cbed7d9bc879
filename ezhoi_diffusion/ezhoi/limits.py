"""Flags with which the published EZ-HOI cannot run, known from its source, so that nobody waits for the crash."""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ezhoi_diffusion.errors import EzhoiDiffusionError

Flags = Mapping[str, Any]  # None for a flag that the script does not have


class UnsupportedError(EzhoiDiffusionError):
    """EZ-HOI itself cannot run with these flags, or not in this kind of run."""


class Limit(NamedTuple):
    """A combination of flags that EZ-HOI cannot run."""

    flag: str  # as the user writes it; {name} stands for the value of a flag
    applies: Callable[[Flags], Any]
    reason: str  # what happens in EZ-HOI, and what to do instead


def _when_set(flag: str, reason: str) -> Limit:
    return Limit(f"--{flag}", lambda a: a[flag], f"{reason}: leave it out")


def _evaluates(a: Flags) -> bool:
    return bool(a["eval"] or a["cache"])


LIMITS = (
    # -- in any run --------------------------------------------------------------------------------------------------
    Limit(
        "--dataset swig",
        lambda a: a["dataset"] == "swig",
        "main() calls build_dataset, which is not in the repository: use hicodet or vcoco",
    ),
    Limit(
        "--num_classes 600",
        lambda a: a["dataset"] == "hicodet" and a["num_classes"] == 600,
        "the label matrix is still made by verb, so 483 of its columns are empty and their logits 0/0: use --num_classes 117",
    ),
    Limit(
        "--dataset vcoco --num_classes {num_classes}",
        lambda a: a["dataset"] == "vcoco" and a["num_classes"] in (117, 236),
        "main() knows only V-COCO's 24 actions, and the default is 117: give --num_classes 24",
    ),
    Limit(
        "--logits_type {logits_type}",
        lambda a: a["logits_type"] and a["logits_type"] not in ("HO", "HO+U", "U"),
        "forward() has visual features for HO, HO+U and U only, not for its own default: use --logits_type HO, as the "
        "published scripts do",
    ),
    Limit(
        "(no --txtcls_pt)",
        lambda a: a["txtcls_pt"] is False,
        "forward() needs a pair of text features, and without --txtcls_pt the text encoder returns one: add --txtcls_pt",
    ),
    _when_set("fix_txt_pt", "forward() uses origin_ctx, which it sets in another branch only"),
    _when_set("clip_test", "forward() uses origin_ctx, which it sets in another branch only"),
    _when_set("seperate_pre_pt", "the prompt learner then returns no origin_ctx, which forward() indexes"),
    _when_set("init_txtcls_pt", "the prompt learner then returns no origin_ctx, which forward() indexes"),
    _when_set("txtcls_descrip", "the text encoder then asks for the length of prompts that it was not given"),
    _when_set("img_descrip_prompt", "forward() reads text_descrip from the targets, and no data set puts it there"),
    _when_set("use_consistloss", "compute_roi_embeddings concatenates pair priors that nothing fills"),
    Limit(
        "--multi_cross",
        lambda a: a["multi_cross"] and a["use_insadapter"],
        "the adapters of the image encoder then need a text context that nothing passes: leave it out",
    ),
    Limit(
        "--vlmtxt llava2",
        lambda a: a["vlmtxt"] == "llava2",
        "it looks up HICO-DET's pairs in V-COCO's table, which has 19 of 600: use --vlmtxt llava",
    ),
    Limit(
        "--d_detr true",
        lambda a: a["d_detr"],
        "build_model_d_detr is not in the repository: leave it out",
    ),
    Limit(
        "--zs_type {zs_type}",
        lambda a: str(a["zs_type"]).startswith("uc") and a["unseen_pt_inj"],
        "the repository has no {zs_type}_diff.txt for --unseen_pt_inj: use rare_first, non_rare_first, unseen_verb, "
        "unseen_object or default",
    ),
    Limit(
        "--zs_type default --without_unseen_name",
        lambda a: a["zs_type"] == "default" and a["without_unseen_name"] and a["unseen_pt_inj"],
        "the repository has no default_seen_diff.txt for --unseen_pt_inj, and nothing is unseen: leave "
        "--without_unseen_name out",
    ),
    Limit(
        "--fill_zs_verb_type 1",
        lambda a: a["zs"] and a["fill_zs_verb_type"] == 1,
        "main() calls refresh_unseen_verb_cache_mem, which the model does not have: leave it out",
    ),
    _when_set("pseudo_label", "main() stops in its debugger"),
    _when_set("tpt", "main() uses test_loader_for_tpt, which it never makes"),
    _when_set("sanity", "sanity_check makes a data set without the name of the CLIP model, which it needs"),
    # -- in one kind of run ------------------------------------------------------------------------------------------
    Limit(
        "--vis_tor {vis_tor}",
        lambda a: a["vis_tor"] not in (None, 1) and _evaluates(a),
        "main() scales logit_scale_U, which the model does not have: leave it out when EZ-HOI evaluates",
    ),
    Limit(
        "--dataset vcoco --compare",
        lambda a: a["dataset"] == "vcoco" and a["compare"],
        "EZ-HOI cannot evaluate V-COCO: capture the test split and use `ezhoi-diffusion compare FEATURES --vcoco DIR`; or "
        "run --cache twice, with and without --plugin diffusion, into two --output-dir, and evaluate both cache.pkl with "
        "V-COCO's own tool",
    ),
    Limit(
        "--dataset vcoco --eval",
        lambda a: a["dataset"] == "vcoco" and a["eval"] and not a["cache"],
        "main() raises NotImplementedError: run --cache in place of --eval, and evaluate its cache.pkl with V-COCO's own "
        "tool",
    ),
    Limit(
        "--cache --img_clip_pt",
        lambda a: a["dataset"] == "hicodet" and a["cache"] and a["img_clip_pt"],
        "cache_hico passes the model no targets, whose file names --img_clip_pt needs: use --eval",
    ),
    Limit(
        "--use_gt_boxes",
        lambda a: a["use_gt_boxes"] and _evaluates(a) and not (a["compare"] or a["capture"]),
        "EZ-HOI's evaluation mixes targets on the CPU with tensors on the GPU: use it in a capture pass or with --compare, "
        "which move the targets",
    ),
    Limit(
        "--without_unseen_name",
        lambda a: a["without_unseen_name"] and a["plugin"] and not _evaluates(a),
        "in eval mode EZ-HOI needs label_HO_eval, which its training flags do not make, and has other text features: capture "
        "with the --eval flags and --capture-split train",
    ),
)  # fmt: skip


def cannot_run(args: argparse.Namespace) -> dict[str, str]:
    """Find the flags with which the published EZ-HOI cannot run.

    Args:
        args: EZ-HOI's parsed flags. Of ours, `compare`, `capture` and `plugin` say what kind of run it is.

    Returns:
        Flag as the user writes it -> why EZ-HOI fails, and what to do.
    """
    given: Flags = defaultdict(lambda: None, vars(args))
    return {limit.flag.format_map(given): limit.reason.format_map(given) for limit in LIMITS if limit.applies(given)}


def refuse_unsupported(args: argparse.Namespace) -> None:
    """Raise UnsupportedError if a plugin or a comparison is enabled and EZ-HOI cannot run with these flags."""
    if not (args.plugin or args.compare):
        return
    problems = cannot_run(args)
    if problems:
        listed = "; ".join(f"{flag}: {why}" for flag, why in problems.items())
        raise UnsupportedError(f"the published EZ-HOI cannot run with these flags. {listed}")
