"""Both maps against their closed forms, and what they may learn from."""

from __future__ import annotations

import functools

import pytest
import torch
from ezhoi_bridge_procrustes import fit, load
from torch.nn.functional import normalize

from ezhoi_diffusion import BridgeError, seen_pairs
from ezhoi_diffusion.testing import Truth, check_bridge, check_fit, reloaded, synthetic_store


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return synthetic_store(tmp_path_factory.mktemp("capture") / "train", images=80)


def centred(store, pairs):
    """Both sides of the pairs as the map is to take one to the other."""
    means = (normalize(rows.double(), dim=1).mean(0) for rows in (store.adapter_feat(), store.text))
    return [
        normalize(rows.double(), dim=1) - mean for rows, mean in zip((pairs.visual, pairs.text), means, strict=True)
    ]


def test_orthogonal_is_of_the_closest_rotations_that_nearest_to_none(store):
    visual, text = centred(store, seen_pairs(store))
    weight = reloaded(fit(store), load).weight.double()
    torch.testing.assert_close(weight @ weight.T, torch.eye(32, dtype=torch.double), rtol=0, atol=1e-5)
    u, s, vh = torch.linalg.svd(visual.T @ text)
    known = int((s > 1e-4 * s[0]).sum())
    assert 4 < known < 10, "the texts of the seen classes span few dimensions"
    rest, _, turned = torch.linalg.svd(u[:, known:].T @ vh[known:].T)
    expected = u[:, :known] @ vh[:known] + u[:, known:] @ rest @ turned @ vh[known:]
    assert (visual @ weight - text).norm() == pytest.approx(float((visual @ u @ vh - text).norm()), abs=1e-4)
    torch.testing.assert_close(weight, expected, rtol=0, atol=5e-3)


def test_what_is_learned_holds_on_other_images(store):
    weight = reloaded(fit(store), load).weight.double()
    visual, text = centred(store, seen_pairs(store))
    assert (visual @ weight - text).norm() < (visual @ Truth.from_seed().map.double() - text).norm()
    visual, text = centred(store, seen_pairs(store, held_out=True))
    before, after = (torch.cosine_similarity(rows, text).mean() for rows in (visual, visual @ weight))
    assert after > before + 0.2


def test_ridge_has_the_penalty_that_is_best_on_a_tenth_of_the_images(store):
    def solved(pairs, alpha):
        visual, text = centred(store, pairs)
        penalty = alpha * visual.square().sum() / 32 * torch.eye(32)
        return torch.linalg.solve(visual.T @ visual + penalty, visual.T @ text)

    artifact = fit(store, mode="ridge")
    curve = {point["alpha"]: point["cosine"] for point in artifact.config["curve"]}
    two_tenths = seen_pairs(store, held_out=True, fraction=0.2)
    second = ~torch.isin(two_tenths.image, seen_pairs(store, held_out=True).image)
    visual, text = (rows[second] for rows in centred(store, two_tenths))
    for alpha, cosine in curve.items():
        mapped = visual @ solved(seen_pairs(store, fraction=0.2), alpha)
        assert cosine == pytest.approx(float(torch.cosine_similarity(mapped, text).mean()), abs=1e-5)
    best = max(curve, key=curve.get)
    assert artifact.config["alpha"] == best
    assert min(curve) < best < max(curve)
    expected = solved(seen_pairs(store), best)
    torch.testing.assert_close(reloaded(artifact, load).weight.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mean", ["visual", "text"])
@pytest.mark.parametrize("blend", [0.0, 0.3, 1])
def test_features_are_blended_and_get_a_mean_and_their_norm_back(store, mean, blend):
    x = store.adapter_feat()
    bridge = reloaded(fit(store, blend=blend, mean=mean), load)
    visual_mean, text_mean = (normalize(rows, dim=1).mean(0) for rows in (x, store.text))
    c = normalize(x, dim=1) - visual_mean
    rows = (1 - blend) * c + blend * c @ bridge.weight + (visual_mean if mean == "visual" else text_mean)
    torch.testing.assert_close(bridge(x), x.norm(dim=1, keepdim=True) * normalize(rows, dim=1), rtol=1e-4, atol=1e-4)
    if blend == 0 and mean == "visual":
        torch.testing.assert_close(bridge(x), x, rtol=1e-5, atol=1e-5)


def test_a_sweep_is_the_fit_at_each_blend(store):
    x = store.adapter_feat()
    points = [{"blend": value} for value in (0, 0.25, 1)]
    for point, swept in zip(points, reloaded(fit(store, blend=0.5), load).sweep(points), strict=True):
        assert torch.equal(swept(x), reloaded(fit(store, **point), load)(x))
        assert swept.provenance["overridden"] == point
    with pytest.raises(BridgeError):
        swept.sweep([{"blend": 2}])


@pytest.mark.parametrize("options", [{"mode": "affine"}, {"mean": "none"}, {"blend": 1.5}, {"blend": "much"}])
def test_other_options_are_refused(store, options):
    with pytest.raises(BridgeError):
        fit(store, **options)


@pytest.mark.parametrize("options", [{}, {"mode": "ridge", "blend": 0.5, "mean": "text"}])
def test_it_keeps_the_rules(tmp_path, options):
    check_bridge(load, check_fit("procrustes", functools.partial(fit, **options), tmp_path), dim=32)
    with pytest.raises(BridgeError):
        load(None)
