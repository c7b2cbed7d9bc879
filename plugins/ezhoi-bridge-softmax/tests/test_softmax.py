"""EZ-HOI's score of calibrated features equals the softmax itself."""

from __future__ import annotations

import math

import pytest
import torch
from ezhoi_bridge_softmax import fit, load, logit_of_softmax

from ezhoi_diffusion import BridgeError, EzHoiScore, FeatureStore, seen_pairs
from ezhoi_diffusion.testing import check_bridge, check_fit, reloaded, synthetic_store
from ezhoi_diffusion.testing import with_full_rank_texts as full_rank


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return full_rank(synthetic_store(tmp_path_factory.mktemp("capture") / "train", images=80))


def test_the_scores_are_the_softmax(store):
    x, score = store.adapter_feat(), EzHoiScore.from_store(store)
    artifact = fit(store)
    expected = (artifact.config["temperature"] * score.logits(x)).softmax(1)
    scores = score.logits(reloaded(artifact, load)(x)).sigmoid()
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-4)
    assert artifact.config["largest_error"] < 1e-4
    assert (scores - score.logits(x).sigmoid()).abs().max() > 0.1


def test_no_other_temperature_is_more_likely(store):
    config, pairs = fit(store).config, seen_pairs(store)
    logits = EzHoiScore.from_store(store).logits(pairs.visual)

    def loss(temperature):
        return float(-(temperature * logits).log_softmax(1)[torch.arange(len(pairs)), pairs.target].mean())

    best = config["temperature"]
    found = config["negative_log_likelihood"]
    assert found["after"] == pytest.approx(loss(best), abs=1e-5)
    assert found["before"] == pytest.approx(loss(1.0), abs=1e-5)
    tried = [loss(best * math.exp(step / 20)) for step in range(-60, 61)]
    assert min(tried) == pytest.approx(tried[60], abs=1e-5)
    assert tried[60] < min(tried[50], tried[70]) - 1e-4


def test_confident_scores_keep_their_order():
    z = torch.tensor([[800.0, 0.0, -800.0], [40.0, 0.0, 0.0], [1.0, 1.0, 1.0]], dtype=torch.double)
    expected = torch.tensor([[800.0, -800.0, -1600.0], [40 - math.log(2), -40.0, -40.0], [-math.log(2)] * 3])
    torch.testing.assert_close(logit_of_softmax(z), expected.double(), rtol=1e-7, atol=1e-7)
    z = torch.randn(50, 7, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(logit_of_softmax(z), z.softmax(1).logit())


def test_dependent_logits_are_refused(store):
    few_dimensions = FeatureStore(store.folder)
    assert torch.linalg.matrix_rank(few_dimensions.text) < 10
    with pytest.raises(BridgeError):
        fit(few_dimensions)


def test_it_keeps_the_rules(tmp_path):
    folder = check_fit("softmax", lambda features: fit(full_rank(features)), tmp_path)
    check_bridge(load, folder, dim=32)
    with pytest.raises(BridgeError):
        load(None)
