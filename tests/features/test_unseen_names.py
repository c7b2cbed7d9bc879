"""Where EZ-HOI ran with --without_unseen_name, nothing is learned from texts of hidden interactions."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from ezhoi_diffusion import FeatureStore
from ezhoi_diffusion.diffusion.recipes import Source
from ezhoi_diffusion.features.labels import pair_labels, seen_pairs
from ezhoi_diffusion.features.score import EzHoiScore
from ezhoi_diffusion.features.store import FeatureStoreError
from ezhoi_diffusion.features.unlabelled import split_of
from ezhoi_diffusion.scoring.bridge import SCORE
from ezhoi_diffusion.testing import synthetic_store
from ezhoi_diffusion.testing.stores import with_full_rank_texts
from ezhoi_diffusion.training.data import TrainingData
from ezhoi_diffusion.training.fitted import fit_artifact, known_fits
from helpers.packages import with_packages

NEED_NAMES = {"eszsl", "gaussian_classes", "pseudo", "softmax"}


def without_names(folder, *, other_texts: bool = False) -> FeatureStore:
    """A capture of a run with the flag; on request the hidden interactions have other texts."""
    store = with_full_rank_texts(FeatureStore(folder))
    store.meta["fingerprint"]["options"]["without_unseen_name"] = True
    if other_texts:
        hidden = torch.isin(store.ezhoi["text_interaction"], store.ezhoi["classes/unseen"])
        store.ezhoi["text"][hidden] = store.ezhoi["text"][hidden].flip(1)
    return store


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return synthetic_store(tmp_path_factory.mktemp("features") / "train", images=40).folder


def test_no_fit_depends_on_them(folder, monkeypatch):
    store, other = without_names(folder), without_names(folder, other_texts=True)
    assert not torch.equal(store.text, other.text)
    fits = known_fits(with_packages(monkeypatch, "center", "procrustes", "softmax", "standardize"))
    assert set(fits.names()) > NEED_NAMES | {"center", "standardize", "residual", "mean_shift"}
    for name in (name for name in fits.names() if split_of(fits[name]) == "train"):
        if name in NEED_NAMES:
            with pytest.raises(FeatureStoreError, match="--without_unseen_name"):
                fit_artifact(name, fits[name], store, {})
            continue
        one, two = (fit_artifact(name, fits[name], source, {}) for source in (store, other))
        for file in one.files.keys() - {SCORE}:  # what EZ-HOI's evaluation scores with
            assert all(torch.equal(x, two.files[file][key]) for key, x in one.files[file].items()), (name, file)


@pytest.mark.parametrize("source", get_args(Source))
def test_no_training_depends_on_them(folder, source):
    one, two = (
        TrainingData.from_store(store, source)
        for store in (without_names(folder), without_names(folder, other_texts=True))
    )
    assert torch.equal(one.text, two.text)
    assert torch.equal(one.statistics.text_mean, two.statistics.text_mean)
    assert one.own_text is None or torch.equal(*(torch.cat([*data.own_text.split(64)]) for data in (one, two)))
    assert one.labelled is None or torch.equal(one.labelled.class_weight, two.labelled.class_weight)


def test_a_subset_hides_the_texts_of_more(folder):
    store = without_names(folder)
    hidden = store.ezhoi["classes/seen"][:2]
    fewer = store.subset(range(40), hidden).to_learn_from()
    assert len(fewer.text) == len(store.to_learn_from().text) - 2
    assert len(store.to_learn_from().subset(range(40), hidden).text) == len(fewer.text)


def test_the_class_texts_are_those_of_ez_hois_training(folder):
    """The mean of the seen interactions' texts; a verb without one has none, and its logit is 0."""
    store = without_names(folder)
    seen = ~torch.isin(store.ezhoi["text_interaction"], store.ezhoi["classes/unseen"])
    label, text = store.ezhoi["label"], store.ezhoi["text"]
    expected = torch.zeros(label.shape[1], text.shape[1])
    for verb in range(label.shape[1]):
        if (rows := seen & label[:, verb].bool()).any():
            expected[verb] = text[rows].mean(0)
    pairs = seen_pairs(store, held_out=None)
    torch.testing.assert_close(pairs.text, expected[pairs.target])
    scale = EzHoiScore.from_store(store).logit_scale / 2
    torch.testing.assert_close(pair_labels(store).class_weight, expected * scale)


def test_without_the_flag_all_texts_count(folder):
    store = FeatureStore(folder)
    assert store.to_learn_from().text is store.text
    assert len(TrainingData.from_store(store, "text").text) == len(store.ezhoi["label"])


def test_a_store_that_cannot_tell_is_refused_where_it_is_learned_from(folder):
    store = without_names(folder)
    del store.ezhoi["text_interaction"]
    for learn in (store.to_learn_from, lambda: TrainingData.from_store(store, "text"), lambda: seen_pairs(store)):
        with pytest.raises(FeatureStoreError, match="capture again into a new folder"):
            learn()
    assert EzHoiScore.from_store(store).class_text.isfinite().all(), "it can be evaluated"
