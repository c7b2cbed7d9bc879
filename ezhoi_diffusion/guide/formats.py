"""Recognise the files of the guide's scripts by their content, check them, and say what is known of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ezhoi_diffusion.diffusion.recipes import MAX_TIMESTEPS, Objective
from ezhoi_diffusion.diffusion.schedule import Schedule
from ezhoi_diffusion.guide.reading import GuideFileError, damaged, printable, read_untrusted, to_tensor

HOI_CLASSES = 600
KINDS = "files of the guide are: text embeddings, text mean, visual embeddings, embeddings_for_viz, model-k.pt, EZ-HOI checkpoint"
MAX_INT = 1 << 63  # what a tensor holds, and a JSON reader of another language
FACTS = ("num_classes", "zs_type", "txt_align", "act_descriptor", "clip_model", "checkpoint", "text_mean_path")

Weights = Literal["ema", "online"]
TextSource = Literal["adapted", "raw_clip"]


@dataclass(frozen=True, eq=False, kw_only=True)
class GuideFile:
    """A file of the guide.

    Attributes:
        dim: D, or 0 where the file does not tell.
        contents: Shapes and numbers, in one line.
        facts: What the file says of its making.
        warnings: What its user should know.
    """

    kind: ClassVar[str]
    path: Path
    dim: int
    contents: str
    facts: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False, kw_only=True)
class TextFile(GuideFile):
    """Text embeddings of the selected classes.

    Attributes:
        embeddings: [N_sel, D] float32.
        scale: None for raw embeddings x. Otherwise the embeddings are scale · normalize(normalize(x) − mean).
        padded: Written by the first version of the guide's script, with a row for each of the 600 classes.
    """

    kind = "text"
    embeddings: Tensor
    source: TextSource
    scale: float | None
    padded: bool


@dataclass(frozen=True, eq=False, kw_only=True)
class TextMeanFile(GuideFile):
    """The mean [D] float32 of normalised text embeddings."""

    kind = "text mean"
    mean: Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class VisualFile(GuideFile):
    """Visual embeddings, scale · normalize(normalize(x) − text mean): the norms of x are lost.

    Attributes:
        embeddings: [N, D] float32.
        images: N file names.
        objects: [N] object classes, where the file names them.
        uneven: Whether the norms differ. The guide's script writes one norm.
    """

    kind = "visual"
    embeddings: Tensor
    images: tuple[str, ...]
    objects: Tensor | None
    scale: float
    uneven: bool


@dataclass(frozen=True, eq=False, kw_only=True)
class AnalysisFile(GuideFile):
    """`embeddings_for_viz`: embeddings before and after a bridge, for pictures. Only its text is of use."""

    kind = "analysis"
    text: TextFile


@dataclass(frozen=True, eq=False, kw_only=True)
class ModelFile(GuideFile):
    """A checkpoint of the guide's trainer, or its weights alone.

    Attributes:
        step: As the file says, never as its name says.
        objective: None where the file has no schedule.
        num_timesteps: None where the file has no schedule.
        weights: The network's tensors, named as the network names them.
    """

    kind = "model"
    step: int | None
    init_dim: int
    dim_mults: tuple[int, ...]
    objective: Objective | None
    num_timesteps: int | None
    weights: dict[Weights, dict[str, Tensor]]


@dataclass(frozen=True, eq=False, kw_only=True)
class EzHoiCheckpoint(GuideFile):
    """A checkpoint of EZ-HOI, which EZ-HOI's `--resume` takes. There is nothing to import."""

    kind = "EZ-HOI checkpoint"


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
        raise GuideFileError(f"{path} holds a {_type_of(value)}, which no script of the guide writes; {KINDS}")
    if "model_state_dict" in value:
        return _ezhoi_checkpoint(value, path)
    if "visual_before" in value:
        return _analysis(value, path)
    if "embeddings" in value:
        return _visual(value, path) if "metadata" in value else _text(value, path)
    for key in ("text_mean", "mean"):
        if key in value:
            if (mean := to_tensor(value[key])) is None:
                raise GuideFileError(f"{path}: {key!r} is a {_type_of(value[key])}, not numbers")
            return _text_mean(mean, value, path)
    if networks := _networks(value):
        return _model(value, networks, path)
    keys = ", ".join(f"{key!r:.50}" for key in list(value)[:8])
    raise GuideFileError(f"{path} holds {keys or 'nothing'}, which no script of the guide writes; {KINDS}")


def _type_of(value: Any) -> str:
    return f"{type(value).__name__} of shape {list(value.shape)}" if hasattr(value, "shape") else type(value).__name__


def _facts(value: Any, keys: tuple[str, ...] = FACTS) -> dict[str, Any]:
    """Contents of a file, as far as one line and JSON can hold them."""
    facts = {key: value.get(key) for key in keys} if isinstance(value, Mapping) else {}
    return {
        key: printable(fact) if isinstance(fact, str) else fact
        for key, fact in facts.items()
        if isinstance(fact, str) or (isinstance(fact, int) and abs(fact) < MAX_INT)
    }


def _matrix(value: Mapping[str, Any], key: str, path: Path) -> Tensor:
    """[N, D] float32, finite, with at least one row that is not zero."""
    matrix = to_tensor(value.get(key))
    if matrix is None or matrix.ndim != 2 or 0 in matrix.shape or matrix.is_complex():
        raise GuideFileError(f"{path}: {key!r} is a {_type_of(value.get(key))}, not a matrix [N, D]")
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
    return TextMeanFile(path=path, dim=len(mean), contents=contents, facts=_facts(value), mean=mean)


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
        facts=_facts(value),
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
        count = len(metadata) if isinstance(metadata, list) else f"no list, but a {_type_of(metadata)}"
        raise GuideFileError(f"{path} has {len(embeddings)} rows and metadata of {count}: make the file again")
    images = [_facts(entry, ("image_id",)).get("image_id") for entry in metadata]
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
        facts=_facts(config),
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


# -- checkpoints -------------------------------------------------------------------------------------------------


def _state(value: Any) -> dict[str, Tensor]:
    """A state dict's tensors, without what wrappers (DDP, compile) add to names; empty for anything else."""
    if not isinstance(value, Mapping):
        return {}
    return {
        ".".join(part for part in name.split(".") if part not in ("module", "_orig_mod")): tensor.detach()
        for name, tensor in value.items()
        if isinstance(name, str) and isinstance(tensor, Tensor)
    }


def _below(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _networks(value: Mapping[str, Any]) -> dict[Weights, dict[str, Tensor]]:
    """The state dicts that hold the network, from a trainer's checkpoint or from a bare state dict of any part of it."""
    bare = _state(value)
    averages = _state(value.get("ema")) or bare
    plain = {name: tensor for name, tensor in bare.items() if not name.startswith("ema_model.")}
    found: dict[Weights, dict[str, Tensor]] = {
        "ema": _below(averages, "ema_model."),
        "online": _state(value.get("model")) or _below(averages, "online_model.") or plain,
    }
    return {name: state for name, state in found.items() if any(key.endswith("init_conv.weight") for key in state)}


def _model(value: Mapping[str, Any], states: dict[Weights, dict[str, Tensor]], path: Path) -> ModelFile:
    weights: dict[Weights, dict[str, Tensor]] = {
        name: _below(state, "model.") or state for name, state in states.items()
    }
    warnings = []
    initialised = _state(value.get("ema")).get("initted")
    if len(weights) == 2 and initialised is not None and not bool(initialised.any()):
        del weights["ema"]
        warnings.append("its averaged weights were never updated: only the online weights are of use")
    if "ema" not in weights:
        warnings.append("it has no averaged (EMA) weights: the online weights are used; the guide uses averaged ones")
    init_dim, dim, dim_mults = _network_shape(next(iter(weights.values())), path)
    step = (
        value.get("step") if isinstance(value.get("model"), Mapping) or isinstance(value.get("ema"), Mapping) else None
    )
    step = int(step) if isinstance(step, int) or (isinstance(step, Tensor) and step.numel() == 1) else None
    if step is not None and abs(step) >= MAX_INT:
        raise GuideFileError(f"{path}: its step is a number of {step.bit_length()} bits: it is damaged")
    schedule = next((state for state in states.values() if "betas" in state or "alphas_cumprod" in state), None)
    objective, num_timesteps = (None, None) if schedule is None else _read_schedule(schedule, path)
    if schedule is None:
        warnings.append("it has no schedule: what the network predicts (--objective) is unknown")
    return ModelFile(
        path=path,
        dim=dim,
        contents=f"Unet1D D = {dim}, init_dim {init_dim}, dim_mults {' '.join(map(str, dim_mults))}; "
        f"{objective or 'objective unknown'}, T = {num_timesteps or 'unknown'}, step "
        f"{'unknown' if step is None else f'{step:,}'}, weights {' and '.join(weights)}",
        facts=_facts(value, ("version",)),
        warnings=tuple(warnings),
        step=step,
        init_dim=init_dim,
        dim_mults=dim_mults,
        objective=objective,
        num_timesteps=num_timesteps,
        weights=weights,
    )


def _network_shape(network: dict[str, Tensor], path: Path) -> tuple[int, int, tuple[int, ...]]:
    """init_dim, D and dim_mults. Raises GuideFileError for another network than the guide's."""
    multiples: list[float] = []
    try:
        time_width, dim = network["time_mlp.1.weight"].shape
        init_dim, channels, _ = network["init_conv.weight"].shape
        while f"downs.{len(multiples)}.3.weight" in network:
            multiples.append(network[f"downs.{len(multiples)}.3.weight"].shape[0] / init_dim)
    except (KeyError, ValueError) as error:
        raise GuideFileError(f"{path} holds a network that is not the guide's Unet1D ({error})") from error
    if channels != 1 or time_width != 4 * init_dim or not multiples or any(m != int(m) for m in multiples):
        raise GuideFileError(
            f"{path} holds another network than the guide's Unet1D: {channels} input channels (1 expected), time width "
            f"{time_width} ({4 * init_dim} expected), dim_mults {multiples} (whole numbers expected)"
        )
    return init_dim, dim, tuple(int(m) for m in multiples)


def _read_schedule(state: dict[str, Tensor], path: Path) -> tuple[Objective, int]:
    """Objective and number of timesteps, from the buffers. Raises GuideFileError for any but the cosine schedule."""
    missing = {"betas", "alphas_cumprod", "loss_weight"} - state.keys()
    if missing:
        raise GuideFileError(f"{path} is incomplete: it lacks {', '.join(sorted(missing))}")
    betas, alpha_bar, weight = (state[name].double().flatten() for name in ("betas", "alphas_cumprod", "loss_weight"))
    timesteps = len(betas)
    if not timesteps == len(alpha_bar) == len(weight) or not 1 <= timesteps <= MAX_TIMESTEPS:
        raise GuideFileError(
            f"{path}: the schedule's buffers have {timesteps}, {len(alpha_bar)} and {len(weight)} timesteps: it is damaged"
        )
    schedule = Schedule.cosine(timesteps)
    expected = schedule.alphas_cumprod
    if not all(torch.allclose(x, expected, rtol=1e-3, atol=1e-6) for x in (alpha_bar, (1 - betas).cumprod(0))):
        linear = torch.linspace(0.1 / timesteps, 20 / timesteps, timesteps, dtype=torch.float64)
        name = "linear" if torch.allclose(betas, linear, rtol=1e-3) else "unknown"
        raise GuideFileError(
            f"{path} was trained with the {name} noise schedule (ᾱ in the middle {alpha_bar[timesteps // 2]:.4f}; the cosine "
            f"schedule has {expected[timesteps // 2]:.4f}): only the cosine schedule can be imported, train another model"
        )
    for objective in cast("tuple[Objective, ...]", ("pred_x0", "pred_noise", "pred_v")):
        known = schedule.loss_weight(objective, torch.arange(timesteps)).double()
        if torch.allclose(weight, known, rtol=1e-2, atol=1e-6):
            return objective, timesteps
    raise GuideFileError(
        f"{path}: its loss_weight fits no objective (SNR for pred_x0, 1 for pred_noise, SNR/(SNR+1) for pred_v), so what the "
        f"network predicts is unknown: train another model"
    )


def _ezhoi_checkpoint(value: Mapping[str, Any], path: Path) -> EzHoiCheckpoint:
    state = _state(value["model_state_dict"])
    names = ("label_HO", "mem_adapter.down_proj_mem.weight", "vis_fuse.0.weight")
    shapes = {name: list(state[name].shape) for name in names if name in state}
    adapter, fuse = shapes.get("mem_adapter.down_proj_mem.weight"), shapes.get("vis_fuse.0.weight")
    dim = 0
    if adapter:
        dim = adapter[-1]
    elif fuse:
        outputs, inputs = fuse
        dim = outputs if inputs == 2 * outputs else outputs // 2
    listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
    contents = f"D = {dim or 'unknown'}; {listed}; nothing to import: give it to EZ-HOI's --resume"
    return EzHoiCheckpoint(path=path, dim=dim, contents=contents, facts=_facts(value, ("iteration", "epoch")))
