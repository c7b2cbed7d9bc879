"""Reads or replaces adapter_feat inside a detector that nobody edits."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from ezhoi_diffusion.errors import EzhoiDiffusionError
from ezhoi_diffusion.features.batch import Pairs

Observe = Callable[[Pairs, Tensor, Tensor | None, Tensor], None]
Inject = Callable[[Tensor, Pairs], Tensor | None]


class FeatureTapError(EzhoiDiffusionError):
    """adapter_feat cannot be read or replaced in this model; the message says why."""


def unwrap(model: nn.Module) -> nn.Module:
    """The detector inside DistributedDataParallel, or the model itself.

    Raises TapError for DataParallel, whose replicas race on one hook, and for a compiled model, whose graph
    never calls a hook that was added later.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    if isinstance(model, nn.DataParallel):
        raise FeatureTapError(
            "the model is wrapped in DataParallel, whose replicas share one hook: use DistributedDataParallel"
        )
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        raise FeatureTapError(
            "the model was compiled before attach, so hooks would never fire: attach first, compile then"
        )
    return model


@dataclass(frozen=True)
class HookPoint:
    """The module whose output is adapter_feat."""

    name: str
    module: nn.Module


def find_feature_module(model: nn.Module) -> HookPoint:
    """Where the published EZ-HOI computes adapter_feat: `mem_adapter`, or `vis_fuse` without --img_align.

    Raises TapError where no module exists.
    """
    for name in ("mem_adapter", "vis_fuse"):
        module = getattr(model, name, None)
        if isinstance(module, nn.Module):
            return HookPoint(name, module)
    logits = getattr(model, "logits_type", None)
    if logits is not None:
        raise FeatureTapError(
            f"with --logits_type {logits} and without --img_align the host computes adapter_feat inline, in no module "
            f"that a hook could see: run with --img_align, or with --logits_type HO"
        )
    raise FeatureTapError(
        f"{type(model).__name__} has neither mem_adapter nor vis_fuse: is this an EZ-HOI detector? A fork with other "
        f"names can say where its feature is in a plugin's locate_adapter_feat hook"
    )


def _text_modules(model: nn.Module) -> list[nn.Module]:
    """The modules whose last output of a forward pass is the text the host multiplies with."""
    found = [getattr(getattr(model, "clip_head", None), "text_encoder", None)]
    found += [getattr(model, "txtmem_adapter", None), getattr(model, "act_descriptor_attn", None)]
    return [module for module in found if isinstance(module, nn.Module)]


def _form_pairs(model: Any, proposals: dict[str, Tensor], size: Tensor, image: str | None, index: int) -> Pairs:
    """The pairs the host forms from an image's proposals: every human with every other box, humans first."""
    is_human = proposals["labels"] == model.human_idx
    order = torch.argsort((~is_human).to(torch.uint8), stable=True)
    boxes, scores, classes = (proposals[key][order] for key in ("boxes", "scores", "labels"))
    count, humans = len(boxes), int(is_human.sum())
    if humans == 0 or count <= 1:
        pairing = boxes.new_zeros((2, 0), dtype=torch.long)
    elif getattr(model, "use_gt_boxes", False):
        pairing = torch.arange(count, device=boxes.device).view(2, -1)
    else:
        human, other = torch.meshgrid(
            torch.arange(humans, device=boxes.device), torch.arange(count, device=boxes.device), indexing="ij"
        )
        pairing = torch.stack([human[human != other], other[human != other]])
    return Pairs(image, index, size, boxes, scores, classes, pairing)


class FeatureTap:
    """Forward hooks on one detector, in one of two roles; active while the model is in eval mode.

    observe(pairs, adapter_feat [P, D], text [N_sel, D] or None, logits [P, num_classes]): called for every image, in
        order, once the host has scored its batch; P is zero for an image without pairs.
    inject(adapter_feat [P, D], pairs): called for every image that has pairs; its result, unless None, replaces
        the feature.

    A context manager. Registers all of its hooks or none, and removes only what it registered, once, whatever
    happens inside. Nothing is added to the model's parameters, buffers or module tree.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        observe: Observe | None = None,
        inject: Inject | None = None,
        point: HookPoint | None = None,
    ) -> None:
        if (observe is None) == (inject is None):
            raise ValueError("a tap has one role: give it observe or inject")
        self.model: Any = unwrap(model)
        self.point = point or find_feature_module(self.model)
        self.hits = 0
        self._observe = observe
        self._inject = inject
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._method: Callable[..., Any] | None = None
        self._images: list[str | None] = []
        self._waiting: list[Pairs] = []
        self._seen: dict[int, Tensor] = {}
        self._text: Tensor | None = None
        self._width = 0

    # -- registering -------------------------------------------------------------------------------------

    def attach(self) -> FeatureTap:
        """Register the hooks. Raises TapError where the model is not the detector this was made for."""
        if self._handles:
            return self
        if not callable(getattr(self.model, "compute_roi_embeddings", None)):
            raise FeatureTapError(
                f"{type(self.model).__name__} has no compute_roi_embeddings: is this an EZ-HOI detector?"
            )
        try:
            self._handles.append(self.model.register_forward_pre_hook(self._on_forward, with_kwargs=True))
            self._handles.append(self.point.module.register_forward_hook(self._on_feature))
            if self._observe:
                self._handles += [m.register_forward_hook(self._on_text) for m in _text_modules(self.model)]
            self._wrap_pairing()
        except BaseException:
            self.remove()
            raise
        return self

    def remove(self) -> None:
        """Remove what `attach` registered; calling it again does nothing."""
        while self._handles:
            self._handles.pop().remove()
        # a wrapper that somebody else wrapped again stays in place, and does nothing once the handles are gone
        if self._method is not None and vars(self.model).get("compute_roi_embeddings") is self._method:
            if self._shadowed is None:
                del self.model.compute_roi_embeddings
            else:
                self.model.compute_roi_embeddings = self._shadowed
        self._method = None

    def __enter__(self) -> FeatureTap:
        return self.attach()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.remove()

    def _wrap_pairing(self) -> None:
        # compute_roi_embeddings is a method, no module, so it can only be wrapped on the instance
        self._shadowed = vars(self.model).get("compute_roi_embeddings")
        original = self.model.compute_roi_embeddings

        @functools.wraps(original)
        def wrapper(
            features: Tensor, image_size: Tensor, region_props: list[dict[str, Tensor]], *a: Any, **k: Any
        ) -> Any:
            if not self._handles or self.model.training:
                return original(features, image_size, region_props, *a, **k)
            return self._around_pairing(original, features, image_size, region_props, *a, **k)

        self._method = wrapper
        self.model.compute_roi_embeddings = wrapper

    # -- listening ---------------------------------------------------------------------------------------

    def _on_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        images = args[0] if args else kwargs["images"]
        targets = args[1] if len(args) > 1 else kwargs.get("targets")
        self._images = [t.get("filename") for t in targets] if targets else [None] * len(images)
        self._text = None

    def _around_pairing(
        self,
        original: Callable[..., Any],
        features: Tensor,
        sizes: Tensor,
        proposals: list[dict[str, Tensor]],
        *a: Any,
        **k: Any,
    ) -> Any:
        names = self._images if len(self._images) == len(proposals) else [None] * len(proposals)
        images = [
            _form_pairs(self.model, p, s, n, i) for i, (p, s, n) in enumerate(zip(proposals, sizes, names, strict=True))
        ]
        # the host skips images without pairs, so a call of the tapped module belongs to the next image that has some
        self._waiting = [pairs for pairs in images if len(pairs)]
        self._seen = {}
        expected = len(self._waiting)
        result = original(features, sizes, proposals, *a, **k)
        if self._waiting:
            raise FeatureTapError(
                f"{self.point.name} ran for {expected - len(self._waiting)} images of a batch in which {expected} have "
                f"pairs: this fork forms its pairs in another way than the published EZ-HOI"
            )
        if self._observe:
            empty = features.new_zeros((0, self._text.shape[-1] if self._text is not None else self._width))
            # without pairs the host stops before its last text module, so what was seen is not what it multiplies with
            text = self._text if expected else None
            scored = iter(result[0])  # one entry for every image that has pairs
            unscored = features.new_zeros((0, self.model.num_classes))
            for pairs in images:
                logits = next(scored).detach() if len(pairs) else unscored
                self._observe(pairs, self._seen.get(pairs.batch_index, empty), text, logits)
        return result

    def _on_text(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not self.model.training:
            text = output[0] if isinstance(output, tuple) else output
            self._text = text.detach().reshape(-1, text.shape[-1])

    def _on_feature(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if self.model.training or not self._waiting:
            return None
        pairs = self._waiting.pop(0)
        feature = output.detach().reshape(-1, output.shape[-1])
        if len(feature) != len(pairs):
            raise FeatureTapError(
                f"{self.point.name} gave {len(feature)} rows for image {pairs.image} where the detector formed {len(pairs)} "
                f"pairs: this fork forms its pairs in another way than the published EZ-HOI"
            )
        self.hits += 1
        self._width = feature.shape[-1]
        if self._inject is None:
            self._seen[pairs.batch_index] = feature
            return None
        replaced = self._inject(feature, pairs)
        return None if replaced is None else replaced.reshape(output.shape)

    def require_hits(self) -> None:
        """Raises TapError if adapter_feat never came by, with what usually causes that."""
        if self.hits == 0:
            raise FeatureTapError(
                f"{self.point.name} never ran in eval mode, so adapter_feat was neither seen nor replaced. Likely causes: "
                f"no image had a human and another box above the detector's threshold (wrong --pretrained?); the run "
                f"ended before its first image; the model stayed in training mode; or this fork computes adapter_feat "
                f"elsewhere (see the locate_adapter_feat hook)"
            )
