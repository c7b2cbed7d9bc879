"""The flow against its equation integrated by hand, and a training that keeps what was best."""

from __future__ import annotations

import functools
import subprocess
import sys

import pytest
import torch
from ezhoi_bridge_flow import fit, load
from torch.nn.functional import normalize

from ezhoi_diffusion import BridgeError, seen_pairs
from ezhoi_diffusion.testing import check_bridge, check_fit, reloaded, same_artifact, synthetic_store

SMALL = {"width": 64, "blocks": 1, "train_steps": 150, "learning_rate": 3e-3}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return synthetic_store(tmp_path_factory.mktemp("capture") / "train", images=80)


@pytest.fixture(scope="module")
def artifact(store):
    return fit(store, **SMALL)


def test_features_follow_the_velocity_by_the_midpoint_rule(store, artifact):
    x, bridge = store.adapter_feat(), reloaded(artifact, load)
    c = normalize(x, dim=1) - normalize(x, dim=1).mean(0)
    z, steps = c * bridge.scale_factor, 4
    for step in range(steps):
        t = torch.tensor(step / steps)
        half = z + bridge.velocity(z, t) / (2 * steps)
        z = z + bridge.velocity(half, t + 1 / (2 * steps)) / steps
    expected = x.norm(dim=1, keepdim=True) * normalize(z / bridge.scale_factor + normalize(x, dim=1).mean(0), dim=1)
    torch.testing.assert_close(bridge(x), expected, rtol=1e-4, atol=1e-4)
    assert torch.cosine_similarity(bridge(x), x).min() < 0.95


def test_an_untrained_flow_stays_where_it_is(store):
    x = store.adapter_feat()
    torch.testing.assert_close(reloaded(fit(store, **{**SMALL, "learning_rate": 0}), load)(x), x, rtol=1e-5, atol=1e-5)


def test_features_come_nearer_to_their_texts_and_the_best_weights_are_kept(store):
    artifact = fit(store, **{**SMALL, "train_steps": 1000, "patience": 3})
    bridge = reloaded(artifact, load)

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


def test_the_same_seed_is_the_same_flow_and_no_random_number_is_drawn(store, artifact, tmp_path):
    before = torch.get_rng_state()
    assert same_artifact(fit(store, **SMALL), artifact)
    assert not same_artifact(fit(store, **SMALL, seed=1), artifact)
    weights = (fit(store, **SMALL, noise=noise).files["model.safetensors"]["enter.weight"] for noise in (0, 0.2))
    assert not torch.equal(*weights)
    artifact.save(tmp_path / "bridge")
    load(tmp_path / "bridge")(store.adapter_feat())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("mean", ["visual", "text"])
def test_features_are_blended_and_get_a_mean_and_their_norm_back(store, mean):
    x = store.adapter_feat()
    bridge = reloaded(fit(store, **{**SMALL, "train_steps": 50}, blend=0.3, mean=mean), load)
    visual_mean, text_mean = (normalize(rows, dim=1).mean(0) for rows in (x, store.text))
    c = normalize(x, dim=1) - visual_mean
    rows = 0.7 * c + 0.3 * bridge.arrived(c) + (visual_mean if mean == "visual" else text_mean)
    torch.testing.assert_close(bridge(x), x.norm(dim=1, keepdim=True) * normalize(rows, dim=1), rtol=1e-4, atol=1e-4)


def test_a_sweep_is_the_flow_applied_so(store, artifact):
    x, bridge = store.adapter_feat(), reloaded(artifact, load)
    whole, half, fine = bridge.sweep([{"blend": 1}, {"blend": 0.5}, {"blend": 1.0, "num_steps": 32}])
    assert torch.equal(whole(x), bridge(x))
    assert torch.cosine_similarity(half(x), x).mean() > torch.cosine_similarity(whole(x), x).mean() + 0.01
    assert 0 < (fine(x) - whole(x)).norm() < 0.1 * (whole(x) - x).norm(), "the steps are a matter of precision"
    assert half.provenance["overridden"] == {"blend": 0.5}
    assert "overridden" not in bridge.provenance
    for point in ({"blend": 2}, {"num_steps": 0}):
        with pytest.raises(BridgeError):
            bridge.sweep([point])


@pytest.mark.parametrize(
    "options",
    [
        {"train_steps": 0}, {"batch_size": 1.5}, {"learning_rate": "fast"}, {"noise": -1}, {"patience": 0}, {"seed": -1},
        {"width": 0}, {"blocks": "two"}, {"num_steps": 0}, {"blend": 1.5}, {"mean": "none"},
    ],
)  # fmt: skip
def test_other_options_are_refused(store, options):
    with pytest.raises(BridgeError, match=next(iter(options))):
        fit(store, **options)


def test_being_found_costs_no_import_of_what_is_needed_later():
    code = "import sys, ezhoi_bridge_flow; assert not {'flow_matching', 'torchdiffeq', 'scipy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_it_keeps_the_rules(tmp_path):
    check_bridge(load, check_fit("flow", functools.partial(fit, **SMALL), tmp_path), dim=32)
    with pytest.raises(BridgeError):
        load(None)
