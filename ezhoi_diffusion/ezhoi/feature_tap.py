"""Read or replace adapter_feat inside a detector that nobody edited."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from ezhoi_diffusion.errors import EzhoiDiffusionError
from ezhoi_diffusion.ezhoi.replaced import replaced
from ezhoi_diffusion.features.batch import Pairs

Observe = Callable[[Pairs, Tensor, Tensor | None, Tensor], None]
Inject = Callable[[Tensor, Pairs], Tensor | None]


class FeatureTapError(EzhoiDiffusionError):
    """adapter_feat cannot be read or replaced in this model."""


def unwrap(model: nn.Module) -> nn.Module:
    """Return the detector inside DistributedDataParallel, or the model itself.

    Raises:
        FeatureTapError: The model is a DataParallel, whose replicas share one hook, or is compiled, so that its graph
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
            "the model was compiled before attach, so its hooks would never run: attach first, then compile"
        )
    return model


@dataclass(frozen=True)
class HookPoint:
    """The module whose output is adapter_feat."""

    name: str
    module: nn.Module


def find_feature_module(model: nn.Module) -> HookPoint:
    """Find where the published EZ-HOI computes adapter_feat: `mem_adapter`, or `vis_fuse` without --img_align.

    Raises:
        FeatureTapError: The model has neither, or is of EZ-HOI's family and adapts texts there.
    """
    # EZ-HOI's attends from pairs to pairs. HOLa has one of the same name that attends from class texts to an image.
    if not getattr(getattr(model, "mem_adapter", None), "mem_adpt_self", True):
        raise FeatureTapError(
            f"mem_adapter of {type(model).__name__} does not attend to its own input, so it adapts something other than pair "
            f"features, as in HOLa, where it adapts class texts to each image: there is no adapter_feat to replace. Run "
            f"EZ-HOI's own detector. If this is a fork that has the feature elsewhere, a plugin can name the module in its "
            f"locate_adapter_feat hook"
        )
    for name in ("mem_adapter", "vis_fuse"):
        module = getattr(model, name, None)
        if isinstance(module, nn.Module):
            return HookPoint(name, module)
    logits = getattr(model, "logits_type", None)
    if logits is not None:
        raise FeatureTapError(
            f"with --logits_type {logits} and without --img_align EZ-HOI computes adapter_feat inline, where no hook can see "
            f"it: run with --img_align, or with --logits_type HO"
        )
    raise FeatureTapError(
        f"{type(model).__name__} has neither mem_adapter nor vis_fuse: is this an EZ-HOI detector? A plugin can name the "
        f"module of a fork in its locate_adapter_feat hook"
    )


def location_problem(found: object) -> str | None:
    """The problem with an answer of `locate_adapter_feat`, or None."""
    if isinstance(found, tuple) and len(found) == 2 and isinstance(found[0], str) and isinstance(found[1], nn.Module):
        return None
    return f"returned {type(found).__name__}, not a name and a module"


def _text_modules(model: nn.Module) -> list[nn.Module]:
    """The modules that may compute the text features; the last to run in a forward pass has the ones EZ-HOI uses."""
    found = [getattr(getattr(model, "clip_head", None), "text_encoder", None)]
    found += [getattr(model, "txtmem_adapter", None), getattr(model, "act_descriptor_attn", None)]
    return [module for module in found if isinstance(module, nn.Module)]


def _form_pairs(model: Any, proposals: dict[str, Tensor], size: Tensor, image: str | None, index: int) -> Pairs:
    """Form the pairs of an image as EZ-HOI does: humans first, then each human with every other box."""
    is_human = proposals["labels"] == model.human_idx
    order = torch.argsort((~is_human).to(torch.uint8), stable=True)
    boxes, scores, classes = (proposals[key][order] for key in ("boxes", "scores", "labels"))
    num_boxes, num_humans = len(boxes), int(is_human.sum())
    if num_humans == 0 or num_boxes <= 1:
        pairing = boxes.new_zeros((2, 0), dtype=torch.long)
    elif getattr(model, "use_gt_boxes", False):
        pairing = torch.arange(num_boxes, device=boxes.device).view(2, -1)
    else:
        every = torch.arange(num_boxes, device=boxes.device)
        pairing = torch.stack(torch.meshgrid(every[:num_humans], every, indexing="ij")).flatten(1)
        pairing = pairing[:, pairing[0] != pairing[1]]
    return Pairs(image, index, size, boxes, scores, classes, pairing)


class FeatureTap:
    """Forward hooks on one detector that read or replace adapter_feat in eval mode.

    A context manager. It registers all of its hooks or none, and removes only its own. It adds nothing to the model's
    parameters, buffers or modules.

    Args:
        model: The detector, wrapped or not.
        observe: Called as `observe(pairs, adapter_feat [P, D], text [N_sel, D] or None, logits [P, num_classes])` for
            every image, in order, once EZ-HOI has scored its batch. P is 0 for an image without pairs.
        inject: Called as `inject(adapter_feat [P, D], pairs)` for every image with pairs. Its result replaces the
            features, unless it is None. A tap has either `observe` or `inject`.
        point: Where adapter_feat is; searched for by default.

    Raises:
        FeatureTapError: The model is not an EZ-HOI detector, or forms its pairs differently.
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
        self._undo = ExitStack()
        self._attached = False
        self._images: list[str | None] = []
        self._waiting: list[Pairs] = []  # images with pairs whose adapter_feat has not been computed yet
        self._seen: dict[int, Tensor] = {}
        self._text: Tensor | None = None
        self._width = 0

    # -- registering -------------------------------------------------------------------------------------

    def attach(self) -> FeatureTap:
        """Register the hooks. Raises FeatureTapError where the model is no EZ-HOI detector."""
        if self._attached:
            return self
        if not callable(getattr(self.model, "compute_roi_embeddings", None)):
            raise FeatureTapError(
                f"{type(self.model).__name__} has no compute_roi_embeddings: is this an EZ-HOI detector?"
            )
        with ExitStack() as undo:
            undo.callback(self.model.register_forward_pre_hook(self._on_forward, with_kwargs=True).remove)
            undo.callback(self.point.module.register_forward_hook(self._on_feature).remove)
            for module in _text_modules(self.model) if self._observe else ():
                undo.callback(module.register_forward_hook(self._on_text).remove)
            pairing = functools.partial(self._on_pairing, self.model.compute_roi_embeddings)
            undo.enter_context(replaced(self.model, "compute_roi_embeddings", pairing))
            self._undo = undo.pop_all()
        self._attached = True
        return self

    def remove(self) -> None:
        """Remove what `attach` registered; does nothing the second time."""
        self._attached = False
        self._undo.close()

    def __enter__(self) -> FeatureTap:
        return self.attach()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.remove()

    def __getstate__(self) -> dict[str, Any]:
        """A deep copy of the model, as for an average of its weights, gets a tap that does nothing."""
        idle = {"_attached": False, "_observe": None, "_inject": None, "_undo": ExitStack()}
        return {**vars(self), **idle, "_images": [], "_waiting": [], "_seen": {}, "_text": None}

    # -- listening ---------------------------------------------------------------------------------------

    def _on_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._attached:
            return
        images = args[0] if args else kwargs["images"]
        targets = args[1] if len(args) > 1 else kwargs.get("targets")
        self._images = [t.get("filename") for t in targets] if targets else [None] * len(images)
        self._text = None

    def _on_pairing(
        self,
        original: Callable[..., Any],
        features: Tensor,
        image_size: Tensor,
        region_props: list[dict[str, Tensor]],
        *rest: Any,
        **kwargs: Any,
    ) -> Any:
        call = functools.partial(original, features, image_size, region_props, *rest, **kwargs)
        # somebody else may have wrapped this, which then stays in place after `remove`
        if not self._attached or self.model.training:
            return call()
        return self._around_pairing(call, features, image_size, region_props)

    def _around_pairing(
        self, call: Callable[[], Any], features: Tensor, sizes: Tensor, proposals: list[dict[str, Tensor]]
    ) -> Any:
        names = self._images if len(self._images) == len(proposals) else [None] * len(proposals)
        images = [
            _form_pairs(self.model, found, size, name, index)
            for index, (found, size, name) in enumerate(zip(proposals, sizes, names, strict=True))
        ]
        # EZ-HOI skips images without pairs, so each call of the hooked module belongs to the next image that has some
        self._waiting = [pairs for pairs in images if len(pairs)]
        self._seen = {}
        expected = len(self._waiting)
        result = call()
        if self._waiting:
            raise FeatureTapError(
                f"{self.point.name} ran for {expected - len(self._waiting)} images of a batch in which {expected} have "
                f"pairs: this fork forms its pairs differently from the published EZ-HOI"
            )
        if self._observe:
            empty = features.new_zeros((0, self._text.shape[-1] if self._text is not None else self._width))
            # without pairs EZ-HOI stops before its last text module, so the text seen is not the final one
            text = self._text if expected else None
            scored = iter(result[0])  # logits of every image with pairs
            unscored = features.new_zeros((0, self.model.num_classes))
            for pairs in images:
                logits = next(scored).detach() if len(pairs) else unscored
                self._observe(pairs, self._seen.get(pairs.batch_index, empty), text, logits)
        return result

    def _on_text(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._attached and not self.model.training:
            text = output[0] if isinstance(output, tuple) else output
            self._text = text.detach().reshape(-1, text.shape[-1])

    def _on_feature(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if self.model.training or not self._waiting:
            return None
        pairs = self._waiting.pop(0)
        feature = output.detach().reshape(-1, output.shape[-1])
        if len(feature) != len(pairs):
            raise FeatureTapError(
                f"{self.point.name} returned {len(feature)} features for image {pairs.image}, in which the detector formed "
                f"{len(pairs)} pairs: this fork forms its pairs differently from the published EZ-HOI"
            )
        self.hits += 1
        self._width = feature.shape[-1]
        if self._inject is None:
            self._seen[pairs.batch_index] = feature
            return None
        replacement = self._inject(feature, pairs)
        return None if replacement is None else replacement.reshape(output.shape)

    def require_hits(self) -> None:
        """Raise FeatureTapError if adapter_feat was never computed while the tap was attached."""
        if self.hits == 0:
            raise FeatureTapError(
                f"{self.point.name} never ran in eval mode, so adapter_feat was neither read nor replaced. Likely causes: no "
                f"image had a human and another box above the detector's threshold (wrong --pretrained?); the run ended "
                f"before its first image; the model stayed in training mode; or this fork computes adapter_feat elsewhere "
                f"(see the locate_adapter_feat hook)"
            )
