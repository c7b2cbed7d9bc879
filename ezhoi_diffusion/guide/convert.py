"""Turn the guide's files into a bridge, or into a feature store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ezhoi_diffusion.diffusion.bridge import BridgeConfig, BridgeError, DiffusionBridge, build_denoiser
from ezhoi_diffusion.diffusion.normalization import uncenter
from ezhoi_diffusion.diffusion.recipes import RECIPES
from ezhoi_diffusion.features.statistics import ModalityStatistics
from ezhoi_diffusion.features.store import FeatureStore
from ezhoi_diffusion.features.writer import write_imported
from ezhoi_diffusion.files import new_folder, require_unused, sha256
from ezhoi_diffusion.guide.formats import HOI_CLASSES
from ezhoi_diffusion.guide.kinds import (
    AnalysisFile,
    EzHoiCheckpoint,
    GuideFile,
    ModelFile,
    TextFile,
    TextMeanFile,
    VisualFile,
    Weights,
)
from ezhoi_diffusion.guide.reading import GuideFileError, printable

GUIDE_STEPS, GUIDE_SCALE, GUIDE_TIMESTEPS = 600, 5.0, 1000
File = TypeVar("File", bound=GuideFile)


@dataclass(frozen=True, eq=False)
class Bundle:
    """The files of one import, by kind. `notes` collects what was assumed, and what is odd about them."""

    model: ModelFile | None
    visual: VisualFile | None
    text: TextFile | None
    mean: TextMeanFile | None
    files: Sequence[GuideFile]
    force: bool
    notes: list[str]

    @classmethod
    def from_files(cls, files: Sequence[GuideFile], *, force: bool = False) -> Bundle:
        """Sort files by kind.

        Args:
            files: The files, in any order.
            force: Go on where the files do not fit, and note it.

        Raises:
            GuideFileError: Two files are of one kind or differ in D, or, unless `force`, the text is CLIP's own.
        """
        dims = {file.path.name: file.dim for file in files if not isinstance(file, EzHoiCheckpoint)}
        if len(set(dims.values())) > 1:
            listed = ", ".join(f"{name} has {dim}" for name, dim in dims.items())
            raise GuideFileError(
                f"the files are of different widths D: {listed}. 512 is CLIP ViT-B's, 768 ViT-L's: give files of one backbone"
            )
        text, analysis = _only(files, TextFile), _only(files, AnalysisFile)
        if text is None and analysis is not None:
            text = analysis.text
        bundle = cls(
            _only(files, ModelFile), _only(files, VisualFile), text, _only(files, TextMeanFile), files, force,
            [f"{file.path.name}: {warning}" for file in files for warning in file.warnings],
        )  # fmt: skip
        if text is not None and text.source == "raw_clip":
            bundle.require_force(
                f"{text.path} is text of CLIP itself; EZ-HOI multiplies with text that its prompts adapted, which has another "
                f"mean: give the adapted text or its mean"
            )
        return bundle

    def require_force(self, problem: str) -> None:
        """Raise GuideFileError for a problem, or note it if forced."""
        if not self.force:
            raise GuideFileError(f"{problem}, or continue with `ezhoi-diffusion import --force`")
        self.notes.append(f"FORCED: {problem}")

    @property
    def fingerprint(self) -> dict[str, Any]:
        """The part of the run's fingerprint that the files know."""
        known: dict[str, Any] = {"dim": next(f.dim for f in self.files if f.dim)}
        for file in self.files:
            known |= {key: file.facts[key] for key in ("zs_type", "num_classes", "txt_align") if key in file.facts}
            backbone = Path(str(file.facts.get("clip_model", ""))).name.removesuffix(".pt").replace("/", "-")
            if backbone.startswith("ViT-"):
                known["backbone"] = backbone
        if self.text is not None:
            known["text_rows"] = len(self.text.embeddings)
        return known

    @property
    def origin(self) -> list[dict[str, Any]]:
        """Name, kind, SHA-256 and facts of every file, as JSON."""
        return [{"file": f.path.name, "kind": f.kind, "sha256": sha256(f.path), "facts": f.facts} for f in self.files]


def make_bridge(
    bundle: Bundle, *, weights: Weights = "ema", scale_factor: float | None = None, num_steps: int | None = None
) -> DiffusionBridge:
    """Make the bridge that the guide's module would be, with recipe `guide`.

    Args:
        bundle: The files; a model, and the text mean or the text.
        weights: Which of the model's weights to use.
        scale_factor: Norm of the network's input. By default the norm of the visual or text embeddings, else 5.
        num_steps: Both `num_steps` and `start_timestep`, as in the guide. 600 by default.

    Raises:
        GuideFileError: A file is missing, or the weights do not fit the guide's network.
    """
    model = bundle.model
    if model is None:
        raise GuideFileError("there is no model among the files: give the trainer's model-k.pt")
    mean = _subtracted_mean(bundle)
    if model.objective is None or model.num_timesteps is None:
        bundle.require_force(
            f"{model.path} has the network's weights without the schedule, so what it predicts is unknown (the guide has "
            f"pred_x0 and {GUIDE_TIMESTEPS} timesteps): give the trainer's own model-k.pt"
        )
    timesteps = model.num_timesteps or GUIDE_TIMESTEPS
    num_steps = min(GUIDE_STEPS, timesteps) if num_steps is None else num_steps
    recipe = replace(
        RECIPES["guide"],
        scale_factor=_scale_factor(bundle, scale_factor),
        num_steps=num_steps,
        start_timestep=num_steps,
    )
    try:
        config = BridgeConfig(
            dim=model.dim,
            recipe=recipe,
            denoiser="unet1d",
            denoiser_options={"init_dim": model.init_dim, "dim_mults": list(model.dim_mults)},
            objective=model.objective or "pred_x0",
            num_timesteps=timesteps,
        )
    except ValueError as error:
        raise GuideFileError(f"{model.path}: {error}") from error
    state, used = _pick_weights(model, weights)
    with torch.random.fork_rng(devices=[]):
        denoiser = build_denoiser(config)
    try:
        denoiser.net.load_state_dict(state)  # type: ignore[union-attr]
    except RuntimeError as error:
        raise GuideFileError(f"{model.path} does not fit the guide's Unet1D ({printable(str(error), 300)})") from error
    statistics = ModalityStatistics.text_only(mean, len(bundle.text.embeddings) if bundle.text else 0)
    if bundle.visual is not None:
        directions = _restore_directions(bundle, bundle.visual, mean)
        statistics = ModalityStatistics.compute_with_text_mean([directions], mean, statistics.text_rows)
    provenance = {
        "fingerprint": bundle.fingerprint,
        "imported": {"files": bundle.origin, "weights": used, "notes": bundle.notes},
        "training": {"step": model.step},
    }
    return DiffusionBridge(config, denoiser, statistics, provenance=provenance)


def save_bridge(bridge: DiffusionBridge, folder: Path) -> None:
    """Write a bridge into a new folder. Raises GuideFileError where `folder` is in use or cannot be written."""
    require_unused(folder, GuideFileError)
    try:
        with new_folder(folder) as staged:
            bridge.save_pretrained(staged)
    except (OSError, BridgeError) as error:  # a BridgeError names the folder that was staged
        raise GuideFileError(
            f"{folder} could not be written ({error.__cause__ or error}): choose another folder, or free space"
        ) from error


def make_store(bundle: Bundle, folder: Path) -> FeatureStore:
    """Write the visual embeddings as a feature store. Their directions are exact; their norms are lost.

    Raises:
        GuideFileError: The visual embeddings or the text mean are missing.
        FeatureStoreError: `folder` is in use or cannot be written.
    """
    visual = bundle.visual
    if visual is None:
        kinds = ", ".join(file.kind for file in bundle.files)
        raise GuideFileError(
            f"of {kinds} alone nothing can be made: add the trainer's model-k.pt for a bridge, or the visual embeddings for "
            f"features (see `ezhoi-diffusion import --help`)"
        )
    mean = _subtracted_mean(bundle)
    text = bundle.text.embeddings if bundle.text else torch.zeros(0, visual.dim)
    if bundle.text and bundle.text.scale is not None:
        text = uncenter(text, mean)
    # the scripts' mean leaves the visual embeddings; training on them takes off the mean of the text itself
    text_mean = normalize(text.double(), dim=-1).mean(0).float() if len(text) else mean
    meta = {
        # the guide's script names no split; HICO-DET's file names do
        "split": "test" if any(name.startswith("HICO_test") for name in visual.images) else "train",
        "fingerprint": bundle.fingerprint,
        "imported": {"files": bundle.origin, "norms": False, "notes": bundle.notes},
    }
    tensors = {"adapter_feat": _restore_directions(bundle, visual, mean)}
    if visual.objects is not None:
        tensors["objects"] = visual.objects
    return write_imported(folder, meta, tensors, visual.images, {"text": text, "text_mean": text_mean})


def _only(files: Sequence[GuideFile], kind: type[File]) -> File | None:
    found = [file for file in files if isinstance(file, kind)]
    if len(found) > 1:
        raise GuideFileError(f"{found[0].path} and {found[1].path} are both a {kind.kind} file: give one of them")
    return found[0] if found else None


def _subtracted_mean(bundle: Bundle) -> Tensor:
    """The text mean [D] that the guide's scripts subtracted: from its file, else from the text embeddings."""
    text, mean = bundle.text, bundle.mean
    own = None
    if text is not None and text.scale is None:
        own = normalize(text.embeddings.double(), dim=-1).mean(0).float()
    if mean is not None:
        if text is not None and own is not None:
            _compare_means(bundle, text, own, mean)
        return mean.mean
    if text is None or own is None:
        which = " (the text file is normalised: its own mean is no longer in it)" if text is not None else ""
        raise GuideFileError(
            f"the text mean is missing{which}: give the file of the text mean, hoi_text_mean_….pkl, or that of raw text"
        )
    if not own.norm() < 1:
        raise GuideFileError(f"{text.path}: all text rows have one direction: make the file again")
    if text.padded:
        problem = (
            f"{text.path} is of the first version, whose mean was too short; no file says whether training subtracted that "
            f"mean: give the file of the text mean that was used"
        )
        if bundle.model is None:
            bundle.require_force(problem)
        else:
            bundle.notes.append(problem)
    return own


def _compare_means(bundle: Bundle, text: TextFile, own: Tensor, mean: TextMeanFile) -> None:
    """Note a mean [D] of the first version; refuse, unless forced, one that is not the mean `own` [D] of the text."""
    shrunk = len(text.embeddings) / HOI_CLASSES * own
    if torch.allclose(mean.mean, shrunk, rtol=1e-2, atol=1e-4) and not torch.allclose(shrunk, own, rtol=1e-2):
        bundle.notes.append(
            f"{mean.path.name} is the first version's mean, {len(text.embeddings)}/{HOI_CLASSES} of the right one: norm "
            f"{mean.mean.norm():.4f}, and the text's has {own.norm():.4f}. Training subtracted it, so the import uses it too"
        )
    elif (distance := float((mean.mean - own).norm())) > 0.05:
        bundle.require_force(
            f"{mean.path} is not the mean of {text.path}: they are {distance:.3f} apart (norms {mean.mean.norm():.4f} and "
            f"{own.norm():.4f}): give files of one run"
        )


def _restore_directions(bundle: Bundle, visual: VisualFile, mean: Tensor) -> Tensor:
    """The visual features [N, D] of norm 1, with the text mean back in place."""
    if visual.uneven:
        bundle.require_force(
            f"{visual.path} has rows of different norms, so the guide's script did not normalise them, and adding the text mean "
            f"would be wrong: give the normalised file"
        )
    return torch.cat([uncenter(block, mean) for block in visual.embeddings.split(1 << 16)])


def _scale_factor(bundle: Bundle, given: float | None) -> float:
    found = bundle.visual.scale if bundle.visual else bundle.text.scale if bundle.text else None
    if given is not None:
        if found is not None and abs(found - given) > 0.01 * found:
            bundle.notes.append(f"--scale-factor {given:g} is used, though the rows of the files have norm {found:.4g}")
        return given
    if found is None:
        bundle.notes.append(f"no file has the scale factor: the guide's {GUIDE_SCALE:g} is assumed (--scale-factor)")
        return GUIDE_SCALE
    return round(found, 3)


def _pick_weights(model: ModelFile, weights: Weights) -> tuple[dict[str, Tensor], Weights]:
    used: Weights = weights if weights in model.weights else "online" if "online" in model.weights else "ema"
    if weights == "online" and used != "online":
        raise GuideFileError(f"{model.path} has no online weights: leave out --weights online")
    state = {name: tensor.float() for name, tensor in model.weights[used].items()}
    broken = [name for name, tensor in state.items() if not torch.isfinite(tensor).all()]
    if broken:
        other = "; the other weights may be whole: --weights " + ("online" if used == "ema" else "ema")
        raise GuideFileError(
            f"{model.path}: the {used} weights hold NaN or infinity ({printable(broken[0])} and {len(broken) - 1} others), so "
            f"the training had diverged: take an earlier checkpoint{other if len(model.weights) > 1 else ''}"
        )
    return state, used
