"""Features that stay on disk: the same training, without room for all of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ezhoi_diffusion.diffusion.recipes import RECIPES
from ezhoi_diffusion.features.labels import seen_pairs
from ezhoi_diffusion.testing import synthetic, synthetic_store
from ezhoi_diffusion.training import data
from ezhoi_diffusion.training.config import TrainConfig
from ezhoi_diffusion.training.data import TrainingData, TrainingSet
from helpers.memory import LargestStorage

ON_DISK = ["guide", "paired", "scored"]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return synthetic_store(tmp_path_factory.mktemp("features") / "train", images=80)


@pytest.mark.parametrize("recipe", ON_DISK)
def test_a_training_is_that_of_the_same_features_in_memory(recipe, store):
    config = TrainConfig(recipe=RECIPES[recipe])
    on_disk, pairs = TrainingData.from_store(store, config.recipe.trained_on), seen_pairs(store, held_out=None)
    if recipe == "paired":
        held = replace(on_disk, visual=pairs.visual, own_text=pairs.text)
    else:
        held = replace(on_disk, visual=store.adapter_feat())
    one, other = (TrainingSet.from_data(each, config) for each in (on_disk, held))
    assert one.fingerprint == other.fingerprint
    some = other.training[torch.randperm(len(other.training), generator=torch.Generator().manual_seed(0))[:64]]
    gaussian = torch.ones(len(some), one.dim)
    assert torch.equal(one[some], other[some])
    assert torch.equal(one.noise(some, gaussian), other.noise(some, gaussian))


@pytest.mark.parametrize("recipe", ON_DISK)
def test_no_training_holds_all_features(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, "ROWS_PER_SHARD", 40)
    monkeypatch.setattr(data, "PART", 40)
    store = synthetic_store(tmp_path / "f", images=160)
    config = TrainConfig(recipe=RECIPES[recipe])
    with LargestStorage() as largest:
        features = TrainingSet.from_data(TrainingData.from_store(store, config.recipe.trained_on), config)
        _ = features[features.training[:40]]
    assert 0 < largest.bytes < 4 * len(features.source) * features.dim / 2
