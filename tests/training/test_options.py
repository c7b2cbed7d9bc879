"""What may be chosen in a training: each option has its effect, survives an interruption, and is refused when wrong."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from statistics import fmean

import pytest
import torch
from accelerate.tracking import GeneralTracker, get_available_trackers
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ezhoi_diffusion.cli import build_parser
from ezhoi_diffusion.cli.train import train_config
from ezhoi_diffusion.diffusion.bridge import BridgeConfig, DiffusionBridge, build_denoiser
from ezhoi_diffusion.diffusion.schedule import isotropic_estimate
from ezhoi_diffusion.errors import Interrupted
from ezhoi_diffusion.report import plots
from ezhoi_diffusion.training import loop
from ezhoi_diffusion.training.curve import notes
from ezhoi_diffusion.training.data import TrainingSet
from ezhoi_diffusion.training.loss import denoising_loss
from ezhoi_diffusion.training.trainer import TrainingError, train
from ezhoi_diffusion.training.validation import Validation
from helpers import TESTS
from helpers.miniature import free_port
from helpers.trainings import OVERFIT, QUICK, Stop, asked_to_end_at, equal, few, low_rank, stop_at, weights


def facts(out):
    return json.loads((out / "training.json").read_text())


# The bridge of a training


def test_a_network_that_learns_its_rows_by_heart_gives_the_bridge_of_before(tmp_path):
    """What the loss on the validation rows says of the bridge's own weights is the lowest of the history."""
    data = low_rank(texts=12, rank=32)  # texts in all directions: nothing to generalise
    config = replace(OVERFIT, patience=0, lr_schedule="constant", train_steps=100, val_every=10)
    out = train(data, config, tmp_path / "out")
    found = facts(out)
    assert found["best_step"] < found["step"] == config.train_steps
    assert found["best_val_loss"] < 0.98 * found["history"][-1]["val_loss"]
    bridge = DiffusionBridge.from_pretrained(out)
    validation = Validation.from_features(TrainingSet.from_data(data, config), config)
    losses = validation.losses(bridge.denoiser, torch.device("cpu"))
    assert fmean(losses) == pytest.approx(found["best_val_loss"], rel=1e-6)
    assert losses == pytest.approx(found["val_loss_by_range"], rel=1e-6)


def published(out):
    """What the bridge and training.json both say of the bridge's own weights; and those weights."""
    training, found = DiffusionBridge.from_pretrained(out).provenance["training"], facts(out)
    assert (training["step"], training["val_loss"]) == (found["best_step"], found["best_val_loss"])
    assert training["config"] == found["config"]
    assert training["stopped"] == found["stopped"]
    return training["step"], training["val_loss"], load_file(out / "model.safetensors")


def test_best_so_far_is_there_while_it_trains_and_nothing_depends_on_it(tmp_path):
    whole = train(few(), OVERFIT, tmp_path / "whole")
    assert not (whole / "best").exists()
    with pytest.raises(Stop):
        train(few(), OVERFIT, tmp_path / "cut", on_step=stop_at(9))
    assert DiffusionBridge.from_pretrained(tmp_path / "cut" / "best").provenance["training"]["step"] <= 8
    (tmp_path / "cut" / "best" / "model.safetensors").write_bytes(b"damaged")
    cut = train(few(), OVERFIT, tmp_path / "cut", resume=True)
    assert equal(weights(cut), weights(whole))
    assert published(cut)[:2] == published(whole)[:2]


def test_a_validation_at_an_early_end_decides_for_that_end_alone(tmp_path):
    """Step 12 is off the rhythm of 10 and the lowest; the run that goes on from there gives the bridge of one that never ended."""
    config = replace(QUICK, train_steps=20, val_every=10, learning_rate=1e-2, ema_decay=0.5, checkpoint_every=50)
    whole = train(low_rank(), config, tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(low_rank(), config, tmp_path / "out", on_step=asked_to_end_at(12))
    out = train(low_rank(), replace(config, train_steps=12), tmp_path / "out", resume=True)
    early = published(out)
    assert early[0] == 12, "later is better here"
    again = train(low_rank(), replace(config, train_steps=12), tmp_path / "out", resume=True)
    assert equal(published(again)[2], early[2])
    train(low_rank(), config, out, resume=True)
    assert published(out)[:2] == published(whole)[:2]
    assert equal(published(out)[2], published(whole)[2])


# Learning rate and weight decay


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
def test_the_optimizer_gets_the_learning_rate_of_the_formula(tmp_path, schedule):
    config = replace(QUICK, lr_schedule=schedule, warmup_steps=4, learning_rate=0.5, val_every=1)
    used = []
    hook = register_optimizer_step_pre_hook(lambda optimizer, *_: used.append(optimizer.param_groups[0]["lr"]))
    try:
        out = train(low_rank(), config, tmp_path / "out")
    finally:
        hook.remove()
    after = {
        "constant": lambda p: 1,
        "linear": lambda p: 1 - p,
        "cosine": lambda p: math.cos(math.pi * p / 2) ** 2,
    }[schedule]
    wanted = [0.5 * w for w in (0.25, 0.5, 0.75, 1, *(after(k / 8) for k in range(8)))]
    assert used == pytest.approx(wanted, abs=1e-12)
    assert [record["lr"] for record in facts(out)["history"]] == used


def test_weight_decay_is_decoupled(tmp_path):
    """After one step the weights differ from those without it by −lr·λ·w0, whatever the gradient was."""
    config = replace(QUICK, train_steps=1, learning_rate=1e-2)
    out = (
        train(low_rank(), config, tmp_path / "plain"),
        train(low_rank(), replace(config, weight_decay=0.3), tmp_path / "decayed"),
    )
    plain, decayed = (load_file(folder / "model.safetensors") for folder in out)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        start = build_denoiser(BridgeConfig(32, config.recipe, "mlp", config.denoiser_options)).state_dict()
    for name, value in plain.items():
        assert torch.allclose(decayed[name] - value, -1e-2 * 0.3 * start[name], atol=1e-7)


def test_the_average_may_be_updated_less_often(tmp_path):
    """Every second step with decay d: the average is that of the even steps alone, begun with the first of them."""
    states = []
    config = replace(QUICK, train_steps=6, checkpoint_every=1, ema_update_every=2, ema_decay=0.6)

    def keep(step):
        states.append(weights(tmp_path / "out" / "checkpoints" / f"step-{step:09d}"))

    out = train(low_rank(), config, tmp_path / "out", on_step=keep)
    for name, average in load_file(out / "model.safetensors").items():
        wanted = 0.6 * (0.6 * states[1][name] + 0.4 * states[3][name]) + 0.4 * states[5][name]
        assert torch.allclose(average, wanted, atol=1e-6)


# Early stopping


def test_patience_stops_and_says_so(tmp_path):
    """Steps too small to change a float32: the first validation stays the lowest, and the third after it ends the run."""
    config = replace(QUICK, train_steps=40, learning_rate=1e-30, patience=3)
    out = train(low_rank(), config, tmp_path / "out")
    found = facts(out)
    assert found["step"] == 16
    assert found["stopped"].startswith("patience 3: no validation after step 4 went below")
    training = DiffusionBridge.from_pretrained(out).provenance["training"]
    assert (training["step"], training["stopped"]) == (found["best_step"], found["stopped"]) == (4, found["stopped"])
    assert facts(train(low_rank(), replace(config, patience=0), tmp_path / "off"))["stopped"] == "all 40 steps are done"


def test_a_run_that_goes_on_for_longer_stops_where_one_that_never_ended_does(tmp_path):
    """The extra validation at the first end, step 6, does not count."""
    config = replace(QUICK, train_steps=6, learning_rate=1e-30, patience=3)
    train(low_rank(), config, tmp_path / "out")
    out = train(low_rank(), replace(config, train_steps=40), tmp_path / "out", resume=True)
    assert facts(out)["step"] == 16


def test_a_stopped_run_stays_stopped_and_more_patience_takes_it_further(tmp_path):
    out = train(few(), OVERFIT, tmp_path / "out")
    stopped, before = facts(out), weights(out)
    assert stopped["step"] < 60
    best = min((r for r in stopped["history"] if "val_loss" in r), key=lambda r: r["val_loss"])
    assert stopped["step"] == best["step"] + 3 * 2
    assert best["val_loss"] == stopped["best_val_loss"] < stopped["history"][-1]["val_loss"]

    train(few(), OVERFIT, out, resume=True)
    assert facts(out)["stopped"] == stopped["stopped"]
    assert equal(weights(out), before)

    patient = replace(OVERFIT, patience=6)
    whole = train(few(), patient, tmp_path / "whole")
    train(few(), patient, out, resume=True)
    assert facts(out)["step"] == facts(whole)["step"] > stopped["step"]
    assert facts(out)["history"] == facts(whole)["history"]
    assert equal(weights(out), weights(whole))


@pytest.mark.parametrize("step", [3, 8, 15])
def test_interrupted_with_every_option_on_it_ends_bit_equal(tmp_path, step):
    whole = train(few(), OVERFIT, tmp_path / "whole")
    with pytest.raises(Stop):
        train(few(), OVERFIT, tmp_path / "broken", on_step=stop_at(step))
    resumed = train(few(), OVERFIT, tmp_path / "broken", resume=True)
    assert equal(weights(resumed), weights(whole))
    for key in ("history", "stopped", "best_val_loss"):
        assert facts(resumed)[key] == facts(whole)[key]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], (2000, 100, 3e-4, 0)),
        (["--recipe", "paired"], (5000, 500, 8e-5, 5)),
        (["--recipe", "guide"], (5000, 500, 8e-5, 0)),
        (["--denoiser", "unet1d"], (2000, 100, 8e-5, 0)),
        (["--recipe", "paired", "--train-steps", "70", "--learning-rate", "0.1"], (70, 500, 0.1, 5)),
    ],
)
def test_defaults_fit_what_is_trained(flags, expected):
    config = train_config(build_parser(words := ["train", "F", "--out", "O", *flags]).parse_args(words))
    assert (config.train_steps, config.val_every, config.learning_rate, config.patience) == expected


# Loss by range of noise


def validation(num_timesteps=1000):
    config = replace(QUICK, num_timesteps=num_timesteps)
    return Validation.from_features(TrainingSet.from_data(low_rank(), config), config)


def test_the_ranges_cover_all_levels_and_their_mean_is_the_loss():
    batch = validation()
    assert batch.ranges == [(0, 198), (200, 398), (400, 598), (600, 798), (800, 998)]
    skip, _ = isotropic_estimate(batch.schedule, batch.objective, 32, batch.scale_factor)

    def estimate(x, t):
        return skip[t].float().unsqueeze(1) * x

    at_once = denoising_loss(
        estimate, batch.z, batch.t, batch.noise, batch.schedule, batch.objective, batch.scale_factor
    )
    assert fmean(batch.baseline_losses()) == pytest.approx(at_once.item(), rel=1e-5)

    def knows_little_noise(x, t):
        return torch.where(t.unsqueeze(1) < 200, batch.z[: len(x)], estimate(x, t))

    losses = batch.losses(knows_little_noise)
    assert losses[0] == 0
    assert losses[1:] == batch.baseline_losses()[1:]


def test_fewer_levels_than_ranges_still_give_five():
    assert len(validation(num_timesteps=101).baseline_losses()) == 5


def test_ranges_are_in_the_files_and_in_the_picture(tmp_path, monkeypatch):
    out = train(low_rank(), replace(QUICK, lr_schedule="linear"), tmp_path / "out")
    found = facts(out)
    validated = [record for record in found["history"] if "val_loss" in record]
    assert all(record["val_loss"] == fmean(record["val_loss_by_range"]) for record in validated)
    assert found["isotropic_val_loss"] == fmean(found["isotropic_val_loss_by_range"])
    training = DiffusionBridge.from_pretrained(out).provenance["training"]
    assert training["val_loss_by_range"] == validated[-1]["val_loss_by_range"]

    drawn = []
    save = plots._save
    monkeypatch.setattr(plots, "_save", lambda figure, path: (drawn.append(figure), save(figure, path)))
    (tmp_path / "curve.png").write_text("old")
    plots.plot_training(found, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    losses, by_range, rate = drawn[0].axes
    curves = {line.get_label(): list(line.get_ydata()) for line in losses.lines}
    assert curves["validation, averaged weights"] == [record["val_loss"] for record in validated]
    assert "stopped: step 12" in curves
    assert f"best: step {min(validated, key=lambda r: r['val_loss'])['step']}" in curves
    assert list(rate.lines[0].get_ydata()) == [record["lr"] for record in found["history"]]
    bar = found["isotropic_val_loss_by_range"]
    for number, line in enumerate(by_range.lines[:5]):
        assert list(line.get_ydata()) == [r["val_loss_by_range"][number] / bar[number] for r in validated]


def test_what_was_not_learned_is_said():
    found = {
        "config": {"recipe": {"trained_on": "text", "start_timestep": 100}},
        "history": [{"loss": 2.0, "val_loss": 0.4}, {"loss": 1.0, "val_loss": 0.2}],
        "best_val_loss": 0.2,
        "isotropic_val_loss": 0.3,
        "ranges": [[0, 499], [500, 999]],
        "val_loss_by_range": [0.3, 0.1],
        "isotropic_val_loss_by_range": [0.5, 0.1],
    }
    (note,) = notes(found)
    assert note.startswith("at timesteps 500-999 the network is no better")
    assert note.endswith("below 100")
    nothing = {**found, "isotropic_val_loss": 0.1}
    assert "0.2000, is not below 0.1000, the loss of the isotropic estimate" in notes(nothing)[0]
    assert "more --train-steps" in notes(nothing)[0]
    turned = [*found["history"], {"loss": 0.5, "val_loss": 0.3}]
    assert "--denoiser gaussian" in notes({**nothing, "history": turned})[0]
    of_pairs = {"recipe": {"trained_on": "pairs", "start_timestep": 100}}
    said = notes({**nothing, "history": turned, "config": of_pairs})[0]
    assert "memorised" in said
    assert "gaussian" not in said, "pairs have no closed form"
    assert "lower --learning-rate" in notes({**nothing, "history": [*turned, {"loss": 3.0, "val_loss": 5.0}]})[0]
    assert notes({**found, "isotropic_val_loss_by_range": [0.5, 0.2]}) == []


# Trackers and progress


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


def test_a_tracker_gets_what_the_history_has_and_is_no_part_of_the_run(tmp_path):
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


def test_a_tracker_that_does_not_start_is_a_typed_error(tmp_path):
    class Offline(Notes):
        def start(self):
            raise ConnectionError("no network")

    with pytest.raises(TrainingError, match="no network"):
        train(low_rank(), QUICK, tmp_path / "out", log_with=[Offline()])


@pytest.mark.skipif("tensorboard" not in map(str, get_available_trackers()), reason="tensorboard is not installed")
def test_tensorboard_goes_on_in_the_same_folder(tmp_path):
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


# Many processes


def test_one_process_where_several_were_asked_for_is_refused(tmp_path, monkeypatch):
    """What `accelerate launch --cpu --num_processes 2` leaves in the environment of the one process it starts."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(TrainingError, match="add --multi_gpu"):
        train(low_rank(), QUICK, tmp_path / "out")


SCRIPT = """
import json, sys
from dataclasses import replace
from pathlib import Path
import torch
from ezhoi_diffusion.errors import EzhoiDiffusionError
from ezhoi_diffusion.training.processes import exit_distributed
from ezhoi_diffusion.training.trainer import train
from helpers.trainings import OVERFIT, few
torch.set_num_threads(1)
out, resume, change = json.loads(sys.argv[1])
try:
    train(few(), replace(OVERFIT, **change), Path(out), resume=resume)
    exit_distributed()
except EzhoiDiffusionError as error:
    sys.exit(f"refused: {error}")
"""


def machines(tmp_path, *outs, resume=False, changes=({}, {})):
    """Train on two machines of one process each, started as accelerate's documentation says, and joined."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    port = free_port()
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "2", "--num_processes",
             "2", "--machine_rank", str(rank), "--main_process_ip", "127.0.0.1", "--main_process_port", port,
             str(script), json.dumps([str(out), resume, change])],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join((str(TESTS), str(TESTS / "training"), *sys.path))},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank, (out, change) in enumerate(zip(outs, changes, strict=True))
    ]  # fmt: skip
    said = [process.communicate(timeout=200)[0] for process in started]
    return [process.returncode for process in started], said


@pytest.mark.slow
def test_two_machines_of_which_one_sees_the_folder_stop_and_resume_as_one_process_does(tmp_path):
    near, far = tmp_path / "near", tmp_path / "file" / "far"
    (tmp_path / "file").write_text("the second machine cannot make a folder here")
    one = train(few(), OVERFIT, tmp_path / "one")
    ended, said = machines(tmp_path, near, far)
    assert ended == [0, 0], said
    assert facts(near)["processes"] == 2
    assert facts(near)["step"] == facts(one)["step"] < 60
    first = weights(near)
    assert all(torch.allclose(value, first[name], atol=1e-5) for name, value in weights(one).items())

    patient = {"patience": 6}
    one = train(few(), replace(OVERFIT, **patient), tmp_path / "one", resume=True)
    ended, said = machines(tmp_path, near, far, resume=True, changes=(patient, patient))
    assert ended == [0, 0], said
    assert facts(near)["step"] == facts(one)["step"]
    found = weights(near)
    assert all(torch.allclose(value, found[name], atol=1e-5) for name, value in weights(one).items())


@pytest.mark.slow
def test_machines_with_different_flags_are_refused(tmp_path):
    ended, said = machines(tmp_path, tmp_path / "a", tmp_path / "b", changes=({}, {"learning_rate": 0.5}))
    assert 0 not in ended
    assert "refused: the processes differ in learning_rate: 0.01 here, 0.5 in process 1" in said[0]
    assert "refused: the processes differ in learning_rate: 0.5 here, 0.01 in process 0" in said[1]
    assert not (tmp_path / "a").exists()
