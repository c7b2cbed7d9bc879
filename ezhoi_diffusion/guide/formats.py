"""Recognise the files of the guide's scripts by their content, check them, and say what is known of each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ezhoi_diffusion.guide.checkpoints import networks, read_ezhoi_checkpoint, read_model
from ezhoi_diffusion.guide.kinds import (
    AnalysisFile,
    GuideFile,
    TextFile,
    TextMeanFile,
    TextSource,
    VisualFile,
    facts_of,
    type_of,
)
from ezhoi_diffusion.guide.reading import GuideFileError, damaged, read_untrusted, to_tensor

HOI_CLASSES = 600
KINDS = "files of the guide are: text embeddings, text mean, visual embeddings, embeddings_for_viz, model-k.pt, EZ-HOI checkpoint"


def read_guide_file(path: Path) -> GuideFile:
    """Read a file and recognise its kind.

    Raises:
        GuideFileError: It is none of the guide's files, or damaged.
        UnsafeFileError: It would run code.
    """
    value = read_untrusted(path)
    try:
        return _recognise(value, path)
    except GuideFileError:
        raise
    except Exception as error:  # values and shapes that no script writes can raise anything
        raise damaged(path, error) from error


def _recognise(value: Any, path: Path) -> GuideFile:
    mean = to_tensor(value)
    if mean is not None and (mean.ndim == 1 or (mean.ndim == 2 and len(mean) == 1)):
        return _text_mean(mean, {}, path)
    if not isinstance(value, Mapping):
        raise GuideFileError(f"{path} holds a {type_of(value)}, which no script of the guide writes; {KINDS}")
    if "model_state_dict" in value:
        return read_ezhoi_checkpoint(value, path)
    if "visual_before" in value:
        return _analysis(value, path)
    if "embeddings" in value:
        return _visual(value, path) if "metadata" in value else _text(value, path)
    for key in ("text_mean", "mean"):
        if key in value:
            if (mean := to_tensor(value[key])) is None:
                raise GuideFileError(f"{path}: {key!r} is a {type_of(value[key])}, not numbers")
            return _text_mean(mean, value, path)
    if found := networks(value):
        return read_model(value, found, path)
    keys = ", ".join(f"{key!r:.50}" for key in list(value)[:8])
    raise GuideFileError(f"{path} holds {keys or 'nothing'}, which no script of the guide writes; {KINDS}")


def _matrix(value: Mapping[str, Any], key: str, path: Path) -> Tensor:
    """[N, D] float32, finite, with at least one row that is not zero."""
    matrix = to_tensor(value.get(key))
    if matrix is None or matrix.ndim != 2 or 0 in matrix.shape or matrix.is_complex():
        raise GuideFileError(f"{path}: {key!r} is a {type_of(value.get(key))}, not a matrix [N, D]")
    matrix = matrix.float().contiguous()
    if bad := int((~torch.isfinite(matrix)).any(dim=1).sum()):
        raise GuideFileError(
            f"{path}: {bad} of the {len(matrix)} rows of {key!r} hold NaN or infinity: make the file again"
        )
    if not matrix.any():
        raise GuideFileError(f"{path}: all rows of {key!r} are zero: make the file again")
    return matrix


def _text_mean(mean: Tensor, value: Mapping[str, Any], path: Path) -> TextMeanFile:
    if mean.ndim not in (1, 2) or mean.numel() != mean.shape[-1] or mean.numel() < 2 or mean.is_complex():
        raise GuideFileError(f"{path}: the text mean has shape {list(mean.shape)}, not [D] or [1, D]")
    mean = mean.reshape(-1).float().contiguous()
    norm = float(mean.norm())
    if not 0 < norm < 1:
        raise GuideFileError(
            f"{path}: the text mean has norm {norm:.4f}. The mean of normalised embeddings has a norm between 0 and 1 (0.7-0.9 "
            f"for CLIP text): normalise every embedding first, then take the mean"
        )
    contents = f"[{len(mean)}], norm {norm:.4f}"
    return TextMeanFile(path=path, dim=len(mean), contents=contents, facts=facts_of(value), mean=mean)


# -- text --------------------------------------------------------------------------------------------------------


def _text(value: Mapping[str, Any], path: Path) -> TextFile:
    source: TextSource = "raw_clip" if "classnames" in value else "adapted"
    index = to_tensor(value.get("select_HOI_index"))
    classes = None if index is None else [int(number) for number in index.flatten()]
    if classes is not None and not all(0 <= number < HOI_CLASSES for number in classes):
        raise GuideFileError(f"{path}: select_HOI_index has numbers that are no HICO-DET interaction (0 to 599)")
    return _text_of(_matrix(value, "embeddings", path), classes, source, value, path)


def _text_of(
    embeddings: Tensor, classes: list[int] | None, source: TextSource, value: Mapping[str, Any], path: Path
) -> TextFile:
    warnings = []
    if source == "raw_clip":
        warnings.append("text of CLIP itself, not adapted by EZ-HOI's prompts: EZ-HOI does not multiply with it")
    empty = embeddings.norm(dim=1) == 0
    scale, spread = _norm_and_spread(embeddings[~empty])
    even = spread < 0.005
    # normalised embeddings that were not centred have a long mean
    mean_norm = float(normalize(embeddings.double(), dim=-1).mean(0).norm())
    centred = even and ("scale_factor" in value or abs(scale - 1) > 0.02 or mean_norm < 0.3)
    if "scale_factor" in value and not even:
        warnings.append("it has a scale_factor, and its rows have different norms: they are taken as not normalised")
    padding = empty
    if centred and len(embeddings) == HOI_CLASSES:
        # the first version gave all classes that were not selected the same row
        _, which, counts = embeddings.unique(dim=0, return_inverse=True, return_counts=True)
        padding = padding | ((counts[which] > 1) & (which == int(counts.argmax())))
    padded = len(embeddings) == HOI_CLASSES and bool(padding.any())
    if padding.any():
        kept = (~padding).nonzero().flatten().tolist()
        if not kept:
            raise GuideFileError(f"{path}: all text rows are the same: make the file again")
        warnings.append(
            f"{int(padding.sum())} of {len(embeddings)} rows stand for no selected class and are dropped"
            + (f"; a mean over all of them is {len(kept) / len(embeddings):.3f} of the right one" if padded else "")
        )
        if padded and classes is not None and sorted(set(classes)) != kept:
            warnings.append(
                f"select_HOI_index names {len(set(classes))} classes, {len(kept)} have a row: the rows count"
            )
        embeddings = embeddings[~padding]
    if (
        source == "adapted"
        and classes is not None
        and not padded
        and len(classes) not in (len(padding), len(embeddings))
    ):
        raise GuideFileError(
            f"{path} has {len(padding)} text rows and names {len(classes)} classes in select_HOI_index"
        )
    form = f"normalised, norm {scale:.3g}" if centred else "raw"
    return TextFile(
        path=path,
        dim=embeddings.shape[1],
        contents=f"{source} {list(embeddings.shape)}, {form}" + (", padded to 600" if padded else ""),
        facts=facts_of(value),
        warnings=(*warnings, *(_scale_warning(value.get("scale_factor"), scale) if centred else ())),
        embeddings=embeddings,
        source=source,
        scale=scale if centred else None,
        padded=padded,
    )


def _norm_and_spread(embeddings: Tensor) -> tuple[float, float]:
    """The median norm, and the largest relative distance from it."""
    norms = embeddings.norm(dim=1)
    median = norms.median()
    return float(median), float((norms / median - 1).abs().max())


def _scale_warning(recorded: Any, scale: float) -> list[str]:
    if isinstance(recorded, (int, float)) and abs(recorded - scale) > 0.01 * scale:
        return [f"it says scale_factor {recorded:g}, and its rows have norm {scale:.4g}: the rows are right"]
    return []


# -- visual embeddings -------------------------------------------------------------------------------------------


def _visual(value: Mapping[str, Any], path: Path) -> VisualFile:
    embeddings = _matrix(value, "embeddings", path)
    metadata, config = value["metadata"], value.get("config")
    if not isinstance(metadata, list) or len(metadata) != len(embeddings):
        count = len(metadata) if isinstance(metadata, list) else f"no list, but a {type_of(metadata)}"
        raise GuideFileError(f"{path} has {len(embeddings)} rows and metadata of {count}: make the file again")
    images = [facts_of(entry, ("image_id",)).get("image_id") for entry in metadata]
    if None in images:
        raise GuideFileError(f"{path}: the metadata of row {images.index(None)} have no image_id: make the file again")
    objects = [entry.get("object_class") for entry in metadata]
    warnings = []
    kept = embeddings.norm(dim=1) > 0
    if not kept.all():
        warnings.append(f"{int((~kept).sum())} rows are zero, have no direction, and are dropped")
        embeddings = embeddings[kept]
        images, objects = (
            [item for item, keep in zip(items, kept.tolist(), strict=True) if keep] for items in (images, objects)
        )
    scale, spread = _norm_and_spread(embeddings)
    uneven = spread > 0.01
    if uneven:
        warnings.append(f"the norms of its rows differ by {100 * spread:.0f} %: the guide's script writes one norm")
    shape = list(embeddings.shape)
    recorded = config.get("scale_factor") if isinstance(config, Mapping) else None
    return VisualFile(
        path=path,
        dim=embeddings.shape[1],
        contents=f"{shape} of {len(set(images))} images, norm {scale:.3g}, directions only",
        facts=facts_of(config),
        warnings=(*warnings, *_scale_warning(recorded, scale)),
        embeddings=embeddings,
        images=tuple(str(image) for image in images),
        objects=torch.tensor(objects, dtype=torch.int32)
        if all(type(o) is int and 0 <= o < 1 << 31 for o in objects)
        else None,
        scale=scale,
        uneven=uneven,
    )


def _analysis(value: Mapping[str, Any], path: Path) -> AnalysisFile:
    before = _matrix(value, "visual_before", path)
    bridged = value.get("visual_after") is not None
    if bridged and (after := _matrix(value, "visual_after", path)).shape != before.shape:
        raise GuideFileError(f"{path}: visual_after is {list(after.shape)}, visual_before is {list(before.shape)}")
    config = value.get("config")
    config = config if isinstance(config, Mapping) else {}
    text = _text_of(_matrix(value, "text_adapted", path), None, "adapted", config, path)
    if text.dim != before.shape[1]:
        raise GuideFileError(
            f"{path}: text rows have D = {text.dim}, visual rows {before.shape[1]}: make the file again"
        )
    contents = f"{list(before.shape)} before {'and after ' if bridged else ''}a bridge; text {text.contents}"
    return AnalysisFile(path=path, dim=text.dim, contents=contents, facts=text.facts, warnings=text.warnings, text=text)
