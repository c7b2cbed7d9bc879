"""The files of the guide's scripts, recognised by what is in them, checked, and told what is known of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor

from ezhoi_diffusion.diffusion.artifact import MAX_TIMESTEPS
from ezhoi_diffusion.diffusion.schedule import Objective, Schedule
from ezhoi_diffusion.features.statistics import unit
from ezhoi_diffusion.guide.reading import LegacyFileError, damaged, printable, read_untrusted, to_tensor

HOI_CLASSES = 600
MADE_BY = "files of the guide are: text embeddings, text mean, visual embeddings, embeddings_for_viz, model-k.pt, EZ-HOI checkpoint"
MAX_INT = 1 << 63  # what a tensor or a JSON reader of other languages takes
FACTS = ("num_classes", "zs_type", "txt_align", "act_descriptor", "clip_model", "checkpoint", "text_mean_path")

Weights = Literal["ema", "online"]


@dataclass(frozen=True, eq=False, kw_only=True)
class LegacyFile:
    """What all of them have. `facts` are what the file says of its making, `warnings` what a user should know of it."""

    kind: ClassVar[str]
    path: Path
    dim: int
    facts: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def contents(self) -> str:
        """Shapes and numbers, in one line."""
        return f"D = {self.dim}"


@dataclass(frozen=True, eq=False, kw_only=True)
class TextRows(LegacyFile):
    """Text embeddings [N_sel, D] float32, of the selected classes alone.

    `centred`: the rows are scale · unit(unit(x) − mean), so that x has lost its norm and the mean; otherwise they are x.
    `padded`: written by the first version of the guide's script, with rows for all 600 classes, whose mean counts them too.
    """

    kind = "text"
    rows: Tensor
    classes: tuple[int, ...] | None
    source: Literal["adapted", "raw_clip"]
    centred: bool
    scale: float | None
    padded: bool = False

    @property
    def contents(self) -> str:
        """Shape, source and form."""
        form = f"normalised, norm {self.scale:.3g}" if self.centred else "raw"
        return f"{self.source} [{len(self.rows)}, {self.dim}], {form}" + (", padded to 600" if self.padded else "")


@dataclass(frozen=True, eq=False, kw_only=True)
class TextMean(LegacyFile):
    """The mean [D] float32 of unit text rows."""

    kind = "text mean"
    mean: Tensor

    @property
    def contents(self) -> str:
        """Shape and norm."""
        return f"[{self.dim}], norm {self.mean.norm():.4f}"


@dataclass(frozen=True, eq=False, kw_only=True)
class VisualRows(LegacyFile):
    """Visual embeddings [N, D] float32, scale · unit(unit(x) − text mean): x has lost its norm.

    `images` has each row's file name, `objects` [N] its object class where the file says it. `uneven`: the norms differ, so
    the rows are not what the guide's script wrote.
    """

    kind = "visual"
    rows: Tensor
    images: tuple[str, ...]
    objects: Tensor | None
    scale: float
    uneven: bool

    @property
    def contents(self) -> str:
        """Shape, images and norm."""
        return (
            f"[{len(self.rows)}, {self.dim}] of {len(set(self.images))} images, norm {self.scale:.3g}, directions only"
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class Analysis(LegacyFile):
    """`embeddings_for_viz`: rows before and after a bridge, for pictures; the text rows are of use here."""

    kind = "analysis"
    text: TextRows
    pairs: int
    bridged: bool

    @property
    def contents(self) -> str:
        """Shapes."""
        after = "before and after" if self.bridged else "before"
        return f"[{self.pairs}, {self.dim}] {after} a bridge; text {self.text.contents}"


@dataclass(frozen=True, eq=False, kw_only=True)
class ModelFile(LegacyFile):
    """A checkpoint of the guide's trainer, or its weights alone.

    `weights` has the network's tensors, named as the network names them. `step` is read from the file. `objective` and
    `timesteps` are None where the file has no schedule.
    """

    kind = "model"
    step: int | None
    init_dim: int
    dim_mults: tuple[int, ...]
    objective: Objective | None
    timesteps: int | None
    weights: dict[Weights, dict[str, Tensor]]

    @property
    def contents(self) -> str:
        """The network, the schedule, the step."""
        step = "unknown" if self.step is None else f"{self.step:,}"
        return (
            f"Unet1D D = {self.dim}, init_dim {self.init_dim}, dim_mults {' '.join(map(str, self.dim_mults))}; "
            f"{self.objective or 'objective unknown'}, T = {self.timesteps or 'unknown'}, step {step}, "
            f"weights {' and '.join(self.weights)}"
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class EzHoiCheckpoint(LegacyFile):
    """A checkpoint of EZ-HOI itself: nothing to import, it is what the host's --resume takes."""

    kind = "EZ-HOI checkpoint"
    shapes: dict[str, list[int]]

    @property
    def contents(self) -> str:
        """What its shapes tell."""
        shapes = ", ".join(f"{name} {shape}" for name, shape in self.shapes.items())
        return f"D = {self.dim or 'unknown'}; {shapes}; nothing to import: give it to the host's --resume"


def read_legacy(path: Path) -> LegacyFile:
    """What `path` is. Raises LegacyFileError, UnsafeFileError for what it cannot be used as."""
    value = read_untrusted(path)
    try:
        return _recognised(value, path)
    except LegacyFileError:
        raise
    except Exception as error:  # whatever values and shapes that no script writes can bring about
        raise damaged(path, error) from error


def _recognised(value: Any, path: Path) -> LegacyFile:
    if (mean := _bare_mean(value)) is not None:
        return _text_mean(mean, {}, path)
    if not isinstance(value, Mapping):
        raise LegacyFileError(f"{path} holds a {_what(value)}, which no script of the guide writes; {MADE_BY}")
    if "model_state_dict" in value:
        return _host_checkpoint(value, path)
    if "visual_before" in value:
        return _analysis(value, path)
    if "embeddings" in value:
        return _visual(value, path) if "metadata" in value else _text(value, path)
    for key in ("text_mean", "mean"):
        if key in value:
            if (mean := to_tensor(value[key])) is None:
                raise LegacyFileError(f"{path}: {key!r} is a {_what(value[key])}, not numbers")
            return _text_mean(mean, value, path)
    if networks := _networks(value):
        return _model(value, networks, path)
    keys = ", ".join(f"{key!r:.50}" for key in list(value)[:8])
    raise LegacyFileError(f"{path} holds {keys or 'nothing'}, which no script of the guide writes; {MADE_BY}")


def _what(value: Any) -> str:
    return f"{type(value).__name__} of shape {list(value.shape)}" if hasattr(value, "shape") else type(value).__name__


def _facts(value: Mapping[str, Any], keys: tuple[str, ...] = FACTS) -> dict[str, Any]:
    """What a file says that one line and JSON can say."""
    facts = {key: value.get(key) for key in keys}
    return {
        key: printable(fact) if isinstance(fact, str) else fact
        for key, fact in facts.items()
        if isinstance(fact, str) or (isinstance(fact, int) and abs(fact) < MAX_INT)
    }


def _rows(value: Mapping[str, Any], key: str, path: Path) -> Tensor:
    """[N, D] float32, finite, at least one of each."""
    rows = to_tensor(value.get(key))
    if rows is None or rows.ndim != 2 or 0 in rows.shape or rows.is_complex():
        raise LegacyFileError(f"{path}: {key!r} is a {_what(value.get(key))}, not a matrix [N, D]")
    rows = rows.float().contiguous()
    if bad := int((~torch.isfinite(rows)).any(dim=1).sum()):
        raise LegacyFileError(
            f"{path}: {bad} of the {len(rows)} rows of {key!r} hold NaN or infinity: make the file again"
        )
    return rows


# Means


def _bare_mean(value: Any) -> Tensor | None:
    tensor = to_tensor(value)
    return tensor if tensor is not None and (tensor.ndim == 1 or (tensor.ndim == 2 and len(tensor) == 1)) else None


def _text_mean(mean: Tensor, value: Mapping[str, Any], path: Path) -> TextMean:
    if mean.ndim not in (1, 2) or len(mean.reshape(-1)) != mean.shape[-1] or mean.shape[-1] < 2 or mean.is_complex():
        raise LegacyFileError(f"{path}: the text mean has shape {list(mean.shape)}, not [D] or [1, D]")
    mean = mean.reshape(-1).float().contiguous()
    if not torch.isfinite(mean).all():
        raise LegacyFileError(f"{path}: the text mean holds NaN or infinity: make it again")
    norm = float(mean.norm())
    if not 0 < norm < 1:
        raise LegacyFileError(
            f"{path}: the text mean has norm {norm:.4f}. The mean of unit rows has a norm between 0 and 1 (0.7-0.9 for CLIP "
            f"text): normalise every row first, then take the mean"
        )
    return TextMean(path=path, dim=len(mean), facts=_facts(value), mean=mean)


# Text


def _text(value: Mapping[str, Any], path: Path) -> TextRows:
    source: Literal["adapted", "raw_clip"] = "raw_clip" if "classnames" in value else "adapted"
    index = to_tensor(value.get("select_HOI_index"))
    classes = None if index is None else [int(number) for number in index.flatten()]
    if classes is not None and not all(0 <= number < HOI_CLASSES for number in classes):
        raise LegacyFileError(f"{path}: select_HOI_index has numbers that are no HICO-DET interaction (0 to 599)")
    warnings = []
    if source == "raw_clip":
        warnings.append("text of CLIP itself, not adapted by the host's prompts: the host does not multiply with these")
    return _text_rows(_rows(value, "embeddings", path), classes, source, value, path, warnings)


def _text_rows(
    rows: Tensor,
    classes: list[int] | None,
    source: Literal["adapted", "raw_clip"],
    value: Mapping[str, Any],
    path: Path,
    warnings: list[str],
) -> TextRows:
    norms = rows.norm(dim=1)
    empty = norms == 0
    if empty.all():
        raise LegacyFileError(f"{path}: all text rows are zero: make the file again")
    scale, spread = _norm_of(norms[~empty])
    even = spread < 0.005
    # unit rows that were not centred have a long mean
    centred = even and ("scale_factor" in value or abs(scale - 1) > 0.02 or _mean_norm(rows) < 0.3)
    if "scale_factor" in value and not even:
        warnings.append("it has a scale_factor, and its rows have different norms: they are taken as not normalised")
    padding = empty
    if centred and len(rows) == HOI_CLASSES:
        # every class that was not selected is the mean's opposite
        _, which, counts = rows.unique(dim=0, return_inverse=True, return_counts=True)
        padding = padding | ((counts[which] > 1) & (which == int(counts.argmax())))
    padded = len(rows) == HOI_CLASSES and bool(padding.any())
    if dropped := int(padding.sum()):
        kept = (~padding).nonzero().flatten().tolist()
        if not kept:
            raise LegacyFileError(f"{path}: all text rows are the same: make the file again")
        warnings.append(
            f"{dropped} of {len(rows)} rows stand for no selected class and are dropped"
            + (f"; a mean over all of them is {len(kept) / len(rows):.3f} of the right one" if padded else "")
        )
        if padded and classes is not None and sorted(set(classes)) != kept:
            warnings.append(
                f"select_HOI_index names {len(set(classes))} classes, {len(kept)} have a row: the rows count"
            )
        if padded:
            classes = kept
        elif classes is not None and len(classes) == len(rows):
            classes = [classes[number] for number in kept]
        rows = rows[~padding]
    if source == "adapted" and classes is not None and len(classes) != len(rows):
        raise LegacyFileError(f"{path} has {len(rows)} text rows and names {len(classes)} classes in select_HOI_index")
    if centred:
        warnings += _scale_warning(value.get("scale_factor"), scale)
    return TextRows(
        path=path,
        dim=rows.shape[1],
        facts=_facts(value),
        warnings=tuple(warnings),
        rows=rows,
        classes=None if classes is None else tuple(classes),
        source=source,
        centred=centred,
        scale=scale if centred else None,
        padded=padded,
    )


def _norm_of(norms: Tensor) -> tuple[float, float]:
    """The median norm, and how far the others are from it, relatively."""
    middle = norms.median()
    return float(middle), float((norms / middle - 1).abs().max())


def _mean_norm(rows: Tensor) -> float:
    return float(unit(rows.double()).mean(0).norm())


def _scale_warning(recorded: Any, scale: float) -> list[str]:
    if isinstance(recorded, (int, float)) and abs(recorded - scale) > 0.01 * scale:
        return [f"it says scale_factor {recorded:g}, and its rows have norm {scale:.4g}: the rows are right"]
    return []


# Visual rows, and the file for pictures


def _visual(value: Mapping[str, Any], path: Path) -> VisualRows:
    rows = _rows(value, "embeddings", path)
    metadata, config = value["metadata"], value.get("config")
    if not isinstance(metadata, list) or len(metadata) != len(rows):
        count = len(metadata) if isinstance(metadata, list) else f"no list, but a {_what(metadata)}"
        raise LegacyFileError(f"{path} has {len(rows)} rows and metadata of {count}: make the file again")
    nameless = (
        n for n, entry in enumerate(metadata) if not isinstance(entry, Mapping) or not _facts(entry, ("image_id",))
    )
    if (row := next(nameless, None)) is not None:
        raise LegacyFileError(f"{path}: the metadata of row {row} have no image_id: make the file again")
    config = config if isinstance(config, Mapping) else {}
    warnings = []
    zero = rows.norm(dim=1) == 0
    if zero.all():
        raise LegacyFileError(f"{path}: all visual rows are zero: make the file again")
    if zero.any():
        warnings.append(f"{int(zero.sum())} rows are zero, have no direction, and are dropped")
        metadata = [entry for entry, empty in zip(metadata, zero.tolist(), strict=True) if not empty]
        rows = rows[~zero]
    scale, spread = _norm_of(rows.norm(dim=1))
    uneven = spread > 0.01
    if uneven:
        warnings.append(
            f"the norms of its rows differ by {100 * spread:.0f} %: they are not what the guide's script writes"
        )
    objects = [entry.get("object_class") for entry in metadata]
    return VisualRows(
        path=path,
        dim=rows.shape[1],
        facts=_facts(config),
        warnings=(*warnings, *_scale_warning(config.get("scale_factor"), scale)),
        rows=rows,
        images=tuple(printable(str(entry["image_id"])) for entry in metadata),
        objects=torch.tensor(objects, dtype=torch.int32)
        if all(type(o) is int and 0 <= o < 2**31 for o in objects)
        else None,
        scale=scale,
        uneven=uneven,
    )


def _analysis(value: Mapping[str, Any], path: Path) -> Analysis:
    before = _rows(value, "visual_before", path)
    bridged = value.get("visual_after") is not None
    if bridged and (after := _rows(value, "visual_after", path)).shape != before.shape:
        raise LegacyFileError(f"{path}: visual_after is {list(after.shape)}, visual_before is {list(before.shape)}")
    config = value.get("config")
    config = config if isinstance(config, Mapping) else {}
    text = _text_rows(_rows(value, "text_adapted", path), None, "adapted", config, path, [])
    if text.dim != before.shape[1]:
        raise LegacyFileError(
            f"{path}: text rows have D = {text.dim}, visual rows {before.shape[1]}: make the file again"
        )
    return Analysis(
        path=path,
        dim=text.dim,
        facts=_facts(config),
        warnings=text.warnings,
        text=text,
        pairs=len(before),
        bridged=bridged,
    )


# Checkpoints


def _state(value: Any) -> dict[str, Tensor]:
    """A state dict's tensors, without what wrappers (DDP, compile) put into names; empty where it is none."""
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
    """State dicts that have the network's tensors in them, with the schedule's where they are there: a trainer's
    checkpoint, or the state dict of the trained model, of its network, or of its average."""
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
    if "ema" in weights and "online" in weights and initialised is not None and not bool(initialised.any()):
        del weights["ema"]
        warnings.append("its averaged weights were never updated: only the online weights are of use")
    if "ema" not in weights:
        warnings.append(
            "it has no averaged (EMA) weights: the online weights are used, which is not what the guide does"
        )
    network = next(iter(weights.values()))
    try:
        time_width, dim = network["time_mlp.1.weight"].shape
        init_dim, channels, _ = network["init_conv.weight"].shape
        multiples: list[float] = []
        while f"downs.{len(multiples)}.3.weight" in network:
            multiples.append(network[f"downs.{len(multiples)}.3.weight"].shape[0] / init_dim)
    except (KeyError, ValueError) as error:
        raise LegacyFileError(f"{path} holds a network that is not the guide's Unet1D ({error})") from error
    if channels != 1 or time_width != 4 * init_dim or not multiples or any(m != int(m) for m in multiples):
        raise LegacyFileError(
            f"{path} holds another network than the guide's Unet1D: {channels} input channels (1 expected), time width "
            f"{time_width} ({4 * init_dim} expected), dim_mults {multiples} (whole numbers expected)"
        )
    step = (
        value.get("step") if isinstance(value.get("model"), Mapping) or isinstance(value.get("ema"), Mapping) else None
    )
    step = int(step) if isinstance(step, int) or (isinstance(step, Tensor) and step.numel() == 1) else None
    if step is not None and abs(step) >= MAX_INT:
        raise LegacyFileError(f"{path}: its step is a number of {step.bit_length()} bits: it is damaged")
    schedule = next((state for state in states.values() if "betas" in state or "alphas_cumprod" in state), None)
    objective, timesteps = (None, None) if schedule is None else _schedule(schedule, path)
    if schedule is None:
        warnings.append("it has no schedule: what the network predicts (--objective) cannot be told")
    return ModelFile(
        path=path,
        dim=dim,
        facts=_facts(value, ("version",)),
        warnings=tuple(warnings),
        step=step,
        init_dim=init_dim,
        dim_mults=tuple(int(m) for m in multiples),
        objective=objective,
        timesteps=timesteps,
        weights=weights,
    )


def _schedule(state: dict[str, Tensor], path: Path) -> tuple[Objective, int]:
    """Objective and number of levels, told from the buffers. Raises LegacyFileError for any schedule but the cosine one."""
    missing = {"betas", "alphas_cumprod", "loss_weight"} - state.keys()
    if missing:
        raise LegacyFileError(f"{path} is incomplete: it lacks {', '.join(sorted(missing))}")
    betas, alpha_bar, weight = (state[name].double().flatten() for name in ("betas", "alphas_cumprod", "loss_weight"))
    timesteps = len(betas)
    if not timesteps == len(alpha_bar) == len(weight) or not 1 <= timesteps <= MAX_TIMESTEPS:
        raise LegacyFileError(
            f"{path}: schedule buffers of {timesteps}, {len(alpha_bar)} and {len(weight)} levels: one number was expected"
        )
    expected = Schedule.cosine(timesteps).alphas_cumprod
    if not torch.allclose(alpha_bar, expected, rtol=1e-3, atol=1e-6) or not torch.allclose(
        (1 - betas).cumprod(0), expected, rtol=1e-3, atol=1e-6
    ):
        linear = torch.linspace(0.1 / timesteps, 20 / timesteps, timesteps, dtype=torch.float64)
        name = "linear" if torch.allclose(betas, linear, rtol=1e-3) else "unknown"
        raise LegacyFileError(
            f"{path} was trained with the {name} noise schedule (ᾱ in the middle {alpha_bar[timesteps // 2]:.4f}; the cosine "
            f"schedule has {expected[timesteps // 2]:.4f}): only the cosine schedule can be imported, train anew"
        )
    for objective in cast("tuple[Objective, ...]", ("pred_x0", "pred_noise", "pred_v")):
        if torch.allclose(
            weight, Schedule(expected).loss_weight(objective, torch.arange(timesteps)).double(), rtol=1e-2, atol=1e-6
        ):
            return objective, timesteps
    raise LegacyFileError(
        f"{path}: its loss_weight is that of no objective (SNR for pred_x0, 1 for pred_noise, SNR/(SNR+1) for pred_v), so what "
        f"the network predicts cannot be told"
    )


def _host_checkpoint(value: Mapping[str, Any], path: Path) -> EzHoiCheckpoint:
    state = _state(value["model_state_dict"])
    telling = ("label_HO", "mem_adapter.down_proj_mem.weight", "vis_fuse.0.weight")
    shapes = {name: list(state[name].shape) for name in telling if name in state}
    dim = next((shapes[name][-1] for name in telling[1:2] if name in shapes), 0)
    if not dim and "vis_fuse.0.weight" in shapes:
        rows, columns = shapes["vis_fuse.0.weight"]
        dim = rows if columns == 2 * rows else rows // 2
    return EzHoiCheckpoint(path=path, dim=dim, facts=_facts(value, ("iteration", "epoch")), shapes=shapes)
