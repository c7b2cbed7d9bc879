"""Let upstream's script for one image, inference.py, run a checkpoint trained with --img_clip_pt.

With that flag, which all shipped scripts set, the prompt learner reads CLIP image features by file name. inference.py
passes no file name. With --self_image_path it computes the features itself, and gives the adapter another shape, an extra
row and another norm than in training. Hooks on the model correct both, and act only where EZ-HOI would fail.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ezhoi_diffusion.errors import EzhoiDiffusionError
from ezhoi_diffusion.ezhoi.replaced import replaced


class SingleImageError(EzhoiDiffusionError):
    """The script for one image cannot run with these flags or on this image."""


def check_flags(args: argparse.Namespace, has_engine: bool) -> None:
    """Refuse flags on which upstream's scripts hang or fail. Raises SingleImageError."""
    if not has_engine and getattr(args, "world_size", 1) > 1:
        raise SingleImageError(
            f"--world-size {args.world_size}: this script starts one process and would wait forever for the others; drop "
            f"the flag"
        )
    image = getattr(args, "self_image_path", None)
    if image and has_engine and getattr(args, "img_clip_pt", False):
        raise SingleImageError(
            "--self_image_path: this script evaluates a whole split and would give every image the CLIP features of that "
            "one; run inference.py for one image, or drop the flag"
        )
    if image and not Path(image).is_file():
        raise SingleImageError(f"--self_image_path: there is no file {image}")


@contextmanager
def single_images(dataset_class: Any) -> Iterator[Callable[[Any], None]]:
    """Help a script without an engine to pass its images to the model.

    Args:
        dataset_class: The class of the script's data set; None where it has none.

    Yields:
        A function to call with the model once it is built. The end of the context removes everything from it.

    Raises:
        SingleImageError: An image has no pairs, or cannot be named.
    """
    item: Any = None  # the data set's last one
    found_no_pairs = False  # the model's last output was None

    def remember(self: Any, index: int) -> Any:
        nonlocal item
        item = getitem(self, index)
        return item

    def add_target(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if len(args) > 1 or kwargs.get("targets") is not None:
            return None
        image = (args[0] if args else kwargs["images"])[0]
        if item is None or not all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(image, item[0], strict=True)):
            raise SingleImageError(
                "with --img_clip_pt EZ-HOI reads the CLIP features of an image by its file name, and the script passed an "
                "image that is not the last one of its data set: give the image as --self_image_path"
            )
        return args, {**kwargs, "targets": [item[1]]}

    def note_output(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        nonlocal found_no_pairs
        found_no_pairs = output is None

    with ExitStack() as undo:

        def help_model(model: Any) -> None:
            undo.callback(model.register_forward_hook(note_output).remove)
            if not getattr(model, "img_clip_pt", False):
                return
            if getattr(model, "self_image_path", None):
                adapter = model.clip_head.prompt_learner.img_clip_pt_adapter
                undo.callback(adapter.register_forward_pre_hook(_reshape_as_in_training).remove)
            else:
                undo.callback(model.register_forward_pre_hook(add_target, with_kwargs=True).remove)

        getitem: Any = getattr(dataset_class, "__getitem__", None)
        if getitem is not None:
            undo.enter_context(replaced(dataset_class, "__getitem__", remember))
        try:
            yield help_model
        except TypeError as error:
            if not found_no_pairs:
                raise
            name = item[1].get("filename", "") if item else ""
            raise SingleImageError(
                f"no human-object pair was found in the image {name}, so EZ-HOI returned nothing and its script failed "
                f"({error}): give an image in which the detector sees a human and something else"
            ) from error


def _reshape_as_in_training(module: nn.Module, args: tuple[Any, ...]) -> Any:
    """[1, 1, 1 + n, D] with the class token first -> [1, n, D] of unit norm, as EZ-HOI reads its feature files."""
    x, (prior, mask) = args
    if prior.dim() != 4:
        return None  # a fork that gets it right
    patches: Tensor = prior.flatten(0, 1)[:, 1:]
    return x, (patches / patches.norm(dim=-1, keepdim=True), mask)
