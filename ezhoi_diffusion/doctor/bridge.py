"""A trained bridge: whole, of a recipe that is worth using, trained long enough, and made for these features."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ezhoi_diffusion.bridge import fingerprint_differences
from ezhoi_diffusion.diffusion.bridge import DiffusionBridge
from ezhoi_diffusion.diffusion.components import components
from ezhoi_diffusion.diffusion.denoiser import FittedDenoiser
from ezhoi_diffusion.diffusion.recipes import Recipe
from ezhoi_diffusion.doctor.features import Scan
from ezhoi_diffusion.doctor.finding import TRAIN, Finding, ok
from ezhoi_diffusion.features.statistics import ModalityStatistics, unit
from ezhoi_diffusion.features.store import FeatureStore
from ezhoi_diffusion.plugins import PluginManager
from ezhoi_diffusion.training.curve import unlearned
from ezhoi_diffusion.training.distillation import MIN_COSINE

EFFECT_ROWS = 512
EFFECT_LEAST = 8  # fewer say nothing
EFFECT_SECONDS = 10.0
LITTLE_LEFT = 0.3
WASHES_OUT = 600  # the level from which strength 1 lost most, wherever measured


def load(folder: Path) -> DiffusionBridge:
    """The bridge in `folder`, with what plugins contribute. Raises BridgeError, PluginError."""
    return DiffusionBridge.from_pretrained(folder, registry=components(PluginManager()))


def unfinished(folder: Path) -> bool:
    """Whether a training was begun there and not ended."""
    return (folder / "checkpoints").is_dir() and not (folder / "config.json").is_file()


def artefact(bridge: DiffusionBridge) -> Iterator[Finding]:
    """What the bridge is, does and costs, from its configuration."""
    config, parameters = bridge.config, sum(p.numel() for p in bridge.denoiser.parameters())
    yield ok(
        "bridge.artefact", f"{config.denoiser}, D = {config.dim}, {parameters:,} parameters, files whole and finite"
    )
    yield _recipe(config.recipe)
    yield _means(config.recipe, bridge.statistics)
    steps = config.recipe.num_steps
    found = f"{steps} network evaluations a row, of {parameters:,} parameters each"
    if steps > 50:
        yield Finding(
            "bridge.cost", "note", f"{found}; beyond 20 evaluations buy almost nothing",
            "--num-steps (the guide's --inference-steps) is cost, --start-timestep is strength: lower --num-steps",
        )  # fmt: skip
    else:
        yield ok("bridge.cost", found)


def _recipe(recipe: Recipe) -> Finding:
    name = "bridge.recipe"
    found = (
        f"{recipe.name}: learned {recipe.trained_on} rows; a row enters at level {recipe.start_timestep} (strength), takes "
        f"{recipe.num_steps} evaluations (cost), {recipe.blend:.0%} of the result is bridged, output {recipe.output}"
    )
    if recipe.input_mean == "text" or recipe.output == "unit_norm":
        return Finding(
            name, "warning", f"{found}. The guide's recipe: it hurt wherever it was measured",
            f"{TRAIN} (recipe gentle), and compare with --compare none,mean_shift,diffusion",
        )  # fmt: skip
    if recipe.start_timestep >= WASHES_OUT and recipe.blend == 1:
        return Finding(
            name, "note", f"{found}. From {WASHES_OUT} at full strength a row's identity is washed out where measured",
            "try --recipe gentle, or a --start-timestep of 50 to 300",
        )  # fmt: skip
    return ok(name, found)


def _means(recipe: Recipe, statistics: ModalityStatistics) -> Finding:
    given_back = f"gives back the {recipe.restored_mean} mean" if recipe.output == "keep_norm" else "gives no mean back"
    found = (
        f"takes the {recipe.input_mean} mean off visual rows, {given_back}; norms: visual "
        f"{statistics.visual_mean.norm():.4f}, text {statistics.text_mean.norm():.4f} (the guide's 0.01-0.05 is impossible), "
        f"gap {statistics.gap:.3f}"
    )
    if recipe.input_mean == "text":
        return Finding(
            "bridge.means", "warning", f"{found}. The text mean leaves in every visual row a vector that all share",
            f"train a recipe that takes the visual mean off: {TRAIN}",
        )  # fmt: skip
    if recipe.output == "keep_norm" and recipe.restored_mean == "text":
        return Finding(
            "bridge.means", "warning",
            f"{found}. EZ-HOI's score is a plain dot product that was trained with the visual mean in place",
            "use restored_mean visual, as recipes gentle and paper do",
        )  # fmt: skip
    return ok("bridge.means", found)


def training(bridge: DiffusionBridge, folder: Path) -> Iterator[Finding]:
    """Whether it was trained long enough, and not by heart: from its provenance, and the curve beside it."""
    if bridge.config.student_of is not None:
        yield _student(bridge)
        return
    facts = bridge.provenance.get("training")
    if not isinstance(facts, dict):
        yield Finding(
            "bridge.training", "note", "nothing is known of its training (imported?)",
            "compare it on your host, or train one here",
        )  # fmt: skip
        return
    loss, bar = float(facts["val_loss"]), float(facts["isotropic_val_loss"])
    if isinstance(bridge.denoiser, FittedDenoiser):
        said = f"a closed form of {facts['rows']} rows; without the held-out ones its loss on those is {loss:.5f}, the bar {bar:.5f}"
        bad = not bridge.denoiser.memorizes and loss >= bar
        yield (
            Finding("bridge.training", "warning", said, f"its rows have nothing in common; {TRAIN}")
            if bad
            else ok("bridge.training", said)
        )
        return
    found = f"step {facts['step']}, validation loss {loss:.5f}, the bar (a closed-form estimate without data) {bar:.5f}"
    history = _history(folder / "training.json")
    validations = [record["val_loss"] for record in history if "val_loss" in record]
    if not math.isfinite(loss):
        yield Finding("bridge.training", "problem", found, f"lower --learning-rate, and {TRAIN}")
    elif min([*validations, loss]) < 0.98 * loss:
        yield Finding(
            "bridge.training", "warning",
            f"{found}; the lowest loss of the curve beside it is {min(validations):.5f}: this is not the bridge of that step", TRAIN,
        )  # fmt: skip
    elif loss >= bar:
        why, remedy = unlearned(history, bridge.config.recipe.trained_on)
        yield Finding(
            "bridge.training", "warning", f"{found}: no better than that estimate; {why}",
            f"{remedy}. See features.rows, features.text and features.norms, too",
        )  # fmt: skip
    else:
        yield ok("bridge.training", found)
    if len(validations) > 1 and validations[-1] < 0.98 * validations[-2]:
        yield Finding(
            "bridge.curve", "note",
            f"the validation loss was still falling: {validations[-2]:.5f}, then {validations[-1]:.5f}",
            "it may gain from more steps: the same command with a larger --train-steps and --resume",
        )  # fmt: skip
    losses = [record["loss"] for record in history]
    if len(losses) > 3 and min(losses[-2:]) > 0.98 * losses[0]:
        yield Finding(
            "bridge.curve", "warning", f"the training loss does not fall: {losses[0]:.5f} at first, {losses[-1]:.5f} at last",
            "see features.norms and features.finite; then --learning-rate 1e-4 (lower) or 1e-3 (higher), or a larger "
            "--batch-size",
        )  # fmt: skip


def _student(bridge: DiffusionBridge) -> Finding:
    teacher, made = bridge.config.student_of or {}, bridge.provenance.get("distilled", {})
    reached = made.get("held_out", {}).get("cosine", math.nan)
    said = (
        f"a student of {teacher.get('denoiser')}, {teacher.get('num_steps')} evaluations from level {teacher.get('start_timestep')}; mean "
        f"cosine to that {reached:.4f} on held-out rows"
    )
    if not reached >= MIN_COSINE:
        return Finding("bridge.training", "warning", said, "distil again with more --train-steps, or use the teacher")
    return ok("bridge.training", said)


def _history(path: Path) -> list[dict[str, float]]:
    """The training's records, where they lie beside the bridge; `best` has none."""
    try:
        found = json.loads(path.read_text())["history"]
        return [
            {str(key): float(value) for key, value in record.items() if not isinstance(value, list)} for record in found
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


def against_features(bridge: DiffusionBridge, store: FeatureStore, found: Scan) -> Iterator[Finding]:
    """Whether the bridge was made from these features, and for the host that they came from."""
    theirs, own = bridge.provenance.get("fingerprint"), store.fingerprint
    theirs = theirs if isinstance(theirs, dict) else {}
    differing = fingerprint_differences(own, theirs)
    if differing:
        listed = "; ".join(f"{key} {here!s:.40} here, {there!s:.40} there" for key, (here, there) in differing.items())
        yield Finding(
            "bridge.fingerprint", "problem" if set(differing) - {"context"} else "warning",
            f"the bridge was made for another host than the features: {listed}",
            f"run the host with --restore-context, which uses the bridge's context vectors; or {TRAIN}"
            if set(differing) == {"context"} else TRAIN,
        )  # fmt: skip
    else:
        yield ok("bridge.fingerprint", "the same host as the features'")
    if bridge.config.dim != store.text.shape[1] or found.statistics is None:
        return
    recorded = (bridge.provenance.get("training") or {}).get("data_sha256")
    if recorded is None:
        return
    if recorded == _data_sha256(bridge.config.recipe, store, found):
        yield ok("bridge.data", "trained on these very features")
    else:
        yield Finding("bridge.data", "warning", "trained on other features than these", f"if they are newer: {TRAIN}")


def _data_sha256(recipe: Recipe, store: FeatureStore, found: Scan) -> str:
    """What training records of its rows: SHA-256 over them as they are, then over the mean that they lose."""
    assert found.statistics is not None
    means = {"visual": found.statistics.visual_mean, "text": found.statistics.text_mean}
    if recipe.trained_on == "text":
        digest, mean = hashlib.sha256(store.text.contiguous().numpy().tobytes()), means["text"]
    else:
        digest, mean = found.digest.copy(), means[recipe.input_mean]
    digest.update(mean.contiguous().numpy().tobytes())
    return str(digest.hexdigest())


def effect(bridge: DiffusionBridge, sample: Tensor, text: Tensor) -> Iterator[Finding]:
    """What the bridge does to at most 512 rows of sample [n, D]: norms, direction, similarity to the nearest text."""
    if bridge.config.dim != sample.shape[1]:
        yield Finding(
            "bridge.effect", "problem", f"the bridge has D = {bridge.config.dim}, the features {sample.shape[1]}",
            f"train on features of this backbone: {TRAIN}",
        )  # fmt: skip
        return
    sample = sample[torch.isfinite(sample).all(dim=1) & (sample.norm(dim=1) > 0)]
    affordable = _affordable(bridge)
    if min(affordable, len(sample)) < EFFECT_LEAST:
        yield Finding(
            "bridge.effect", "note",
            f"not tried: of {len(sample)} usable rows {affordable} could be bridged here in {EFFECT_SECONDS:.0f} s",
            "see bridge.cost: fewer --num-steps, or the denoiser mlp; or ask on a GPU with `ezhoi-diffusion run … --compare`",
        )  # fmt: skip
        return
    chosen = torch.randperm(len(sample), generator=torch.Generator().manual_seed(0))
    before = sample[chosen[: min(EFFECT_ROWS, affordable)]].float()
    after = bridge(before)
    if not torch.isfinite(after).all():
        yield Finding("bridge.effect", "problem", "its output holds NaN or infinity", TRAIN)
        return
    ratio = float((after.norm(dim=1) / before.norm(dim=1)).median())
    own = [unit(unit(x) - bridge.statistics.visual_mean) for x in (before, after)]  # what a row does not share with all
    kept = float((own[0] * own[1]).sum(1).median())
    similar = [(unit(x) @ unit(text).T).max(dim=1) for x in (before, after)]
    changed = float((similar[0].indices != similar[1].indices).float().mean())
    found = (
        f"on {len(before)} rows: norm x {ratio:.3f}, cosine to the row before, less the mean, {kept:.3f}, cosine to the nearest text "
        f"{similar[0].values.mean():.3f} -> {similar[1].values.mean():.3f}, nearest text changed for {changed:.0%}. A higher "
        f"cosine does not mean a higher mAP"
    )
    measure = "measure it: `ezhoi-diffusion run … --eval --bridge BRIDGE --compare none,mean_shift,diffusion`"
    if not 0.5 < ratio < 2:
        yield Finding(
            "bridge.effect", "warning", f"{found}. EZ-HOI does not normalise, so this change of norm rescales every score",
            f"take a recipe with output keep_norm; {measure}",
        )  # fmt: skip
    elif kept < LITTLE_LEFT:
        yield Finding(
            "bridge.effect", "warning", f"{found}. Little is left of each row",
            f"a lower --start-timestep or --blend; {measure}",
        )  # fmt: skip
    else:
        yield ok("bridge.effect", found)


def _affordable(bridge: DiffusionBridge) -> int:
    """Rows that can be bridged in EFFECT_SECONDS, judged by one evaluation of a few after a first to warm up."""
    rows, levels = torch.zeros(EFFECT_LEAST, bridge.config.dim), torch.zeros(EFFECT_LEAST, dtype=torch.long)
    with torch.no_grad():
        bridge.denoiser(rows, levels)
        begun = time.perf_counter()
        bridge.denoiser(rows, levels)
    seconds = (time.perf_counter() - begun) / len(rows) * bridge.config.recipe.num_steps
    return int(EFFECT_SECONDS / max(seconds, 1e-9))


def facts_for_host(bridge: DiffusionBridge) -> dict[str, Any]:
    """The fingerprint that the bridge demands of a host; empty where it knows none."""
    found = bridge.provenance.get("fingerprint")
    return found if isinstance(found, dict) else {}
