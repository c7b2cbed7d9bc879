"""The pass over a split that gives every image's features: eval mode, evaluation transform, nothing trained."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from ezhoi_diffusion.errors import EzhoiDiffusionError, Interrupted
from ezhoi_diffusion.ezhoi.feature_tap import FeatureTap
from ezhoi_diffusion.ezhoi.fingerprint import context_vectors
from ezhoi_diffusion.ezhoi.run import EzHoiRun
from ezhoi_diffusion.features.batch import FeatureBatch, Pairs


class CaptureError(EzhoiDiffusionError):
    """The pass cannot be made with these flags or data; the message says which and what to change."""


def default_split(args: Any) -> str:
    """`test` under --eval and --cache, else `train`: the split that the host's own flags are about."""
    return "test" if getattr(args, "eval", False) or getattr(args, "cache", False) else "train"


def split_dataset(run: EzHoiRun, split: str) -> Any:
    """The host's dataset of a split, with the evaluation transform, and the annotations its own flags leave in it.

    Raises CaptureError where the host would load both partitions with its training augmentation.
    """
    args, trainset = run.args, run.engine._train_loader.dataset
    if str(args.partitions[1]).startswith("train"):
        raise CaptureError(
            f"--partitions {' '.join(args.partitions)}: EZ-HOI loads whatever starts with `train` with flips, crops and "
            f"colour jitter, so the second must be a test split, e.g. test2015 for HICO-DET, test for V-COCO"
        )
    factory = type(trainset)
    testset = factory(
        name=args.dataset, partition=args.partitions[1], data_root=args.data_root, clip_model_name=args.clip_model_name
    )
    if split == "test":
        return testset
    # a copy, because the training loader keeps its augmentation; not a new dataset, because making one under
    # --zs opens every image of the split
    dataset = copy.copy(trainset)
    dataset.transforms, dataset.clip_transforms = testset.transforms, testset.clip_transforms
    return dataset


def image_names(dataset: Any) -> list[str]:
    """File names of a host dataset's images, in its order."""
    return [str(dataset.dataset.filename(i)) for i in dataset.keep]


def clip_folder(run: EzHoiRun, split: str, names: list[str]) -> Path | None:
    """The folder with this split's CLIP image features; None where the host reads none.

    Raises CaptureError where it lacks an image of the split.
    """
    if not getattr(run.model, "img_clip_pt", False):
        return None
    return find_clip_folder(Path(run.args.clip_img_file), split, names)


def find_clip_folder(given: Path, split: str, names: list[str]) -> Path:
    """The folder with the CLIP features of images `names`: `given`, or its sibling for the split.

    The published folders end in `_train` and `_test`, V-COCO's in `_train` and `_val`, so the other split's is found
    beside the one in the flags. Raises CaptureError where no folder has all.
    """
    candidates = [given]
    for ending in CLIP_ENDINGS["test" if split == "train" else "train"]:
        if given.name.endswith(ending):
            base = given.name.removesuffix(ending)
            candidates = [*(given.with_name(base + own) for own in CLIP_ENDINGS[split]), given]
    missing = {}
    for folder in candidates:
        available = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        lacking = [
            name for name in names if not any(f"{name.split('.')[0]}_clip{e}" in available for e in CLIP_SUFFIXES)
        ]
        if not lacking:
            return folder
        missing[folder] = lacking
    listed = "; ".join(
        f"{folder} lacks {len(lacking)} of {len(names)}, e.g. {lacking[0]}" for folder, lacking in missing.items()
    )
    raise CaptureError(
        f"no folder has the CLIP image features of all {split} images: {listed}. Give the {split} split's folder as "
        f"--clip_img_file"
    )


CLIP_ENDINGS = {"train": ("_train",), "test": ("_test", "_val")}
CLIP_SUFFIXES = (".pkl", ".safetensors")  # the published host's, and the miniature's


@contextmanager
def _reading_clip_from(model: Any, folder: Path | None) -> Iterator[None]:
    if folder is None:
        yield
        return
    learner = model.clip_head.prompt_learner
    before = learner.clip_img_file
    learner.clip_img_file = str(folder)
    try:
        yield
    finally:
        learner.clip_img_file = before


def share_context(model: torch.nn.Module, device: torch.device) -> None:
    """Give every process the context vectors of rank 0.

    They are drawn from each process's own seed and are no parameters, so DistributedDataParallel leaves them
    different: without this, each rank would capture another host's features.
    """
    for _, vector in sorted(context_vectors(model).items()):
        shared = vector.to(device)  # the process group may know the device only
        dist.broadcast(shared, src=0)
        vector.copy_(shared)


def capture_pass(
    run: EzHoiRun,
    split: str,
    max_images: int | None,
    emit: Callable[[FeatureBatch], None],
    first: int = 0,
    asked: Callable[[], bool] = lambda: False,
) -> None:
    """Show each image of a split to the host and hand what the tap saw to `emit`, in the order of the split.

    Each process takes one contiguous block of images, from position `first` on. Raises CaptureError, TapError, and
    Interrupted after the image during which `asked` becomes true.
    """
    dataset = split_dataset(run, split)
    names = image_names(dataset)
    total = len(names) if max_images is None else min(max_images, len(names))
    if total == 0:
        raise CaptureError(
            f"the {split} split has no image to capture: look at --data-root, --partitions and --max-images"
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
    target: dict[str, Any] = {}
    index = start

    def observe(pairs: Pairs, feature: Tensor, text: Tensor | None, logits: Tensor) -> None:
        emit(_feature_batch(run.model, index, pairs, feature, text, logits, target))

    was_training = run.model.training
    run.model.eval()
    tap = FeatureTap(run.model, observe=observe, point=run.hook_point)
    try:
        # the model itself, not DistributedDataParallel around it, whose forward waits for the other processes
        with tap, torch.no_grad(), _reading_clip_from(run.model, folder):
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
                target = dict(targets[0])  # whatever the host puts into its own
                run.model(images, targets)
                if asked() and index + 1 < high:
                    raise Interrupted(f"stopped after image {index + 1 - low} of {high - low}")
    except RuntimeError as error:
        if not asked():  # the loader's processes were told to end, too
            raise
        raise Interrupted(f"stopped while image {index + 1 - low} of {high - low} was loaded") from error
    finally:
        run.model.train(was_training)
    if start == 0 and high == len(names):  # a part of a split may well hold images without pairs alone
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
    """The host's nested batches on a device; unlike pocket's function this lets file names through."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, (list, tuple)):
        return type(value)(to_device(item, device) for item in value)
    if isinstance(value, dict):
        return {key: to_device(item, device) for key, item in value.items()}
    return value
