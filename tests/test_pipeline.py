"""What the pipeline does, skips and does again."""

from __future__ import annotations

import json
import shutil

import pytest
from conftest import host_flags, run_host

from ezhoi_diffusion import pipeline
from ezhoi_diffusion.cli import main
from ezhoi_diffusion.pipeline import PipelineError, Step, StepFailed, run_steps


@pytest.fixture
def commands(monkeypatch):
    """Steps that write their command into their folder, and note that they ran; `fail` names one that does not end well."""
    ran: list[list[str]] = []

    def run(command):
        ran.append(list(command))
        folder = pipeline.Path(command[1])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "result").write_text(" ".join(command[2:]) or "nothing")
        if command[0] in run.fail:
            raise StepFailed("it failed", 75)

    run.ran, run.fail = ran, set()
    monkeypatch.setattr(pipeline, "_run", run)
    return run


def three(work, *, text="x", last="z"):
    a, b, c = (work / name for name in "abc")
    return [
        Step("a", "first", a, ["a", str(a), text], {"text": text}),
        Step("b", "second", b, ["b", str(b)], {}, ["a"], ["--resume"]),
        Step("c", "third", c, ["c", str(c), last], {"last": last}, ["b"]),
    ]


def names(commands):
    found = [command[0] for command in commands.ran]
    commands.ran.clear()
    return "".join(found)


def test_a_second_run_does_nothing(tmp_path, commands, capsys):
    work = tmp_path / "work"
    assert run_steps(three(work), work) == 3
    assert names(commands) == "abc"
    capsys.readouterr()
    assert run_steps(three(work), work) == 0
    assert names(commands) == ""
    assert capsys.readouterr().out.count("up to date") == 3


def test_what_depends_on_a_change_is_done_again_and_nothing_else(tmp_path, commands, capsys):
    run_steps(three(tmp_path), tmp_path)
    names(commands)
    run_steps(three(tmp_path, last="other"), tmp_path)
    assert names(commands) == "c"
    assert "because of what changed: last" in capsys.readouterr().out
    run_steps(three(tmp_path, text="other", last="other"), tmp_path)
    assert names(commands) == "ab", "b gave the same as before, so c is valid still"
    run_steps(three(tmp_path, text="x", last="other"), tmp_path)
    assert names(commands) == "ab"


def test_a_result_that_was_changed_or_removed_is_made_again(tmp_path, commands, capsys):
    run_steps(three(tmp_path), tmp_path)
    names(commands)
    (tmp_path / "b" / "result").write_text("tampered")
    run_steps(three(tmp_path), tmp_path)
    assert names(commands) == "b"
    assert "was changed since" in capsys.readouterr().out
    assert (tmp_path / "b" / "result").read_text() == "nothing"
    shutil.rmtree(tmp_path / "a")
    run_steps(three(tmp_path), tmp_path)
    assert names(commands) == "a"
    (tmp_path / "a" / ".hidden").write_text("transient")
    run_steps(three(tmp_path), tmp_path)
    assert names(commands) == ""


def test_an_interrupted_step_goes_on_and_a_changed_one_begins_anew(tmp_path, commands):
    commands.fail.add("b")
    with pytest.raises(StepFailed):
        run_steps(three(tmp_path), tmp_path)
    assert names(commands) == "ab"
    (tmp_path / "b" / "half").write_text("kept")
    commands.fail.clear()
    run_steps(three(tmp_path), tmp_path)
    assert commands.ran[0][-1] == "--resume"
    assert names(commands) == "bc"
    assert (tmp_path / "b" / "half").exists()

    commands.fail.add("b")
    with pytest.raises(StepFailed):
        run_steps(three(tmp_path, text="other"), tmp_path)
    assert commands.ran[-1][-1] != "--resume"
    assert not (tmp_path / "b" / "half").exists()


def test_folders_of_others_and_broken_records_are_refused(tmp_path, commands):
    work = tmp_path / "work"
    work.mkdir()
    (work / "thesis.tex").write_text("precious")
    with pytest.raises(PipelineError, match="holds no pipeline"):
        run_steps(three(work), work)
    assert (work / "thesis.tex").read_text() == "precious"
    (work / "thesis.tex").unlink()
    run_steps(three(work)[:1], work)
    (work / "b").mkdir()
    (work / "b" / "mine").write_text("precious")
    with pytest.raises(PipelineError, match="this pipeline did not make it"):
        run_steps(three(work), work)
    assert (work / "b" / "mine").read_text() == "precious"
    (work / "pipeline.json").write_text("{}}")
    with pytest.raises(PipelineError, match=r"pipeline\.json"):
        run_steps(three(work), work)
    assert names(commands) == "a"


def test_flags_that_the_pipeline_sets_itself_are_refused(tmp_path, capsys):
    assert main(["pipeline", "main_tip_finetune.py", "--plugin", "capture", "--work", str(tmp_path)]) == 2
    assert "the pipeline sets --plugin itself" in capsys.readouterr().err
    assert main(["pipeline", "main_tip_finetune.py", "--eval"]) == 2
    assert "--work DIR is missing" in capsys.readouterr().err
    assert main(["pipeline", str(tmp_path / "none.py"), "--work", str(tmp_path / "w")]) == 2
    assert "run this from the EZ-HOI folder" in capsys.readouterr().err


@pytest.mark.slow
def test_the_pipeline_on_the_miniature(small_world, tmp_path):
    """Twice, then with more steps, then with a step that cannot succeed."""
    work = tmp_path / "work"
    flags = host_flags(small_world, evaluate=True)

    def run(*ours):
        return run_host("-m", "ezhoi_diffusion", "pipeline", "main_tip_finetune.py", *flags, "--work", str(work), *ours)

    quick = ["--max-images", "12", "--num-test-images", "3", "--inference-steps", "50", "--scale-factor", "4"]
    first = run("--train-steps", "10", *quick)
    assert first.returncode == 0, first.stderr
    assert "6 of 6 steps were done" in first.stdout
    report = json.loads((work / "report" / "comparison.json").read_text())
    assert report["images"] == 12
    recipe = json.loads((work / "bridge" / "config.json").read_text())["recipe"]
    assert (recipe["start_step"], recipe["steps"], recipe["scale"]) == (50, 50, 4)
    assert (work / "test" / "diffusion_effect.png").stat().st_size > 10_000

    second = run("--train-steps", "10", *quick)
    assert second.returncode == 0, second.stderr
    assert "everything was up to date" in second.stdout

    failed = run("--train-steps", "0", *quick)
    assert failed.returncode == 2
    assert "the same pipeline command goes on from here" in failed.stderr
    assert "Traceback" not in failed.stderr

    third = run("--train-steps", "12", *quick)
    assert third.returncode == 0, third.stderr
    assert "3 of 6 steps were done" in third.stdout
