"""The residual network: what it computes, what it may learn from, and that it learns."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import silu

from ezhoi_diffusion import BridgeError, EzHoiScore
from ezhoi_diffusion.features.labels import pair_labels
from ezhoi_diffusion.features.loss import bridge_loss
from ezhoi_diffusion.scoring.residual import TENSORS, fit, load
from ezhoi_diffusion.testing import check_bridge, check_fit, reloaded, synthetic_store
from ezhoi_diffusion.testing.fits import same_artifact


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return synthetic_store(tmp_path_factory.mktemp("features") / "train", images=80)


@pytest.fixture(scope="module")
def fitted(store):
    return fit(store)


def test_it_adds_a_network_of_one_hidden_layer(store, fitted):
    x, w = store.adapter_feat(), fitted.files[TENSORS]
    hidden = silu((x - x.mean(0)) / w["scale"] @ w["enter.weight"].T + w["enter.bias"])
    change = w["scale"] * (hidden @ w["leave.weight"].T + w["leave.bias"])
    bridge = reloaded(fitted, load)
    for blend in (1.0, 0.3):
        torch.testing.assert_close(bridge.override(blend=blend)(x), x + blend * change)
    assert change.abs().max() > 1e-2
    assert torch.equal(bridge.override(blend=0)(x), x)


def test_it_learns_what_ez_hoi_is_trained_for_and_this_holds_on_other_images(store, fitted, tmp_path):
    bridge = reloaded(fitted, load)
    other = synthetic_store(tmp_path / "other", images=160)
    for captured, some in ((store, slice(None)), (other, slice(480, None))):
        x, labels = captured.adapter_feat()[some], pair_labels(captured)[torch.arange(len(captured))[some]]
        positives = int(labels.target.sum())
        before, after = (float(bridge_loss(each, x, labels, positives, keep=0)) for each in (x, bridge(x)))
        assert after < 0.95 * before


def test_a_seed_is_a_bridge(store, fitted):
    assert same_artifact(fit(store), fitted)
    other = fit(store, seed=1)
    assert not torch.equal(other.files[TENSORS]["enter.weight"], fitted.files[TENSORS]["enter.weight"])


def test_the_default_dtype_changes_nothing(store, fitted):
    torch.set_default_dtype(torch.float64)
    try:
        assert same_artifact(fit(store), fitted)
        bridged = reloaded(fitted, load)(store.adapter_feat())
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(bridged, reloaded(fitted, load)(store.adapter_feat()))


def test_what_is_kept_stays(store, fitted):
    x, score = store.adapter_feat(), EzHoiScore.from_store(store)
    moved = [
        (score.logits(reloaded(one, load)(x)) - score.logits(x)).norm()
        for one in (fit(store, keep=0.0), fitted, fit(store, keep=1000.0))
    ]
    assert moved[0] > moved[1] > 5 * moved[2] > 0


def test_all_images_are_learned_from(store, tmp_path):
    """Also those that `tune` holds out: it fits again without them."""
    last = synthetic_store(tmp_path / "last", images=80, alter=unannotated_in(78))
    assert not same_artifact(fit(last, epochs=1), fit(store, epochs=1))


def unannotated_in(index):
    return lambda batch: replace(batch, labels=batch.labels & (batch.index != index))


@pytest.mark.parametrize(
    "options",
    [{"epochs": 0}, {"keep": -1}, {"keep": "x"}, {"epochs": 1.5}, {"seed": "a"}, {"blend": 1.5}, {"blend": "much"}],
)
def test_other_options_are_refused(store, options):
    with pytest.raises(BridgeError):
        fit(store, **options)


def test_it_keeps_the_rules(tmp_path):
    check_bridge(load, check_fit("residual", fit, tmp_path), dim=32)
    with pytest.raises(BridgeError):
        load(None)
