"""A host's command line: that its script reads it, upstream can run it, its files are there and fit each other."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any

import torch

from ezhoi_diffusion.doctor.finding import Finding, Level, ok
from ezhoi_diffusion.errors import EzhoiDiffusionError
from ezhoi_diffusion.ezhoi.capture_pass import CaptureError, default_split, find_clip_folder
from ezhoi_diffusion.ezhoi.launch import LaunchError, read_flags
from ezhoi_diffusion.ezhoi.limits import cannot_run

FILES = ("pretrained", "resume", "resume_part", "clip_dir_vit", "self_image_path")
FOLDERS = ("data_root", "bridge")
IMAGES = "hico_20160224_det/images"
WIDTHS = {"ViT-B-16": 512, "ViT-L-14-336px": 768}
SPLITS = ("non_rare_first", "rare_first", "unseen_verb", "unseen_object")
# What args.txt, which training writes beside its checkpoints, and the flags of a later run have to agree on.
KEPT = (
    "zs", "zs_type", "num_classes", "logits_type", "txtcls_pt", "img_align", "txt_align", "img_clip_pt", "act_descriptor",
    "unseen_pt_inj", "use_insadapter", "emb_dim", "N_CTX", "dataset", "seed",
)  # fmt: skip
INSTALL = {
    "pocket": "git clone https://github.com/fredzzhang/pocket && pip install -e pocket",
    "clip": "pip install -e CLIP in the EZ-HOI folder",
    "pkg_resources": "pip install 'setuptools<81'",
    "cv2": "pip install opencv-python-headless",
    "sklearn": "pip install scikit-learn",
}


def flags(script: Path, argv: Sequence[str]) -> tuple[argparse.Namespace | None, Finding]:
    """The script's flags as it reads them itself, or None and why not."""
    try:
        args = read_flags(script, argv)
    except EzhoiDiffusionError as error:
        return None, Finding("host.flags", "problem", str(error), _flags_fix(error, script))
    return args, ok("host.flags", f"{script} reads its flags")


def _flags_fix(error: EzhoiDiffusionError, script: Path) -> str:
    cause = error.__cause__
    if isinstance(cause, ModuleNotFoundError) and cause.name:
        missing = cause.name.partition(".")[0]
        return f"{INSTALL.get(missing, f'pip install {missing}')}, in the environment in which the script runs"
    if isinstance(cause, SystemExit) or not isinstance(error, LaunchError):
        return f"`ezhoi-diffusion run {script} --help` lists its flags"
    if isinstance(cause, RuntimeError) and "torchvision" in str(cause):
        return "mend environment.torchvision first"
    return "give it from the EZ-HOI folder: -- main_tip_finetune.py and its flags"


def options(args: argparse.Namespace) -> Iterator[Finding]:
    """Flags that upstream's own code cannot run with."""
    refused = cannot_run(args)
    for flag, text in refused.items():
        reason, _, fix = text.rpartition(": ")  # what happens: what to do
        yield Finding("host.options", "problem", f"{flag}: {reason or text}", fix or f"leave {flag} out")
    if not refused:
        yield ok("host.options", "upstream can run these")
    workers = getattr(args, "num_workers", 0)
    if workers:
        yield Finding(
            "host.workers", "note", f"--num-workers {workers}: each is a process with its own copy of the data set",
            "--num-workers 0 if memory runs out, in capture too; its batches are of one image already",
        )  # fmt: skip


def paths(args: argparse.Namespace) -> Iterator[Finding]:
    """Files and folders that flags name."""
    missing = False
    named = [(name, Path.is_file, "file") for name in FILES] + [(name, Path.is_dir, "folder") for name in FOLDERS]
    for name, exists, kind in named:
        value = getattr(args, name, None)
        if not value or exists(Path(value)):
            continue
        missing = True
        silent = ": the host would say nothing and go on with random weights" if name.startswith("resume") else ""
        yield Finding(
            "host.paths", "problem", f"--{_spelt(name)} {value}: there is no such {kind}{silent}",
            "correct the path; relative ones start from the current folder",
        )  # fmt: skip
    if not getattr(args, "resume", "") and (getattr(args, "eval", False) or _captures(args)):
        missing = True
        yield Finding(
            "host.paths", "warning", "no --resume: the host would run with random weights", "add --resume CHECKPOINT"
        )
    if not missing:
        yield ok("host.paths", "every file and folder that the flags name is there")


def _spelt(name: str) -> str:
    return {"data_root": "data-root"}.get(name, name)


def _captures(args: argparse.Namespace) -> bool:
    return "capture" in (getattr(args, "plugin", None) or [])


def data(args: argparse.Namespace) -> Iterator[Finding]:
    """Annotations, images and CLIP image features of both partitions. HICO-DET only."""
    if getattr(args, "dataset", "hicodet") != "hicodet" or not getattr(args, "data_root", ""):
        return
    root = Path(args.data_root)
    names: dict[str, list[str]] = {}
    partitions, used = _partitions(args)
    for split, partition in partitions.items():
        file = root / f"instances_{partition}.json"
        try:
            content = json.loads(file.read_text())
            empty = set(content["empty"])
            names[split] = [name for i, name in enumerate(content["filenames"]) if i not in empty]
        except (OSError, ValueError, KeyError, TypeError) as error:
            yield Finding(
                "host.data", "problem", f"{file} cannot be read ({type(error).__name__}: {error})",
                "EZ-HOI's Readme says where the HICO-DET annotations come from; --data-root is their folder",
            )  # fmt: skip
            continue
        yield _images(root, partition, names[split])
    one_image = getattr(args, "self_image_path", None)
    if getattr(args, "img_clip_pt", False) and getattr(args, "clip_img_file", "") and used in names and not one_image:
        yield _clip_features(args, used, names[used])


def _partitions(args: argparse.Namespace) -> tuple[dict[str, str], str]:
    """Split -> partition as the flags name them, and the split that the run is about; inference.py has one only."""
    if hasattr(args, "partitions"):
        split = getattr(args, "capture_split", None) or default_split(args)
        return dict(zip(("train", "test"), args.partitions, strict=False)), split
    split = "train" if args.partition.startswith("train") else "test"
    return {split: args.partition}, split


def _images(root: Path, partition: str, names: list[str]) -> Finding:
    if (root / f"{partition}.safetensors").is_file():  # the miniature's
        return ok("host.data", f"{partition}: {len(names)} images with annotations")
    folder = root / IMAGES / partition
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    lacking = [name for name in names if name not in there]
    if lacking:
        return Finding(
            "host.data", "problem", f"{folder} lacks {len(lacking)} of {len(names)} images, e.g. {lacking[0]}",
            "unpack hico_20160224_det there",
        )  # fmt: skip
    return ok("host.data", f"{partition}: {len(names)} images with annotations, all there")


def _clip_features(args: argparse.Namespace, split: str, names: list[str]) -> Finding:
    given = Path(args.clip_img_file)
    try:
        folder = find_clip_folder(given, split, names)
    except CaptureError as error:
        return Finding(
            "host.clip", "problem", str(error),
            f"give the {split} split's folder; EZ-HOI's CLIP_hicodet_extract.py makes such features",
        )  # fmt: skip
    if folder == given:
        return ok("host.clip", f"{given.name} has the CLIP features of all {len(names)} {split} images")
    level: Level = "note" if _captures(args) else "problem"
    return Finding(
        "host.clip", level, f"{given.name} is not the {split} split's; a capture reads {folder.name} beside it, the bare host "
        f"does not", f"--clip_img_file {folder}",
    )  # fmt: skip


def checkpoint(args: argparse.Namespace, demanded: dict[str, Any]) -> Iterator[Finding]:
    """Whether --resume can be read without executing anything, and fits the flags.

    demanded: the fingerprint that a bridge or features carry, may be empty.
    """
    path = Path(getattr(args, "resume", "") or "")
    if not path.is_file():
        return
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError:  # written in the format before zip archives, which cannot be mapped
        content = torch.load(path, map_location="cpu", weights_only=True)
    state = content.get("model_state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict):
        yield Finding(
            "host.checkpoint", "problem", f"{path} has no model_state_dict: it is no EZ-HOI checkpoint",
            "give one that EZ-HOI's training wrote (ckpt_….pt), or the published one",
        )  # fmt: skip
        return
    mismatches = list(_mismatches(args, state, demanded))
    for found in mismatches:
        yield Finding("host.checkpoint", "problem", f"{path.name}: {found}", "give the flags that it was trained with")
    if not mismatches:
        shape = tuple(state["label_HO"].shape) if "label_HO" in state else "absent"
        yield ok(
            "host.checkpoint",
            f"{path.name}: epoch {content.get('epoch')}, label_HO {shape}, read without executing anything",
        )
    yield from _told_by_neighbours(args, path)


def _mismatches(args: argparse.Namespace, state: dict[str, Any], demanded: dict[str, Any]) -> Iterator[str]:
    label, down, fuse = (state.get(k) for k in ("label_HO", "mem_adapter.down_proj_mem.weight", "vis_fuse.0.weight"))
    if label is None:
        yield "it holds no label_HO"
    elif label.shape[1] != args.num_classes:
        yield f"label_HO has {label.shape[1]} classes, --num_classes is {args.num_classes}"
    if (down is not None) != bool(args.img_align):
        yield f"it was trained {'with' if down is not None else 'without'} --img_align, which is {'on' if args.img_align else 'off'}"
    dim = None
    if down is not None:
        dim = down.shape[1]
        if down.shape[0] != args.emb_dim:
            yield f"mem_adapter has {down.shape[0]} hidden units, --emb_dim is {args.emb_dim}"
    if fuse is not None:
        inputs, per_output = fuse.shape[1], fuse.shape[1] / fuse.shape[0]
        kind = "HO" if per_output == 2 else "HO+U" if per_output == 1.5 else None
        width = inputs // (2 if kind == "HO" else 3)
        if kind is not None:
            dim = dim or width
            if kind != args.logits_type and args.logits_type in ("HO", "HO+U"):
                yield f"vis_fuse is that of --logits_type {kind}, the flags say {args.logits_type}"
        if dim is not None and width != dim:
            yield f"vis_fuse is {width} wide, mem_adapter {dim}"
    backbone = PurePath(args.clip_dir_vit).stem
    if dim in WIDTHS.values() and WIDTHS.get(backbone, dim) != dim:
        yield f"D = {dim}, and --clip_dir_vit names {backbone} with D = {WIDTHS[backbone]}"
    for tensor in (down, fuse):
        if tensor is not None and not torch.isfinite(tensor).all():
            yield "its weights hold NaN or infinity"
    if dim is not None and demanded.get("dim", dim) != dim:
        yield f"D = {dim}, and features or bridge were made for D = {demanded['dim']}"
    if label is not None and not getattr(args, "without_unseen_name", False):
        rows = demanded.get("text_rows", label.shape[0])
        if rows != label.shape[0]:
            yield f"{label.shape[0]} text rows, and features or bridge were made for {rows}"


def _told_by_neighbours(args: argparse.Namespace, path: Path) -> Iterator[Finding]:
    """What the checkpoint's name, and the args.txt that training left beside it, say of its flags."""
    zs_type = args.zs_type if getattr(args, "zs", False) else None
    named = re.findall("|".join(SPLITS), f"{path.parent.name}/{path.name}")
    if named and zs_type not in named:
        yield Finding(
            "host.zs_type", "warning", f"the checkpoint's name says {named[-1]}, the flags say {zs_type or 'no --zs'}",
            f"--zs --zs_type {named[-1]}, if that is what it was trained for: unseen classes would be seen ones",
        )  # fmt: skip
    try:
        trained = json.loads((path.parent / "args.txt").read_text())
        differing = {k: trained[k] for k in KEPT if k in trained and trained[k] != getattr(args, k, trained[k])}
    except (OSError, ValueError, TypeError):
        return
    if not (trained.get("zs") or zs_type):
        differing.pop("zs_type", None)
    if differing:
        listed = ", ".join(f"{key} {value} (now {getattr(args, key)})" for key, value in differing.items())
        yield Finding(
            "host.args_txt", "warning", f"args.txt beside the checkpoint was written with other flags: {listed}",
            "give those of the training, if args.txt belongs to this checkpoint. Another seed draws other context vectors",
        )  # fmt: skip
    else:
        yield ok("host.args_txt", "the flags agree with args.txt beside the checkpoint")


def fits(args: argparse.Namespace, what: str, demanded: dict[str, Any]) -> Finding:
    """Whether what flags alone decide is as in the fingerprint of `what`, the features or the bridge."""
    here = {
        "backbone": PurePath(args.clip_dir_vit).stem,
        "dataset": args.dataset,
        "zs_type": args.zs_type if args.zs else None,
        "num_classes": args.num_classes,
        "logits_type": args.logits_type,
        "img_align": args.img_align,
        "txt_align": getattr(args, "txt_align", False),
    }
    differing = {k: (value, demanded[k]) for k, value in here.items() if k in demanded and demanded[k] != value}
    if differing:
        listed = "; ".join(f"{key} is {now!r} here, {then!r} there" for key, (now, then) in differing.items())
        return Finding(
            f"host.{what}", "problem", f"the {what} were made for another host: {listed}" if what == "features" else
            f"the {what} was made for another host: {listed}", "capture and train for this host, or give the flags of that one",
        )  # fmt: skip
    return ok(f"host.{what}", f"the flags agree with the fingerprint of the {what} (weights are compared when it runs)")
