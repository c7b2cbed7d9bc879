"""The capture pass: show every image of a split to EZ-HOI and collect its pair features."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from ezhoi_diffusion.errors import EzhoiDiffusionError, Interrupted
from ezhoi_diffusion.ezhoi.feature_tap import FeatureTap
from ezhoi_diffusion.ezhoi.fingerprint import context_vectors
from ezhoi_diffusion.ezhoi.replaced import replaced
from ezhoi_diffusion.ezhoi.run import EzHoiRun
from ezhoi_diffusion.features.batch import FeatureBatch, Pairs


class CaptureError(EzhoiDiffusionError):
    """The pass cannot be made with these flags or data."""


def default_split(args: Any) -> str:
    """Return the split of EZ-HOI's own flags: `test` with --eval or --cache, else `train`."""
    return "test" if getattr(args, "eval", False) or getattr(args, "cache", False) else "train"


def split_dataset(run: EzHoiRun, split: str) -> Any:
    """Return EZ-HOI's data set of a split with the evaluation transform; its flags decide which annotations it has.

    Raises:
        CaptureError: EZ-HOI would load both partitions with its training augmentation.
    """
    args, trainset = run.args, run.engine._train_loader.dataset
    if str(args.partitions[1]).startswith("train"):
        raise CaptureError(
            f"--partitions {' '.join(args.partitions)}: EZ-HOI loads whatever starts with `train` with flips, crops and "
            f"colour jitter, so the second must be a test split, e.g. test2015 for HICO-DET, test for V-COCO"
        )
    testset = type(trainset)(
        name=args.dataset, partition=args.partitions[1], data_root=args.data_root, clip_model_name=args.clip_model_name
    )
    if split == "test":
        return testset
    # a copy, because the training loader keeps its augmentation; not a new data set, because making one opens every
    # image of the split under --zs
    dataset = copy.copy(trainset)
    dataset.transforms, dataset.clip_transforms = testset.transforms, testset.clip_transforms
    return dataset


def image_names(dataset: Any) -> list[str]:
    """Return the file names of a data set's images, in its order."""
    return [str(dataset.dataset.filename(i)) for i in dataset.keep]


CLIP_ENDINGS = {"train": ("_train",), "test": ("_test", "_val")}  # of the folders published for HICO-DET and V-COCO
CLIP_SUFFIXES = (".pkl", ".safetensors")  # EZ-HOI's, and the miniature's


def clip_folder(run: EzHoiRun, split: str, names: list[str]) -> Path | None:
    """Return the folder with the CLIP features of images `names`; None where EZ-HOI reads none. Raises CaptureError."""
    if not getattr(run.model, "img_clip_pt", False):
        return None
    return find_clip_folder(Path(run.args.clip_img_file), split, names)


def find_clip_folder(given: Path, split: str, names: list[str]) -> Path:
    """Return the folder that has the CLIP features of all images `names`: `given`, or its sibling for the split.

    The published folders differ in their endings only, so the folder of one split is found beside that of the other.

    Raises:
        CaptureError: No folder has all of them.
    """
    candidates = [given]
    for ending in CLIP_ENDINGS["test" if split == "train" else "train"]:
        if given.name.endswith(ending):
            base = given.name.removesuffix(ending)
            candidates = [*(given.with_name(base + own) for own in CLIP_ENDINGS[split]), given]
    problems = []
    for folder in candidates:
        files = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        missing = [
            name for name in names if not any(f"{name.split('.')[0]}_clip{end}" in files for end in CLIP_SUFFIXES)
        ]
        if not missing:
            return folder
        problems.append(f"{folder} lacks {len(missing)} of {len(names)}, e.g. {missing[0]}")
    raise CaptureError(
        f"no folder has the CLIP image features of all {split} images: {'; '.join(problems)}. Give the folder of the {split} "
        f"split as --clip_img_file"
    )


def share_context(model: torch.nn.Module, device: torch.device) -> None:
    """Give every process the context vectors of rank 0.

    Each process draws them from its own seed. They are no parameters, so DistributedDataParallel leaves them different,
    and each rank would capture the features of another run.
    """
    for _, vector in sorted(context_vectors(model).items()):
        shared = vector.to(device)  # the process group may know no other device
        dist.broadcast(shared, src=0)
        vector.copy_(shared)


def capture_pass(
    run: EzHoiRun,
    split: str,
    max_images: int | None,
    emit: Callable[[FeatureBatch], None],
    first: int = 0,
    should_stop: Callable[[], bool] = lambda: False,
) -> None:
    """Run EZ-HOI on each image of a split and hand the features to `emit`, in the order of the split.

    The model is in eval mode, and nothing is trained. Each process takes one contiguous block of images.

    Args:
        run: The run, with an engine.
        split: `train` or `test`.
        max_images: Stop after as many images of the split; None for all.
        emit: Called once for every image.
        first: Index of the first image in the split; earlier ones were captured before.
        should_stop: Asked after each image.

    Raises:
        CaptureError: The split is empty, or lacks CLIP features.
        FeatureTapError: adapter_feat was never computed.
        Interrupted: `should_stop` returned True before the last image.
    """
    dataset = split_dataset(run, split)
    names = image_names(dataset)
    total = len(names) if max_images is None else min(max_images, len(names))
    if total == 0:
        raise CaptureError(
            f"the {split} split has no image to capture: check --data-root, --partitions and --max-images"
        )
    folder = clip_folder(run, split, names[:total])
    low, high = run.rank * total // run.world_size, (run.rank + 1) * total // run.world_size
    start = min(max(low, first), high)
    subset = torch.utils.data.Subset(dataset, range(start, high))
    loader = torch.utils.data.DataLoader(
        subset,
        batch_size=1,
        shuffle=False,
        num_workers=int(run.args.num_workers),
        collate_fn=run.engine._train_loader.collate_fn,
    )
    reads_clip_files = (
        replaced(run.model.clip_head.prompt_learner, "clip_img_file", str(folder)) if folder else nullcontext()
    )
    target: dict[str, Any] = {}
    index = start

    def observe(pairs: Pairs, feature: Tensor, text: Tensor | None, logits: Tensor) -> None:
        emit(_feature_batch(run.model, index, pairs, feature, text, logits, target))

    was_training = run.model.training
    run.model.eval()
    tap = FeatureTap(run.model, observe=observe, point=run.hook_point)
    try:
        # the model itself, not DistributedDataParallel around it, whose forward waits for the other processes
        with tap, torch.no_grad(), reads_clip_files:
            progress = tqdm(
                loader,
                total=high - low,
                initial=start - low,
                desc=f"capture {split}",
                unit="img",
                disable=run.rank != 0,
                file=sys.stderr,
            )
            for index, (images, targets) in enumerate(progress, start):
                images, targets = to_device(images, run.device), to_device(targets, run.device)
                target = dict(targets[0])  # a copy, because EZ-HOI writes into its own
                run.model(images, targets)
                if should_stop() and index + 1 < high:
                    raise Interrupted(f"stopped after image {index + 1 - low} of {high - low}")
    except RuntimeError as error:
        if not should_stop():  # the signal may end the loader's processes, too
            raise
        raise Interrupted(f"stopped while image {index + 1 - low} of {high - low} was loaded") from error
    finally:
        run.model.train(was_training)
    if start == 0 and high == len(names):  # in a part of a split, no image may have pairs
        tap.require_hits()


def _feature_batch(
    model: Any,
    index: int,
    pairs: Pairs,
    feature: Tensor,
    text: Tensor | None,
    logits: Tensor,
    target: dict[str, Any],
) -> FeatureBatch:
    human, other = pairs.boxes[pairs.pairing[0]], pairs.boxes[pairs.pairing[1]]
    gt = [model.recover_boxes(target[key], target["size"]) for key in ("boxes_h", "boxes_o")]
    return FeatureBatch(
        index=index,
        pairs=pairs,
        adapter_feat=feature,
        text=text,
        logits=logits,
        labels=model.associate_with_ground_truth(human, other, target).bool(),
        gt_boxes=torch.stack(gt),
        gt_hoi=target.get("hoi", target["labels"]),
    )


def to_device(value: Any, device: torch.device) -> Any:
    """Move a nested batch to a device. Unlike pocket's function, this leaves file names alone."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, (list, tuple)):
        return type(value)(to_device(item, device) for item in value)
    if isinstance(value, dict):
        return {key: to_device(item, device) for key, item in value.items()}
    return value
