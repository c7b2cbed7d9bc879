"""EZ-HOI's flags: its script reads them, its code can run them, and the files they name exist and fit each other."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any

import torch

from ezhoi_diffusion.bridge import fingerprint_differences
from ezhoi_diffusion.doctor.finding import Finding, Level, ok
from ezhoi_diffusion.errors import EzhoiDiffusionError
from ezhoi_diffusion.ezhoi.capture_pass import CLIP_SUFFIXES, CaptureError, default_split, find_clip_folder
from ezhoi_diffusion.ezhoi.launch import LaunchError, read_flags
from ezhoi_diffusion.ezhoi.limits import cannot_run
from ezhoi_diffusion.files import read_plain
from ezhoi_diffusion.guide.reading import GuideFileError, read_untrusted, to_tensor

FILES = ("pretrained", "resume", "resume_part", "clip_dir_vit", "self_image_path")
IMAGES = "hico_20160224_det/images"
WIDTHS = {"ViT-B-16": 512, "ViT-L-14-336px": 768}
NUM_OPENED = 5  # of the files with CLIP features; there are some 40,000
SPLITS = ("non_rare_first", "rare_first", "unseen_verb", "unseen_object")
# flags of a training, in the args.txt beside its checkpoints, with which later runs must agree
TRAINED_FLAGS = (
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


def read(script: Path, argv: Sequence[str]) -> argparse.Namespace | Finding:
    """Read the flags as the script reads them itself; a problem where it does not."""
    try:
        return read_flags(script, argv)
    except EzhoiDiffusionError as error:
        cause = error.__cause__
        fix = "run it from the EZ-HOI folder: -- main_tip_finetune.py and its flags"
        if isinstance(cause, ModuleNotFoundError) and cause.name:
            missing = cause.name.partition(".")[0]
            fix = f"{INSTALL.get(missing, f'pip install {missing}')}, in the environment in which the script runs"
        elif isinstance(cause, SystemExit) or not isinstance(error, LaunchError):
            fix = f"`ezhoi-diffusion run {script} --help` lists its flags"
        elif isinstance(cause, RuntimeError) and "torchvision" in str(cause):
            fix = "fix environment.torchvision first"
        return Finding("ezhoi.flags", "problem", str(error), fix)


def check_options(args: argparse.Namespace) -> Iterator[Finding]:
    """Check for flags that EZ-HOI's own code cannot run with."""
    refused = cannot_run(args)
    for flag, text in refused.items():
        reason, _, fix = text.rpartition(": ")  # what happens: what to do
        yield Finding("ezhoi.options", "problem", f"{flag}: {reason or text}", fix or f"leave {flag} out")
    if not refused:
        yield ok("ezhoi.options", "the script reads its flags, and EZ-HOI can run them")
    if workers := getattr(args, "num_workers", 0):
        yield Finding(
            "ezhoi.workers", "note", f"--num-workers {workers}: each is a process with its own copy of the data set",
            "--num-workers 0 if memory runs out, in capture too; its batches are of one image already",
        )  # fmt: skip


def check_paths(args: argparse.Namespace) -> Iterator[Finding]:
    """Check that the files and folders that flags name exist."""
    name, complete = "ezhoi.paths", True
    for flag in (*FILES, "data_root"):
        value, kind = getattr(args, flag, None), "folder" if flag == "data_root" else "file"
        if value and not (Path(value).is_dir() if kind == "folder" else Path(value).is_file()):
            complete = False
            silent = ": EZ-HOI would say nothing and use random weights" if flag.startswith("resume") else ""
            spelling = "data-root" if flag == "data_root" else flag
            found = f"--{spelling} {value}: there is no such {kind}{silent}"
            yield Finding(name, "problem", found, "correct the path; relative ones start from the current folder")
    if not getattr(args, "resume", "") and (getattr(args, "eval", False) or _captures(args)):
        complete = False
        yield Finding(name, "warning", "no --resume: EZ-HOI would use random weights", "add --resume CHECKPOINT")
    if complete:
        yield ok(name, "every file and folder that the flags name exists")


def _captures(args: argparse.Namespace) -> bool:
    return any(str(plugin).partition("=")[0] == "capture" for plugin in getattr(args, "plugin", None) or ())


def check_data(args: argparse.Namespace) -> Iterator[Finding]:
    """Check annotations, images and CLIP image features of both partitions. HICO-DET only."""
    if getattr(args, "dataset", "hicodet") != "hicodet" or not getattr(args, "data_root", ""):
        return
    root = Path(args.data_root)
    names: dict[str, list[str]] = {}
    partitions, used = _partitions(args)
    for split, partition in partitions.items():
        file = root / f"instances_{partition}.json"
        try:
            content = json.loads(read_plain(file))
            empty = set(content["empty"])
            names[split] = [name for i, name in enumerate(content["filenames"]) if i not in empty]
        except (OSError, ValueError, KeyError, TypeError) as error:
            yield Finding(
                "ezhoi.data", "problem", f"{file} cannot be read ({type(error).__name__}: {error})",
                "EZ-HOI's Readme says where the HICO-DET annotations come from; --data-root is their folder",
            )  # fmt: skip
            continue
        yield _check_images(root, partition, names[split])
    one_image = getattr(args, "self_image_path", None)
    if getattr(args, "img_clip_pt", False) and getattr(args, "clip_img_file", "") and used in names and not one_image:
        yield _check_clip_features(args, used, names[used])


def _partitions(args: argparse.Namespace) -> tuple[dict[str, str], str]:
    """Split -> partition as the flags name them, and the split that the run uses; inference.py has one only."""
    if hasattr(args, "partitions"):
        split = getattr(args, "capture_split", None) or default_split(args)
        return dict(zip(("train", "test"), args.partitions, strict=False)), split
    split = "train" if args.partition.startswith("train") else "test"
    return {split: args.partition}, split


def _check_images(root: Path, partition: str, names: list[str]) -> Finding:
    if (root / f"{partition}.safetensors").is_file():  # the miniature's
        return ok("ezhoi.data", f"{partition}: {len(names)} images with annotations")
    folder = root / IMAGES / partition
    existing = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    lacking = [name for name in names if name not in existing]
    if lacking:
        found = f"{folder} lacks {len(lacking)} of {len(names)} images, e.g. {lacking[0]}"
        return Finding("ezhoi.data", "problem", found, "unpack hico_20160224_det there")
    return ok("ezhoi.data", f"{partition}: {len(names)} images with annotations")


def _check_clip_features(args: argparse.Namespace, split: str, names: list[str]) -> Finding:
    given = Path(args.clip_img_file)
    try:
        folder = find_clip_folder(given, split, names)
    except CaptureError as error:
        fix = f"give the {split} split's folder; EZ-HOI's CLIP_hicodet_extract.py makes such features"
        return Finding("ezhoi.clip", "problem", str(error), fix)
    fix = "make them with EZ-HOI's CLIP_hicodet_extract.py and its own CLIP (pip install -e CLIP), which keeps one feature a patch"
    for name in names[:: max(1, len(names) // NUM_OPENED)][:NUM_OPENED]:
        if problem := _clip_problem(folder, name, PurePath(getattr(args, "clip_dir_vit", "")).stem):
            return Finding("ezhoi.clip", "problem", problem, fix)
    if folder == given:
        return ok("ezhoi.clip", f"{given.name} has the CLIP features of all {len(names)} {split} images")
    level: Level = "note" if _captures(args) else "problem"
    found = f"{given.name} is not the {split} split's; a capture reads {folder.name} beside it, EZ-HOI itself does not"
    return Finding("ezhoi.clip", level, found, f"--clip_img_file {folder}")


def _clip_problem(folder: Path, name: str, backbone: str) -> str | None:
    """What is wrong with the file of an image's CLIP features, or None. EZ-HOI attends to [patches, D]."""
    path = next(path for end in CLIP_SUFFIXES if (path := folder / f"{name.split('.')[0]}_clip{end}").exists())
    if path.suffix == ".safetensors":  # the miniature's, of another width
        return None
    try:
        feature = to_tensor(read_untrusted(path))
    except GuideFileError as error:
        return str(error)
    if feature is None:
        return f"{path} holds no tensor"
    if feature.ndim != 2 or feature.shape[1] != WIDTHS.get(backbone, feature.shape[1]):
        return f"{path} has shape {list(feature.shape)} instead of [patches, {WIDTHS.get(backbone, 'D')}]"
    return None if feature.isfinite().all() else f"{path} holds NaN or infinity"


def check_checkpoint(args: argparse.Namespace, fingerprint: dict[str, Any]) -> Iterator[Finding]:
    """Check that --resume can be read without executing anything, and fits the flags.

    Args:
        args: EZ-HOI's flags.
        fingerprint: That of a bridge or of features; may be empty.
    """
    name, path = "ezhoi.checkpoint", Path(getattr(args, "resume", "") or "")
    if not path.is_file():
        return
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError:  # the format before zip archives cannot be mapped
        content = torch.load(path, map_location="cpu", weights_only=True)
    state = content.get("model_state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict):
        fix = "give one that EZ-HOI's training wrote (ckpt_….pt), or the published one"
        yield Finding(name, "problem", f"{path} has no model_state_dict: it is no EZ-HOI checkpoint", fix)
        return
    mismatches = list(_mismatches(args, state, fingerprint))
    for found in mismatches:
        yield Finding(name, "problem", f"{path.name}: {found}", "give the flags that it was trained with")
    if not mismatches:
        shape = list(state["label_HO"].shape)
        yield ok(name, f"{path.name}: epoch {content.get('epoch')}, label_HO {shape}, read without executing anything")
    yield from _check_name_and_args(args, path)


def _mismatches(args: argparse.Namespace, state: dict[str, Any], fingerprint: dict[str, Any]) -> Iterator[str]:
    label, down, fuse = (state.get(k) for k in ("label_HO", "mem_adapter.down_proj_mem.weight", "vis_fuse.0.weight"))
    if label is None:
        yield "it holds no label_HO"
    elif label.shape[1] != args.num_classes:
        yield f"label_HO has {label.shape[1]} classes, --num_classes is {args.num_classes}"
    if (down is not None) != bool(args.img_align):
        trained = "with" if down is not None else "without"
        yield f"it was trained {trained} --img_align, which is {'on' if args.img_align else 'off'}"
    dim = None
    if down is not None:
        dim = down.shape[1]
        if down.shape[0] != args.emb_dim:
            yield f"mem_adapter has {down.shape[0]} hidden units, --emb_dim is {args.emb_dim}"
    if fuse is not None:
        outputs, inputs = fuse.shape
        kind = "HO" if inputs == 2 * outputs else "HO+U" if 2 * inputs == 3 * outputs else None
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
    if not all(tensor is None or torch.isfinite(tensor).all() for tensor in (down, fuse)):
        yield "its weights hold NaN or infinity"
    if dim is not None and fingerprint.get("dim", dim) != dim:
        yield f"D = {dim}, and features or bridge were made for D = {fingerprint['dim']}"
    if label is not None and not getattr(args, "without_unseen_name", False):
        expected = fingerprint.get("text_rows", label.shape[0])
        if expected != label.shape[0]:
            yield f"{label.shape[0]} text features, and features or bridge were made for {expected}"


def _check_name_and_args(args: argparse.Namespace, path: Path) -> Iterator[Finding]:
    """Compare the flags with the checkpoint's name, and with the args.txt that training left beside it."""
    zs_type = args.zs_type if getattr(args, "zs", False) else None
    named = re.findall("|".join(SPLITS), f"{path.parent.name}/{path.name}")
    if named and zs_type not in named:
        yield Finding(
            "ezhoi.zs_type", "warning", f"the checkpoint's name says {named[-1]}, the flags say {zs_type or 'no --zs'}",
            f"--zs --zs_type {named[-1]}, if it was trained for that: otherwise unseen classes are seen ones",
        )  # fmt: skip
    try:
        trained = json.loads(read_plain(path.parent / "args.txt"))
        differing = {
            k: trained[k] for k in TRAINED_FLAGS if k in trained and trained[k] != getattr(args, k, trained[k])
        }
    except (OSError, ValueError, TypeError):
        return
    if not (trained.get("zs") or zs_type):
        differing.pop("zs_type", None)
    if differing:
        listed = ", ".join(f"{key} {value} (now {getattr(args, key)})" for key, value in differing.items())
        yield Finding(
            "ezhoi.args_txt", "warning", f"args.txt beside the checkpoint was written with other flags: {listed}",
            "give those of the training, if args.txt belongs to this checkpoint. Another seed draws other context vectors",
        )  # fmt: skip
    else:
        yield ok("ezhoi.args_txt", "the flags agree with args.txt beside the checkpoint")


def check_fingerprint(args: argparse.Namespace, kind: str, fingerprint: dict[str, Any]) -> Finding:
    """Compare what flags alone decide with the fingerprint of features or of a bridge."""
    here = {
        "backbone": PurePath(args.clip_dir_vit).stem,
        "dataset": args.dataset,
        "zs_type": args.zs_type if args.zs else None,
        "num_classes": args.num_classes,
        "logits_type": args.logits_type,
        "img_align": args.img_align,
        "txt_align": getattr(args, "txt_align", False),
    }
    differing = fingerprint_differences({k: v for k, v in here.items() if k in fingerprint}, fingerprint)
    if differing:
        listed = "; ".join(f"{key} is {now!r} here, {then!r} there" for key, (now, then) in differing.items())
        fix = "capture and train for this EZ-HOI run, or give the flags of the other one"
        return Finding(f"ezhoi.{kind}", "problem", f"{kind} of another EZ-HOI run: {listed}", fix)
    return ok(
        f"ezhoi.{kind}", f"the flags agree with the fingerprint of the {kind} (weights are compared when it runs)"
    )
