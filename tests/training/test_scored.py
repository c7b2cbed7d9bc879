"""Recipe `scored`: a denoiser that learns through EZ-HOI's own loss."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ezhoi_diffusion.builtin.diffusion import load
from ezhoi_diffusion.cli import build_parser
from ezhoi_diffusion.cli.train import train_config
from ezhoi_diffusion.diffusion.bridge import DiffusionBridge, build_denoiser
from ezhoi_diffusion.diffusion.recipes import RECIPES
from ezhoi_diffusion.diffusion.schedule import Schedule
from ezhoi_diffusion.features.labels import pair_labels
from ezhoi_diffusion.features.loss import KEEP, bridge_loss
from ezhoi_diffusion.testing import check_bridge, synthetic_store
from ezhoi_diffusion.training.data import TrainingSet
from ezhoi_diffusion.training.loss import scored_loss
from ezhoi_diffusion.training.trainer import TrainConfig, TrainingData, TrainingError, train
from ezhoi_diffusion.training.validation import Validation
from helpers.trainings import Stop, equal, facts, stop_at, weights

SCORED = TrainConfig(
    recipe=RECIPES["scored"],
    train_steps=30,
    batch_size=64,
    val_every=5,
    checkpoint_every=7,
    learning_rate=3e-3,
    ema_decay=0.5,
    denoiser_options={"width": 64, "depth": 1},
)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return synthetic_store(tmp_path_factory.mktemp("features") / "train", images=80)


@pytest.fixture(scope="module")
def data(store):
    return TrainingData.from_store(store, "score")


@pytest.fixture(scope="module")
def out(data, tmp_path_factory):
    return train(data, SCORED, tmp_path_factory.mktemp("bridges") / "scored")


def loss_at(predict, data, features, t, noise=0.0, rows=slice(None)):
    chosen = torch.arange(len(data.visual))[rows]
    x = data.visual[chosen]
    return scored_loss(
        predict,
        x,
        data.labelled[chosen],
        torch.full((len(x),), t),
        torch.full_like(x, noise),
        Schedule.cosine(),
        features,
    )


def test_the_loss_is_that_of_what_the_bridge_returns(store, data):
    """Where no noise is added, an estimate in training is the bridge's single evaluation at that timestep."""
    recipe = replace(RECIPES["scored"], start_timestep=41)
    config = replace(SCORED, recipe=recipe)
    denoiser = build_denoiser(config.bridge_config(data.statistics.dim))
    torch.nn.init.normal_(denoiser.leave.weight, std=0.5, generator=torch.Generator().manual_seed(0))
    bridge = DiffusionBridge(config.bridge_config(data.statistics.dim), denoiser, data.statistics)
    features = TrainingSet.from_data(data, config)
    x = store.adapter_feat()
    bridged = bridge(x)
    assert (bridged - x).norm() > 0.1 * x.norm()
    count = features.positives * len(bridged) / len(features.training)
    expected = bridge_loss(bridged, x, data.labelled[:], count, KEEP / features.positives)
    with torch.no_grad():
        torch.testing.assert_close(loss_at(denoiser, data, features, 40), expected)


def test_an_estimate_that_is_the_input_has_the_loss_of_ez_hoi(store, data):
    features = TrainingSet.from_data(data, SCORED)
    count = features.positives * len(data.visual) / len(features.training)
    x = store.adapter_feat()
    expected = bridge_loss(x, x, data.labelled[:], count, keep=0)
    for t in (0, 99, 900):
        torch.testing.assert_close(loss_at(lambda x, t: x, data, features, t), expected)
    assert loss_at(lambda x, t: x, data, features, 99, noise=1.0) > expected, "noise costs, also where it is not scored"
    assert Validation.from_features(features, SCORED).ranges[-1][1] < 100, "only timesteps that a feature can enter at"


def test_processes_that_share_a_batch_have_its_loss_as_their_mean(data):
    features = TrainingSet.from_data(data, SCORED)
    half = len(data.visual) // 2
    parts = [loss_at(lambda x, t: x + 1, data, features, 50, rows=rows) for rows in (slice(half), slice(half, None))]
    whole = loss_at(lambda x, t: x + 1, data, features, 50)
    torch.testing.assert_close((parts[0] + parts[1]) / 2, whole)


def test_it_learns_what_holds_on_other_images(out, tmp_path):
    bridge = DiffusionBridge.from_pretrained(out)
    other = synthetic_store(tmp_path / "other", images=160)
    x, labels = other.adapter_feat()[480:], pair_labels(other)[torch.arange(480, len(other))]
    positives = int(labels.target.sum())
    before, after = (float(bridge_loss(each, x, labels, positives, keep=0)) for each in (x, bridge(x)))
    assert after < 0.97 * before
    assert facts(out)["best_val_loss"] < facts(out)["isotropic_val_loss"]


def test_interrupted_it_goes_on_bit_equal(data, out, tmp_path):
    for step in (9, 21):
        with pytest.raises(Stop):
            train(data, SCORED, tmp_path / "out", resume=step > 9, on_step=stop_at(step))
    train(data, SCORED, tmp_path / "out", resume=True)
    assert equal(weights(tmp_path / "out"), weights(out))


def test_other_labels_are_another_training(data, out, tmp_path):
    flipped = replace(data, labelled=replace(data.labelled, target=data.labelled.valid & ~data.labelled.target))
    with pytest.raises(TrainingError, match="other features"):
        train(flipped, SCORED, out, resume=True)
    with pytest.raises(TrainingError, match="hold none"):
        train(replace(data, labelled=None), SCORED, tmp_path / "none")


def test_annotations_of_hidden_classes_have_no_effect(out, tmp_path):
    secret = synthetic_store(tmp_path / "plain").ezhoi["classes/unseen"]

    def alter(batch):
        own = store_table[batch.pairs.objects]
        return replace(batch, labels=batch.labels ^ torch.isin(own, secret))

    store_table = synthetic_store(tmp_path / "table").ezhoi["object_n_verb_to_interaction"]
    plain, altered = (
        synthetic_store(tmp_path / name, images=80, alter=change) for name, change in (("a", None), ("b", alter))
    )
    assert not torch.equal(plain.rows("labels"), altered.rows("labels"))
    one, other = (
        train(TrainingData.from_store(store, "score"), replace(SCORED, train_steps=5), tmp_path / f"out-{number}")
        for number, store in enumerate((plain, altered))
    )
    assert equal(weights(one), weights(other))


def test_it_keeps_the_rules_of_bridges_and_at_blend_0_it_is_the_identity(store, out):
    check_bridge(load, out, dim=32)
    bridge = DiffusionBridge.from_pretrained(out)
    x = store.adapter_feat()
    assert not torch.allclose(bridge(x), x, rtol=1e-3)
    torch.testing.assert_close(bridge.override(blend=0.0)(x), x)


def test_the_flag_gives_a_training_of_seconds(capsys):
    def parsed(*flags):
        line = ["train", "F", "--out", "B", "--recipe", "scored", *flags]
        return train_config(build_parser(line).parse_args(line))

    config = parsed()
    assert config.recipe == RECIPES["scored"]
    assert config.patience > 0
    assert config.train_steps * config.batch_size < 300_000
    assert parsed("--noise-augmentation", "0", "--start-timestep", "50").recipe.start_timestep == 50
    with pytest.raises(TrainingError, match="pred_x0"):
        parsed("--objective", "pred_noise")


def test_a_closed_form_is_refused(data, tmp_path):
    config = replace(SCORED, denoiser="gaussian", denoiser_options={})
    with pytest.raises(TrainingError, match="without it"):
        train(data, config, tmp_path / "out")
