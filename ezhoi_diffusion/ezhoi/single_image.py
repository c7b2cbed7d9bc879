"""What keeps upstream's script for one image, inference.py, from running a checkpoint trained with --img_clip_pt.

With that flag, which all shipped scripts set, the prompt learner reads CLIP image features by a file name, and the script
passes none; with --self_image_path it computes them itself, and gives its adapter another shape, another row and another
norm than those it was trained with. Both are put right by hooks on the model, which act only where the host would fail.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ezhoi_diffusion.errors import EzhoiDiffusionError


class SingleImageError(EzhoiDiffusionError):
    """The script for one image cannot run with these flags or on this image; the message says what to do."""


def check_flags(args: argparse.Namespace, has_engine: bool) -> None:
    """Refuse what upstream's scripts hang or fail on. Raises SingleImageError."""
    if not has_engine and getattr(args, "world_size", 1) > 1:
        raise SingleImageError(
            f"--world-size {args.world_size}: this script starts one process, and would wait for the others for ever; drop the flag"
        )
    if has_engine and getattr(args, "self_image_path", None) and getattr(args, "img_clip_pt", False):
        raise SingleImageError(
            "--self_image_path: this script evaluates a whole split, and would give every image the CLIP features of that "
            "one, where it does not fail before; run inference.py for one image, or drop the flag"
        )
    image = getattr(args, "self_image_path", None)
    if image and not Path(image).is_file():
        raise SingleImageError(f"--self_image_path: there is no file {image}")


@contextmanager
def single_images(dataset_class: Any) -> Iterator[Callable[[Any], None]]:
    """Yields what to call with the model of a script without an engine, once it is built; undone at the end."""
    handles: list[torch.utils.hooks.RemovableHandle] = []
    shown: list[Any] = []  # the item that the data set gave last
    empty = [False]  # whether the model's last answer was None
    getitem: Any = getattr(dataset_class, "__getitem__", None)

    def remember(self: Any, index: int) -> Any:
        item = getitem(self, index)
        shown[:] = [item]
        return item

    def name_image(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if len(args) > 1 or kwargs.get("targets") is not None:
            return None
        given = (args[0] if args else kwargs["images"])[0]
        if not shown or not all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(given, shown[0][0], strict=True)):
            raise SingleImageError(
                "with --img_clip_pt the host reads the image's CLIP features by its file name, and the script gave it an image "
                "that is not the last one of its data set: give the image as --self_image_path"
            )
        return args, {**kwargs, "targets": [shown[0][1]]}

    def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        empty[0] = output is None

    def help_model(model: Any) -> None:
        handles.append(model.register_forward_hook(keep))
        if not getattr(model, "img_clip_pt", False):
            return
        if getattr(model, "self_image_path", None):
            adapter = model.clip_head.prompt_learner.img_clip_pt_adapter
            handles.append(adapter.register_forward_pre_hook(_as_trained))
        else:
            handles.append(model.register_forward_pre_hook(name_image, with_kwargs=True))

    if getitem is not None:
        dataset_class.__getitem__ = remember
    try:
        yield help_model
    except TypeError as error:
        if not empty[0]:
            raise
        name = shown[0][1].get("filename", "") if shown else ""
        raise SingleImageError(
            f"no human-object pair was found in the image {name}, so the host returned nothing, on which its script fails "
            f"({error}): give an image in which the detector sees a human and something else"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
        if getitem is not None:
            dataset_class.__getitem__ = getitem


def _as_trained(module: nn.Module, args: tuple[Any, ...]) -> Any:
    """[1, 1, 1 + n, D] with the class token in front -> [1, n, D] of unit rows, as the host's feature files are read."""
    x, (prior, mask) = args
    if prior.dim() != 4:
        return None  # a fork that gets it right
    patches: Tensor = prior.flatten(0, 1)[:, 1:]
    return x, (patches / patches.norm(dim=-1, keepdim=True), mask)
