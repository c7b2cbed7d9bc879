"""`capture` is `run --plugin capture`, and bridges are applied live by the flags of the offline commands."""

from __future__ import annotations

from pathlib import Path

import pytest

from ezhoi_diffusion.cli import main
from ezhoi_diffusion.features.store import FeatureStore
from helpers.miniature import ezhoi_flags, rows_of, run_in_miniature


@pytest.fixture
def ran(mocker):
    """Script and flags of what would have run."""
    return mocker.patch("ezhoi_diffusion.ezhoi.launch.run_script")


def test_its_flags_may_stand_anywhere_and_are_taken_out_of_the_scripts(ran):
    own = ["--out", "F", "--split", "test", "--max_images", "3"]
    expected = [
        "--eval",
        "--seed",
        "5",
        "--plugin",
        "capture",
        "--capture",
        "F",
        "--capture-split",
        "test",
        "--max-images",
        "3",
    ]
    for words in (["main.py", "--eval", *own, "--seed", "5"], [*own, "main.py", "--eval", "--seed", "5"]):
        assert main(["capture", *words]) == 0
        ran.assert_called_with(Path("main.py"), expected)


def test_split_and_number_of_images_are_left_to_the_run(ran):
    assert main(["capture", "main.py", "--out", "F"]) == 0
    ran.assert_called_with(Path("main.py"), ["--plugin", "capture", "--capture", "F"])


def test_without_a_folder_it_is_refused(ran, capsys):
    assert main(["capture", "main.py", "--eval"]) == 2
    assert "--out DIR" in capsys.readouterr().err
    ran.assert_not_called()


@pytest.mark.slow
def test_captured_trained_and_applied_live_by_one_grammar(small_world, tmp_path):
    def ezhoi_diffusion(command, *words):
        done = run_in_miniature("-m", "ezhoi_diffusion", command, "main_tip_finetune.py", *words)
        assert done.returncode == 0, done.stderr
        return done.stdout

    features, bridge, report = (tmp_path / name for name in ("features", "bridge", "report"))
    flags = ezhoi_flags(small_world, evaluate=True)
    ezhoi_diffusion("capture", *flags, "--out", str(features), "--split", "train", "--max-images", "20")
    assert (FeatureStore(features).split, len(FeatureStore(features).images)) == ("train", 20)
    assert main(["train", str(features), "--out", str(bridge), "--train-steps", "20"]) == 0
    compare = ["--compare", f"none,diffusion={bridge}", "--set", "start_timestep=900", "--sweep", "blend=0,1"]
    rows = rows_of(ezhoi_diffusion("run", *flags, *compare, "--out", str(report)))
    assert {"none", *(f"diffusion={bridge}{point}" for point in ("", "[blend=0]", "[blend=1]"))} <= set(rows)
    assert rows[f"diffusion={bridge}[blend=0]"] == rows["none"]
    assert (report / "report.html").exists()
    ezhoi_diffusion("run", *flags, "--plugin", f"diffusion={bridge}", "--set", "blend=0.5")
