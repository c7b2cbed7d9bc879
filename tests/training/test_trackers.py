"""Experiment trackers and the progress bar."""

import pytest
from accelerate.tracking import GeneralTracker, get_available_trackers

from ezhoi_diffusion.training import loop
from ezhoi_diffusion.training.trainer import TrainingError, train
from helpers.trainings import QUICK, Stop, equal, facts, low_rank, stop_at, weights


class Notes(GeneralTracker):
    name = "notes"
    requires_logging_directory = False

    def __init__(self):
        super().__init__()
        self.logged, self.config, self.finished = {}, None, 0

    @property
    def tracker(self):
        return self.logged

    def store_init_configuration(self, values):
        self.config = values

    def log(self, values, step=None, **_):
        self.logged[step] = values

    def finish(self):
        self.finished += 1


def test_a_tracker_gets_the_history_and_does_not_change_the_run(tmp_path):
    notes, more = Notes(), Notes()
    with pytest.raises(Stop):
        train(low_rank(), QUICK, tmp_path / "out", log_with=[notes], on_step=stop_at(6))
    assert notes.finished == 1
    assert notes.config["recipe.name"] == "gentle"
    assert notes.config["denoiser_options.width"] == 16
    out = train(low_rank(), QUICK, tmp_path / "out", log_with=[more], resume=True)
    assert more.config is None  # the same run goes on
    logged = {**notes.logged, **more.logged}
    for record in facts(out)["history"]:
        scalars = logged[record["step"]]
        assert [scalars[name] for name in ("loss", "lr", "val_loss")] == [record[n] for n in ("loss", "lr", "val_loss")]
        assert [v for k, v in scalars.items() if k.startswith("val_loss/")] == record["val_loss_by_range"]
    assert equal(weights(out), weights(train(low_rank(), QUICK, tmp_path / "silent")))
    assert not (tmp_path / "silent" / "trackers").exists()


@pytest.mark.parametrize("name", ["tensorbord", "comet_ml", "all"])
def test_a_tracker_that_is_not_installed_is_refused_before_any_work(tmp_path, monkeypatch, name):
    monkeypatch.setattr("accelerate.tracking._available_trackers", [])
    with pytest.raises(TrainingError, match=f"no tracker '{name}' is installed: accelerate knows .*tensorboard"):
        train(low_rank(), QUICK, tmp_path / "out", log_with=[name])
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not hasattr(GeneralTracker, "start"), reason="accelerate 1.0 starts trackers where they are made")
def test_a_tracker_that_does_not_start_is_a_typed_error(tmp_path):
    class Offline(Notes):
        def start(self):
            raise ConnectionError("no network")

    with pytest.raises(TrainingError, match="no network"):
        train(low_rank(), QUICK, tmp_path / "out", log_with=[Offline()])


@pytest.mark.skipif("tensorboard" not in map(str, get_available_trackers()), reason="tensorboard is not installed")
def test_tensorboard_resumes_in_the_same_folder(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with pytest.raises(Stop):
        train(low_rank(), QUICK, tmp_path / "out", log_with=["tensorboard"], on_step=stop_at(6))
    out = train(low_rank(), QUICK, tmp_path / "out", log_with=["tensorboard"], resume=True)
    events = EventAccumulator(str(out / "trackers" / "ezhoi-diffusion"))
    events.Reload()
    wanted = [(record["step"], pytest.approx(record["val_loss"])) for record in facts(out)["history"]]
    assert [(event.step, event.value) for event in events.Scalars("val_loss")] == wanted
    assert "val_loss/timesteps 800-998" in events.Tags()["scalars"]


def test_a_log_shows_progress_now_and_then(tmp_path, monkeypatch, capsys):
    train(low_rank(), QUICK, tmp_path / "quiet")
    assert "7/12 [" not in capsys.readouterr().err
    monkeypatch.setattr(loop, "PROGRESS_SECONDS", 0)
    train(low_rank(), QUICK, tmp_path / "out")
    said = capsys.readouterr().err
    assert "7/12 [" in said
    assert "step/s, loss=" in said
