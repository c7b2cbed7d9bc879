"""The grammar that commands share, live and offline, and the device that they run on."""

from __future__ import annotations

import argparse

import pytest
import torch

from ezhoi_diffusion import device
from ezhoi_diffusion.cli import COMMANDS, build_parser
from ezhoi_diffusion.cli.terminal import print_table
from ezhoi_diffusion.device import pick_device
from ezhoi_diffusion.errors import EzhoiDiffusionError
from ezhoi_diffusion.evaluation.variants import parse_settings, parse_sweep
from ezhoi_diffusion.ezhoi.flags import add_arguments


def flags_of(command):
    subparsers = next(a for a in build_parser([command])._actions if isinstance(a, argparse._SubParsersAction))
    return {flag for action in subparsers.choices[command]._actions for flag in action.option_strings}


def live_flags():
    parser = argparse.ArgumentParser()
    add_arguments(parser, [])
    return {flag for action in parser._actions for flag in action.option_strings}


def test_bridges_are_applied_by_the_same_flags_everywhere():
    applied = {"--bridge", "--set", "--sweep", "--inference-steps", "--out", "--force", "--no-plugin"}
    assert applied <= live_flags()
    for command in ("compare", "test", "tune"):
        assert applied | {"--bridges", "--device"} <= flags_of(command), command
    for command in ("capture", "pipeline", "train", "import", "doctor", "bench", "demo"):
        assert "--out" in flags_of(command), command


def test_flags_that_were_renamed_are_gone():
    everywhere = live_flags().union(*(flags_of(command) for command in COMMANDS))
    assert not {"--force-bridge", "--work", "--option", "--name"} & everywhere
    assert "--report" not in live_flags() | flags_of("compare") | flags_of("tune")


def test_plugins_of_a_run_may_name_their_folders():
    parser = argparse.ArgumentParser()
    add_arguments(parser, [])
    args = parser.parse_args(["--plugin", "text_cache", "--plugin", "diffusion=hf:user/name@v1", "--plugin", "a=b=c"])
    assert args.plugin == ["text_cache", "diffusion", "a"]
    assert args.plugin_folders == {"diffusion": "hf:user/name@v1", "a": "b=c"}
    assert parser.parse_args([]).plugin_folders == {}


def test_settings_and_sweeps():
    assert parse_settings(["blend=0.5", "start-timestep=50", "output=unit_norm"]) == {
        "blend": 0.5,
        "start_timestep": 50,
        "output": "unit_norm",
    }
    assert parse_settings(["blend=1"], 7) == {"start_timestep": 7, "num_steps": 7, "blend": 1}
    assert parse_sweep(["blend=.5,1", "output=unit_norm"]) == {"blend": [0.5, 1], "output": ["unit_norm"]}
    for wrong in (["blend"], ["=1"], ["blend="], ["blend=1", "blend=2"]):
        for parse in (parse_settings, parse_sweep):
            with pytest.raises(EzhoiDiffusionError):
                parse(wrong)
    with pytest.raises(EzhoiDiffusionError):
        parse_settings(["num_steps=5"], 7)


def test_a_device_is_checked_before_the_work(mocker):
    assert pick_device("cpu") == torch.device("cpu")
    mocker.patch.object(device.torch.cuda, "is_available", return_value=False)
    assert pick_device() == torch.device("cpu")
    for wrong in ("gpu", "cuda:99", "meta", "hpu"):
        with pytest.raises(EzhoiDiffusionError, match=f"--device {wrong}"):
            pick_device(wrong)


def test_tables_are_plain_text_where_there_is_no_terminal(capsys, mocker):
    print_table(("mAP", "name"), [("9.10", "none"), ("10.25", "[red]x[/red]")], numbers=[0])
    assert capsys.readouterr().out == "  mAP  name\n 9.10  none\n10.25  [red]x[/red]\n"
    mocker.patch("sys.stdout.isatty", return_value=True, create=True)
    print_table(("mAP", "name"), [("10.25", "[red]x[/red]")])
    assert "[red]x[/red]" in capsys.readouterr().out, "names are no markup"
