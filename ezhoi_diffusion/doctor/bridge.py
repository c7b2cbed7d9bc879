"""A trained bridge: a useful recipe, trained long enough, made for these features."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ezhoi_diffusion.bridge import fingerprint_mismatch
from ezhoi_diffusion.diffusion.bridge import DiffusionBridge
from ezhoi_diffusion.diffusion.denoiser import FittedDenoiser
from ezhoi_diffusion.doctor.features import Contents
from ezhoi_diffusion.doctor.finding import TRAIN, Finding, ok
from ezhoi_diffusion.errors import EzhoiDiffusionError
from ezhoi_diffusion.features.store import FeatureStore
from ezhoi_diffusion.schema import json_problem
from ezhoi_diffusion.training.curve import unlearned
from ezhoi_diffusion.training.distillation import MIN_COSINE
from ezhoi_diffusion.training.facts import FACTS, Losses, read_facts

NUM_EFFECT, MIN_EFFECT = 512, 8  # features to try; fewer say nothing
MAX_SECONDS = 10.0
MAX_STEPS = 50  # beyond 20 evaluations, almost nothing changed where it was measured
MIN_KEPT = 0.3
WASHES_OUT = 600  # start timestep from which blend 1 lost most, wherever measured
STILL = 0.98  # a loss that is not below this share of another has not changed
MEASURE = "measure it: `ezhoi-diffusion compare TEST_FEATURES --bridge BRIDGE`"


def is_unfinished(folder: Path) -> bool:
    """Whether the folder holds an unfinished training."""
    return (folder / "checkpoints").is_dir() and not (folder / "config.json").is_file()


def check_config(bridge: DiffusionBridge) -> Iterator[Finding]:
    """Check the recipe, and what the bridge costs."""
    recipe = bridge.config.recipe
    found = (
        f"{recipe.name}, learned from {recipe.trained_on}: subtracts the {recipe.input_mean} mean, start_timestep "
        f"{recipe.start_timestep}, blend {recipe.blend:g}, output {recipe.output}"
        + (f" with the {recipe.restored_mean} mean" if recipe.output == "keep_norm" else "")
    )
    name, gentle = "bridge.recipe", f"{TRAIN} (recipe gentle)"
    if recipe.input_mean == "text":
        said = (
            f"{found}. The text mean leaves a vector that all visual features share; it hurt wherever it was measured"
        )
        yield Finding(name, "warning", said, f"{gentle}; {MEASURE}")
    elif recipe.output == "unit_norm":
        said = f"{found}. EZ-HOI does not normalise, so norm 1 rescales every score"
        yield Finding(name, "warning", said, f"{gentle}; {MEASURE}")
    elif recipe.output == "keep_norm" and recipe.restored_mean == "text":
        said = f"{found}. EZ-HOI's score is a dot product, trained with the visual mean in place"
        yield Finding(name, "warning", said, "use restored_mean visual, as recipes gentle and paper do")
    elif recipe.start_timestep >= WASHES_OUT and recipe.blend == 1:
        said = f"{found}. From timestep {WASHES_OUT} on, features lost their identity where it was measured"
        yield Finding(name, "note", said, "try --recipe gentle, or a --start-timestep of 50 to 300")
    else:
        yield ok(name, found)
    parameters = sum(p.numel() for p in bridge.denoiser.parameters())
    cost = f"{bridge.config.denoiser} with {parameters:,} parameters, {recipe.num_steps} evaluations for each feature"
    if recipe.num_steps > MAX_STEPS:
        fix = "--num-steps sets the cost, --start-timestep the strength: lower --num-steps"
        yield Finding("bridge.cost", "note", f"{cost}; beyond 20, almost nothing changes", fix)
    else:
        yield ok("bridge.cost", cost)


def check_training(bridge: DiffusionBridge, folder: Path) -> Iterator[Finding]:
    """Check whether the bridge was trained long enough, from its provenance and the training.json beside it."""
    name, provenance = "bridge.training", bridge.provenance or {}
    if bridge.config.student_of is not None:
        cosine = provenance.get("distilled", {}).get("held_out", {}).get("cosine", math.nan)
        found = f"a student of {bridge.config.student_of.get('denoiser')}; mean cosine {cosine:.4f} to it on held-out features"
        if cosine >= MIN_COSINE:
            yield ok(name, found)
        else:
            yield Finding(name, "warning", found, "distil again with more --train-steps, or use the teacher")
        return
    facts = provenance.get("training")
    if not isinstance(facts, dict) or "val_loss" not in facts:
        fix = f"compare it in your EZ-HOI run, or {TRAIN}"
        yield Finding(name, "note", "nothing is known of its training (imported?)", fix)
        return
    wrong = json_problem(facts, Losses)
    if wrong:
        yield Finding(name, "problem", f"config.json has a wrong entry below provenance.training: {wrong}", TRAIN)
        return
    loss, baseline = float(facts["val_loss"]), float(facts["isotropic_val_loss"])
    found = f"validation loss {loss:.5f}, and {baseline:.5f} of an estimate that knows no data"
    history, damage = _read_history(folder)
    if damage:
        yield Finding("bridge.history", "warning", f"nothing is said of the training's curve: {damage}", TRAIN)
    validations = [record["val_loss"] for record in history if "val_loss" in record]
    fitted = isinstance(bridge.denoiser, FittedDenoiser)
    if not math.isfinite(loss):
        yield Finding(name, "problem", found, f"lower --learning-rate, and {TRAIN}")
    elif min([*validations, loss]) < STILL * loss:
        said = f"{found}; training.json reaches {min(validations):.5f}: this is not the bridge of that step"
        yield Finding(name, "warning", said, TRAIN)
    elif loss < baseline or (fitted and bridge.denoiser.memorizes):
        yield ok(name, found)  # what memorizes cannot return features that it does not hold
    elif fitted:
        yield Finding(name, "warning", f"{found}: no better; the data have little in common", TRAIN)
    else:
        why, remedy = unlearned(history, bridge.config.recipe.trained_on)
        fix = f"{remedy}. See features.text and features.norms, too"
        yield Finding(name, "warning", f"{found}: no better; {why}", fix)
    yield from _check_curve([record["loss"] for record in history], validations)


def _check_curve(losses: list[float], validations: list[float]) -> Iterator[Finding]:
    name = "bridge.curve"
    if len(validations) > 1 and validations[-1] < STILL * validations[-2]:
        found = f"the validation loss was still falling: {validations[-2]:.5f}, then {validations[-1]:.5f}"
        fix = "more steps may help: the same command with a larger --train-steps and --resume"
        yield Finding(name, "note", found, fix)
    if len(losses) > 3 and min(losses[-2:]) > STILL * losses[0]:
        fix = "see features.norms; then --learning-rate 1e-4 (lower) or 1e-3 (higher), or a larger --batch-size"
        yield Finding(name, "warning", f"the training loss does not fall: {losses[0]:.5f}, then {losses[-1]:.5f}", fix)


def _read_history(folder: Path) -> tuple[list[dict[str, float]], str]:
    """The training's records, none where there are none beside the bridge; and what is wrong with the file, if anything."""
    if not (folder / FACTS).exists():
        return [], ""
    try:
        return read_facts(folder)["history"], ""
    except EzhoiDiffusionError as error:
        return [], str(error)


def check_features(bridge: DiffusionBridge, store: FeatureStore, contents: Contents) -> Iterator[Finding]:
    """Check whether the bridge was made from these features, and for the EZ-HOI run that they came from."""
    mismatch = fingerprint_mismatch(bridge, "diffusion", store.fingerprint)
    if mismatch is None:
        yield ok("bridge.fingerprint", "of the same EZ-HOI run as the features")
    elif mismatch.fields == {"context"}:
        fix = f"run EZ-HOI with --restore-context, which uses the bridge's context vectors; or {TRAIN}"
        yield Finding("bridge.fingerprint", "warning", mismatch.message, fix)
    else:
        yield Finding("bridge.fingerprint", "problem", mismatch.message, TRAIN)
    here, there = contents.statistics, bridge.statistics
    if here.dim != bridge.config.dim:
        return
    same_visual = not there.visual_known or torch.allclose(here.visual_mean, there.visual_mean, atol=1e-6)
    if same_visual and torch.allclose(here.text_mean, there.text_mean, atol=1e-6):
        yield ok("bridge.data", "its means are those of these features")
    else:
        yield Finding("bridge.data", "warning", "its means are those of other features", f"if these are newer: {TRAIN}")


def check_effect(bridge: DiffusionBridge, contents: Contents, text: Tensor) -> Finding:
    """Apply the bridge to some features, and compare norms, directions and the nearest text of [N_sel, D]."""
    name = "bridge.effect"
    if bridge.config.dim != contents.statistics.dim:
        found = f"the bridge has D = {bridge.config.dim}, the features {contents.statistics.dim}"
        return Finding(name, "problem", found, f"train on features of this backbone: {TRAIN}")
    usable = (contents.norms > 0).nonzero().squeeze(1)
    count = min(NUM_EFFECT, len(usable), _affordable(bridge))
    if count < MIN_EFFECT:
        found = f"not tried: of {len(usable)} usable features {count} could be bridged in {MAX_SECONDS:.0f} s"
        return Finding(name, "note", found, "fewer --num-steps, or the denoiser mlp; or ask on a machine with a GPU")
    before = contents.features[usable[torch.randperm(len(usable), generator=torch.Generator().manual_seed(0))[:count]]]
    after = bridge(before)
    if not torch.isfinite(after).all():
        return Finding(name, "problem", "its output holds NaN or infinity", TRAIN)
    ratio = float((after.norm(dim=1) / before.norm(dim=1)).median())
    directions = normalize(before, dim=-1), normalize(after, dim=-1)
    own = [normalize(x - bridge.statistics.visual_mean, dim=-1) for x in directions]  # without what all share
    kept = float((own[0] * own[1]).sum(1).median())
    nearest = [(x @ normalize(text, dim=-1).T).max(dim=1) for x in directions]
    changed = float((nearest[0].indices != nearest[1].indices).float().mean())
    found = (
        f"on {count} features: norm x {ratio:.3f}, cosine to the centred feature before {kept:.3f}, cosine to the nearest text "
        f"{nearest[0].values.mean():.3f} -> {nearest[1].values.mean():.3f} (higher is not always better), nearest text changed "
        f"for {changed:.0%}"
    )
    if not 0.5 < ratio < 2:
        return Finding(
            name, "warning", f"{found}. EZ-HOI does not normalise: every score changes", f"output keep_norm; {MEASURE}"
        )
    if kept < MIN_KEPT:
        return Finding(
            name, "warning", f"{found}. Little is left of each", f"a lower --start-timestep or --blend; {MEASURE}"
        )
    return ok(name, found)


def _affordable(bridge: DiffusionBridge) -> int:
    """Number of features that can be bridged in MAX_SECONDS, by the time of one evaluation after a warm-up."""
    features, timesteps = torch.zeros(MIN_EFFECT, bridge.config.dim), torch.zeros(MIN_EFFECT, dtype=torch.long)
    with torch.no_grad():
        bridge.denoiser(features, timesteps)
        start = time.perf_counter()
        bridge.denoiser(features, timesteps)
    seconds = (time.perf_counter() - start) / MIN_EFFECT * bridge.config.recipe.num_steps
    return int(MAX_SECONDS / max(seconds, 1e-9))
