"""Checkpoints: the newest complete one counts, and two are kept."""

import pytest
import torch

from ezhoi_diffusion.training.checkpoint import flat, nested, read_newest, write_checkpoint
from ezhoi_diffusion.training.config import TrainingError

STATE = {
    "history": [], "pending": [1.0], "seconds": 1.0, "config": {}, "data_sha256": "0" * 64, "scaler": None,
}  # fmt: skip


def checkpoint(folder, step):
    w = {"w": torch.full((3,), float(step))}
    write_checkpoint(folder, step, {"model": w, "ema": w, "optimizer": {}}, {**STATE, "step": step})


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
    assert state["step"] == 10
    assert tensors["model"]["w"].tolist() == [10.0] * 3


@pytest.mark.parametrize("name", ["model.safetensors", "manifest.json"])
@pytest.mark.parametrize("damage", [lambda p: p.unlink(), lambda p: p.write_bytes(p.read_bytes()[:-1] + b"X")])
def test_the_newest_complete_checkpoint_counts(tmp_path, name, damage):
    checkpoint(tmp_path, 1)
    checkpoint(tmp_path, 2)
    damage(tmp_path / "step-000000002" / name)
    with pytest.warns(UserWarning, match="step-000000002"):
        found = read_newest(tmp_path)
    assert found[1]["step"] == 1
    # A broken one does not count towards the two that are kept.
    checkpoint(tmp_path, 3)
    assert (tmp_path / "step-000000001").exists()


def test_a_checkpoint_that_was_moved_aside_is_put_back(tmp_path):
    checkpoint(tmp_path, 1)
    (tmp_path / "step-000000001").rename(tmp_path / "step-000000001.replaced")
    (tmp_path / "step-000000001.staged").mkdir()
    assert read_newest(tmp_path)[1]["step"] == 1
    checkpoint(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000000001", "step-000000002"]


def test_an_unfinished_checkpoint_is_ignored(tmp_path):
    (tmp_path / "step-000000009.staged").mkdir(parents=True)
    assert read_newest(tmp_path) is None
    (tmp_path / "step-000000008").mkdir()
    with pytest.warns(UserWarning, match="manifest"), pytest.raises(TrainingError, match="no complete checkpoint"):
        read_newest(tmp_path)
