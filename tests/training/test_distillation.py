"""Distillation: the recorded fidelity of a student holds on features that it has not learned from."""

import json
from dataclasses import replace

import pytest
import torch

from ezhoi_diffusion.cli import main
from ezhoi_diffusion.diffusion.bridge import BridgeError, DiffusionBridge
from ezhoi_diffusion.features.split import validation_mask
from ezhoi_diffusion.features.store import FeatureStore
from ezhoi_diffusion.testing import synthetic_store
from ezhoi_diffusion.training import distillation
from ezhoi_diffusion.training.config import TrainingError
from ezhoi_diffusion.training.data import TrainingData
from ezhoi_diffusion.training.distillation import distill
from ezhoi_diffusion.training.fidelity import fidelity
from ezhoi_diffusion.training.trainer import train
from helpers.bridges import make
from helpers.trainings import QUICK, low_rank


@pytest.fixture(autouse=True)
def few_features(monkeypatch):
    monkeypatch.setattr(distillation, "NUM_FEATURES", 300)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    recipe = replace(make("paper").config.recipe, num_steps=10)
    config = replace(QUICK, recipe=recipe, train_steps=300, learning_rate=2e-3, val_every=300, checkpoint_every=300)
    return DiffusionBridge.from_pretrained(train(low_rank(), config, tmp_path_factory.mktemp("teacher") / "out"))


def distilled(teacher, train_steps=400, seed=0):
    data = low_rank(visuals=240)
    return distill(teacher, data.visual[:200], data.visual[200:], data.text, train_steps=train_steps, seed=seed)


def direction(bridge, x):
    """Return what is distilled: the result before blending, mean and norm."""
    return bridge.override(blend=1.0, output="unit_norm")(x)


def test_one_evaluation_gives_what_ten_give(teacher):
    student, reached = distilled(teacher)
    unseen = low_rank(visuals=240).visual[200:]
    cosine = torch.cosine_similarity(direction(student, unseen), direction(teacher, unseen))
    one = torch.cosine_similarity(direction(teacher.override(num_steps=1), unseen), direction(teacher, unseen))
    assert student.config.recipe.num_steps == 1
    assert reached.cosine == pytest.approx(float(cosine.mean()), abs=1e-5)
    assert reached.cosine_min == pytest.approx(float(cosine.min()), abs=1e-5)
    assert reached.rows == 40
    assert reached.cosine > 0.995
    assert 1 - reached.cosine < 0.3 * (1 - float(one.mean()))
    baselines = student.provenance["distilled"]["baselines"]
    assert baselines["single_evaluation"] == pytest.approx(float(one.mean()), abs=1e-5)
    entered = torch.nn.functional.normalize(unseen, dim=1) - teacher.input_mean
    same = torch.cosine_similarity(entered, direction(teacher, unseen))
    assert baselines["identity"] == pytest.approx(float(same.mean()), abs=1e-5)


def test_the_artefact_records_fidelity_and_teacher(teacher, tmp_path):
    student, reached = distilled(teacher, train_steps=20)
    student.save_pretrained(tmp_path)
    again = DiffusionBridge.from_pretrained(tmp_path)
    x = low_rank().visual
    assert torch.equal(again(x), student(x))
    assert again.provenance["distilled"]["held_out"] == vars(reached)
    assert (again.config.student_of["start_timestep"], again.config.student_of["num_steps"]) == (600, 10)
    assert again.provenance["distilled"]["teacher"] == teacher.provenance["training"]
    assert again.provenance["run"] == teacher.provenance["run"]
    assert "training" not in again.provenance
    assert torch.equal(again.context["ctx"], teacher.context["ctx"])


def test_the_provenance_of_a_student_differs_from_its_teachers(teacher):
    """Reports and cards tell bridges apart by their provenance."""
    applied = teacher.override(num_steps=7)
    student, _ = distill(applied, low_rank().visual[:60], low_rank().visual[60:], low_rank().text, train_steps=2)
    origins = [{k: v for k, v in bridge.provenance.items() if k != "overridden"} for bridge in (applied, student)]
    assert origins[0] != origins[1]
    assert "overridden" not in student.provenance
    with pytest.raises(TrainingError, match="is a student"):
        distill(student, low_rank().visual[:60], low_rank().visual[60:], low_rank().text)


def test_a_student_starts_from_the_weights_of_its_teacher(teacher):
    student, _ = distill(teacher, low_rank().visual[:60], low_rank().visual[60:], low_rank().text, train_steps=1)
    moved = [
        float((new - old).abs().max())
        for new, old in zip(student.denoiser.parameters(), teacher.denoiser.parameters(), strict=True)
    ]
    assert max(moved) < 2 * distillation.LEARNING_RATE  # one step of Adam


def test_of_many_held_out_features_a_part_is_bridged(teacher, monkeypatch):
    monkeypatch.setattr(distillation, "MAX_HELD_OUT", 5)
    assert distilled(teacher, train_steps=1)[1].rows == 5


def test_settings_of_the_teachers_sampler_are_fixed(teacher):
    student, _ = distilled(teacher, train_steps=5)
    for fixed in ({"start_timestep": 100}, {"num_steps": 2}, {"spacing": "cubic"}):
        with pytest.raises(BridgeError, match="its settings are blend, output"):
            student.override(**fixed)
    x = low_rank().visual
    gentle, strong = student.sweep([{"blend": 0.0}, {"blend": 1.0}])
    assert torch.allclose(gentle(x), x, rtol=1e-4, atol=1e-3)
    assert not torch.allclose(strong(x), x, rtol=1e-2)


def test_the_same_seed_gives_the_same_student_and_draws_no_global_random_number(teacher):
    state = torch.get_rng_state()
    one, other, another = distilled(teacher, 5), distilled(teacher, 5), distilled(teacher, 5, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    weights = [list(student.denoiser.state_dict().values()) for student, _ in (one, other, another)]
    assert all(map(torch.equal, weights[0], weights[1]))
    assert not all(map(torch.equal, weights[0], weights[2]))


def test_nothing_is_learned_from_held_out_features(teacher):
    data = low_rank(visuals=240)
    student, _ = distilled(teacher, 5)
    other, _ = distill(teacher, data.visual[:200], -data.visual[200:], data.text, train_steps=5)
    assert all(map(torch.equal, student.denoiser.state_dict().values(), other.denoiser.state_dict().values()))


def test_the_student_is_an_mlp_whatever_the_teacher(tmp_path):
    data = low_rank()
    recipe = replace(make("paper").config.recipe, num_steps=10, spacing="cubic")
    out = train(data, replace(QUICK, denoiser="empirical", denoiser_options={}, recipe=recipe), tmp_path / "out")
    student, _ = distill(
        DiffusionBridge.from_pretrained(out), data.visual[:60], data.visual[60:], data.text, train_steps=3
    )
    assert (student.config.denoiser, student.config.student_of["denoiser"]) == ("mlp", "empirical")
    assert (student.config.recipe.spacing, student.config.student_of["spacing"]) == ("linear", "cubic")


def test_refuses_what_cannot_be_distilled(teacher):
    data = low_rank()
    with pytest.raises(TrainingError, match="one evaluation already"):
        distill(teacher.override(num_steps=1), data.visual, data.visual, data.text)
    with pytest.raises(TrainingError, match="capture more images"):
        distill(teacher, data.visual[:1], data.visual, data.text)


def test_fidelity_equals_cosines_written_out():
    text = torch.eye(4)[:3]
    reference = torch.tensor([[1.0, 0, 0, 0], [0, 2, 0, 0]])
    found = torch.tensor([[3.0, 0, 0, 4], [0, 1, 3, 0]])
    result = fidelity(found, reference, text)
    assert result.cosine == pytest.approx((0.6 + 10**-0.5) / 2)
    assert result.cosine_min == pytest.approx(10**-0.5)
    assert result.top1 == 0.5
    assert fidelity(reference, 7 * reference, text).cosine == 1


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    store = synthetic_store(folder / "train", images=40)
    recipe = replace(make("paper").config.recipe, num_steps=10)
    config = replace(QUICK, recipe=recipe, train_steps=100, learning_rate=2e-3)
    bridge = train(TrainingData.from_store(store, "text"), config, folder / "bridge")
    synthetic_store(folder / "test", split="test", images=8)
    synthetic_store(folder / "other", images=20, seed=5)
    return folder, bridge


def test_the_command_writes_a_student_that_compare_takes(stores, tmp_path, capsys):
    folder, bridge = stores
    out = tmp_path / "student"
    assert (
        main(["train", str(folder / "train"), "--student-of", str(bridge), "--out", str(out), "--train-steps", "300"])
        == 0
    )
    said = capsys.readouterr().out
    assert "one evaluation instead of 10 from timestep 600: cosine 0.99" in said or "cosine 1.0" in said
    assert json.loads((out / "config.json").read_text())["provenance"]["distilled"]["held_out"]["cosine"] >= 0.99
    names = f"none,diffusion={bridge},diffusion={out}"
    assert main(["compare", str(folder / "test"), "--bridges", names, "--replicates", "0"]) == 0
    assert f"diffusion={out}" in capsys.readouterr().out


def test_the_command_learns_from_images_that_are_not_held_out(stores, tmp_path, monkeypatch):
    folder, bridge = stores
    given = []

    def stop(teacher, training, held_out, *rest, **options):
        given.append((training, held_out))
        raise TrainingError("seen enough")

    monkeypatch.setattr(distillation, "distill", stop)
    assert main(["train", str(folder / "train"), "--student-of", str(bridge), "--out", str(tmp_path / "x")]) == 2
    store = FeatureStore(folder / "train")
    apart = validation_mask(len(store.images))[store.image_index()]
    assert torch.equal(given[0][0][torch.arange(len(given[0][0]))], store.adapter_feat()[~apart])
    assert torch.equal(given[0][1][torch.arange(len(given[0][1]))], store.adapter_feat()[apart])


def test_steps_that_no_bridge_can_take_are_refused(stores, tmp_path, capsys):
    folder, bridge = stores
    teacher = DiffusionBridge.from_pretrained(bridge)
    data = FeatureStore(folder / "train")
    student, _ = distill(teacher, data.adapter_feat()[:50], data.adapter_feat()[50:], data.text, train_steps=1)
    student.save_pretrained(tmp_path)
    names = f"none,diffusion={tmp_path}"
    assert main(["compare", str(folder / "test"), "--bridges", names, "--inference-steps", "5"]) == 2
    said = capsys.readouterr().err
    assert f"diffusion={tmp_path} has a setting num_steps, start_timestep" in said
    assert main(["doctor", str(folder / "train"), str(tmp_path)]) in (0, 1)
    assert "a student of mlp; mean cosine" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["--min-cosine", "1.1"], "so it was not written"),
        (
            ["--min-cosine", "0", "--train-steps", "1", "--start-timestep", "2", "--num-steps", "2"],
            "no better than what costs no training",
        ),
        (["--train-steps", "0"], "--train-steps"),
        (["--num-steps", "601"], "num_steps"),
        (["--num-steps", "1"], "one evaluation already"),
    ],
)
def test_the_command_does_not_write_what_it_refuses(stores, tmp_path, capsys, changes, says):
    folder, bridge = stores
    out = tmp_path / "student"
    words = [
        "train",
        str(folder / "train"),
        "--student-of",
        str(bridge),
        "--out",
        str(out),
        "--train-steps",
        "3",
        *changes,
    ]
    assert main(words) == 2
    assert says in capsys.readouterr().err
    assert not (out / "config.json").exists()


def test_the_command_refuses_test_images_and_another_run(stores, tmp_path, capsys):
    folder, bridge = stores
    assert main(["train", str(folder / "test"), "--student-of", str(bridge), "--out", str(tmp_path / "a")]) == 2
    assert "training images only" in capsys.readouterr().err
    assert main(["train", str(folder / "other"), "--student-of", str(bridge), "--out", str(tmp_path / "b")]) == 2
    assert "another EZ-HOI run" in capsys.readouterr().err


def test_one_bar_shows_the_whole_distillation(stores, tmp_path, capfd):
    folder, bridge = stores
    main(
        [
            "train",
            str(folder / "train"),
            "--student-of",
            str(bridge),
            "--out",
            str(tmp_path / "x"),
            "--train-steps",
            "2",
        ]
    )
    shown = [line for line in capfd.readouterr().err.replace("\r", "\n").splitlines() if "distilling" in line]
    assert "100%" in shown[-1]
    assert not any("100%" in line for line in shown[:-1])
