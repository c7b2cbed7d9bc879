"""The flow against its equation integrated by hand, and a training that keeps what was best."""

from __future__ import annotations

import functools
import subprocess
import sys

import pytest
import torch
from ezhoi_bridge_flow import fit
from torch.nn.functional import normalize

from ezhoi_diffusion import Artifact, BridgeError, EzhoiDiffusionError, FeatureStore, seen_pairs
from ezhoi_diffusion.testing import check_bridge, check_fit, synthetic_store

SMALL = {"width": 64, "blocks": 1, "train_steps": 150, "learning_rate": 3e-3}


@pytest.fixture(scope="module")
def artifact(store):
    return fit(store, **SMALL)


def test_rows_follow_the_velocity_by_the_midpoint_rule(store, artifact, reloaded):
    x, bridge = store.adapter_feat(), reloaded(artifact)
    c = normalize(x, dim=1) - normalize(x, dim=1).mean(0)
    z, steps = c * bridge.scale, 4
    for step in range(steps):
        t = torch.tensor(step / steps)
        half = z + bridge.velocity(z, t) / (2 * steps)
        z = z + bridge.velocity(half, t + 1 / (2 * steps)) / steps
    expected = x.norm(dim=1, keepdim=True) * normalize(z / bridge.scale + normalize(x, dim=1).mean(0), dim=1)
    torch.testing.assert_close(bridge(x), expected, rtol=1e-4, atol=1e-4)
    assert torch.cosine_similarity(bridge(x), x).min() < 0.95


def test_an_untrained_flow_stays_where_it_is(store, reloaded):
    x = store.adapter_feat()
    torch.testing.assert_close(reloaded(fit(store, **{**SMALL, "learning_rate": 0}))(x), x, rtol=1e-5, atol=1e-5)


def test_rows_come_nearer_to_their_texts_and_the_best_weights_are_kept(store, reloaded):
    artifact = fit(store, **{**SMALL, "train_steps": 1000, "patience": 3})
    bridge = reloaded(artifact)

    def cosines(pairs):
        visual = normalize(pairs.visual, dim=1) - bridge.visual_mean
        text = normalize(pairs.text, dim=1) - normalize(store.text, dim=1).mean(0)
        return [torch.cosine_similarity(rows, text) for rows in (visual, bridge.arrived(visual))]

    two_tenths, held_out = seen_pairs(store, held_out=True, fraction=0.2), seen_pairs(store, held_out=True)
    second = ~torch.isin(two_tenths.image, held_out.image)
    before, after = (float(cosine[second].mean()) for cosine in cosines(two_tenths))
    curve = [point["cosine"] for point in artifact.config["curve"]]
    assert [point["step"] for point in artifact.config["curve"]] == [50 * look for look in range(len(curve))]
    assert curve[0] == pytest.approx(before, abs=1e-5)
    assert max(curve) == pytest.approx(after, abs=1e-5)
    assert max(curve) > curve[-1], "training went on for a while after the best weights"
    before, after = cosines(held_out)
    assert after.mean() > before.mean() + 0.2


def test_training_ends_where_nothing_improves(store):
    waited = fit(store, **{**SMALL, "train_steps": 1000, "learning_rate": 0, "patience": 3})
    assert [point["step"] for point in waited.config["curve"]] == [0, 50, 100, 150]


def test_the_same_seed_is_the_same_flow_and_no_random_number_is_drawn(store, artifact, load, equal, tmp_path):
    before = torch.get_rng_state()
    assert equal(fit(store, **SMALL), artifact)
    assert not equal(fit(store, **SMALL, seed=1), artifact)
    weights = (fit(store, **SMALL, noise=noise).files["model.safetensors"]["enter.weight"] for noise in (0, 0.2))
    assert not torch.equal(*weights)
    artifact.save(tmp_path / "bridge")
    load(tmp_path / "bridge")(store.adapter_feat())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("mean", ["visual", "text"])
def test_rows_are_blended_and_get_a_mean_and_their_norm_back(store, reloaded, mean):
    x = store.adapter_feat()
    bridge = reloaded(fit(store, **{**SMALL, "train_steps": 50}, blend=0.3, mean=mean))
    visual_mean, text_mean = (normalize(rows, dim=1).mean(0) for rows in (x, store.text))
    c = normalize(x, dim=1) - visual_mean
    rows = 0.7 * c + 0.3 * bridge.arrived(c) + (visual_mean if mean == "visual" else text_mean)
    torch.testing.assert_close(bridge(x), x.norm(dim=1, keepdim=True) * normalize(rows, dim=1), rtol=1e-4, atol=1e-4)


def test_a_sweep_is_the_flow_applied_so(store, artifact, reloaded):
    x, bridge = store.adapter_feat(), reloaded(artifact)
    whole, half, fine = bridge.sweep([{"blend": 1}, {"blend": 0.5}, {"blend": 1.0, "steps": 32}])
    assert torch.equal(whole(x), bridge(x))
    assert torch.cosine_similarity(half(x), x).mean() > torch.cosine_similarity(whole(x), x).mean() + 0.01
    assert 0 < (fine(x) - whole(x)).norm() < 0.1 * (whole(x) - x).norm(), "the steps are a matter of precision"
    assert half.provenance["overridden"] == {"blend": 0.5}
    assert "overridden" not in bridge.provenance
    for point in ({"blend": 2}, {"steps": 0}):
        with pytest.raises(BridgeError):
            bridge.sweep([point])


def test_labels_of_unseen_classes_are_not_learned_from(store, artifact, relabelled, unseen, equal):
    assert any((shard["labels"] & unseen(shard)).any() for shard in store.shards())
    assert equal(artifact, fit(relabelled(lambda shard: shard["labels"] & ~unseen(shard)), **SMALL))
    assert equal(artifact, fit(relabelled(lambda shard: shard["labels"] | unseen(shard)), **SMALL))
    without_a_split = FeatureStore(store.folder)
    del without_a_split.host["classes/unseen"]
    assert not equal(artifact, fit(without_a_split, **SMALL)), "they would have changed the flow"


def test_features_without_labels_and_of_test_images_are_refused(store, relabelled, tmp_path):
    with pytest.raises(EzhoiDiffusionError, match="no pair of a seen class is annotated"):
        fit(relabelled(lambda shard: shard["labels"] & False))
    imported = FeatureStore(store.folder)
    imported.meta = {**imported.meta, "imported": {"norms": True}}
    with pytest.raises(EzhoiDiffusionError, match="was imported"):
        fit(imported)
    with pytest.raises(EzhoiDiffusionError, match="learn from training images only"):
        fit(synthetic_store(tmp_path / "test", split="test"))


@pytest.mark.parametrize(
    "options",
    [
        {"train_steps": 0}, {"batch_size": 1.5}, {"learning_rate": "fast"}, {"noise": -1}, {"patience": 0}, {"seed": -1},
        {"width": 0}, {"blocks": "two"}, {"steps": 0}, {"blend": 1.5}, {"mean": "none"},
    ],
)  # fmt: skip
def test_other_options_are_refused(store, options):
    with pytest.raises(BridgeError, match=f"flow: {next(iter(options))} is "):
        fit(store, **options)


def test_what_is_stored_comes_back_to_the_bit(store, artifact, tmp_path, load, equal):
    x = store.adapter_feat()
    artifact.save(tmp_path / "a")
    assert equal(Artifact.load(tmp_path / "a", "flow"), artifact)
    first = load(tmp_path / "a")
    artifact.save(tmp_path / "b")
    assert torch.equal(first(x), load(tmp_path / "b")(x))
    assert first.provenance["fingerprint"] == store.fingerprint
    with pytest.raises(BridgeError, match="fit flow"):
        load(None)


def test_being_found_costs_no_import_of_what_is_needed_later():
    code = "import sys, ezhoi_bridge_flow; assert not {'flow_matching', 'torchdiffeq', 'scipy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_it_keeps_all_rules_for_fits_and_bridges(tmp_path, load):
    check_bridge(load, check_fit("flow", functools.partial(fit, **SMALL), tmp_path), dim=32)
