"""The host's own score of the calibrated features, against the softmax itself."""

from __future__ import annotations

import math

import pytest
import torch
from ezhoi_bridge_softmax import fit, logit_of_softmax

from ezhoi_diffusion import Artifact, BridgeError, EzhoiDiffusionError, FeatureStore, Score, seen_pairs
from ezhoi_diffusion.testing import check_bridge, check_fit, synthetic_store


def test_the_hosts_scores_are_the_softmax(store, reloaded):
    x, score = store.adapter_feat(), Score.of(store)
    artifact = fit(store)
    expected = (artifact.config["temperature"] * score.logits(x)).softmax(1)
    scores = score.logits(reloaded(artifact)(x)).sigmoid()
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-4)
    assert artifact.config["largest_error"] < 1e-4
    assert (scores - score.logits(x).sigmoid()).abs().max() > 0.1


def test_no_other_temperature_is_more_likely(store):
    config, pairs = fit(store).config, seen_pairs(store)
    logits = Score.of(store).logits(pairs.visual)

    def loss(temperature):
        return float(-(temperature * logits).log_softmax(1)[torch.arange(len(pairs)), pairs.target].mean())

    best = config["temperature"]
    found = config["negative_log_likelihood"]
    assert found["keep_norm"] == pytest.approx(loss(best), abs=1e-5)
    assert found["as it is"] == pytest.approx(loss(1.0), abs=1e-5)
    tried = [loss(best * math.exp(step / 20)) for step in range(-60, 61)]
    assert min(tried) == pytest.approx(tried[60], abs=1e-5)
    assert tried[60] < min(tried[50], tried[70]) - 1e-4


def test_certain_rows_keep_their_order():
    z = torch.tensor([[800.0, 0.0, -800.0], [40.0, 0.0, 0.0], [1.0, 1.0, 1.0]], dtype=torch.double)
    expected = torch.tensor([[800.0, -800.0, -1600.0], [40 - math.log(2), -40.0, -40.0], [-math.log(2)] * 3])
    torch.testing.assert_close(logit_of_softmax(z), expected.double(), rtol=1e-7, atol=1e-7)
    z = torch.randn(50, 7, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(logit_of_softmax(z), z.softmax(1).logit())


def test_logits_that_hang_on_each_other_are_refused(store):
    few_dimensions = FeatureStore(store.folder)  # as it was made up
    assert torch.linalg.matrix_rank(few_dimensions.text) < 10
    with pytest.raises(BridgeError, match="10 logits cannot be set one by one"):
        fit(few_dimensions)


def test_labels_of_unseen_classes_are_not_learned_from(store, relabelled, unseen, equal):
    plain = fit(store)
    assert any((shard["labels"] & unseen(shard)).any() for shard in store.shards())
    assert equal(plain, fit(relabelled(lambda shard: shard["labels"] & ~unseen(shard))))
    assert equal(plain, fit(relabelled(lambda shard: shard["labels"] | unseen(shard))))
    without_a_split = FeatureStore(store.folder)
    without_a_split.host["text"] = store.text
    del without_a_split.host["classes/unseen"]
    assert not equal(plain, fit(without_a_split)), "they would have changed the temperature"


def test_features_without_labels_and_of_test_images_are_refused(store, relabelled, tmp_path):
    with pytest.raises(EzhoiDiffusionError, match="no pair of a seen class is annotated"):
        fit(relabelled(lambda shard: shard["labels"] & False))
    imported = FeatureStore(store.folder)
    imported.meta = {**imported.meta, "imported": {"norms": True}}
    with pytest.raises(EzhoiDiffusionError, match="was imported"):
        fit(imported)
    with pytest.raises(EzhoiDiffusionError, match="learn from training images only"):
        fit(synthetic_store(tmp_path / "test", split="test"))


def test_what_is_stored_comes_back_to_the_bit(store, tmp_path, load, equal):
    artifact, x = fit(store), store.adapter_feat()
    artifact.save(tmp_path / "a")
    assert equal(Artifact.load(tmp_path / "a", "softmax"), artifact)
    first = load(tmp_path / "a")
    artifact.save(tmp_path / "b")
    assert torch.equal(first(x), load(tmp_path / "b")(x))
    assert first.provenance["fingerprint"] == store.fingerprint
    with pytest.raises(BridgeError, match="fit softmax"):
        load(None)


def test_it_keeps_all_rules_for_fits_and_bridges(tmp_path, independent, load):
    folder = check_fit("softmax", lambda features: fit(independent(features)), tmp_path)
    check_bridge(load, folder, dim=32)
