"""Labels that fits may learn from. Nothing that a split hides is among them."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from ezhoi_diffusion import EzHoiScore, seen_pairs
from ezhoi_diffusion.features.images import stored_images
from ezhoi_diffusion.features.labels import LabelsError, pair_labels, seen_targets
from ezhoi_diffusion.features.split import validation_mask
from ezhoi_diffusion.testing import synthetic_store


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return synthetic_store(tmp_path_factory.mktemp("features") / "train")


def by_hand(store):
    """(position of the image, row of the pair, verb) of every annotated pair, found by loops."""
    return [
        (position, row, verb)
        for position, image in enumerate(stored_images(store))
        for row, verb in image.labels.nonzero().tolist()
    ]


def test_labelled_pairs_have_the_text_of_their_class(store):
    pairs = seen_pairs(store, held_out=None)
    table, score = store.ezhoi["object_n_verb_to_interaction"], EzHoiScore.from_store(store)
    unseen = set(store.ezhoi["classes/unseen"].tolist())
    images = list(stored_images(store))
    expected = []
    for position, row, verb in by_hand(store):
        image = images[position]
        hidden = {hoi for hoi in image.gt_hoi.tolist() if hoi in unseen}
        hidden_verbs = {int((table == hoi).nonzero()[0, 1]) for hoi in hidden}
        hoi = int(table[image.pairs.objects[row], verb])
        if hoi >= 0 and hoi not in unseen and verb not in hidden_verbs:
            expected.append((position, verb, image.adapter_feat[row]))
    assert 20 < len(pairs) == len(expected) < len(by_hand(store))
    assert pairs.image.tolist() == [position for position, _, _ in expected]
    assert pairs.target.tolist() == [verb for _, verb, _ in expected]
    assert torch.equal(pairs.visual, torch.stack([row for _, _, row in expected]))
    # the score is a product with that text: ½·scale·x·text of the class
    logits = score.logits(pairs.visual).gather(1, pairs.target.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(0.5 * score.logit_scale * (pairs.visual * pairs.text).sum(1), logits)


@pytest.mark.parametrize("predicts", ["verbs", "interactions"])
def test_seen_targets_are_those_of_seen_interactions(predicts):
    table = torch.tensor([[0, -1, 1], [2, 3, -1]])
    verbs, interactions = torch.tensor([[1, 0, 1], [1, 1, 0]]).bool(), torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1]]).bool()
    possible = verbs if predicts == "verbs" else interactions
    ezhoi = {"object_n_verb_to_interaction": table, "label": torch.zeros(5, possible.shape[1])}
    score = SimpleNamespace(object_to_target=possible)
    assert torch.equal(seen_targets(SimpleNamespace(ezhoi=ezhoi), score), possible)
    hiding = SimpleNamespace(ezhoi={**ezhoi, "classes/unseen": torch.tensor([1, 2])})
    expected = [[True, False, False], [False, True, False]]
    if predicts == "interactions":
        expected = [[True, False, False, False], [False, False, False, True]]
    assert seen_targets(hiding, score).tolist() == expected


def test_held_out_images_are_the_others(store):
    every, training, apart = (seen_pairs(store, held_out=which) for which in (None, False, True))
    mask = validation_mask(len(store.images))
    assert set(apart.image.tolist()) <= set(mask.nonzero().squeeze(1).tolist())
    assert not mask[training.image].any()
    assert len(training) + len(apart) == len(every)


def test_labels_of_hidden_classes_are_not_looked_at(store, tmp_path):
    """Where every annotation and label of a hidden class says something else, the pairs are bit-equal."""
    unseen = store.ezhoi["classes/unseen"]
    table = store.ezhoi["object_n_verb_to_interaction"]

    def strip(batch):
        secret = torch.isin(batch.gt_hoi, unseen)
        labels = batch.labels.clone()
        for hoi in batch.gt_hoi[secret].tolist():
            labels[:, int((table == hoi).nonzero()[0, 1])] = True  # as wrong as can be
        return replace(batch, labels=labels)

    store = synthetic_store(tmp_path / "plain")  # made here, on as many threads: rounding is not the question
    altered = synthetic_store(tmp_path / "altered", alter=strip)
    assert not torch.equal(altered.rows("labels"), store.rows("labels"))
    for which in (False, True):
        one, other = seen_pairs(store, held_out=which), seen_pairs(altered, held_out=which)
        for name in ("visual", "text", "target", "image"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name
    for name, tensor in vars(pair_labels(store)[:]).items():
        assert torch.equal(tensor, getattr(pair_labels(altered)[:], name)), name


def test_every_pair_has_the_labels_that_may_count(store):
    pairs = pair_labels(store)[:]
    table, unseen = store.ezhoi["object_n_verb_to_interaction"], store.ezhoi["classes/unseen"].tolist()
    row = hidden_verbs_in_images = 0
    for position, image in enumerate(stored_images(store)):
        hidden = {int((table == hoi).nonzero()[0, 1]) for hoi in image.gt_hoi.tolist() if hoi in unseen}
        hidden_verbs_in_images += len(hidden)
        human, other = image.pairs.pairing
        for pair, found in enumerate(image.pairs.objects.tolist()):
            own = table[found].tolist()
            valid = [hoi >= 0 and hoi not in unseen and verb not in hidden for verb, hoi in enumerate(own)]
            assert pairs.valid[row].tolist() == valid
            assert pairs.target[row].tolist() == (image.labels[pair] & torch.tensor(valid)).tolist()
            assert pairs.prior[row] == image.pairs.scores[human[pair]] * image.pairs.scores[other[pair]]
            assert pairs.image[row] == position
            row += 1
    assert row == len(pairs) == len(store)
    assert hidden_verbs_in_images > 3
    x = store.adapter_feat()
    torch.testing.assert_close(x @ pairs.class_weight.T, EzHoiScore.from_store(store).logits(x))
    assert 0 < pairs.target.sum() == len(seen_pairs(store, held_out=None))


def test_a_batch_has_the_labels_of_its_pairs(store):
    packed = pair_labels(store)
    rows, everything = torch.randperm(len(packed), generator=torch.Generator().manual_seed(0))[:100], packed[:]
    for name, tensor in vars(packed[rows]).items():
        expected = getattr(everything, name)
        assert torch.equal(tensor, expected if name == "class_weight" else expected[rows]), name
    assert packed.positives(rows) == packed[rows].target.sum() > 0
    assert packed.positives(slice(None)) == everything.target.sum()


def test_a_pair_that_ez_hoi_scores_zero_does_not_count(tmp_path):
    without = synthetic_store(tmp_path / "zero", alter=lambda b: replace(b, pairs=replace(b.pairs, scores=unsure(b))))
    assert not pair_labels(without)[:].valid[::6].any()
    assert pair_labels(without)[:].valid[1::6].any()


def unsure(batch):
    """The detector's scores, zero for the first object."""
    scores = batch.pairs.scores.clone()
    scores[batch.pairs.pairing[1, :1]] = 0
    return scores


def test_what_cannot_be_learned_from_is_refused(store, tmp_path):
    with pytest.raises(LabelsError, match="learn from training images only"):
        seen_pairs(synthetic_store(tmp_path / "test", split="test"))
    nothing = synthetic_store(tmp_path / "nothing", alter=lambda b: replace(b, labels=torch.zeros_like(b.labels)))
    for collect in (seen_pairs, pair_labels):
        with pytest.raises(LabelsError, match="no pair of a seen class is annotated"):
            collect(nothing)
    with pytest.raises(LabelsError, match="too few images"):
        seen_pairs(synthetic_store(tmp_path / "one", images=1))
