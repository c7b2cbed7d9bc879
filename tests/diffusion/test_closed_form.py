"""Denoisers that are fitted: their formulas, and how `train` handles them."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from sklearn.covariance import LedoitWolf

from ezhoi_diffusion.cli import main
from ezhoi_diffusion.diffusion.bridge import DiffusionBridge
from ezhoi_diffusion.diffusion.closed_form import build_empirical, build_gaussian
from ezhoi_diffusion.diffusion.components import Components
from ezhoi_diffusion.diffusion.denoiser import DenoiserError, FittedDenoiser
from ezhoi_diffusion.diffusion.normalization import normalize, rescale
from ezhoi_diffusion.diffusion.recipes import RECIPES
from ezhoi_diffusion.diffusion.schedule import Schedule, isotropic_estimate
from ezhoi_diffusion.errors import EzhoiDiffusionError
from ezhoi_diffusion.testing import synthetic_store
from ezhoi_diffusion.training.trainer import TrainingError, train
from helpers.trainings import QUICK, low_rank

SCHEDULE, SCALE, DIM = Schedule.cosine(), 5.0, 48
GAUSSIAN = replace(QUICK, denoiser_options={}, denoiser="gaussian")
EMPIRICAL = replace(GAUSSIAN, denoiser="empirical")


def centred(count: int, rank: int = 6, seed: int = 0) -> torch.Tensor:
    """z [count, DIM] of norm SCALE near a plane."""
    draw = torch.Generator().manual_seed(seed)
    plane = torch.randn(rank, DIM, generator=torch.Generator().manual_seed(99))
    noise = 0.1 * torch.randn(count, DIM, generator=draw)
    return rescale(torch.randn(count, rank, generator=draw) @ plane + noise, SCALE)


def noisy(z: torch.Tensor, t: int) -> torch.Tensor:
    return SCHEDULE.q_sample(z, t, torch.randn(z.shape, generator=torch.Generator().manual_seed(t)))


@pytest.mark.parametrize("t", [0, 99, 599, 999])
def test_gaussian_is_the_conditional_mean_of_a_joint_normal(t):
    """E[x0|x_t] from the joint covariance of (x0, x_t), solved in float64 without axes."""
    z = centred(30)
    denoiser = build_gaussian(DIM, SCHEDULE, "pred_x0", SCALE)
    denoiser.fit(z)
    estimate = LedoitWolf().fit(z.double().numpy())
    mean, covariance = torch.from_numpy(estimate.location_), torch.from_numpy(estimate.covariance_)
    alpha_bar = SCHEDULE.alphas_cumprod[t]
    x = rescale(noisy(centred(7, seed=1), t), SCALE)
    x_t = x.double() * SCHEDULE.expected_norm(t, DIM, SCALE) / SCALE
    joint = alpha_bar * covariance + (1 - alpha_bar) * torch.eye(DIM, dtype=torch.float64)
    off = (x_t - alpha_bar.sqrt() * mean).T
    expected = mean + (alpha_bar.sqrt() * covariance @ torch.linalg.solve(joint, off)).T
    found = denoiser(x, torch.tensor([t]))
    assert torch.allclose(found.double(), expected, atol=1e-4)
    assert torch.allclose(denoiser(x, torch.full((7,), t)), found, atol=1e-6)


def test_gaussian_beats_the_isotropic_estimate_on_held_out_features():
    denoiser = build_gaussian(DIM, SCHEDULE, "pred_x0", SCALE)
    denoiser.fit(centred(200))
    skip, _ = isotropic_estimate(SCHEDULE, "pred_x0", DIM, SCALE)
    for t in (50, 300, 700):
        z = centred(300, seed=5)
        x = rescale(noisy(z, t), SCALE)
        error = (denoiser(x, torch.tensor([t])) - z).square().mean()
        assert error < 0.7 * (float(skip[t]) * x - z).square().mean()


@pytest.mark.parametrize("t", [0, 99, 599])
def test_empirical_weighs_stored_features_by_their_likelihood(t):
    """Bayes' rule with a normal likelihood, written out with distances."""
    z = centred(9)
    denoiser = build_empirical(DIM, SCHEDULE, "pred_x0", SCALE, count=9)
    denoiser.fit(z)
    x = rescale(noisy(z[:5], t), SCALE)
    alpha_bar = SCHEDULE.alphas_cumprod[t]
    x_t = x.double() * SCHEDULE.expected_norm(t, DIM, SCALE) / SCALE
    far = torch.cdist(x_t, alpha_bar.sqrt() * z.double()).square()
    likelihood = torch.exp(-(far - far.min(1, keepdim=True).values) / (2 * (1 - alpha_bar)))
    expected = likelihood / likelihood.sum(1, keepdim=True) @ z.double()
    found = denoiser(x, torch.tensor([t]))
    assert torch.allclose(found.double(), expected, atol=1e-4)
    assert torch.allclose(denoiser(x, torch.full((5,), t)), found, atol=1e-6)


def test_empirical_leads_to_the_nearest_text(tmp_path):
    data = low_rank()
    recipe = replace(RECIPES["paper"], num_steps=20, start_timestep=300, output="unit_norm")
    bridge = DiffusionBridge.from_pretrained(train(data, replace(EMPIRICAL, recipe=recipe), tmp_path / "out"))
    texts = normalize(data.text, data.statistics.text_mean, 1.0)[0]
    mixed = F.normalize(0.8 * texts[:10] + 0.2 * texts[10:20], dim=-1)
    found = bridge(mixed + data.statistics.visual_mean)
    nearest = normalize(mixed + data.statistics.visual_mean, data.statistics.visual_mean, 1.0)[0] @ texts.T
    assert torch.equal((found @ texts.T).argmax(1), nearest.argmax(1))
    assert (found @ texts.T).max(1).values.mean() > nearest.max(1).values.mean()


@pytest.mark.parametrize("config", [GAUSSIAN, EMPIRICAL])
def test_a_fit_writes_a_bridge_of_all_texts(tmp_path, config):
    data = low_rank()
    out = train(data, config, tmp_path / "out")
    facts = json.loads((out / "training.json").read_text())
    bridge = DiffusionBridge.from_pretrained(out)
    assert bridge.provenance["training"]["rows"] == len(data.text)
    assert bridge.provenance["run"] == "test"
    assert torch.equal(bridge.context["ctx"], torch.ones(2))
    assert facts["history"] == []
    assert len(facts["val_loss_by_range"]) == len(facts["ranges"]) == 5
    found = bridge(data.visual)
    assert torch.equal(DiffusionBridge.from_pretrained(out)(data.visual), found)
    assert torch.allclose(found.norm(dim=1), data.visual.norm(dim=1), rtol=1e-4)
    assert not torch.allclose(found, data.visual, rtol=1e-2)
    with pytest.raises(TrainingError, match="holds a trained bridge"):
        train(data, config, out)
    before = (out / "config.json").read_bytes()
    assert train(data, config, out, resume=True) == out
    assert (out / "config.json").read_bytes() == before


class Nearest(FittedDenoiser):
    """A plugin's: its shape depends on what it is fitted to."""

    def __init__(self, dim, count):
        super().__init__()
        self.register_buffer("kept", torch.zeros(count, dim))

    def fit(self, z):
        self.kept = z[::2].clone()

    def fitted_options(self):
        return {"count": len(self.kept)}

    def forward(self, x, t):
        return self.kept[(x @ self.kept.T).argmax(1)]


def test_a_denoiser_of_a_plugin_is_fitted(tmp_path):
    registry = Components()
    registry.denoisers.register("nearest", lambda dim, schedule, objective, scale_factor, count=1: Nearest(dim, count))
    data = low_rank()
    out = train(data, replace(GAUSSIAN, denoiser="nearest"), tmp_path / "out", registry=registry)
    bridge = DiffusionBridge.from_pretrained(out, registry=registry)
    assert torch.equal(bridge.denoiser.kept, normalize(data.text, data.statistics.text_mean, SCALE)[0][::2])
    assert bridge.config.denoiser_options == {"count": 30}
    visual = replace(GAUSSIAN, denoiser="nearest", recipe=replace(RECIPES["guide"], num_steps=5))
    train(data, visual, tmp_path / "visual", registry=registry)
    with pytest.raises(TrainingError, match="leave it out"):
        train(data, replace(visual, denoiser_options={"count": 3}), tmp_path / "more", registry=registry)


def test_a_fit_leaves_other_trainings_alone(tmp_path):
    data = low_rank()
    out = train(data, QUICK, tmp_path / "mlp")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for config in (GAUSSIAN, replace(GAUSSIAN, seed=3)):
        with pytest.raises(TrainingError, match="holds another training"):
            train(data, config, out, resume=True)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    fitted = train(data, GAUSSIAN, tmp_path / "gaussian")
    for other, config in ((data, EMPIRICAL), (low_rank(texts=61), GAUSSIAN)):
        with pytest.raises(TrainingError, match="holds another training"):
            train(other, config, fitted, resume=True)


def test_the_command_refuses_several_seeds_of_a_fit_to_texts(tmp_path, capsys):
    synthetic_store(tmp_path / "train")
    assert (
        main(["train", str(tmp_path / "train"), "--out", str(tmp_path / "x"), "--denoiser", "gaussian", "--seeds", "3"])
        == 2
    )
    assert "leave --seeds out" in capsys.readouterr().err


@pytest.mark.parametrize("denoiser", ["gaussian", "empirical"])
def test_the_commands_take_a_fitted_bridge(tmp_path, capsys, denoiser):
    store = synthetic_store(tmp_path / "train")
    synthetic_store(tmp_path / "test", split="test", images=8)
    assert main(["train", str(store.folder), "--out", str(tmp_path / "bridge"), "--denoiser", denoiser]) == 0
    assert ("says nothing" in capsys.readouterr().out) == (denoiser == "empirical")
    assert main(["doctor", str(store.folder), str(tmp_path / "bridge")]) in (0, 1)
    said = capsys.readouterr().out
    assert "its means are those of these features" in said
    names = f"none,diffusion={tmp_path / 'bridge'}"
    assert main(["compare", str(tmp_path / "test"), "--bridges", names, "--replicates", "0"]) == 0


def test_the_validation_loss_is_that_of_a_fit_without_the_held_out_texts(tmp_path):
    """Gaussian learns what texts have in common. Empirical cannot return a text it was not fitted to."""
    losses = {}
    for config in (GAUSSIAN, EMPIRICAL):
        facts = json.loads((train(low_rank(), config, tmp_path / config.denoiser) / "training.json").read_text())
        losses[config.denoiser] = facts["val_loss"] / facts["isotropic_val_loss"]
    assert losses["gaussian"] < 0.8
    assert losses["empirical"] > losses["gaussian"]


def test_a_fit_to_visual_features_learns_from_all_images(tmp_path):
    data = low_rank()
    out = train(data, replace(GAUSSIAN, recipe=replace(RECIPES["guide"], num_steps=5)), tmp_path / "out")
    facts = DiffusionBridge.from_pretrained(out).provenance["training"]
    assert facts["rows"] == len(data.visual)
    assert 0 < facts["val_rows"] < len(data.visual)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (replace(EMPIRICAL, recipe=RECIPES["guide"]), "learns from visual features"),
        (replace(GAUSSIAN, objective="pred_v"), "pred_x0"),
        (replace(GAUSSIAN, denoiser_options={"width": 8}), "does not take"),
        (replace(EMPIRICAL, denoiser_options={"count": 5}), "leave it out"),
        (replace(GAUSSIAN, denoiser_options={"count": 5}), "denoiser 'gaussian' does not take"),
    ],
)
def test_a_refused_fit_leaves_no_bridge(tmp_path, config, says):
    with pytest.raises(EzhoiDiffusionError, match=says):
        train(low_rank(), config, tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()


def test_pairs_cannot_be_fitted(tmp_path):
    data = low_rank()
    paired = replace(data, own_text=data.text[torch.arange(len(data.visual)) % len(data.text)])
    with pytest.raises(TrainingError, match="Gaussian"):
        train(paired, replace(GAUSSIAN, recipe=RECIPES["paired"]), tmp_path / "out")


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: build_empirical(8, SCHEDULE, "pred_x0", SCALE, count=0), "stores 1 to"),
        (lambda: build_empirical(8, SCHEDULE, "pred_x0", SCALE, count=10**9), "stores 1 to"),
        (lambda: build_gaussian(5000, SCHEDULE, "pred_x0", SCALE), "width"),
        (lambda: build_gaussian(8, SCHEDULE, "pred_x0", SCALE).fit(torch.ones(1, 8)), "two features"),
        (lambda: build_empirical(8, SCHEDULE, "pred_x0", SCALE).fit(torch.ones(0, 8)), "stores 1 to"),
    ],
)
def test_denoisers_refuse(build, says):
    with pytest.raises(DenoiserError, match=says):
        build()
