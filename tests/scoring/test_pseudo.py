"""Pseudo-positives: which pairs they are, what they change, and that no hidden annotation is among them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ezhoi_diffusion import EzHoiScore
from ezhoi_diffusion.bridge import BridgeError
from ezhoi_diffusion.features.images import stored_images
from ezhoi_diffusion.features.labels import seen_targets
from ezhoi_diffusion.scoring.linear import SHRINKAGE
from ezhoi_diffusion.scoring.pseudo import SHARE, TENSORS, Candidates, fit, load, mined
from ezhoi_diffusion.testing import reloaded, synthetic_store, with_full_rank_texts


def blocks_of(x, confidence, possible):
    rows = torch.arange(len(x))
    return [Candidates(part, x[part], confidence[part], possible[part]) for part in rows.split([1, 0, len(x) - 1])]


def test_the_discriminant_of_a_class_by_hand():
    """Four pairs may show class 0 and SHARE of them is one; no pair may show class 1."""
    x = torch.tensor([[4.0, 0], [-2, 0], [-2, 0], [0, 0], [0, 6], [0, -6]], dtype=torch.float64)
    confidence = torch.tensor([[0.9, 0.9], [0.2, 0], [0.1, 0], [0.3, 0], [1.0, 0], [1.0, 0]], dtype=torch.float64)
    possible = torch.tensor([[1, 0], [1, 0], [1, 0], [1, 0], [0, 0], [0, 0]]).bool()
    assert int(SHARE * 4) == 1
    linear, bias, total = mined(blocks_of(x, confidence, possible), x, 2, 10)
    covariance = torch.diag(torch.tensor([24.0 / 6, 72.0 / 6], dtype=torch.float64))
    shrunk = (1 - SHRINKAGE) * covariance + SHRINKAGE * 8 * torch.eye(2, dtype=torch.float64)
    expected = torch.linalg.inv(shrunk) @ torch.tensor([4.0, 0], dtype=torch.float64)  # the mean of the four is 0
    torch.testing.assert_close(linear, torch.stack([expected, torch.zeros(2, dtype=torch.float64)], 1))
    assert bias.tolist() == [0, 0]
    torch.testing.assert_close(total.products, 6 * covariance)


def test_examples_count_as_much_as_ezhoi_is_sure_of_them():
    x = torch.tensor([[1.0], [3.0], *[[0.0]] * 6], dtype=torch.float64)
    confidence = torch.tensor([[0.75], [0.25], *[[0.0]] * 6], dtype=torch.float64)
    linear, bias, _ = mined(blocks_of(x, confidence, torch.ones(8, 1, dtype=torch.bool)), x, 1, 2)
    middle = 0.5
    variance = float(((x - middle) ** 2).mean())
    assert linear.item() == pytest.approx((0.75 * 1 + 0.25 * 3 - middle) / variance)
    assert bias.item() == pytest.approx(middle * linear.item())


def test_only_hidden_interactions_move_and_weight_0_moves_none(store):
    score, bridge = EzHoiScore.from_store(store), reloaded(fit(store), load)
    hidden = score.object_to_target & ~seen_targets(store, score)
    moves = torch.zeros(2, dtype=torch.bool)
    for image in stored_images(store):
        if len(image.pairs):
            x = image.adapter_feat
            change = score.logits(bridge(x, image.pairs)) - score.logits(x)
            here = hidden[image.pairs.objects]
            moves |= torch.stack([(change[here].abs() > 1e-3).any(), (change[~here].abs() > 1e-3).any()])
            torch.testing.assert_close(bridge.override(weight=0.0)(x, image.pairs), x)
    assert moves.tolist() == [True, False]
    assert bridge.protocol == "train-transductive"


def test_no_annotation_of_a_hidden_interaction_is_read(tmp_path):
    store = with_full_rank_texts(synthetic_store(tmp_path / "plain", images=60))
    unseen = store.ezhoi["classes/unseen"]
    verbs = store.ezhoi["object_n_verb_to_interaction"].long()
    changed = []

    def poison(batch):
        objects, labels = batch.pairs.objects.long(), batch.labels.clone()
        hidden = torch.isin(verbs[objects], unseen)
        if not torch.isin(batch.gt_hoi, unseen).any():  # there such an annotation says which labels do not count
            return batch
        changed.append(int((labels & hidden).sum()))
        return replace(batch, labels=labels & ~hidden)

    other = with_full_rank_texts(synthetic_store(tmp_path / "poisoned", images=60, alter=poison))
    assert sum(changed) > 0
    one, two = (fit(each).files[TENSORS] for each in (store, other))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_where_a_run_hides_nothing_nothing_changes(tmp_path):
    everything = with_full_rank_texts(synthetic_store(tmp_path / "seen", images=30, unseen=False))
    bridge = reloaded(fit(everything), load)
    for image in stored_images(everything):
        torch.testing.assert_close(bridge(image.adapter_feat, image.pairs), image.adapter_feat)


@pytest.mark.parametrize("options", [{"count": 0}, {"count": 2.5}, {"count": True}, {"weight": -1}, {"weight": "x"}])
def test_other_options_are_refused(store, options):
    with pytest.raises(BridgeError, match=r"is a (whole )?number"):
        fit(store, **options)
