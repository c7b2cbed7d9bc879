"""Peak memory of bridging and training, each in a process of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from ezhoi_diffusion.bench.measure import in_new_process, peak_growth
from ezhoi_diffusion.bench.sampling import GUIDE_TIMED, BridgeCase, fresh
from ezhoi_diffusion.bench.training import TrainerCase, take_steps, training
from ezhoi_diffusion.diffusion.bridge import BridgeConfig
from ezhoi_diffusion.diffusion.components import components
from ezhoi_diffusion.features.statistics import ModalityStatistics
from ezhoi_diffusion.plugins import PluginManager
from ezhoi_diffusion.training.data import TrainingData

STEPS = 2  # the first one makes the optimizer's state


def of_bridging(entry: BridgeCase, features: Tensor) -> int:
    """Bytes that a bridge and bridging features [N, D] with it add to a process."""
    config = entry.bridge.config
    steps = min(GUIDE_TIMED, config.recipe.num_steps)  # memory does not depend on their number
    return in_new_process(_bridge, config, entry.bridge.statistics, features.cpu(), steps)


def of_training(trainer_case: TrainerCase, data: TrainingData, batch: int) -> int:
    """Bytes that a training adds to its process, without the workers of a data loader."""
    return in_new_process(_train, trainer_case, data, batch)


def _bridge(config: BridgeConfig, statistics: ModalityStatistics, features: Tensor, steps: int) -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    registry = components(PluginManager())
    if config.denoiser == "unet1d":
        import denoising_diffusion_pytorch  # noqa: F401, to load modules before measuring
    with peak_growth(device) as grown:
        bridge = fresh(config, statistics, registry)
        (bridge if config.student_of else bridge.override(num_steps=steps)).to(device)(features.to(device))
    return grown[0]


def _train(trainer_case: TrainerCase, data: TrainingData, batch: int) -> int:
    import accelerate
    import denoising_diffusion_pytorch  # noqa: F401, as above

    device = accelerate.Accelerator().device
    with peak_growth(device) as grown, training(trainer_case, data, batch, components(PluginManager())) as turn:
        take_steps(turn, STEPS)
    return grown[0]
