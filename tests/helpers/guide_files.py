"""Write the nine kinds of files that users of the guide have, from their description, without the code under test."""

from __future__ import annotations

import itertools
import math
import pickle
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

D, N_SEL = 32, 12
HOI = [3, 17, 18, 44, 90, 101, 205, 300, 411, 412, 500, 599]
IMAGES = ["HICO_train_7.jpg", "HICO_train_2.jpg", "HICO_train_7.jpg", "HICO_train_9.jpg"]


def text(dim: int = D, rows: int = N_SEL) -> torch.Tensor:
    """Text features as EZ-HOI has them: far from norm 1, with a common offset."""
    generator = torch.Generator().manual_seed(5)
    return 3 * (torch.randn(rows, dim, generator=generator) + 1.5 * torch.randn(dim, generator=generator))


def visual(rows: int = 24, dim: int = D) -> torch.Tensor:
    generator = torch.Generator().manual_seed(6)
    return 9 * (torch.randn(rows, dim, generator=generator) - torch.randn(dim, generator=generator))


def mean_of(rows: torch.Tensor) -> torch.Tensor:
    return torch.stack([row / row.norm() for row in rows]).mean(0)


def chain(rows: torch.Tensor, mean: torch.Tensor, scale: float) -> torch.Tensor:
    return F.normalize(F.normalize(rows, dim=-1) - mean, dim=-1) * scale


def dump(value: Any, path: Path) -> Path:
    with path.open("wb") as file:
        pickle.dump(value, file)
    return path


def text_file(path: Path, rows: torch.Tensor, **changes: Any) -> Path:
    facts = {
        "embeddings": rows, "select_HOI_index": HOI, "num_classes": 117, "checkpoint": "unknown", "txt_align": True,
        "txtcls_pt": True, "act_descriptor": True, "vlmtxt": None,
    }  # fmt: skip
    return dump({**facts, **changes}, path)


def first_version(rows: torch.Tensor) -> torch.Tensor:
    """[600, D] with zeros for the classes that were not selected."""
    padded = torch.zeros(600, rows.shape[1])
    padded[HOI] = rows
    return padded


def visual_file(path: Path, rows: torch.Tensor, **config: Any) -> Path:
    metadata = [
        {
            "image_id": IMAGES[n * len(IMAGES) // len(rows)], "human_idx": 0, "object_idx": n % 4, "object_class": n % 80,
            "has_gt": n % 2 == 0, **({"gt_verbs": [4, 5]} if n % 2 == 0 else {}),
        }
        for n in range(len(rows))
    ]  # fmt: skip
    known = {"checkpoint": "ckpt_1.pt", "text_mean_path": "m.pkl", "scale_factor": 5.0, "num_classes": 117}
    known |= {"zs_type": "unseen_verb", "clip_model": "checkpoints/ViT-B-16.pt"}
    return dump({"embeddings": rows.numpy(), "metadata": metadata, "config": {**known, **config}}, path)


def schedule(objective: str = "pred_x0", timesteps: int = 1000, kind: str = "cosine") -> dict[str, torch.Tensor]:
    """The thirteen buffers, float32."""
    if kind == "cosine":
        f = [math.cos((t / timesteps + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(timesteps + 1)]
        betas = torch.tensor([min(1 - b / a, 0.999) for a, b in itertools.pairwise(f)], dtype=torch.float64)
    else:
        betas = torch.linspace(0.1 / timesteps, 20 / timesteps, timesteps, dtype=torch.float64)
    bar = (1 - betas).cumprod(0)
    previous = torch.cat((torch.ones(1, dtype=torch.float64), bar[:-1]))
    variance = betas * (1 - previous) / (1 - bar)
    snr = bar / (1 - bar)
    weight = {"pred_x0": snr, "pred_noise": torch.ones_like(snr), "pred_v": snr / (snr + 1)}[objective]
    buffers = {
        "betas": betas, "alphas_cumprod": bar, "alphas_cumprod_prev": previous, "sqrt_alphas_cumprod": bar.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - bar).sqrt(), "log_one_minus_alphas_cumprod": (1 - bar).log(),
        "sqrt_recip_alphas_cumprod": (1 / bar).sqrt(), "sqrt_recipm1_alphas_cumprod": (1 / bar - 1).sqrt(),
        "posterior_variance": variance, "posterior_log_variance_clipped": variance.clamp(min=1e-20).log(),
        "posterior_mean_coef1": betas * previous.sqrt() / (1 - bar),
        "posterior_mean_coef2": (1 - previous) * (1 - betas).sqrt() / (1 - bar), "loss_weight": weight,
    }  # fmt: skip
    return {name: buffer.float() for name, buffer in buffers.items()}


def unet(dim: int, init_dim: int, dim_mults: tuple[int, ...], seed: int) -> torch.nn.Module:
    """The guide's network, made from its package."""
    from denoising_diffusion_pytorch.denoising_diffusion_pytorch_1d import SinusoidalPosEmb, Unet1D

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Unet1D(dim=init_dim, dim_mults=dim_mults, channels=1)
        net.time_mlp[0] = SinusoidalPosEmb(dim)
        net.time_mlp[1] = torch.nn.Linear(dim, 4 * init_dim)
    return net.eval()


def trainer_checkpoint(
    dim: int = D, objective: str = "pred_x0", *, init_dim: int = 8, dim_mults: tuple[int, ...] = (1, 2), step: int = 500_000,
    kind: str = "cosine", timesteps: int = 1000,
) -> dict[str, Any]:  # fmt: skip
    """What the guide's trainer saves. Online and averaged weights differ (seeds 1 and 2)."""
    buffers = schedule(objective, timesteps, kind)
    states = [
        buffers | {f"model.{k}": v for k, v in unet(dim, init_dim, dim_mults, seed).state_dict().items()}
        for seed in (1, 2)
    ]
    averaged = {f"ema_model.{k}": v for k, v in states[1].items()} | {
        f"online_model.{k}": v for k, v in states[0].items()
    }
    averaged |= {"initted": torch.tensor(True), "step": torch.tensor(step)}
    optimizer = {"state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 8e-5}]}
    scaler = {"scale_factor": 65536.0, "growth_factor": 2.0}
    return {"step": step, "model": states[0], "opt": optimizer, "ema": averaged, "scaler": scaler, "version": "2.1.1"}


def model_file(path: Path, **changes: Any) -> Path:
    torch.save(trainer_checkpoint(**changes), path)
    return path


def published_sampler(
    net: torch.nn.Module, buffers: dict[str, torch.Tensor], z: torch.Tensor, steps: int, objective: str, scale: float
) -> torch.Tensor:
    """The published loop with its float32 buffers: `steps` timesteps from steps − 1, with z [N, D] as it is."""
    timesteps = torch.linspace(-1, steps - 1, steps + 1).int().tolist()[::-1]
    x = z[:, None]
    for t, after in itertools.pairwise(timesteps):
        x = F.normalize(x, dim=-1) * scale
        with torch.no_grad():
            out = net(x, torch.full((len(x),), t))
        recip, recipm1 = buffers["sqrt_recip_alphas_cumprod"][t], buffers["sqrt_recipm1_alphas_cumprod"][t]
        if objective == "pred_noise":
            x0 = recip * x - recipm1 * out
        elif objective == "pred_v":
            x0 = buffers["sqrt_alphas_cumprod"][t] * x - buffers["sqrt_one_minus_alphas_cumprod"][t] * out
        else:
            x0 = out
        if after < 0:
            return x0[:, 0]
        noise = out if objective == "pred_noise" else (recip * x - x0) / recipm1
        bar = buffers["alphas_cumprod"][after]
        x = x0 * bar.sqrt() + (1 - bar).sqrt() * noise
    raise AssertionError("no timestep")
