"""A subset of a capture is what a capture of those images alone would be, and hides labels from every fit."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest
import torch

from ezhoi_diffusion import FeatureStore
from ezhoi_diffusion.diffusion.recipes import Source
from ezhoi_diffusion.features.labels import seen_pairs
from ezhoi_diffusion.features.score import interaction_classes
from ezhoi_diffusion.features.store import COUNTED_BY, FeatureStoreError
from ezhoi_diffusion.features.unlabelled import split_of
from ezhoi_diffusion.testing import synthetic_store
from ezhoi_diffusion.testing.stores import relabelled, with_full_rank_texts
from ezhoi_diffusion.training.data import TrainingData
from ezhoi_diffusion.training.fitted import fit_artifact, known_fits
from helpers.packages import with_packages
from helpers.stores import IMAGES, write

CHOSEN = [0, 2, 3, 4, 6, 8, 9, 12, 13, 17, 19, 20, 21, 26, 28, 29, 30, 33, 37, 38]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return with_full_rank_texts(synthetic_store(tmp_path_factory.mktemp("features") / "train", images=40))


def hidden_verb(store):
    """The interactions of one verb that the split itself does not hide."""
    table, unseen = store.ezhoi["object_n_verb_to_interaction"], store.ezhoi["classes/unseen"]
    classes = table[:, 2][table[:, 2] >= 0]
    assert not torch.isin(classes, unseen).all()
    return classes


@pytest.mark.parametrize("positions", [[0, 2, 5], [1, 2, 3], [5]])
def test_a_subset_equals_a_capture_of_those_images(tmp_path, positions):
    whole = write(tmp_path / "whole", rows_per_shard=4)
    view = whole.subset(positions)
    alone = write(tmp_path / "alone", [replace(IMAGES[p], index=k) for k, p in enumerate(positions)])
    assert view.images == alone.images
    assert (len(view), view.index["images"], view.index["rows"]) == (len(alone), len(positions), len(alone))
    assert torch.equal(view.image_index(), alone.image_index())
    assert all(torch.equal(view.rows(name), alone.rows(name)) for name in next(alone.shards()))
    view_means, means = view.statistics(), alone.statistics()
    assert torch.equal(view_means.visual_mean, means.visual_mean)
    for entry, tensors in zip(view.index["shards"], view.shards(), strict=True):
        counts = {key: sum(image[key] for image in entry["images"]) for key in ("rows", "boxes", "annotations")}
        counts["images"] = len(entry["images"])
        assert all(len(tensor) == counts[COUNTED_BY.get(name, "rows")] for name, tensor in tensors.items())


def test_a_subset_of_a_subset_counts_its_own_images(tmp_path):
    whole = write(tmp_path / "whole", rows_per_shard=4)
    assert torch.equal(whole.subset([0, 2, 5]).subset([1, 2]).adapter_feat(), whole.subset([2, 5]).adapter_feat())


def test_images_without_a_pair_are_no_subset(tmp_path):
    with pytest.raises(FeatureStoreError, match="has a pair"):
        write(tmp_path / "whole").subset([1, 4])


def test_hidden_interactions_join_the_unseen_ones(store):
    hidden, before = hidden_verb(store), store.ezhoi["classes/unseen"]
    view = store.subset(CHOSEN, hidden)
    assert set(view.ezhoi["classes/unseen"].tolist()) == {*hidden.tolist(), *before.tolist()}
    assert not torch.isin(view.ezhoi["classes/seen"], view.ezhoi["classes/unseen"]).any()
    assert torch.equal(store.ezhoi["classes/unseen"], before), "the whole store stays as it is"
    pairs = seen_pairs(view, held_out=None)
    assert len(pairs) > 0
    assert not (pairs.target == 2).any()
    assert (seen_pairs(store.subset(CHOSEN), held_out=None).target == 2).any()


def poisoned(store, view_of, hidden):
    """The same capture with other labels wherever a fit on the subset must not look."""
    inside = torch.zeros(len(store.images), dtype=torch.bool)
    inside[CHOSEN] = True
    first = iter(torch.tensor([len(entry["images"]) for entry in store.index["shards"]]).cumsum(0).tolist())
    begin = 0

    def relabel(shard):
        nonlocal begin, first
        if begin >= len(store.images):
            begin, first = 0, iter(torch.tensor([len(e["images"]) for e in store.index["shards"]]).cumsum(0).tolist())
        end = next(first)
        rows = torch.tensor([image["rows"] for image in store.images[begin:end]])
        is_inside = inside[begin:end].repeat_interleave(rows)
        begin = end
        labels = shard["labels"].clone()
        labels[~is_inside] = ~labels[~is_inside]
        row, target = torch.ones_like(labels).nonzero().unbind(1)
        is_hidden = torch.isin(interaction_classes(store, shard["objects"][row], target), hidden).view_as(labels)
        return labels ^ (is_hidden & is_inside.unsqueeze(1))

    return relabelled(store, relabel).subset(view_of, hidden)


def test_every_fit_ignores_labels_of_other_images_and_hidden_classes(store, monkeypatch):
    hidden = hidden_verb(store)
    view, poison = store.subset(CHOSEN, hidden), poisoned(store, CHOSEN, hidden)
    assert not torch.equal(view.rows("labels"), poison.rows("labels"))
    fits = known_fits(with_packages(monkeypatch, "center", "procrustes", "softmax", "standardize"))
    assert "procrustes" in fits.names()
    for name in (name for name in fits.names() if split_of(fits[name]) == "train"):
        one, other = (fit_artifact(name, fits[name], source, {}) for source in (view, poison))
        assert one.files.keys() == other.files.keys()
        for file, tensors in one.files.items():
            assert all(torch.equal(tensor, other.files[file][key]) for key, tensor in tensors.items()), (name, file)


@pytest.mark.parametrize("source", get_args(Source))
def test_training_data_come_from_the_subset_alone(store, source):
    hidden = hidden_verb(store)
    view, poison = store.subset(CHOSEN, hidden), poisoned(store, CHOSEN, hidden)
    one, other = (TrainingData.from_store(each, source) for each in (view, poison))
    assert torch.equal(*(torch.cat([data.text[:0], *data.visual.split(64)]) for data in (one, other)))
    assert torch.equal(one.image, other.image)
    assert one.own_text is None or torch.equal(*(torch.cat([*data.own_text.split(64)]) for data in (one, other)))
    assert one.images == len(CHOSEN)
    assert one.provenance["features"] == {"rows": len(view), "images": len(CHOSEN)}


def test_a_view_is_a_feature_store(store):
    assert isinstance(store.subset([0]), FeatureStore)
