"""From the guide's files to ours: a bridge, or a store of features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ezhoi_diffusion.diffusion.bridge import BridgeConfig, BridgeError, DiffusionBridge, build_denoiser
from ezhoi_diffusion.diffusion.normalization import uncenter
from ezhoi_diffusion.diffusion.recipes import RECIPES
from ezhoi_diffusion.diffusion.samplers import samplers
from ezhoi_diffusion.errors import EzhoiDiffusionError
from ezhoi_diffusion.features.statistics import ModalityStatistics, unit
from ezhoi_diffusion.features.store import FeatureStore
from ezhoi_diffusion.features.writer import write_imported
from ezhoi_diffusion.files import new_folder, require_unused, sha256
from ezhoi_diffusion.guide.formats import (
    Analysis,
    EzHoiCheckpoint,
    LegacyFile,
    ModelFile,
    TextMean,
    TextRows,
    VisualRows,
    Weights,
)
from ezhoi_diffusion.guide.reading import LegacyFileError, printable

GUIDE_STEPS, GUIDE_SCALE, GUIDE_TIMESTEPS = 600, 5.0, 1000
File = TypeVar("File", bound=LegacyFile)


class ImportFilesError(EzhoiDiffusionError):
    """The files that were given do not make anything together."""


@dataclass(frozen=True, eq=False)
class Bundle:
    """The files of one import, sorted; `notes` collects what was assumed or is odd about them."""

    model: ModelFile | None
    visual: VisualRows | None
    text: TextRows | None
    mean: TextMean | None
    files: Sequence[LegacyFile]
    notes: list[str]

    @classmethod
    def of(cls, files: Sequence[LegacyFile], *, force: bool = False) -> Bundle:
        """Sort files. Raises ImportFilesError for two of a kind, for different D, and, unless `force`, for raw CLIP text."""
        dims = {file.path.name: file.dim for file in files if not isinstance(file, EzHoiCheckpoint)}
        if len(set(dims.values())) > 1:
            listed = ", ".join(f"{name} has {dim}" for name, dim in dims.items())
            raise ImportFilesError(
                f"the files are of different widths D: {listed}. 512 is CLIP ViT-B's, 768 ViT-L's: give files of one backbone"
            )
        text = _only(files, TextRows)
        analysis = _only(files, Analysis)
        if text is None and analysis is not None:
            text = analysis.text
        bundle = cls(
            _only(files, ModelFile), _only(files, VisualRows), text, _only(files, TextMean), files,
            [f"{file.path.name}: {warning}" for file in files for warning in file.warnings],
        )  # fmt: skip
        if text is not None and text.source == "raw_clip":
            bundle.tolerate(
                f"{text.path} is text of CLIP itself; the host multiplies with text adapted by its prompts, and the mean is "
                f"another: give the adapted text or its mean",
                force,
            )
        return bundle

    def tolerate(self, problem: str, force: bool) -> None:
        """Raise ImportFilesError, or note the problem if `force`."""
        if not force:
            raise ImportFilesError(f"{problem}, or go on all the same with `ezhoi-diffusion import --force`")
        self.notes.append(f"FORCED: {problem}")

    @property
    def fingerprint(self) -> dict[str, Any]:
        """The part of a host's fingerprint that the files know."""
        known: dict[str, Any] = {"dim": next(f.dim for f in self.files if f.dim)}
        for file in self.files:
            known |= {key: file.facts[key] for key in ("zs_type", "num_classes", "txt_align") if key in file.facts}
            backbone = Path(str(file.facts.get("clip_model", ""))).name.removesuffix(".pt").replace("/", "-")
            if backbone.startswith("ViT-"):
                known["backbone"] = backbone
        if self.text is not None:
            known["text_rows"] = len(self.text.rows)
        return known

    @property
    def origin(self) -> list[dict[str, Any]]:
        """Name, kind, content hash and facts of every file, as JSON."""
        return [{"file": f.path.name, "kind": f.kind, "sha256": sha256(f.path), "facts": f.facts} for f in self.files]


def make_bridge(
    bundle: Bundle,
    *,
    weights: Weights = "ema",
    scale: float | None = None,
    num_steps: int | None = None,
    force: bool = False,
) -> DiffusionBridge:
    """The bridge that the guide's module would be: recipe `guide`, S = t0 = `steps` (600), of a norm `scale` that is told
    by the visual or text file, else 5.

    Raises ImportFilesError where the model or the text mean is missing; LegacyFileError where the weights do not fit.
    """
    model = bundle.model
    if model is None:
        raise ImportFilesError("there is no model among the files: give the trainer's model-k.pt")
    mean = _subtracted_mean(bundle, force)
    if model.objective is None or model.timesteps is None:
        bundle.tolerate(
            f"{model.path} has the network's weights without the schedule, so that what it predicts is unknown (pred_x0 and "
            f"{GUIDE_TIMESTEPS} levels are the guide's): give the trainer's own model-k.pt",
            force,
        )
    timesteps = model.timesteps or GUIDE_TIMESTEPS
    num_steps = min(GUIDE_STEPS, timesteps) if num_steps is None else num_steps
    recipe = replace(
        RECIPES["guide"], scale_factor=_scale(bundle, scale), num_steps=num_steps, start_timestep=num_steps
    )
    try:
        config = BridgeConfig(
            dim=model.dim,
            recipe=recipe,
            denoiser="unet1d",
            denoiser_options={"init_dim": model.init_dim, "dim_mults": list(model.dim_mults)},
            objective=model.objective or "pred_x0",
            timesteps=timesteps,
        )
    except ValueError as error:
        raise ImportFilesError(f"{model.path}: {error}") from error
    state, used = _chosen(model, weights)
    with torch.random.fork_rng(devices=[]):
        denoiser = build_denoiser(config)
    try:
        denoiser.net.load_state_dict(state)  # type: ignore[union-attr]
    except RuntimeError as error:
        raise LegacyFileError(f"{model.path} does not fit the guide's Unet1D ({printable(str(error), 300)})") from error
    statistics = ModalityStatistics.text_only(mean, len(bundle.text.rows) if bundle.text else 0)
    if bundle.visual is not None:
        statistics = ModalityStatistics.around([_undone(bundle, mean, force)], mean, statistics.text_rows)
    config.provenance.update(
        fingerprint=bundle.fingerprint,
        imported={"files": bundle.origin, "weights": used, "notes": bundle.notes},
        training={"step": model.step},
    )
    return DiffusionBridge(config, denoiser, statistics, sampler=samplers()[recipe.sampler])


def save_bridge(bridge: DiffusionBridge, folder: Path) -> None:
    """Write the artefact. Raises ImportFilesError where `folder` is in use or cannot be written."""
    require_unused(folder, ImportFilesError)
    try:
        with new_folder(folder) as staged:
            bridge.save_pretrained(staged)
    except (OSError, BridgeError) as error:  # the latter names the folder that was staged
        raise ImportFilesError(
            f"{folder} could not be written ({error.__cause__ or error}): choose another folder, or free space"
        ) from error


def make_store(bundle: Bundle, folder: Path, *, force: bool = False) -> FeatureStore:
    """Write the visual rows as unit rows into a new store: their directions are exact, their norms are lost.

    Raises ImportFilesError where the visual file or the text mean is missing, FeatureStoreError where `folder` is in use.
    """
    visual = bundle.visual
    if visual is None:
        kinds = ", ".join(file.kind for file in bundle.files)
        raise ImportFilesError(
            f"of {kinds} alone nothing can be made: add the trainer's model-k.pt for a bridge, or the visual embeddings for "
            f"features (see `ezhoi-diffusion import --help`)"
        )
    mean = _subtracted_mean(bundle, force)
    text = _text_of(bundle.text, mean) if bundle.text else torch.zeros(0, visual.dim)
    # what was subtracted has to be given back; what is to be subtracted from now on is the mean of the text itself
    text_mean = unit(text.double()).mean(0).float() if len(text) else mean
    meta = {
        # the guide's script names no split, HICO-DET's file names do
        "split": "test" if any(name.startswith("HICO_test") for name in visual.images) else "train",
        "fingerprint": bundle.fingerprint,
        "imported": {"files": bundle.origin, "norms": False, "notes": bundle.notes},
    }
    rows = {"adapter_feat": _undone(bundle, mean, force)}
    if visual.objects is not None:
        rows["objects"] = visual.objects
    return write_imported(folder, meta, rows, visual.images, {"text": text, "text_mean": text_mean})


def _only(files: Sequence[LegacyFile], kind: type[File]) -> File | None:
    found = [file for file in files if isinstance(file, kind)]
    if len(found) > 1:
        raise ImportFilesError(f"{found[0].path} and {found[1].path} are both a {kind.kind} file: give one of them")
    return found[0] if found else None


def _subtracted_mean(bundle: Bundle, force: bool) -> Tensor:
    """The text mean [D] that the guide's scripts took off: that of the mean file, else that of the text rows."""
    text, mean = bundle.text, bundle.mean
    own = None if text is None or text.centred else unit(text.rows.double()).mean(0).float()
    if mean is None:
        if own is None:
            which = " (the text file is normalised: its own mean is no longer in it)" if text is not None else ""
            raise ImportFilesError(
                f"the text mean is missing{which}: give the file of the text mean, hoi_text_mean_….pkl, or that of raw text"
            )
        if not own.norm() < 1:
            raise LegacyFileError(
                f"{bundle.text and bundle.text.path}: all text rows have one direction: make the file again"
            )
        if text is not None and text.padded:
            problem = (
                f"{text.path} is of the first version, whose mean was too short, and whether that was subtracted in training "
                f"cannot be told: give the file of the text mean that was used"
            )
            if bundle.model is None:
                bundle.tolerate(problem, force)
            else:
                bundle.notes.append(problem)
        return own
    if own is not None and text is not None:
        shrunk = len(text.rows) / 600 * own
        if torch.allclose(mean.mean, shrunk, rtol=1e-2, atol=1e-4) and not torch.allclose(shrunk, own, rtol=1e-2):
            bundle.notes.append(
                f"{mean.path.name} is the first version's mean, {len(text.rows)}/600 of the right one: norm {mean.mean.norm():.4f} "
                f"where the text has {own.norm():.4f}. It is what was subtracted in training, and is used as such"
            )
        elif (distance := float((mean.mean - own).norm())) > 0.05:
            bundle.tolerate(
                f"{mean.path} is not the mean of {text.path}: they are {distance:.3f} apart (norms {mean.mean.norm():.4f} and "
                f"{own.norm():.4f}): give files of one run",
                force,
            )
    return mean.mean


def _text_of(text: TextRows, mean: Tensor) -> Tensor:
    """Text rows [N_sel, D] with the mean in place."""
    return uncenter(text.rows, mean) if text.centred else text.rows


def _undone(bundle: Bundle, mean: Tensor, force: bool) -> Tensor:
    """Unit visual rows [N, D], the text mean back in place."""
    assert bundle.visual is not None
    if bundle.visual.uneven:
        bundle.tolerate(
            f"{bundle.visual.path} has rows of different norms, so they were not normalised by the guide's script, and giving the "
            f"text mean back would be wrong: give the normalised file",
            force,
        )
    return torch.cat([uncenter(block, mean) for block in bundle.visual.rows.split(1 << 16)])


def _scale(bundle: Bundle, given: float | None) -> float:
    found = bundle.visual.scale if bundle.visual else bundle.text.scale if bundle.text else None
    if given is not None:
        if found is not None and abs(found - given) > 0.01 * found:
            bundle.notes.append(f"--scale-factor {given:g} is used, though the rows of the files have norm {found:.4g}")
        return given
    if found is None:
        bundle.notes.append(f"no file tells the scale factor: the guide's {GUIDE_SCALE:g} is assumed (--scale-factor)")
        return GUIDE_SCALE
    return round(found, 3)


def _chosen(model: ModelFile, weights: Weights) -> tuple[dict[str, Tensor], Weights]:
    used: Weights = weights if weights in model.weights else "online" if "online" in model.weights else "ema"
    if weights == "online" and used != "online":
        raise ImportFilesError(f"{model.path} has no online weights: leave out --weights online")
    state = {name: tensor.float() for name, tensor in model.weights[used].items()}
    broken = [name for name, tensor in state.items() if not torch.isfinite(tensor).all()]
    if broken:
        other = "; the other weights may be whole: --weights " + ("online" if used == "ema" else "ema")
        raise LegacyFileError(
            f"{model.path}: the {used} weights hold NaN or infinity ({printable(broken[0])} and {len(broken) - 1} others), so the training "
            f"had diverged: take an earlier checkpoint{other if len(model.weights) > 1 else ''}"
        )
    return state, used
