"""The configuration of a training: its JSON, and what it refuses."""

import json
import math
from dataclasses import fields, replace

import pytest

from ezhoi_diffusion.diffusion.recipes import RECIPES
from ezhoi_diffusion.training.config import TrainConfig, TrainingError


def test_configuration_survives_json():
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
        {"lr_schedule": "step"},
        {"warmup_steps": 5000},
        {"warmup_steps": -1},
        {"weight_decay": -0.1},
        {"weight_decay": math.inf},
        {"patience": -1},
        {"patience": 1.5},
        {"ema_update_every": 0},
    ],
)
def test_configuration_refuses(change):
    with pytest.raises(TrainingError, match=next(iter(change))):
        replace(TrainConfig(), **change)


def test_departures_name_what_makes_another_run():
    config = TrainConfig()
    old = config.to_dict()
    assert config.departures(old) == []
    assert replace(config, patience=4, train_steps=9000).departures(old) == []
    cosine = replace(config, lr_schedule="cosine")
    assert cosine.departures(old) == ["lr_schedule (was 'constant', is 'cosine')"]
    # where the learning rate follows it, another length changes every step
    assert replace(cosine, train_steps=9000).departures(cosine.to_dict()) == ["train_steps (was 2000, is 9000)"]
