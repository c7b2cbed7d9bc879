"""Global settings of torch that others have changed."""

from __future__ import annotations

import io
import os
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ezhoi_diffusion import DiffusionBridge, FeatureStore, hookimpl
from ezhoi_diffusion.defaults import kept_globals, torch_defaults
from ezhoi_diffusion.evaluation.replay import replay
from ezhoi_diffusion.evaluation.variants import resolve_variants
from ezhoi_diffusion.features.unlabelled import split_of
from ezhoi_diffusion.plugins import PluginManager
from ezhoi_diffusion.testing import synthetic_store, with_full_rank_texts
from ezhoi_diffusion.training.fitted import fit_artifact, known_fits
from ezhoi_diffusion.training.trainer import train
from helpers.trainings import QUICK, equal, low_rank, weights


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


OTHERS = {
    "float64": lambda: default_dtype(torch.float64),
    "float16": lambda: default_dtype(torch.float16),
    "meta": lambda: torch.device("meta"),
    "no_grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "inference": torch.inference_mode,
}


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    return [
        with_full_rank_texts(synthetic_store(folder / split, split=split, images=20)) for split in ("train", "test")
    ]


@pytest.fixture(scope="module")
def bridge(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bridge") / "bridge"
    train(low_rank(), QUICK, folder)
    return folder


@pytest.mark.parametrize("other", OTHERS)
def test_a_training_is_the_same(bridge, tmp_path, other):
    data = low_rank()
    with OTHERS[other]():
        train(data, QUICK, tmp_path / "bridge")
    assert equal(weights(tmp_path / "bridge"), weights(bridge))


@pytest.mark.parametrize("other", OTHERS)
def test_a_loaded_bridge_is_the_same(bridge, other):
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    expected = DiffusionBridge.from_pretrained(bridge)(x)
    with OTHERS[other]():
        found = DiffusionBridge.from_pretrained(bridge)(x)
    assert torch.equal(found, expected)
    assert found.dtype == torch.float32


@pytest.mark.parametrize("other", OTHERS)
def test_every_fit_and_its_comparison_are_the_same(stores, tmp_path, other):
    train_store, test_store = stores
    plugins = PluginManager()
    fits = known_fits(plugins)
    results = []
    for context in (torch.enable_grad, OTHERS[other]):
        folders = {}
        with context():
            for name in fits.names():
                folders[name] = tmp_path / context.__name__ / name
                learned_from = test_store if split_of(fits[name]) == "test" else train_store
                fit_artifact(name, fits[name], learned_from, {}).save(folders[name])
            spec = ",".join(["scale", *(f"{name}={folder}" for name, folder in folders.items())])
            variants = resolve_variants(spec, plugins, check=lambda bridge, name: None, device="cpu")
            store = FeatureStore(test_store.folder)
            results.append(replay(store, variants).variants)
    one, two = results
    assert len(one) == len(two) == len(fits.names()) + 2
    for a, b in zip(one.values(), two.values(), strict=True):
        assert torch.equal(a.ap, b.ap), a.name


def test_what_was_set_is_there_again_afterwards():
    with default_dtype(torch.float64), torch.device("meta"):
        with torch_defaults():
            assert torch.empty(1).dtype == torch.float32
            assert torch.empty(1).device.type == "cpu"
        assert torch.empty(1).dtype == torch.float64
        assert torch.empty(1).device.type == "meta"


def test_what_a_plugin_sets_at_its_import_is_put_back_and_named(mocker, caplog):
    def load():
        torch.set_default_dtype(torch.float64)
        torch.set_grad_enabled(False)
        torch.set_default_device("meta")
        torch.autocast("cpu", dtype=torch.bfloat16).__enter__()
        sys.stdout = io.StringIO()
        os.chdir("/")
        return SimpleNamespace(on_attach=hookimpl(lambda run: None))

    before = sys.stdout, Path.cwd()
    point = SimpleNamespace(name="selfish", value="selfish_module", dist=None, load=load)
    mocker.patch("ezhoi_diffusion.plugins.entry_points", return_value=[point])
    with kept_globals() as changed:  # for the other tests, where this one fails
        manager = PluginManager()
        assert torch.get_default_dtype() == torch.float32
        assert torch.is_grad_enabled()
        assert torch.empty(0).device.type == "cpu"
        assert not torch.is_autocast_enabled("cpu")
        assert (sys.stdout, Path.cwd()) == before
    assert not changed
    assert manager.found["selfish"].status == "loaded"
    what = "standard output and working folder and autocast and default dtype and default device and gradients"
    assert f"sets the {what} for all when it is imported" in caplog.text


def test_what_a_hook_sets_is_put_back_and_named_once(caplog):
    manager = PluginManager(discover=False)
    selfish = hookimpl(lambda adapter_feat: torch.set_default_dtype(torch.float64))
    manager.register(SimpleNamespace(post_adapter_feat=selfish), "selfish")
    manager.enable(["selfish"])
    with kept_globals() as changed:
        for _ in range(3):
            manager.fold("post_adapter_feat", torch.ones(1), lambda before, after: None, pairs=None)
            assert torch.get_default_dtype() == torch.float32
    assert not changed
    assert caplog.text.count("sets the default dtype for all in post_adapter_feat; they are put back") == 1
