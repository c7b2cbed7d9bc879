"""Every bridge that acts on the score, and every baseline, keeps the rules of the test kit."""

from __future__ import annotations

from functools import wraps

import pytest

from ezhoi_diffusion.artifact import Artifact
from ezhoi_diffusion.bridge import BridgeError
from ezhoi_diffusion.builtin import scoring
from ezhoi_diffusion.builtin.bridge_plugin import BridgePlugin
from ezhoi_diffusion.features.images import stored_images
from ezhoi_diffusion.features.unlabelled import split_of
from ezhoi_diffusion.scoring import residual
from ezhoi_diffusion.scoring.bridge import SCORE
from ezhoi_diffusion.testing import check_bridge, check_fit, synthetic, synthetic_store, with_full_rank_texts
from helpers.memory import LargestStorage

PLUGINS = {plugin.name: plugin for plugin in vars(scoring).values() if isinstance(plugin, BridgePlugin)}
FITTED = {name: plugin for name, plugin in PLUGINS.items() if plugin.fit is not None}


@pytest.mark.parametrize("name", FITTED)
def test_fits_and_their_bridges_keep_the_rules(name, tmp_path):
    plugin = FITTED[name]

    @wraps(plugin.fit)
    def fit(features):
        return plugin.fit(with_full_rank_texts(features))

    folder = check_fit(name, fit, tmp_path)
    check_bridge(plugin.load, folder, dim=32)
    with pytest.raises(BridgeError, match="needs its folder"):
        plugin.load(None)


@pytest.mark.parametrize("name", FITTED)
def test_no_fit_holds_all_features(name, tmp_path, monkeypatch):
    fit = FITTED[name].fit
    monkeypatch.setattr(synthetic, "ROWS_PER_SHARD", 40)
    monkeypatch.setattr(residual, "BLOCK", 40)
    monkeypatch.setattr(residual, "BATCH_SIZE", 40)
    store = with_full_rank_texts(synthetic_store(tmp_path / "f", split=split_of(fit), images=120))
    with LargestStorage() as largest:
        fit(store, **({"epochs": 1} if name == "residual" else {}))
    assert 0 < largest.bytes < 4 * len(store) * store.text.shape[1] / 2


@pytest.mark.parametrize("name", sorted(PLUGINS.keys() - FITTED.keys()))
def test_baselines_keep_the_rules(name):
    check_bridge(PLUGINS[name].load, dim=32)
    assert PLUGINS[name].load(None).baseline


@pytest.mark.parametrize("name", FITTED)
def test_a_setting_is_what_the_fit_takes_and_other_values_are_refused(name, store, tmp_path):
    plugin = FITTED[name]
    plugin.fit(store).save(tmp_path)
    bridge = plugin.load(tmp_path)
    x, pairs = next((image.adapter_feat, image.pairs) for image in stored_images(store))
    for setting in bridge.settings:
        plugin.fit(store, **{setting: 0.25}).save(tmp_path / setting)
        swept, fitted = bridge.override(**{setting: 0.25})(x, pairs), plugin.load(tmp_path / setting)(x, pairs)
        assert (swept == fitted).all()
        assert (swept != bridge(x, pairs)).any()
        for value in (-1, "much", True, float("inf"), None):
            with pytest.raises(BridgeError, match=setting):
                bridge.override(**{setting: value})
            with pytest.raises(BridgeError, match=setting):
                plugin.fit(store, **{setting: value})


@pytest.mark.parametrize("name", sorted(FITTED.keys() - {"residual"}))
def test_files_that_lack_a_tensor_are_refused(name, store, tmp_path):
    plugin = FITTED[name]
    whole = plugin.fit(store)
    (own,) = whole.files.keys() - {SCORE}
    for file, tensor in [(one, key) for one in (own, SCORE) for key in whole.files[one]]:
        rest = {key: value for key, value in whole.files[file].items() if key != tensor}
        Artifact(name, whole.config, {**whole.files, file: rest}).save(tmp_path)
        with pytest.raises(BridgeError, match=f"{tensor}.*fit it again"):
            plugin.load(tmp_path)
