"""Order, noise and split are pure functions; the configuration and the checkpoints refuse what is broken."""

import json
from dataclasses import fields, replace

import pytest
import torch

from ezhoi_diffusion.diffusion.recipes import RECIPES
from ezhoi_diffusion.features.split import validation_mask
from ezhoi_diffusion.rng import generator
from ezhoi_diffusion.training.batches import batch_indices, timesteps_and_noise
from ezhoi_diffusion.training.checkpoint import flat, nested, read_newest, write_checkpoint
from ezhoi_diffusion.training.config import TrainConfig, TrainingError


def test_every_epoch_visits_every_row_once():
    stream = torch.cat([batch_indices(10, 4, seed=3, batch=k) for k in range(15)])
    for epoch in stream.split(10):
        assert epoch.sort().values.tolist() == list(range(10))
    assert stream[:10].tolist() != stream[10:20].tolist()
    assert batch_indices(10, 4, seed=4, batch=0).tolist() != stream[:4].tolist()


def test_a_batch_may_hold_more_than_all_rows():
    counts = batch_indices(60, 64, seed=0, batch=0).bincount(minlength=60)
    assert counts.sum() == 64
    assert counts.min() == 1
    assert len(batch_indices(60, 64, seed=0, batch=7)) == 64
    assert batch_indices(5, 64, seed=0, batch=0).bincount().tolist() == pytest.approx([13] * 5, abs=1)


@pytest.mark.parametrize(("rows", "size"), [(10, 4), (10, 10), (3, 8), (100, 7)])
def test_an_epoch_is_drawn_once_and_batches_are_as_if_it_were_drawn_for_each(monkeypatch, rows, size):
    epochs = [torch.randperm(rows, generator=generator(99, "order", k)) for k in range(1 + 20 * size // rows)]
    drawn, real = [], torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda *args, **kwargs: drawn.append(args) or real(*args, **kwargs))
    batches = [batch_indices(rows, size, seed=99, batch=k) for k in range(20)]
    assert torch.equal(torch.cat(batches), torch.cat(epochs)[: 20 * size])
    assert len(drawn) <= len(epochs)
    last = batches[-1].clone()
    batches[-1].zero_()
    assert torch.equal(batch_indices(rows, size, seed=99, batch=19), last)


def test_noise_is_a_function_of_seed_and_batch_and_draws_nothing_global():
    state = torch.get_rng_state()
    first, again = timesteps_and_noise((8, 4), 1000, 0, 5), timesteps_and_noise((8, 4), 1000, 0, 5)
    other = timesteps_and_noise((8, 4), 1000, 0, 6)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[1], other[1])


def test_what_is_held_out_is_a_function_of_the_count_and_a_larger_share_contains_a_smaller():
    tenth, third = validation_mask(40, 0.1), validation_mask(40, 0.33)
    assert (int(tenth.sum()), int(third.sum())) == (4, 13)
    assert torch.equal(tenth, validation_mask(40, 0.1))
    assert not (tenth & ~third).any()
    assert not torch.equal(tenth, validation_mask(40, 0.1, seed=1))


def test_something_is_held_out_and_something_is_left():
    assert validation_mask(2, 0.01).sum() == 1
    assert validation_mask(2, 0.99).sum() == 1
    with pytest.raises(ValueError, match="at least 2"):
        validation_mask(1, 0.5)


def test_configuration_is_its_json():
    config = TrainConfig(recipe=RECIPES["guide"], denoiser_options={"width": 8}, train_steps=7)
    assert config.departures(json.loads(json.dumps(config.to_dict()))) == []
    assert all(field.metadata["help"] for field in fields(TrainConfig))
    tuples = TrainConfig(denoiser_options={"dim_mults": (1, 2)})
    assert tuples.departures(json.loads(json.dumps(tuples.to_dict()))) == []
    assert config.departures({})[0] == "batch_size (was None, is 64)"


@pytest.mark.parametrize(
    "change",
    [
        {"train_steps": 0},
        {"batch_size": 0.5},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"ema_decay": 1.0},
        {"val_fraction": 0.0},
        {"num_timesteps": 99},
        {"objective": "pred_y"},
        {"mixed_precision": "fp8"},
        {"seed": 1.5},
        {"denoiser_options": [1]},
        {"denoiser_options": {"width": {1}}},
        {"ema_update_every": 5001},
    ],
)
def test_configuration_refuses(change):
    with pytest.raises(TrainingError, match=next(iter(change))):
        replace(TrainConfig(), **change)


def checkpoint(folder, step):
    w = {"w": torch.full((3,), float(step))}
    write_checkpoint(folder, step, {"model": w, "ema": w, "best": {}, "optimizer": {}}, {"step": step})


def test_optimizer_state_survives_flattening():
    moments = {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(2)}, 11: {"step": torch.tensor(4.0)}}
    again = nested(flat(moments))
    assert [(i, list(kept)) for i, kept in again.items()] == [(i, list(kept)) for i, kept in moments.items()]
    assert torch.equal(again[0]["exp_avg"], moments[0]["exp_avg"])


def test_the_last_two_checkpoints_are_kept(tmp_path):
    for step in (1, 2, 3, 10):
        checkpoint(tmp_path, step)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000000003", "step-000000010"]
    tensors, state = read_newest(tmp_path)
    assert state == {"step": 10}
    assert tensors["model"]["w"].tolist() == [10.0] * 3


@pytest.mark.parametrize("name", ["model.safetensors", "manifest.json"])
@pytest.mark.parametrize("damage", [lambda p: p.unlink(), lambda p: p.write_bytes(p.read_bytes()[:-1] + b"X")])
def test_the_newest_whole_checkpoint_counts(tmp_path, name, damage):
    checkpoint(tmp_path, 1)
    checkpoint(tmp_path, 2)
    damage(tmp_path / "step-000000002" / name)
    with pytest.warns(UserWarning, match="step-000000002"):
        found = read_newest(tmp_path)
    assert found[1] == {"step": 1}
    # A broken one does not count towards the two that are kept.
    checkpoint(tmp_path, 3)
    assert (tmp_path / "step-000000001").exists()


def test_a_checkpoint_that_was_about_to_be_replaced_is_put_back(tmp_path):
    checkpoint(tmp_path, 1)
    (tmp_path / "step-000000001").rename(tmp_path / "step-000000001.replaced")
    (tmp_path / "step-000000001.staged").mkdir()
    assert read_newest(tmp_path)[1] == {"step": 1}
    checkpoint(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000000001", "step-000000002"]


def test_an_unfinished_checkpoint_is_not_seen(tmp_path):
    (tmp_path / "step-000000009.staged").mkdir(parents=True)
    assert read_newest(tmp_path) is None
    (tmp_path / "step-000000008").mkdir()
    with pytest.warns(UserWarning, match="manifest"), pytest.raises(TrainingError, match="no complete checkpoint"):
        read_newest(tmp_path)
