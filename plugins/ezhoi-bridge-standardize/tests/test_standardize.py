"""Standardisation and CORAL, against moments computed by numpy and scipy."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from ezhoi_bridge_standardize import fit, load
from torch.nn.functional import normalize

from ezhoi_diffusion import BridgeError, FeatureStore
from ezhoi_diffusion.testing import check_bridge, check_fit, relabelled, reloaded, same_artifact, synthetic_store


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return synthetic_store(tmp_path_factory.mktemp("capture") / "train", images=80)


def moments(rows):
    units = normalize(rows.double(), dim=1).numpy()
    return units, units.mean(0), np.cov(units, rowvar=False, bias=True)


def spread_of(bridge, x):
    """Spread, centred unit features, before a mean and the norms are given back."""
    centred = normalize(x.double(), dim=1) - bridge.visual_mean.double()
    spread = bridge.spread.double()
    return (centred @ spread if spread.ndim == 2 else centred * spread).numpy()


def test_every_dimension_gets_the_deviation_of_the_texts(store):
    x = store.adapter_feat()
    rows = spread_of(reloaded(fit(store), load), x)
    np.testing.assert_allclose(rows.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(rows.std(0), moments(store.text)[0].std(0), rtol=1e-4)


def test_coral_gives_the_covariance_of_the_texts(store):
    rows = spread_of(reloaded(fit(store, mode="coral", shrinkage=0), load), store.adapter_feat())
    covariance = moments(store.text)[2]
    np.testing.assert_allclose(np.cov(rows, rowvar=False, bias=True), covariance, atol=1e-4 * covariance.max())


def test_coral_is_that_of_the_paper_on_shrunk_covariances(store):
    linalg = pytest.importorskip("scipy.linalg")
    bridge = reloaded(fit(store, mode="coral"), load)
    whiten, recolour = (
        linalg.sqrtm(0.9 * covariance + 0.1 * np.trace(covariance) / len(covariance) * np.eye(len(covariance))).real
        for covariance in (moments(store.adapter_feat())[2], moments(store.text)[2])
    )
    np.testing.assert_allclose(bridge.spread.numpy(), np.linalg.inv(whiten) @ recolour, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("mode", ["diagonal", "coral"])
@pytest.mark.parametrize("mean", ["visual", "text"])
def test_a_mean_and_the_norms_are_given_back(store, mode, mean):
    x = store.adapter_feat()
    bridge = reloaded(fit(store, mode=mode, mean=mean), load)
    given = moments(x if mean == "visual" else store.text)[1]
    rows = torch.from_numpy(spread_of(bridge, x) + given)
    expected = x.norm(dim=1, keepdim=True) * normalize(rows, dim=1).float()
    torch.testing.assert_close(bridge(x), expected, rtol=1e-4, atol=1e-4)


def test_what_did_not_vary_is_no_division_by_zero(store):
    flat = FeatureStore(store.folder)
    shards = [{**shard, "adapter_feat": shard["adapter_feat"].clone()} for shard in store.shards()]
    for shard in shards:
        shard["adapter_feat"][:, 3] = 0
    flat.shards = lambda: iter(shards)
    for options in ({}, {"mode": "coral", "shrinkage": 0}):
        spread = fit(flat, **options).files["standardize.safetensors"]["spread"]
        assert torch.isfinite(spread).all()
        assert spread.abs().max() < 1e3
        assert spread[3].abs().max() < 1e-3


@pytest.mark.parametrize(
    "options", [{"mode": "zca"}, {"mean": "none"}, {"shrinkage": 1.5}, {"shrinkage": "much"}, {"mode": []}]
)
def test_other_options_are_refused(store, options):
    with pytest.raises(BridgeError, match="standardize: "):
        fit(store, **options)


def test_imported_features_without_texts_are_refused(store):
    without = FeatureStore(store.folder)
    without.ezhoi["text"] = torch.zeros(0, 32)
    with pytest.raises(BridgeError):
        fit(without)


def test_labels_are_not_read(store):
    assert same_artifact(fit(store, mode="coral"), fit(relabelled(store, lambda shard: ~shard["labels"]), mode="coral"))


@pytest.mark.parametrize("options", [{}, {"mode": "coral", "mean": "text"}])
def test_it_keeps_the_rules(tmp_path, options):
    check_bridge(load, check_fit("standardize", functools.partial(fit, **options), tmp_path), dim=32)
    with pytest.raises(BridgeError):
        load(None)
