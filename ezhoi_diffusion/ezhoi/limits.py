"""What the published EZ-HOI cannot run, by flag: known from its source, so that nobody waits for the crash."""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

from ezhoi_diffusion.errors import EzhoiDiffusionError

Flags = Mapping[str, Any]  # None for a flag that the script does not have


class UnsupportedError(EzhoiDiffusionError):
    """Flags with which the host itself cannot run, or not in the pass that is asked for."""


def _evaluates(given: Flags) -> bool:
    return bool(given["eval"] or given["cache"])


# flag as it is written, when it is a problem, what happens in the host and what to do instead
_BROKEN: tuple[tuple[str, Callable[[Flags], Any], str], ...] = (
    # -- in any run ---------------------------------------------------------------------------------------------------
    (
        "--dataset swig",
        lambda a: a["dataset"] == "swig",
        "main() calls build_dataset, which is not in the repository: use hicodet or vcoco",
    ),
    (
        "--num_classes 600",
        lambda a: a["dataset"] == "hicodet" and a["num_classes"] == 600,
        "the label matrix is made by verb all the same, so that 483 of its columns are empty and the logits there 0/0: use "
        "--num_classes 117",
    ),
    (
        "--dataset vcoco --num_classes {num_classes}",
        lambda a: a["dataset"] == "vcoco" and a["num_classes"] in (117, 236),
        "main() knows V-COCO's 24 actions only, and the default is 117: give --num_classes 24",
    ),
    (
        "--logits_type {logits_type}",
        lambda a: a["logits_type"] and a["logits_type"] not in ("HO", "HO+U", "U"),
        "forward() knows HO, HO+U and U, and has no visual feature for any other kind, its own default included: use "
        "--logits_type HO, as the published scripts do",
    ),
    (
        "(no --txtcls_pt)",
        lambda a: a["txtcls_pt"] is False,
        "forward() needs a pair of text features, and the text encoder gives one without --txtcls_pt: add --txtcls_pt",
    ),
    (
        "--fix_txt_pt",
        lambda a: a["fix_txt_pt"],
        "forward() uses origin_ctx, which it sets on the other branch only: leave it out",
    ),
    (
        "--clip_test",
        lambda a: a["clip_test"],
        "forward() uses origin_ctx, which it sets on the other branch only: leave it out",
    ),
    (
        "--seperate_pre_pt",
        lambda a: a["seperate_pre_pt"],
        "the prompt learner then returns no origin_ctx, which forward() indexes: leave it out",
    ),
    (
        "--init_txtcls_pt",
        lambda a: a["init_txtcls_pt"],
        "the prompt learner then returns no origin_ctx, which forward() indexes: leave it out",
    ),
    (
        "--txtcls_descrip",
        lambda a: a["txtcls_descrip"],
        "the text encoder then asks for the length of prompts it was not given: leave it out",
    ),
    (
        "--img_descrip_prompt",
        lambda a: a["img_descrip_prompt"],
        "forward() reads text_descrip from the targets, and no data set puts it there: leave it out",
    ),
    (
        "--use_consistloss",
        lambda a: a["use_consistloss"],
        "compute_roi_embeddings concatenates pair priors that nothing fills: leave it out",
    ),
    (
        "--multi_cross",
        lambda a: a["multi_cross"] and a["use_insadapter"],
        "the image encoder's adapters then assert a text context that nobody hands them: leave it out",
    ),
    (
        "--vlmtxt llava2",
        lambda a: a["vlmtxt"] == "llava2",
        "it looks HICO-DET's pairs up in V-COCO's table, which has 19 of 600: use --vlmtxt llava",
    ),
    (
        "--d_detr true",
        lambda a: a["d_detr"],
        "build_model_d_detr is not in the repository: leave it out",
    ),
    (
        "--zs_type {zs_type}",
        lambda a: str(a["zs_type"]).startswith("uc") and a["unseen_pt_inj"],
        "the repository has no {zs_type}_diff.txt for --unseen_pt_inj: use rare_first, non_rare_first, unseen_verb, "
        "unseen_object or default",
    ),
    (
        "--zs_type default --without_unseen_name",
        lambda a: a["zs_type"] == "default" and a["without_unseen_name"] and a["unseen_pt_inj"],
        "the repository has no default_seen_diff.txt for --unseen_pt_inj, and nothing is unseen: leave "
        "--without_unseen_name out",
    ),
    (
        "--fill_zs_verb_type 1",
        lambda a: a["zs"] and a["fill_zs_verb_type"] == 1,
        "main() calls refresh_unseen_verb_cache_mem, which the model does not have: leave it out",
    ),
    (
        "--pseudo_label",
        lambda a: a["pseudo_label"],
        "main() stops in its debugger: leave it out",
    ),
    (
        "--tpt",
        lambda a: a["tpt"],
        "main() uses test_loader_for_tpt, which it never makes: leave it out",
    ),
    (
        "--sanity",
        lambda a: a["sanity"],
        "sanity_check makes a data set without the CLIP model's name, which it must have: leave it out",
    ),
    # -- in one kind of run -------------------------------------------------------------------------------------------
    (
        "--vis_tor {vis_tor}",
        lambda a: a["vis_tor"] not in (None, 1) and _evaluates(a),
        "main() scales logit_scale_U, which the model does not have: leave it out where the host evaluates",
    ),
    (
        "--dataset vcoco --compare",
        lambda a: a["dataset"] == "vcoco" and a["compare"],
        "the host has no evaluation of V-COCO to compare by: capture the test split, and use `ezhoi-diffusion compare FEATURES "
        "--vcoco DIR`; or run --cache twice, with and without --plugin diffusion, into two --output-dir, and evaluate both "
        "cache.pkl with V-COCO's own tool",
    ),
    (
        "--dataset vcoco --eval",
        lambda a: a["dataset"] == "vcoco" and a["eval"] and not a["cache"],
        "main() raises NotImplementedError: run --cache in place of --eval, and evaluate its cache.pkl with V-COCO's own "
        "tool",
    ),
    (
        "--cache --img_clip_pt",
        lambda a: a["dataset"] == "hicodet" and a["cache"] and a["img_clip_pt"],
        "cache_hico hands the model no targets, whose file names --img_clip_pt needs: use --eval",
    ),
    (
        "--use_gt_boxes",
        lambda a: a["use_gt_boxes"] and _evaluates(a) and not (a["compare"] or a["capture"]),
        "the host's evaluation leaves the targets on the CPU and mixes them with what is on the GPU; a capture pass and "
        "--compare move them, so they run",
    ),
    (
        "--without_unseen_name",
        lambda a: a["without_unseen_name"] and a["plugin"] and not _evaluates(a),
        "in eval mode the host needs label_HO_eval, which its training flags do not make, and the text features are others "
        "there: capture with the --eval flags, and --capture-split train",
    ),
)  # fmt: skip


def cannot_run(args: argparse.Namespace) -> dict[str, str]:
    """Flag, as the user writes it -> why the published host cannot run it, and what to do; empty where nothing is known.

    args: the host's parsed flags, with or without ours: `compare`, `capture` and `plugin` say which pass is meant.
    """
    given: Flags = defaultdict(lambda: None, vars(args))
    return {flag.format_map(given): why.format_map(given) for flag, broken, why in _BROKEN if broken(given)}


def refuse_unsupported(args: argparse.Namespace) -> None:
    """Raises UnsupportedError where a plugin or a comparison is enabled and the host cannot run; else does nothing."""
    if not (args.plugin or args.compare):
        return
    problems = cannot_run(args)
    if problems:
        listed = "; ".join(f"{flag}: {why}" for flag, why in problems.items())
        raise UnsupportedError(f"the published EZ-HOI cannot run with these flags. {listed}")
