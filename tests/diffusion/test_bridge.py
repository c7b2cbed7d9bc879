"""Contracts of the diffusion bridge: identity, determinism, independence, precision, settings, artefact."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from ezhoi_diffusion import artifact
from ezhoi_diffusion.diffusion.bridge import (
    BridgeConfig,
    BridgeError,
    DiffusionBridge,
    build_denoiser,
)
from ezhoi_diffusion.diffusion.components import Components
from ezhoi_diffusion.diffusion.denoiser import DenoiserError
from ezhoi_diffusion.diffusion.normalization import normalize
from ezhoi_diffusion.diffusion.recipes import RECIPES
from ezhoi_diffusion.features.statistics import ModalityStatistics
from ezhoi_diffusion.files import COMMITTED, write_tensors
from ezhoi_diffusion.registry import RegistryError
from helpers.bridges import DIM, MLP, features, make, statistics
from helpers.miniature import rewrite


class Identity(nn.Module):
    def forward(self, x, t):
        return x


@pytest.mark.parametrize("output", ["keep_norm", "free_norm", "unit_norm"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_denoiser_may_return_another_dtype(dtype, output):
    class Casts(Identity):
        def forward(self, x, t):
            return (2 * x).to(dtype)

    class Doubles(Identity):
        def forward(self, x, t):
            return 2 * x

    config = BridgeConfig(DIM, replace(RECIPES["gentle"], output=output, blend=0.7, num_steps=1), "identity")
    casts, doubles = (DiffusionBridge(config, denoiser, statistics())(features()) for denoiser in (Casts(), Doubles()))
    assert casts.dtype == torch.float32
    torch.testing.assert_close(casts, doubles, rtol=0, atol=0.01 * float(doubles.abs().max()))


@pytest.mark.parametrize("dim", [512, 768])
@pytest.mark.parametrize(("recipe", "blend"), [("paper", 1.0), ("gentle", 0.3), ("gentle", 0.0), ("scored", 0.7)])
def test_identity_denoiser_returns_the_input(dim, recipe, blend):
    chosen = replace(RECIPES[recipe], restored_mean="visual", blend=blend)
    bridge = DiffusionBridge(BridgeConfig(dim, chosen, "identity"), Identity(), statistics(dim))
    x = features(100, dim, seed=2)
    assert ((bridge(x) - x).norm(dim=1) / x.norm(dim=1)).max() < 1e-6


@pytest.mark.parametrize(("dim", "parameters"), [(512, 4_037_313), (768, 4_070_081)])
def test_unet1d_is_the_papers_network(dim, parameters):
    config = BridgeConfig(dim, RECIPES["paper"], "unet1d")
    unet = build_denoiser(config)
    assert sum(p.numel() for p in unet.parameters()) == parameters
    if dim == 512:
        assert unet(torch.randn(1, dim), torch.tensor([599])).shape == (1, dim)


def test_unet1d_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "denoising_diffusion_pytorch.denoising_diffusion_pytorch_1d", None)
    with pytest.raises(DenoiserError, match="pip install --upgrade torch torchvision"):
        build_denoiser(BridgeConfig(512, RECIPES["paper"], "unet1d"))


def test_unet1d_refuses_widths_it_cannot_halve():
    with pytest.raises(DenoiserError, match="multiple of 8"):
        build_denoiser(BridgeConfig(510, RECIPES["paper"], "unet1d"))
    with pytest.raises(DenoiserError, match="multiple of 2"):
        build_denoiser(BridgeConfig(51, RECIPES["paper"], "unet1d", {"init_dim": 8, "dim_mults": [2]}))


@pytest.mark.parametrize(
    ("dim", "options", "parameters"),
    [
        (512, {"dim_mults": [1, 2, 4]}, 1_333_697),
        (768, {"dim_mults": [1, 2, 4, 8, 16]}, 13_819_073),
        (512, {"init_dim": 64, "dim_mults": (1, 2)}, 1_729_153),
        (512, {"init_dim": 16, "dim_mults": [2, 3, 5]}, 646_177),
        (512, {"init_dim": 32, "dim_mults": [1, 2, 4, 8]}, 4_037_313),
    ],
)
def test_unet1d_of_other_sizes_is_the_published_class(dim, options, parameters):
    """The counts are those of the published class. Its outputs were equal to the last digit."""
    unet = build_denoiser(BridgeConfig(dim, RECIPES["paper"], "unet1d", options))
    assert sum(p.numel() for p in unet.parameters()) == parameters


def published_unet1d(dim: int, options: dict) -> nn.Module:
    """Random weights everywhere. Fresh gains are one, and would hide a missing one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = build_denoiser(BridgeConfig(dim, RECIPES["paper"], "unet1d", options)).eval()
        with torch.no_grad():
            for parameter in unet.parameters():
                parameter += 0.3 * torch.randn_like(parameter) * parameter.abs().mean()
    return unet


SMALL = {"init_dim": 8, "dim_mults": [1, 2]}


@pytest.mark.parametrize("timesteps", ["one for all", "one each"])
@torch.no_grad()
def test_unet1d_returns_what_the_published_class_returns(timesteps):
    unet = published_unet1d(64, SMALL)
    x = 5 * nn.functional.normalize(features(20, 64), dim=1)
    t = torch.tensor([300]) if timesteps == "one for all" else torch.arange(20)
    expected = unet.net(x.unsqueeze(1), t.expand(20)).squeeze(1)
    assert torch.allclose(unet(x, t), expected, atol=1e-4)
    assert all(name.startswith("net.") for name in unet.state_dict())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"init_dim": 10**6}, "init_dim"),
        ({"init_dim": 32.0}, "init_dim"),
        ({"dim_mults": [1, 2, 4, 8, 16, 32, 64]}, "dim_mults"),
        ({"dim_mults": [1, 1000]}, "dim_mults"),
        ({"dim_mults": []}, "dim_mults"),
        ({"dim_mults": "12"}, "dim_mults"),
        ({"dim_mults": [1, 2, 4, 8, 16, 32]}, "not a multiple of 32: use mlp"),
    ],
)
def test_unet1d_refuses_absurd_sizes(options, says):
    with pytest.raises(DenoiserError, match=says):
        build_denoiser(BridgeConfig(520, RECIPES["paper"], "unet1d", options))


@pytest.mark.parametrize("options", [{"width": 10**9}, {"depth": 0}, {"width": "512"}])
def test_mlp_refuses_absurd_sizes(options):
    with pytest.raises(DenoiserError):
        build_denoiser(BridgeConfig(DIM, RECIPES["paper"], "mlp", options))


def test_a_fresh_mlp_is_the_isotropic_estimate():
    config = BridgeConfig(DIM, RECIPES["paper"], "mlp", MLP)
    mlp = build_denoiser(config)
    x = features(3)
    skip = mlp.skip[599]
    assert torch.equal(mlp(x, torch.full((3,), 599)), skip * x)


@pytest.mark.parametrize("recipe", ["paper", "guide", "gentle", "scored"])
@pytest.mark.parametrize("objective", ["pred_x0", "pred_noise", "pred_v"])
def test_deterministic_and_independent_of_batch_and_chunks(recipe, objective):
    changes = {"num_steps": 20} if recipe == "guide" else {}
    bridge, x = make(recipe, objective, **changes), features()
    y = bridge(x)
    assert torch.isfinite(y).all()
    assert torch.equal(bridge(x), y)
    scale = y.norm(dim=1).max()
    chunked = make(recipe, objective, chunk_size=7, **changes)(x)
    alone = torch.cat([bridge(row[None]) for row in x])
    assert (chunked - y).abs().max() / scale < 1e-5
    assert (alone - y).abs().max() / scale < 1e-5


def test_keep_norm_keeps_norms_and_unit_norm_gives_unit_vectors():
    x = features()
    assert torch.allclose(make("gentle")(x).norm(dim=1), x.norm(dim=1), rtol=1e-5)
    unit_norm = make("guide", num_steps=5)(x)
    assert torch.allclose(unit_norm.norm(dim=1), torch.ones(len(x)), rtol=1e-5)


def test_free_norm_moves_a_feature_as_far_as_its_sample():
    x = features()
    bridge = make("scored")
    z, norm = normalize(x, bridge.input_mean, 5.0)
    length = norm * (x / norm - bridge.input_mean).norm(dim=1, keepdim=True)
    moved = length / 5 * (bridge.sample(z) - z)
    assert moved.norm() > 0.01 * x.norm()
    torch.testing.assert_close(bridge(x), x + moved, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(bridge.override(blend=0.3)(x), x + 0.3 * moved, rtol=1e-4, atol=1e-4)


def test_no_features_and_features_of_norm_zero():
    bridge = make()
    assert bridge(torch.empty(0, DIM)).shape == (0, DIM)
    x = features(3)
    x[1] = 0
    y = bridge(x)
    assert (y[1] == 0).all()
    assert torch.isfinite(y).all()


def test_computes_in_float32_for_every_input_dtype_and_under_autocast():
    bridge, x = make(), features()
    y = bridge(x)
    half = bridge(x.half())
    assert half.dtype == torch.float16
    assert torch.allclose(half.float(), bridge(x.half().float()).half().float())
    assert bridge(x.double()).dtype == torch.float64
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(bridge(x), y)


def test_tracks_no_gradient_and_draws_no_random_number():
    bridge, x = make(), features().requires_grad_()
    state = torch.get_rng_state()
    assert not bridge(x).requires_grad
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(3, DIM + 1),
        torch.zeros(DIM),
        torch.zeros(3, 1, DIM),
        torch.zeros(3, DIM, dtype=torch.int64),
        torch.full((3, DIM), torch.nan),
        torch.full((3, DIM), torch.inf),
    ],
)
def test_refuses_inputs(x):
    with pytest.raises(BridgeError):
        make()(x)


def test_refuses_statistics():
    config = BridgeConfig(DIM, RECIPES["paper"], "identity")
    one_text = ModalityStatistics.compute([features()], features(1))
    with pytest.raises(BridgeError, match="text mean"):
        DiffusionBridge(config, Identity(), replace(one_text, text_mean=torch.eye(DIM)[0]))
    with pytest.raises(BridgeError, match="visual mean"):
        DiffusionBridge(config, Identity(), replace(statistics(), visual_mean=torch.zeros(3)))


# The artefact


def test_round_trip_is_bit_equal_and_draws_nothing(tmp_path):
    bridge, x = make("paper"), features()
    bridge.context = {"txtcls_ctx_pt": torch.randn(2, 3)}
    bridge.save_pretrained(tmp_path / "a")
    state = torch.get_rng_state()
    loaded = DiffusionBridge.from_pretrained(tmp_path / "a")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(loaded(x), bridge(x))
    assert loaded.config == bridge.config
    assert torch.equal(loaded.context["txtcls_ctx_pt"], bridge.context["txtcls_ctx_pt"])
    assert loaded.statistics.visual_rows == 40


def test_saving_replaces_an_older_artefact_and_keeps_other_files(tmp_path):
    make("paper").save_pretrained(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    make("gentle").save_pretrained(tmp_path)
    assert DiffusionBridge.from_pretrained(tmp_path).config.recipe.name == "gentle"
    assert {p.name for p in tmp_path.iterdir()} == {
        "notes.txt",
        "config.json",
        "model.safetensors",
        "statistics.safetensors",
    }


@pytest.mark.parametrize("moves", [0, 1, 2])
def test_a_crash_after_the_commit_leaves_the_new_artefact(tmp_path, monkeypatch, moves):
    make("paper").save_pretrained(tmp_path)
    original, left = Path.replace, [moves]

    def replace_then_die(self, target):
        if self.parent.name == COMMITTED:
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
        return original(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(type(tmp_path), "replace", replace_then_die)
        with pytest.raises(KeyboardInterrupt):
            make("gentle").save_pretrained(tmp_path)
    assert DiffusionBridge.from_pretrained(tmp_path).config.recipe.name == "gentle"
    make("paper").save_pretrained(tmp_path)
    assert DiffusionBridge.from_pretrained(tmp_path).config.recipe.name == "paper"
    assert not (tmp_path / COMMITTED).exists()


@pytest.mark.parametrize("dies", ["write_tensors", "write_json"])
def test_a_crash_before_the_commit_leaves_the_old_artefact(tmp_path, monkeypatch, dies):
    make("paper").save_pretrained(tmp_path)

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(artifact, dies, die)
        with pytest.raises(KeyboardInterrupt):
            make("gentle").save_pretrained(tmp_path)
    assert DiffusionBridge.from_pretrained(tmp_path).config.recipe.name == "paper"


def edit(folder, **changes):
    rewrite(folder / "config.json", **changes)


def nan_weights(folder):
    """Write weights that `save` refuses."""
    tensors = load_file(folder / "model.safetensors")
    next(iter(tensors.values())).fill_(torch.nan)
    files = json.loads((folder / "config.json").read_text())["files"]
    edit(folder, files={**files, "model.safetensors": write_tensors(folder / "model.safetensors", tensors)})


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: (f / "config.json").unlink(), "config.json"),
        (lambda f: (f / "model.safetensors").unlink(), "model.safetensors"),
        (lambda f: (f / "statistics.safetensors").unlink(), "statistics.safetensors"),
        (lambda f: (f / "config.json").write_text("{"), "config.json"),
        (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), "config.json"),
        (lambda f: (f / "config.json").write_text("[]"), "config.json"),
        (lambda f: (f / "config.json").write_text("{}"), "no checksum"),
        (lambda f: (f / "config.json").write_text((f / "config.json").read_text() + " "), "changed after"),
        (lambda f: edit(f, schema_version=2), "schema version 2"),
        (lambda f: edit(f, bridge="other"), "'other'"),
        (lambda f: edit(f, dim=32), "cannot be used"),
        (lambda f: edit(f, dim=-1), "dim"),
        (lambda f: edit(f, num_timesteps=50), "50 timesteps"),
        (lambda f: edit(f, objective="pred_y"), "objective"),
        (lambda f: edit(f, denoiser="nobody"), "nobody"),
        (lambda f: edit(f, denoiser_options={"wdth": 3}), "wdth"),
        (lambda f: edit(f, denoiser_options={"width": 16}), "cannot be used"),
        (lambda f: edit(f, recipe={"name": "x"}), "recipe|argument"),
        (lambda f: edit(f, recipe=None), "recipe"),
        (lambda f: edit(f, surprise=1), "surprise"),
        (lambda f: edit(f, files={"../../etc/passwd": ""}), "files"),
        (lambda f: edit(f, files={"../../etc/passwd": {"bytes": 1, "sha256": ""}}), "files"),
        (lambda f: (f / "model.safetensors").write_bytes(b"garbage"), "model.safetensors"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 4096), "model.safetensors"),
        (
            lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-8]),
            "model.safetensors",
        ),
        (
            lambda f: (f / "model.safetensors").write_bytes((f / "statistics.safetensors").read_bytes()),
            "model.safetensors",
        ),
        (nan_weights, "NaN"),
    ],
)
def test_refuses_damaged_artefacts(tmp_path, damage, says):
    make("paper").save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(BridgeError, match=says):
        DiffusionBridge.from_pretrained(tmp_path)


def test_a_plugin_denoiser_is_found_by_name(tmp_path):
    registry = Components()
    registry.denoisers.register("identity", lambda dim, schedule, objective, scale_factor: Identity())
    with pytest.raises(RegistryError, match="registered already"):
        registry.denoisers.register("mlp", build_denoiser)
    assert "identity" not in Components().denoisers.names()
    config = BridgeConfig(DIM, RECIPES["paper"], "identity")
    DiffusionBridge(config, build_denoiser(config, registry), statistics()).save_pretrained(tmp_path)
    with pytest.raises(BridgeError, match="known are empirical, gaussian, mlp, unet1d"):
        DiffusionBridge.from_pretrained(tmp_path)
    assert DiffusionBridge.from_pretrained(tmp_path, registry=registry)(features()).shape == (40, DIM)


def test_importing_the_bridge_stays_light():
    code = (
        "import sys, ezhoi_diffusion.diffusion.bridge;"
        "print([m for m in ('torchvision', 'accelerate', 'denoising_diffusion_pytorch') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_settings_are_overridden_and_recorded_in_the_provenance():
    bridge, x = make("paper"), features(3)
    before = bridge(x)
    other = bridge.override(num_steps=3).override(start_timestep=50)
    assert other.provenance["overridden"] == {"num_steps": 3, "start_timestep": 50}
    assert torch.equal(bridge(x), before), "the bridge itself does not change"
    assert not torch.equal(other(x), before)
    assert torch.equal(other(x), make("paper", num_steps=3, start_timestep=50)(x))
    for wrong in ({"input_mean": "text"}, {"scale_factor": 2.0}, {"typo": 1}):
        with pytest.raises(BridgeError, match="cannot be set on this bridge; its settings are start_timestep"):
            bridge.override(**wrong)
    with pytest.raises(BridgeError, match="need 1 <= num_steps <= start_timestep"):
        other.override(num_steps=51)


def test_a_sweep_gives_the_overrides_and_samples_once_where_points_differ_in_blend_only():
    bridge, x, y = make("paper"), features(3), features(4)
    points = [{"start_timestep": s, "blend": w} for s in (20, 300) for w in (0.1, 0.5, 1.0)]
    expected = [bridge.override(**point)(x) for point in points]
    calls = []
    bridge.denoiser.register_forward_hook(lambda *_: calls.append(1))
    swept = bridge.sweep(points)
    assert [torch.equal(other(x), wanted) for other, wanted in zip(swept, expected, strict=True)] == [True] * 6
    assert len(calls) == 2 * bridge.config.recipe.num_steps
    assert torch.equal(swept[0](y), bridge.override(**points[0])(y)), "other features are sampled again"
    with pytest.raises(BridgeError, match="num_steps <= start_timestep"):
        bridge.sweep([{"num_steps": 7, "start_timestep": 5}])


def one_evaluation(predict, z, *, schedule, timesteps, scale_factor):
    return predict(z, timesteps[0])


def test_a_plugin_sampler_is_a_setting(tmp_path):
    registry = Components()
    registry.samplers.register("one_evaluation", one_evaluation)
    plain = make("paper")
    bridge = DiffusionBridge(plain.config, plain.denoiser, plain.statistics, registry=registry)
    x = features(3)
    other = bridge.override(sampler="one_evaluation")
    assert torch.allclose(other(x), bridge.override(num_steps=1)(x), rtol=1e-5)
    swept = bridge.sweep([{"sampler": "ddim"}, {"sampler": "one_evaluation"}])
    assert [torch.equal(a(x), b(x)) for a, b in zip(swept, (bridge, other), strict=True)] == [True, True]
    other.save_pretrained(tmp_path)
    assert torch.equal(DiffusionBridge.from_pretrained(tmp_path, registry=registry)(x), other(x))
    for refused in (
        lambda: plain.override(sampler="one_evaluation"),
        lambda: DiffusionBridge.from_pretrained(tmp_path),
    ):
        with pytest.raises(BridgeError, match="unknown sampler 'one_evaluation': known are cold, ddim, published"):
            refused()


def test_override_refuses_a_mean_that_is_not_known():
    config = BridgeConfig(DIM, replace(RECIPES["guide"], restored_mean="visual"), "identity")
    bridge = DiffusionBridge(config, Identity(), ModalityStatistics.text_only(statistics().text_mean))
    with pytest.raises(BridgeError, match="uses the visual mean, which is not known"):
        bridge.override(output="keep_norm")
    assert bridge.config.recipe.output == "unit_norm"


@pytest.mark.parametrize(
    "facts",
    [
        ["bytes", "sha256"],
        {"bytes": None, "sha256": "0" * 64},
        {"bytes": 1, "sha256": "short"},
        {"bytes": -1, "sha256": "0" * 64},
    ],
)
def test_refuses_file_entries_without_size_and_checksum(tmp_path, facts):
    make().save_pretrained(tmp_path)
    rewrite(tmp_path / "config.json", files={"model.safetensors": facts, "statistics.safetensors": facts})
    with pytest.raises(BridgeError, match=r"\$\.files"):
        DiffusionBridge.from_pretrained(tmp_path)


def test_loading_retries_while_the_artefact_is_replaced(tmp_path, monkeypatch):
    make(num_steps=2).save_pretrained(tmp_path)
    other, calls = make("paper"), []
    nn.init.ones_(next(other.denoiser.parameters()))
    original = artifact.read_tensors

    def read_tensors(*args):
        calls.append(args)
        if len(calls) == 1:
            other.save_pretrained(tmp_path)
        return original(*args)

    monkeypatch.setattr(artifact, "read_tensors", read_tensors)
    assert DiffusionBridge.from_pretrained(tmp_path).config.recipe.name == "paper"
