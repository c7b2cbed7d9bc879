"""Fits that learn from test images see features, boxes and scores, and no annotation."""

from __future__ import annotations

from functools import partial

import pytest

from ezhoi_diffusion import Artifact, Bridge, BridgePlugin
from ezhoi_diffusion.bridge import BridgeError
from ezhoi_diffusion.errors import EzhoiDiffusionError
from ezhoi_diffusion.evaluation.remake import RemakeError, recipes_of
from ezhoi_diffusion.evaluation.variants import Named, load_bridge
from ezhoi_diffusion.features.labels import LabelsError, seen_pairs
from ezhoi_diffusion.features.store import FeatureStoreError
from ezhoi_diffusion.features.unlabelled import ANNOTATIONS, Unlabelled, learns_from_test_images, split_of
from ezhoi_diffusion.plugins import PluginManager
from ezhoi_diffusion.testing import synthetic_store
from ezhoi_diffusion.training.fitted import fit_artifact


class Same(Bridge):
    def forward(self, adapter_feat, pairs=None):
        return adapter_feat


class Adapted(Same):
    protocol = "test-transductive"


def plugins_with(*plugins):
    manager = PluginManager()
    for number, plugin in enumerate(plugins):
        manager.register(plugin, name=f"test-{number}")
    return manager


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    return {split: synthetic_store(folder / split, split=split) for split in ("train", "test")}


def test_features_without_annotations(stores):
    whole, view = stores["test"], Unlabelled(stores["test"])
    assert [image["annotations"] for image in view.images] == [0] * len(whole.images)
    assert [image["rows"] for image in view.images] == [image["rows"] for image in whole.images]
    for kept, shard in zip(view.shards(), whole.shards(), strict=True):
        assert kept.keys() == shard.keys() - set(ANNOTATIONS)
        assert all((kept[name] == shard[name]).all() for name in kept)
    with pytest.raises(LabelsError, match="holds the test split"):
        seen_pairs(view)


def test_a_marked_fit_gets_the_test_split_without_annotations_and_no_other(stores):
    found = []

    @learns_from_test_images
    def fit(features, share=1.0):
        found.extend(name for shard in features.shards() for name in shard)
        return Artifact("same", {"share": share})

    assert split_of(fit) == split_of(partial(fit, share=0.5)) == "test"
    assert split_of(lambda features: None) == "train"
    artifact = fit_artifact("same", fit, stores["test"], {"share": 0.5})
    assert "adapter_feat" in found
    assert not set(found) & set(ANNOTATIONS)
    assert artifact.provenance["features"]["split"] == "test"
    with pytest.raises(FeatureStoreError, match=r"holds the train split: 'same' learns from unlabelled test images"):
        fit_artifact("same", fit, stores["train"], {})
    with pytest.raises(FeatureStoreError, match="fitted to training images only"):
        fit_artifact("same", lambda features: Artifact("same"), stores["test"], {})


def test_a_marked_fit_that_asks_for_labels_is_named(stores):
    @learns_from_test_images
    def fit(features):
        return Artifact("same", {"positive": int(sum(shard["labels"].sum() for shard in features.shards()))})

    with pytest.raises(EzhoiDiffusionError, match=r"fit 'same'.*labels"):
        fit_artifact("same", fit, stores["test"], {})


@pytest.mark.parametrize("kind", [Same, Adapted])
def test_its_bridge_has_to_say_that_it_is_test_transductive(kind, stores, tmp_path):
    def load(folder):
        bridge = kind()
        bridge.provenance = Artifact.load(folder).provenance
        return bridge

    fit = learns_from_test_images(lambda features: Artifact("mine"))
    fit_artifact("mine", fit, stores["test"], {}).save(tmp_path)
    manager = plugins_with(BridgePlugin("mine", load, fit))
    if kind is Adapted:
        assert load_bridge(manager, "mine", tmp_path).protocol == "test-transductive"
    else:
        with pytest.raises(BridgeError, match="'mine' was fitted to test images and says that it is inductive"):
            load_bridge(manager, "mine", tmp_path)


def test_tune_does_not_choose_it_on_training_images():
    with pytest.raises(RemakeError, match="'test_time_cache' learns from test images"):
        recipes_of(Named("test_time_cache", ""), PluginManager(), {}, 1, lambda *_: None)
