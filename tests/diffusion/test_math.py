"""Normalization, schedule, timesteps and samplers against closed forms and independent loops."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from ezhoi_diffusion.diffusion.normalization import normalize, uncenter
from ezhoi_diffusion.diffusion.recipes import OBJECTIVES, RECIPES, Recipe, RecipeError
from ezhoi_diffusion.diffusion.samplers import cold, ddim, published
from ezhoi_diffusion.diffusion.schedule import Schedule, isotropic_estimate
from ezhoi_diffusion.diffusion.timesteps import make_timesteps

SCHEDULE = Schedule.cosine()


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("dim", [512, 768])
@pytest.mark.parametrize("mean_norm", [0.0, 0.7, 0.9, 0.999])
def test_uncenter_inverts_normalize(dim, mean_norm):
    x = 7 * normal(50, dim)
    mean = mean_norm * F.normalize(normal(dim, seed=1), dim=-1)
    z, norm = normalize(x, mean, 5.0)
    assert torch.allclose(z.norm(dim=1), torch.full((50,), 5.0))
    error = (norm * uncenter(3 * z, mean) - x).norm(dim=1) / x.norm(dim=1)
    assert error.max() < 1e-6


def test_normalize_takes_features_of_norm_zero():
    z, norm = normalize(torch.zeros(2, 8), torch.full((8,), 0.1), 5.0)
    assert torch.isfinite(z).all()
    assert (norm == 0).all()


def test_uncenter_refuses_a_mean_of_norm_one():
    with pytest.raises(ValueError, match="norm is 1"):
        uncenter(normal(3, 8), torch.eye(8)[0])


def test_schedule_has_the_published_values():
    assert SCHEDULE.num_timesteps == 1000
    assert SCHEDULE.alphas_cumprod[599].item() == pytest.approx(0.3408, abs=5e-5)
    betas = 1 - SCHEDULE.alphas_cumprod[1:] / SCHEDULE.alphas_cumprod[:-1]
    assert betas.max() <= 0.999 + 1e-12
    assert (SCHEDULE.alphas_cumprod > 0).all()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_target_leads_back_to_x0(objective):
    x0, noise = normal(6, 32, dtype=torch.float64), normal(6, 32, seed=1, dtype=torch.float64)
    t = torch.tensor([0, 50, 99, 300, 599, 900])
    x_t = SCHEDULE.q_sample(x0, t, noise)
    target = SCHEDULE.target(objective, x0, t, noise)
    assert torch.allclose(SCHEDULE.to_x0(objective, target, x_t, t), x0)
    assert torch.allclose(SCHEDULE.to_x0(objective, target[:1], x_t[:1], 0), x0[:1])


def test_loss_weights():
    t = torch.tensor([10, 599])
    alpha_bar = SCHEDULE.alphas_cumprod[t]
    snr = (alpha_bar / (1 - alpha_bar)).float()
    assert torch.allclose(SCHEDULE.loss_weight("pred_x0", t), snr)
    assert torch.equal(SCHEDULE.loss_weight("pred_noise", t), torch.ones(2))
    assert torch.allclose(SCHEDULE.loss_weight("pred_v", t), snr / (snr + 1))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_isotropic_estimate_is_the_best_multiple_of_the_input(objective):
    """Compared with the least-squares multiple, on data without a preferred direction."""
    dim, scale = 512, 5.0
    skip, residual = isotropic_estimate(SCHEDULE, objective, dim, scale)
    for t in (20, 99, 300, 599):
        z, noise = scale * F.normalize(normal(2000, dim, seed=t), dim=-1), normal(2000, dim, seed=t + 1)
        x = scale * F.normalize(SCHEDULE.q_sample(z, t, noise), dim=-1)
        target = SCHEDULE.target(objective, z, t, noise)
        best = (target * x).sum() / x.square().sum()
        assert skip[t].item() == pytest.approx(best.item(), rel=0.02, abs=0.02)
        assert residual[t].abs().item() == pytest.approx((target - best * x).square().mean().sqrt().item(), rel=0.02)


@pytest.mark.parametrize(
    ("num_steps", "start_timestep", "timesteps"),
    [
        (5, 600, [599, 479, 359, 239, 119, -1]),
        (600, 600, list(range(599, -2, -1))),
        (100, 100, list(range(99, -2, -1))),
        (1, 600, [599, -1]),
        (1, 1, [0, -1]),
        (7, 10, [9, 7, 6, 4, 3, 1, 0, -1]),
    ],
)
def test_linear_timesteps(num_steps, start_timestep, timesteps):
    assert make_timesteps("linear", num_steps, start_timestep) == tuple(timesteps)


@pytest.mark.parametrize(("num_steps", "start_timestep"), [(0, 5), (6, 5), (-1, 5), (1, 0)])
def test_more_steps_than_timesteps_are_refused(num_steps, start_timestep):
    with pytest.raises(ValueError, match="num_steps"):
        make_timesteps("linear", num_steps, start_timestep)


@pytest.mark.parametrize(
    ("spacing", "num_steps", "timesteps"),
    [
        ("quadratic", 5, [599, 383, 215, 95, 23, -1]),
        ("cubic", 5, [599, 306, 128, 37, 3, -1]),
        ("cubic", 1, [599, -1]),
    ],
)
def test_quadratic_and_cubic_timesteps(spacing, num_steps, timesteps):
    """600·(i/5)^p − 1, rounded down."""
    assert make_timesteps(spacing, num_steps, 600) == tuple(timesteps)


@pytest.mark.parametrize("spacing", ["quadratic", "cubic"])
@pytest.mark.parametrize(("num_steps", "start_timestep"), [(600, 600), (50, 60), (99, 100), (20, 1000), (7, 8)])
def test_no_timestep_is_repeated(spacing, num_steps, start_timestep):
    timesteps = make_timesteps(spacing, num_steps, start_timestep)
    assert (timesteps[0], timesteps[-1], len(timesteps)) == (start_timestep - 1, -1, num_steps + 1)
    assert all(after < before for before, after in pairwise(timesteps))


@pytest.mark.parametrize("sampler", [ddim, published])
def test_samplers_equal_the_published_loop(sampler):
    """Written from the formula, with ε explicit and in float64."""
    z = 5 * F.normalize(normal(4, 64, dtype=torch.float64), dim=-1)
    weights = normal(64, 64, seed=2, dtype=torch.float64) / 8
    alpha_bar = SCHEDULE.alphas_cumprod

    def predict(x, t):
        return torch.tanh(x @ weights) + t / 1000

    timesteps = torch.linspace(-1, 599, 6).trunc().int().tolist()[::-1]
    x = z
    for t, after in pairwise(timesteps):
        x = 5 * x / x.norm(dim=1, keepdim=True)
        x0 = predict(x, t)
        if after >= 0:
            noise = (x / alpha_bar[t].sqrt() - x0) / (1 / alpha_bar[t] - 1).sqrt()
            x = alpha_bar[after].sqrt() * x0 + (1 - alpha_bar[after]).sqrt() * noise
    found = sampler(predict, z, schedule=SCHEDULE, timesteps=timesteps, scale_factor=5.0)
    assert torch.allclose(found, x0, atol=1e-12)


def test_ddim_with_the_exact_posterior_moves_to_the_nearer_of_two_points():
    points = 5 * F.normalize(normal(2, 128), dim=-1)

    def posterior_mean(x, t):
        """With the expected norm of x_t, the posterior over two points is a softmax."""
        norm = float(SCHEDULE.expected_norm(t, 128, 5.0))
        alpha_bar = float(SCHEDULE.alphas_cumprod[t])
        logits = (x / 5 * norm) @ points.T * math.sqrt(alpha_bar) / (1 - alpha_bar)
        return logits.softmax(1) @ points

    start = 5 * F.normalize(torch.stack((0.6 * points[0] + 0.4 * points[1], 0.4 * points[0] + 0.6 * points[1])), dim=-1)
    end = ddim(posterior_mean, start, schedule=SCHEDULE, timesteps=make_timesteps("linear", 50, 600), scale_factor=5.0)
    assert torch.allclose(end, points, atol=1e-3)


def test_recipes_are_the_documented_ones():
    assert (RECIPES["paper"].num_steps, RECIPES["paper"].start_timestep, RECIPES["paper"].trained_on) == (
        5,
        600,
        "text",
    )
    assert (RECIPES["guide"].num_steps, RECIPES["guide"].input_mean, RECIPES["guide"].output) == (
        600,
        "text",
        "unit_norm",
    )
    assert (RECIPES["gentle"].blend, RECIPES["gentle"].restored_mean) == (0.3, "visual")


@pytest.mark.parametrize(
    "change",
    [
        {"num_steps": 601},
        {"num_steps": 0},
        {"num_steps": 5.0},
        {"start_timestep": True},
        {"blend": 1.1},
        {"blend": math.nan},
        {"scale_factor": 0.0},
        {"scale_factor": math.inf},
        {"trained_on": "both"},
        {"input_mean": "none"},
        {"restored_mean": ""},
        {"output": "raw"},
        {"spacing": "quartic"},
    ],
)
def test_recipe_refuses(change):
    with pytest.raises(RecipeError, match=next(iter(change))):
        replace(RECIPES["paper"], **change)
    assert isinstance(replace(RECIPES["paper"], num_steps=10), Recipe)


def test_the_guide_has_the_published_timesteps():
    """reverse(trunc(linspace(−1, t0−1, S+1))) in float32, in a case where whole numbers differ."""
    expected = [int(v) for v in torch.linspace(-1, 59, 51).tolist()][::-1]
    assert make_timesteps(RECIPES["guide"].spacing, 50, 60) == tuple(expected)
    assert make_timesteps("linear", 50, 60) != tuple(expected)


@pytest.mark.parametrize("sampler", [ddim, cold, published])
def test_a_sampler_evaluates_at_every_timestep_but_the_last(sampler):
    visited = []
    sampler(
        lambda x, t: visited.append(t) or x, normal(1, 8), schedule=SCHEDULE, timesteps=[9, 4, 3, -1], scale_factor=5.0
    )
    assert visited == [9, 4, 3]
