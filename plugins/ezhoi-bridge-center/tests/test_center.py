"""Centring, against the same thing done to both sides by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from ezhoi_bridge_center import fit

from ezhoi_diffusion import Artifact, BridgeError, FeatureStore, Score
from ezhoi_diffusion.testing import check_bridge, check_fit


def test_logits_are_those_of_centred_rows_and_centred_texts(store, reloaded):
    x, score = store.adapter_feat(), Score.of(store)
    bridge = reloaded(fit(store))
    visual_mean = torch.nn.functional.normalize(x, dim=1).mean(0)
    centred = x.norm(dim=1, keepdim=True) * (torch.nn.functional.normalize(x, dim=1) - visual_mean)
    both_sides = replace(score, text=score.text - score.text.mean(0))
    torch.testing.assert_close(score.logits(bridge(x)), both_sides.logits(centred), rtol=1e-4, atol=1e-4)
    assert (score.logits(centred) - both_sides.logits(centred)).abs().max() > 0.1, "the texts' mean must matter"
    assert (score.logits(x) - score.logits(bridge(x))).abs().max() > 0.1


def test_texts_that_are_equal_are_centred_too(store):
    twice = FeatureStore(store.folder)
    twice.host["text"] = torch.cat([store.text[:20], store.text[:4]])
    tensors = fit(twice).files["center.safetensors"]
    assert torch.allclose(twice.text @ tensors["w"], torch.ones(24), atol=1e-4)


def test_more_texts_than_dimensions_are_refused(store):
    many = FeatureStore(store.folder)
    many.host["text"] = torch.randn(40, 32, generator=torch.Generator().manual_seed(0))
    with pytest.raises(BridgeError, match="the 40 texts of width 32 cannot be centred"):
        fit(many)
    many.host["text"] = torch.zeros(0, 32)
    with pytest.raises(BridgeError, match="without its texts"):
        fit(many)


def test_labels_are_not_read(store, relabelled, equal):
    assert equal(fit(store), fit(relabelled(lambda shard: ~shard["labels"])))


def test_what_is_stored_comes_back_to_the_bit(store, tmp_path, load, equal):
    artifact, x = fit(store), store.adapter_feat()
    artifact.save(tmp_path / "a")
    assert equal(Artifact.load(tmp_path / "a", "center"), artifact)
    first = load(tmp_path / "a")
    artifact.save(tmp_path / "b")
    assert torch.equal(first(x), load(tmp_path / "b")(x))
    assert first.provenance["fingerprint"] == store.fingerprint
    with pytest.raises(BridgeError, match="fit center"):
        load(None)


def test_it_keeps_all_rules_for_fits_and_bridges(tmp_path, independent, load):
    folder = check_fit("center", lambda features: fit(independent(features)), tmp_path)
    check_bridge(load, folder, dim=32)
