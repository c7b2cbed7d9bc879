"""Interactiveness against the conditions of its optimum, and what it is learned from."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ezhoi_diffusion import EzHoiScore
from ezhoi_diffusion.features.batch import Pairs
from ezhoi_diffusion.features.images import stored_images
from ezhoi_diffusion.features.labels import pair_labels
from ezhoi_diffusion.scoring.geometry import GEOMETRY, pair_geometry
from ezhoi_diffusion.scoring.interactive import TENSORS, fit, load
from ezhoi_diffusion.testing import reloaded, synthetic_store, with_full_rank_texts


def pairs_of(*boxes, scale=1.0):
    """The first box is the human of all pairs."""
    count = len(boxes) - 1
    pairing = torch.stack([torch.zeros(count, dtype=torch.long), torch.arange(1, count + 1)])
    sizes = torch.tensor([100, 100])
    return Pairs("x.jpg", 0, sizes, scale * torch.tensor(boxes), torch.ones(count + 1), torch.ones(count + 1), pairing)


def test_geometry_is_what_its_names_say():
    pairs = pairs_of([0.0, 0, 10, 40], [2.0, 10, 8, 20], [20.0, 0, 30, 40], [5.0, 20, 15, 60])
    inside, beside, diagonal = (dict(zip(GEOMETRY, row, strict=True)) for row in pair_geometry(pairs).tolist())
    assert inside["gap between the boxes"] == 0
    assert inside["share of the object inside the human"] == 1
    assert inside["overlap"] == pytest.approx(60 / 400)
    assert inside["log ratio of the areas"] == pytest.approx(torch.tensor(400 / 60).log().item())
    assert beside["gap between the boxes"] == pytest.approx(10 / 20)  # areas of 400 each: a unit of 20
    assert beside["distance of the centres"] == pytest.approx(20 / 20)
    assert beside["overlap"] == beside["offset of the object downwards"] == 0
    assert diagonal["offset of the object downwards"] == pytest.approx(20 / 20)
    assert diagonal["overlap"] == pytest.approx(100 / 700)


def test_geometry_does_not_depend_on_the_size_of_the_image():
    boxes = [[0.0, 0, 10, 40], [2.0, 10, 8, 20], [20.0, 0, 30, 40]]
    torch.testing.assert_close(pair_geometry(pairs_of(*boxes)), pair_geometry(pairs_of(*boxes, scale=7.0)))


def test_all_verbs_of_a_pair_move_by_the_logarithm_of_a_probability(store):
    score, bridge = EzHoiScore.from_store(store), reloaded(fit(store, weight=0.5), load)
    for image in stored_images(store):
        if len(image.pairs):
            moved = score.logits(bridge(image.adapter_feat, image.pairs)) - score.logits(image.adapter_feat)
            torch.testing.assert_close(moved, moved[:, :1].expand_as(moved), rtol=0, atol=1e-4)
            assert (moved < 1e-4).all()


def with_useless_pairs(batch):
    """The last object has no verb, and every sixth image has no annotation."""
    if not len(batch.pairs):
        return batch
    classes, labels = batch.pairs.classes.clone(), batch.labels.clone()
    classes[-1], labels[-1] = 0, False
    batch = replace(batch, pairs=replace(batch.pairs, classes=classes), labels=labels)
    if batch.index % 6 == 1:
        batch = replace(batch, labels=labels & False, gt_boxes=batch.gt_boxes[:, :0], gt_hoi=batch.gt_hoi[:0])
    return batch


def test_the_fit_is_the_optimum_of_a_weighted_logistic_regression(tmp_path):
    store = with_full_rank_texts(synthetic_store(tmp_path / "f", images=60, alter=with_useless_pairs))
    score, pairs = EzHoiScore.from_store(store), pair_labels(store)[:]
    unseen = store.ezhoi["classes/unseen"]
    table = store.ezhoi["object_n_verb_to_interaction"]
    images = list(stored_images(store))
    x = torch.cat([pair_geometry(image.pairs) for image in images])
    annotated = pairs.target.any(1).double()
    weight = []
    for image in images:
        used = any(hoi not in unseen for hoi in image.gt_hoi)
        for z, obj in zip(score.logits(image.adapter_feat).double(), image.pairs.objects.tolist(), strict=True):
            verbs = [verb for verb in range(10) if table[obj, verb] >= 0]
            softmax = dict(zip(verbs, z[verbs].softmax(0).tolist(), strict=True))  # of no verb: nothing
            weight.append(used * sum(p for verb, p in softmax.items() if table[obj, verb] not in unseen))
    weight = torch.where(annotated > 0, 1.0, torch.tensor(weight, dtype=torch.double))
    assert ((weight > 0.1) & (weight < 0.9)).any()
    assert (weight == 0).sum() > 60 / 6 * 5
    tensors = fit(store).files[TENSORS]
    x = (x - tensors["mean"]) / tensors["spread"]
    slope, constant = tensors["coefficient"][:-1], tensors["coefficient"][-1]
    residual = weight * ((x @ slope + constant).sigmoid() - annotated)
    assert float(residual.sum()) == pytest.approx(0, abs=0.05)
    torch.testing.assert_close(residual @ x, -slope, rtol=0, atol=0.05)  # the penalty is |slope|²/2
    assert len(x) > 100


def test_what_lies_like_an_annotated_pair_gains_on_what_does_not(tmp_path):
    def together(batch):
        """The object of an annotated pair lies on the human, others far away."""
        other = batch.pairs.pairing[1]
        boxes = batch.pairs.boxes.clone()
        boxes[other] += torch.where(batch.labels.any(1, keepdim=True), 0.0, 300.0)
        return replace(batch, pairs=replace(batch.pairs, boxes=boxes))

    store = with_full_rank_texts(synthetic_store(tmp_path / "f", images=40, alter=together))
    score, bridge = EzHoiScore.from_store(store), reloaded(fit(store), load)
    near, far = [], []
    for image in stored_images(store):
        if len(image.pairs):
            moved = (score.logits(bridge(image.adapter_feat, image.pairs)) - score.logits(image.adapter_feat))[:, 0]
            near += moved[image.labels.any(1)].tolist()
            far += moved[~image.labels.any(1)].tolist()
    assert min(near) > max(far) + 1
