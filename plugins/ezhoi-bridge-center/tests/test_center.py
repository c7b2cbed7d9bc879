"""Centring through the features equals centring both sides by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from ezhoi_bridge_center import fit, load
from torch.nn.functional import normalize

from ezhoi_diffusion import BridgeError, EzHoiScore, FeatureStore
from ezhoi_diffusion.testing import check_bridge, check_fit, relabelled, reloaded, same_artifact, synthetic_store
from ezhoi_diffusion.testing import with_full_rank_texts as full_rank


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return full_rank(synthetic_store(tmp_path_factory.mktemp("capture") / "train", images=80))


def test_logits_are_those_of_centred_features_and_centred_texts(store):
    x, score = store.adapter_feat(), EzHoiScore.from_store(store)
    bridge = reloaded(fit(store), load)
    centred = x.norm(dim=1, keepdim=True) * (normalize(x, dim=1) - normalize(x, dim=1).mean(0))
    both_sides = replace(score, text=score.text - score.text.mean(0))
    torch.testing.assert_close(score.logits(bridge(x)), both_sides.logits(centred), rtol=1e-4, atol=1e-4)
    assert (score.logits(centred) - both_sides.logits(centred)).abs().max() > 0.1, "the texts' mean must matter"
    assert (score.logits(x) - score.logits(bridge(x))).abs().max() > 0.1


def test_equal_texts_are_centred_too(store):
    twice = FeatureStore(store.folder)
    twice.ezhoi["text"] = torch.cat([store.text[:20], store.text[:4]])
    tensors = fit(twice).files["center.safetensors"]
    assert torch.allclose(twice.text @ tensors["w"], torch.ones(24), atol=1e-4)


@pytest.mark.parametrize("texts", [40, 0])
def test_texts_that_cannot_be_centred_are_refused(store, texts):
    other = FeatureStore(store.folder)
    other.ezhoi["text"] = torch.randn(texts, 32, generator=torch.Generator().manual_seed(0))
    with pytest.raises(BridgeError):
        fit(other)


def test_labels_are_not_read(store):
    assert same_artifact(fit(store), fit(relabelled(store, lambda shard: ~shard["labels"])))


def test_it_keeps_the_rules(tmp_path):
    folder = check_fit("center", lambda features: fit(full_rank(features)), tmp_path)
    check_bridge(load, folder, dim=32)
    with pytest.raises(BridgeError):
        load(None)
