"""Recognise checkpoints: of the guide's trainer, and of EZ-HOI."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ezhoi_diffusion.diffusion.recipes import MAX_TIMESTEPS, Objective
from ezhoi_diffusion.diffusion.schedule import Schedule
from ezhoi_diffusion.guide.kinds import MAX_INT, EzHoiCheckpoint, ModelFile, Weights, facts_of
from ezhoi_diffusion.guide.reading import GuideFileError


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


def networks(value: Mapping[str, Any]) -> dict[Weights, dict[str, Tensor]]:
    """The state dicts that hold the network, from a trainer's checkpoint or from a bare state dict of any part of it."""
    bare = _state(value)
    averages = _state(value.get("ema")) or bare
    plain = {name: tensor for name, tensor in bare.items() if not name.startswith("ema_model.")}
    found: dict[Weights, dict[str, Tensor]] = {
        "ema": _below(averages, "ema_model."),
        "online": _state(value.get("model")) or _below(averages, "online_model.") or plain,
    }
    return {name: state for name, state in found.items() if any(key.endswith("init_conv.weight") for key in state)}


def read_model(value: Mapping[str, Any], states: dict[Weights, dict[str, Tensor]], path: Path) -> ModelFile:
    """Read a trainer's checkpoint, or a bare state dict, whose `networks` are `states`. Raises GuideFileError."""
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
        facts=facts_of(value, ("version",)),
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


def read_ezhoi_checkpoint(value: Mapping[str, Any], path: Path) -> EzHoiCheckpoint:
    """Describe a checkpoint of EZ-HOI."""
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
    return EzHoiCheckpoint(path=path, dim=dim, contents=contents, facts=facts_of(value, ("iteration", "epoch")))
