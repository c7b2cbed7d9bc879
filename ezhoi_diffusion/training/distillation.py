"""Distillation: a student gives in one evaluation what its teacher, a diffusion bridge, gives in many."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ezhoi_diffusion.defaults import torch_defaults
from ezhoi_diffusion.diffusion.bridge import BridgeConfig, DiffusionBridge, build_denoiser
from ezhoi_diffusion.diffusion.normalization import normalize, rescale
from ezhoi_diffusion.features.rows import Rows
from ezhoi_diffusion.rng import generator
from ezhoi_diffusion.training.config import TrainingError
from ezhoi_diffusion.training.fidelity import Fidelity, fidelity

STUDENT = "mlp"
MIN_COSINE = 0.99  # to the teacher, on held-out features; the command refuses a student below it by default
NUM_FEATURES = 16_384  # that the teacher bridges once; mixtures fill up where fewer were captured
MAX_HELD_OUT = 4096  # features that the student is judged by
BATCH = 128
LEARNING_RATE = 1e-3
BLOCK = 256


@torch_defaults()
@torch.enable_grad()
def distill(
    teacher: DiffusionBridge,
    training: Rows,
    held_out: Rows,
    text: Tensor,
    *,
    train_steps: int = 2000,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> tuple[DiffusionBridge, Fidelity]:
    """Train a student of a bridge, applied as it is set: override it first.

    The student is the denoiser mlp, evaluated once at the teacher's first timestep. Adam with a cosine schedule minimises the mean
    of 1 − cos(student, teacher). A teacher that is an mlp lends its weights. On a CPU the same seed gives the same student.

    Args:
        teacher: The bridge.
        training: Captured adapter_feat [N, D] to learn from. A sample is taken, so they may stay on disk.
        held_out: Captured adapter_feat [M, D] of other images, to judge by.
        text: EZ-HOI's text features [K, D].
        train_steps: Optimizer steps.
        seed: Of features, mixtures and order.
        device: Where to train.

    Returns:
        The student on the CPU, and how near it comes to the teacher on held-out features. Its provenance also has the mean
        cosine of what costs no training: the features as they are, and one evaluation of the teacher.

    Raises:
        TrainingError: The teacher is a student or takes one evaluation already, or there are too few features.
    """
    recipe = teacher.config.recipe
    if teacher.config.student_of is not None:
        raise TrainingError("the bridge is a student: distil its teacher")
    if recipe.num_steps == 1:
        raise TrainingError("the bridge takes one evaluation already: set num_steps to distil the result of more")
    if min(len(training), len(held_out)) < 2:
        raise TrainingError(
            f"a student needs 2 training and 2 held-out features, not {len(training)} and {len(held_out)}: capture more images"
        )
    rng = generator(seed, "distillation rows")
    judged = held_out[torch.randperm(len(held_out), generator=rng)[:MAX_HELD_OUT]]
    teacher = teacher.to(device)
    z = _inputs(teacher, training, rng).to(device)
    # in evaluations of a network, of which a step takes three: one forward, and a backward pass that costs two
    total = (len(z) + len(judged)) * recipe.num_steps + len(judged) + 3 * BATCH * train_steps
    progress = tqdm(total=total, desc="distilling", unit="evaluation", unit_scale=True)
    target = _teach(teacher, z, progress)
    student = _initial(teacher, seed).to(device)
    optimizer = torch.optim.Adam(student.parameters(), lr=LEARNING_RATE, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, train_steps)
    entry = torch.tensor([recipe.start_timestep - 1], device=device)
    batches = torch.randint(len(z), (train_steps, BATCH), generator=generator(seed, "distillation"))
    for chosen in batches.to(device):
        loss = (1 - torch.cosine_similarity(student(z[chosen], entry), target[chosen])).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress.update(3 * BATCH)
    unseen = normalize(judged.to(device).float(), teacher.input_mean, recipe.scale_factor)[0]
    with torch.no_grad():
        found = student(unseen, entry)
    centred = F.normalize(text.to(device), dim=-1) - teacher.statistics.text_mean.to(device)
    taught = _teach(teacher, unseen, progress)
    reached = fidelity(found, taught, centred)
    single = teacher.override(num_steps=1, spacing="linear", sampler="ddim")
    baselines = {"identity": unseen, "single_evaluation": _teach(single, unseen, progress)}
    progress.close()
    config = replace(
        _student_config(teacher),
        recipe=replace(recipe, num_steps=1, spacing="linear", sampler="ddim"),
        student_of={
            "denoiser": teacher.config.denoiser,
            **{name: getattr(recipe, name) for name in ("start_timestep", "num_steps", "spacing", "sampler")},
        },
    )
    provenance = {
        **{name: fact for name, fact in teacher.provenance.items() if name not in ("training", "overridden")},
        "distilled": {
            "held_out": asdict(reached),
            "baselines": {name: fidelity(result, taught, centred).cosine for name, result in baselines.items()},
            "train_steps": train_steps,
            "seed": seed,
            "rows": len(training),
            "teacher": teacher.provenance.get("training"),
        },
    }
    bridge = DiffusionBridge(config, student, teacher.statistics, provenance=provenance, context=teacher.context)
    return bridge.to("cpu"), reached


def _inputs(teacher: DiffusionBridge, features: Rows, rng: torch.Generator) -> Tensor:
    """Return inputs of the network [NUM_FEATURES, D]: features, and mixtures of two where there are too few."""
    scale_factor = teacher.config.recipe.scale_factor
    chosen = features[torch.randperm(len(features), generator=rng)[:NUM_FEATURES]].float()
    z = normalize(chosen, teacher.input_mean.cpu(), scale_factor)[0]
    missing = NUM_FEATURES - len(z)
    one, other = torch.randint(len(z), (2, missing), generator=rng)
    share = torch.rand(missing, 1, generator=rng)
    return torch.cat([z, rescale(share * z[one] + (1 - share) * z[other], scale_factor)])


@torch.no_grad()
def _teach(teacher: DiffusionBridge, z: Tensor, progress: tqdm[Any]) -> Tensor:
    found = []
    for block in z.split(BLOCK):
        found.append(F.normalize(teacher.sample(block), dim=-1))
        progress.update(len(block) * teacher.config.recipe.num_steps)
    return torch.cat(found)


def _student_config(teacher: DiffusionBridge) -> BridgeConfig:
    """Return the teacher's configuration where it is an mlp that predicts x0, else one with the default mlp."""
    if teacher.config.denoiser == STUDENT and teacher.config.objective == "pred_x0":
        return teacher.config
    return replace(teacher.config, denoiser=STUDENT, denoiser_options={}, objective="pred_x0")


def _initial(teacher: DiffusionBridge, seed: int) -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        student = build_denoiser(_student_config(teacher))
    if _student_config(teacher) is teacher.config:
        student.load_state_dict(teacher.denoiser.state_dict())
    return student
