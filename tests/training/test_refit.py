"""The search finds the step without the held-out features; the refit learns from all of them."""

from dataclasses import replace

import pytest
from torch import nn

from ezhoi_diffusion.diffusion.bridge import DiffusionBridge
from ezhoi_diffusion.diffusion.recipes import RECIPES
from ezhoi_diffusion.errors import Interrupted
from ezhoi_diffusion.training.data import TrainingSet
from ezhoi_diffusion.training.trainer import train
from helpers.trainings import OVERFIT, QUICK, Stop, asked_to_end_at, equal, facts, few, low_rank, stop_at, weights


def test_texts_that_chose_the_step_come_back_as_well_as_the_others(tmp_path):
    """The texts lie in all directions, so that a network has to see one to return it."""
    data = low_rank(texts=20, rank=32)
    config = replace(
        QUICK, train_steps=300, val_every=300, checkpoint_every=300, learning_rate=1e-2, ema_decay=0.9, val_fraction=0.2,
        denoiser_options={"width": 64, "depth": 1},
    )  # fmt: skip
    bridge = DiffusionBridge.from_pretrained(train(data, config, tmp_path / "out"))
    features = TrainingSet.from_data(data, config)
    chose, others = (
        float(nn.functional.cosine_similarity(bridge.predict_x0(features[part], 900), features[part]).mean())
        for part in (features.validation, features.training)
    )
    assert others > 0.8
    assert abs(chose - others) < 0.05


@pytest.mark.parametrize(("recipe", "count", "held_out"), [("gentle", 60, 6), ("guide", 90, 12)])
def test_both_phases_are_recorded(tmp_path, recipe, count, held_out):
    out = train(low_rank(), replace(QUICK, recipe=RECIPES[recipe]), tmp_path / "out")
    found, training = facts(out), DiffusionBridge.from_pretrained(out).provenance["training"]
    assert found["rows"] == count - held_out
    assert (training["rows"], training["val_rows"]) == (found["refit"]["rows"], held_out) == (count, held_out)
    assert found["refit"]["step"] == found["best_step"] == training["step"]
    assert [record["step"] for record in found["refit"]["history"]][-1] == found["best_step"]
    assert not any("val_loss" in record for record in found["refit"]["history"])
    assert found["refit"]["seconds"] > 0


@pytest.mark.parametrize("step", [1, 4, 6])
def test_an_interrupted_refit_ends_bit_equal(tmp_path, step):
    whole = train(few(), OVERFIT, tmp_path / "whole")
    searched, best = facts(whole)["step"], facts(whole)["best_step"]
    assert best > 6
    with pytest.raises(Stop):
        train(few(), OVERFIT, tmp_path / "killed", on_step=stop_at(searched + step))
    with pytest.raises(Interrupted, match=f"stopped after step {step} of {best} of the refit"):
        train(few(), OVERFIT, tmp_path / "asked", on_step=asked_to_end_at(searched + step))
    for folder in (tmp_path / "killed", tmp_path / "asked"):
        assert not (folder / "model.safetensors").exists()
        train(few(), OVERFIT, folder, resume=True)
        assert equal(weights(folder), weights(whole))
        for key in ("history", "stopped", "best_val_loss"):
            assert facts(folder)[key] == facts(whole)[key]
        assert facts(folder)["refit"]["history"] == facts(whole)["refit"]["history"]
        assert not (folder / "best").exists()


def test_a_longer_search_continues_the_refit(tmp_path):
    """The steps of a refit do not depend on how many there are."""
    longer, steps = replace(QUICK, train_steps=20), []
    train(low_rank(), QUICK, tmp_path / "out")
    train(low_rank(), longer, tmp_path / "out", resume=True, on_step=steps.append)
    assert steps == [*range(13, 21), *range(20 + 13, 20 + 21)]
    assert equal(weights(tmp_path / "out"), weights(train(low_rank(), longer, tmp_path / "whole")))


def test_the_progress_bar_names_the_phase(tmp_path, capsys):
    train(low_rank(), QUICK, tmp_path / "out")
    said = capsys.readouterr()
    assert "search, phase 1 of 2" in said.err
    assert "refit, phase 2 of 2" in said.err
    assert "starting over for as many steps, on all 60 features" in said.out
