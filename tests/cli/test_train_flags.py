"""Flags of `train`: settings of the recipe, the guide's names, and flags that one way of making a bridge ignores."""

from __future__ import annotations

import shlex
from dataclasses import fields, replace

import pytest

from ezhoi_diffusion.cli import build_parser, main
from ezhoi_diffusion.cli.train import recipe_settings, train_config
from ezhoi_diffusion.diffusion.recipes import RECIPES, RecipeError
from ezhoi_diffusion.errors import EzhoiDiffusionError
from ezhoi_diffusion.training.config import TrainConfig


def parsed(*flags):
    line = ["train", "F", "--out", "B", *flags]
    return build_parser(line).parse_args(line)


def test_every_field_of_the_configuration_is_a_flag():
    args = parsed("--objective", "pred_v", "--denoiser-options", '{"width": 8}')
    assert {field.name for field in fields(TrainConfig)} <= vars(args).keys()
    assert (args.objective, args.denoiser_options, args.batch_size) == ("pred_v", {"width": 8}, None)


def test_a_setting_has_a_flag_of_its_own_and_set():
    expected = {"start_timestep": 50, "blend": 0.5}
    assert recipe_settings(parsed("--start-timestep", "50", "--blend", "0.5")) == expected
    assert recipe_settings(parsed("--set", "start-timestep=50", "--set", "blend=0.5")) == expected
    assert recipe_settings(parsed("--set", "start_timestep=50", "--blend", "0.5")) == expected
    for twice in (["--blend", "1", "--set", "blend=1"], ["--inference-steps", "9", "--num-steps", "5"]):
        with pytest.raises(EzhoiDiffusionError):
            recipe_settings(parsed(*twice))


def test_inference_steps_set_start_timestep_and_num_steps():
    recipe = train_config(parsed("--recipe", "guide", "--inference-steps", "300", "--scale-factor", "7")).recipe
    assert recipe == replace(RECIPES["guide"], start_timestep=300, num_steps=300, scale_factor=7.0)
    with pytest.raises(RecipeError, match="num_steps"):
        train_config(parsed("--inference-steps", "0"))


@pytest.mark.parametrize("flags", [["--set", "unheard=1"], ["--sampler", "unheard"], ["--denoiser", "unheard"]])
def test_unknown_names_are_refused_before_any_work(flags):
    with pytest.raises(EzhoiDiffusionError, match="unheard"):
        train_config(parsed(*flags))


def test_the_command_of_the_guide_works_as_it_is_written():
    guide = shlex.split(
        "--timesteps 1000 --objective pred_x0 --batch_size 64 --learning_rate 8e-5 --train_steps 500000 "
        "--gradient_accumulate 1 --ema_decay 0.995 --init_dim 32 --dim_mults 1 2 4 8 --use_amp"
    )
    config = train_config(parsed(*guide))
    assert (config.train_steps, config.learning_rate, config.mixed_precision) == (500_000, 8e-5, "fp16")
    assert (config.denoiser, config.denoiser_options) == ("unet1d", {"init_dim": 32, "dim_mults": [1, 2, 4, 8]})
    with_dashes = [word.replace("_", "-") if word[0] == "-" else word for word in guide]
    assert train_config(parsed(*with_dashes)) == config
    line = ["train", "--data_path", "F", "--results_folder", "B"]
    args = build_parser(line).parse_args(line)
    assert (str(args.data_path), str(args.out)) == ("F", "B")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["F"], "--out DIR"),
        (["--out", "B"], "FEATURES"),
        (["F", "--out", "B", "--bridge", "x", "--student-of", "y"], "--student-of"),
        (["F", "--out", "B", "--bridge", "x", "--train-steps", "5"], "--train-steps"),
        (["F", "--out", "B", "--bridge", "x", "--blend", "1"], "--blend"),
        (["F", "--out", "B", "--student-of", "x", "--recipe", "paper"], "--recipe"),
        (["F", "--out", "B", "--student-of", "x", "--resume"], "--resume"),
        (["F", "--out", "B", "--bridge", "x", "--seed", "0"], "--seed"),
        (["F", "--out", "B", "--min-cosine", "0.5"], "--min-cosine"),
        (["F", "--data-path", "G", "--out", "B"], "--data-path (G)"),
        (["F", "--data-path", "G", "--out", "B", "--student-of", "x"], "--data-path (G)"),
    ],
)
def test_flags_without_effect_are_refused(words, named, capsys):
    assert main(["train", *words]) == 2
    assert named in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--mixed-precision", "bf16"], ["--use-amp"]])
def test_an_error_names_the_flag_itself_not_its_name_in_the_guide(flags, capsys):
    assert main(["train", "F", "--out", "B", "--bridge", "x", *flags]) == 2
    assert "--mixed-precision has no effect" in capsys.readouterr().err
    assert parsed().flags["out"] == "--out"


@pytest.mark.parametrize(("flag", "called"), [("--student-of", "_distil"), ("--bridge", "_fit")])
def test_data_path_names_the_features_in_every_mode(flag, called, mocker):
    made = mocker.patch(f"ezhoi_diffusion.cli.train.{called}", return_value=0)
    assert main(["train", "--data-path", "F", "--out", "B", flag, "x"]) == 0
    assert str(made.call_args.args[0].features) == "F"


def test_a_file_of_the_guide_in_place_of_features_is_explained(tmp_path, capsys):
    (tmp_path / "x.pkl").write_bytes(b"")
    assert main(["train", "--data_path", str(tmp_path / "x.pkl"), "--results_folder", str(tmp_path / "b")]) == 2
    assert "ezhoi-diffusion import" in capsys.readouterr().err
