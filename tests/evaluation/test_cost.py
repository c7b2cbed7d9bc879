"""What a comparison reads, computes and keeps: no more than it needs."""

from __future__ import annotations

import pytest
import torch

from ezhoi_diffusion import Bridge, BridgePlugin
from ezhoi_diffusion.diffusion.bridge import BridgeConfig, DiffusionBridge, build_denoiser
from ezhoi_diffusion.diffusion.recipes import DEFAULT_RECIPE
from ezhoi_diffusion.evaluation import replay as replay_module
from ezhoi_diffusion.evaluation.comparison import Comparison
from ezhoi_diffusion.evaluation.replay import NUM_TIMED, replay
from ezhoi_diffusion.evaluation.variants import resolve_variants
from ezhoi_diffusion.features.store import FeatureStore
from ezhoi_diffusion.plugins import PluginManager
from ezhoi_diffusion.testing import synthetic_store

D = 16


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return synthetic_store(tmp_path_factory.mktemp("capture") / "test", split="test", images=24, dim=D)


@pytest.fixture(scope="module")
def variants(store, tmp_path_factory):
    """A diffusion bridge as it is, and at six points of a sweep with two timesteps, one of which is its own."""
    folder = tmp_path_factory.mktemp("bridge")
    torch.manual_seed(0)
    config = BridgeConfig(D, DEFAULT_RECIPE, "mlp", {"width": 16, "depth": 1})
    DiffusionBridge(config, build_denoiser(config), store.statistics()).save_pretrained(folder)
    sweep = {"start_timestep": [50, DEFAULT_RECIPE.start_timestep], "blend": [0.1, 0.5, 1.0]}
    return resolve_variants(
        f"none,diffusion={folder}", PluginManager(), check=lambda *_: None, device="cpu", sweep=sweep
    )


def test_a_sweep_samples_every_pair_once_at_each_timestep_also_where_single_images_are_timed(store, variants, mocker):
    sampled = []
    sample = DiffusionBridge.sample
    mocker.patch.object(DiffusionBridge, "sample", lambda self, z: sampled.append(len(z)) or sample(self, z))
    replay(store, variants, measured=True)
    timed = sum(image["rows"] for image in [one for one in store.images if one["rows"]][:NUM_TIMED])
    assert len(variants) == 7
    assert sum(sampled) <= 2 * len(store) + 7 * timed


def test_a_measured_comparison_reads_the_capture_once(store, variants, mocker):
    read = mocker.spy(FeatureStore, "shards")
    replay(store, variants, measured=True)
    assert read.call_count == 1


def test_a_variant_keeps_five_bytes_for_a_detection(store, variants, mocker):
    made = mocker.spy(Comparison, "from_detections")
    replay(store, variants)
    first, *others = made.call_args.args[0].values()
    for scored in others:
        assert (scored.scores.dtype, scored.labels.dtype) == (torch.float32, torch.bool)
        assert scored.classes.data_ptr() == first.classes.data_ptr()
        assert scored.image.data_ptr() == first.image.data_ptr()


def test_one_bar_shows_the_whole_comparison(store, variants, capfd):
    replay(store, variants, replicates=100)
    shown = capfd.readouterr().err
    assert "bootstrap" not in shown
    total = 24 + 8 * 1  # steps: images, and at least one for the bootstrap of each variant
    assert f"100%|██████████| {total}/{total}" in shown


class WithPairs(Bridge):
    """Gets one image at a time."""

    needs_pairs = True

    def forward(self, adapter_feat, pairs=None):
        return adapter_feat


def test_a_bridge_that_gets_single_images_is_timed_on_the_first_alone(store, mocker):
    plugins = PluginManager()
    plugins.register(BridgePlugin("with_pairs", lambda folder: WithPairs()), "with_pairs")
    milliseconds = mocker.spy(replay_module, "_milliseconds")
    mocker.patch.object(replay_module, "MAX_PAIRS", 64)
    replay(store, resolve_variants("none,with_pairs", plugins, check=lambda *_: None, device="cpu"), measured=True)
    assert 1 <= len(milliseconds.call_args.args[0]) <= NUM_TIMED < len(store.images)
