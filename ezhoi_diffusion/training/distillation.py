"""A student that gives in one evaluation what its teacher, a diffusion bridge, gives in many."""

from __future__ import annotations

from dataclasses import asdict, replace

import torch
from torch import Tensor
from tqdm import tqdm

from ezhoi_diffusion.diffusion.bridge import BridgeConfig, DiffusionBridge, build_denoiser
from ezhoi_diffusion.diffusion.normalization import normalize, rescale
from ezhoi_diffusion.evaluation.fidelity import Fidelity, fidelity
from ezhoi_diffusion.features.statistics import unit
from ezhoi_diffusion.rng import generator
from ezhoi_diffusion.training.config import TrainingError

STUDENT = "mlp"
LEAST_COSINE = 0.99  # on held-out rows; below, a student is refused unless asked for
ROWS = 16_384  # that the teacher bridges once, before the student learns; of fewer captured ones, mixtures fill up
JUDGED = 4096  # held-out rows, by which the student is judged
BATCH = 128
LEARNING_RATE = 1e-3
BLOCK = 256


def distill(
    teacher: DiffusionBridge,
    training: Tensor,
    held_out: Tensor,
    text: Tensor,
    *,
    train_steps: int = 2000,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> tuple[DiffusionBridge, Fidelity]:
    """The student of a bridge as it is applied (override it first), and how near it comes on rows it has not learned from.

    training, held_out [N, D]: adapter_feat as captured, of different images; text [K, D]: the host's. The student is the
    denoiser mlp, evaluated once at the level where a row enters; the mean over rows of 1 − cos(student, teacher) falls by Adam
    with a cosine schedule. It starts from the teacher's weights where that is an mlp. The same seed gives the same student on a
    CPU. Raises TrainingError for a teacher that takes one evaluation already, and for too few rows.
    """
    recipe = teacher.config.recipe
    if teacher.config.student_of is not None:
        raise TrainingError("the bridge is a student already: distil its teacher")
    if recipe.num_steps == 1:
        raise TrainingError(
            "the bridge takes one evaluation already, so there is nothing to distil: give --num-steps for the result of more"
        )
    if min(len(training), len(held_out)) < 2:
        raise TrainingError(
            f"a student learns from training rows and is judged by held-out ones: {len(training)} and {len(held_out)} are too few"
        )
    draw = generator(seed, "distillation rows")
    judged = held_out[torch.randperm(len(held_out), generator=draw)[:JUDGED]]
    teacher = teacher.to(device)
    z = _inputs(teacher, training, draw).to(device)
    target = _taught(teacher, z, "the teacher's result")
    student = _fresh(teacher, seed).to(device)
    optimizer = torch.optim.Adam(student.parameters(), lr=LEARNING_RATE, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, train_steps)
    level = torch.tensor([recipe.start_timestep - 1], device=device)
    order = torch.randint(len(z), (train_steps, BATCH), generator=generator(seed, "distillation"))
    for chosen in tqdm(order.to(device), desc="distilling", unit="step"):
        loss = (1 - torch.cosine_similarity(student(z[chosen], level), target[chosen])).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    unseen = normalize(judged.to(device).float(), teacher.input_mean, recipe.scale_factor)[0]
    with torch.no_grad():
        found = student(unseen, level)
    centred = unit(text.to(device)) - teacher.statistics.text_mean.to(device)
    reached = fidelity(found, _taught(teacher, unseen, "held-out rows"), centred)
    config = replace(
        _config(teacher),
        recipe=replace(recipe, num_steps=1, spacing="linear", sampler="ddim"),
        student_of={
            "denoiser": teacher.config.denoiser,
            **{name: getattr(recipe, name) for name in ("start_timestep", "num_steps", "spacing", "sampler")},
        },
        provenance={
            **{name: fact for name, fact in teacher.provenance.items() if name not in ("training", "overridden")},
            "distilled": {
                "held_out": asdict(reached),
                "train_steps": train_steps,
                "seed": seed,
                "rows": len(training),
                "teacher": teacher.provenance.get("training"),
            },
        },
    )
    return DiffusionBridge(config, student, teacher.statistics, context=teacher.context).to("cpu"), reached


def _inputs(teacher: DiffusionBridge, rows: Tensor, draw: torch.Generator) -> Tensor:
    """What enters the network [ROWS, D]: captured rows, and mixtures of two where there are too few."""
    scale_factor = teacher.config.recipe.scale_factor
    chosen = rows[torch.randperm(len(rows), generator=draw)[:ROWS]].float()
    z = normalize(chosen, teacher.input_mean.cpu(), scale_factor)[0]
    missing = ROWS - len(z)
    one, other = torch.randint(len(z), (2, missing), generator=draw)
    share = torch.rand(missing, 1, generator=draw)
    return torch.cat([z, rescale(share * z[one] + (1 - share) * z[other], scale_factor)])


@torch.no_grad()
def _taught(teacher: DiffusionBridge, z: Tensor, what: str) -> Tensor:
    blocks = tqdm(z.split(BLOCK), desc=what, unit="block")
    return torch.cat([unit(teacher.sample(block)) for block in blocks])


def _config(teacher: DiffusionBridge) -> BridgeConfig:
    """The student's configuration: its network is the teacher's where that is an mlp, else the default one."""
    if teacher.config.denoiser == STUDENT and teacher.config.objective == "pred_x0":
        return teacher.config
    return replace(teacher.config, denoiser=STUDENT, denoiser_options={}, objective="pred_x0")


def _fresh(teacher: DiffusionBridge, seed: int) -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        student = build_denoiser(_config(teacher))
    if _config(teacher) is teacher.config:
        student.load_state_dict(teacher.denoiser.state_dict())
    return student
