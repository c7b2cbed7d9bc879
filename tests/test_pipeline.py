"""Which steps the pipeline runs, skips and repeats."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ezhoi_diffusion.cli import main
from ezhoi_diffusion.errors import Interrupted
from ezhoi_diffusion.locks import locked
from ezhoi_diffusion.pipeline import run as process
from ezhoi_diffusion.pipeline.record import PipelineError, Record, Step, content
from ezhoi_diffusion.pipeline.run import StepFailed, run_steps
from helpers.miniature import MINIATURE, ezhoi_flags, run_in_miniature


@pytest.fixture
def commands(monkeypatch):
    """Steps that write their command into their folder, and note that they ran; `fail` names one that does not end well."""
    ran: list[list[str]] = []

    def run(command):
        ran.append(list(command))
        folder = Path(command[1])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "result").write_text(" ".join(command[2:]) or "nothing")
        if command[0] in run.fail:
            raise StepFailed("it failed", 75)

    run.ran, run.fail = ran, set()
    monkeypatch.setattr(process, "_run", run)
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


def test_an_interrupted_step_resumes_and_a_changed_one_starts_again(tmp_path, commands):
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


def test_an_old_result_is_kept_until_the_new_one_is_there(tmp_path, commands, capsys):
    """It is put back where the old inputs come back before that."""
    run_steps(three(tmp_path), tmp_path)
    (tmp_path / "a" / "hours").write_text("of work")
    commands.fail.add("a")
    with pytest.raises(StepFailed):
        run_steps(three(tmp_path, text="typo"), tmp_path)
    with pytest.raises(StepFailed):
        run_steps(three(tmp_path, text="another typo"), tmp_path)
    commands.fail.clear()
    names(commands)
    assert run_steps(three(tmp_path), tmp_path) == 0
    assert names(commands) == ""
    assert (tmp_path / "a" / "hours").exists()
    assert not list(tmp_path.glob(".old-*"))
    run_steps(three(tmp_path, text="meant"), tmp_path)
    assert not (tmp_path / "a" / "hours").exists()
    assert not list(tmp_path.glob(".old-*"))


def test_killed_between_two_renames_nothing_is_lost(tmp_path, commands, monkeypatch):
    run_steps(three(tmp_path), tmp_path)
    names(commands)

    def killed(self, step, record):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Record, "_write", killed)
        with pytest.raises(KeyboardInterrupt):
            run_steps(three(tmp_path, text="other"), tmp_path)
    assert not (tmp_path / "a").exists()
    assert run_steps(three(tmp_path), tmp_path) == 0
    assert names(commands) == ""


@pytest.mark.parametrize("killed_at", ["_write", "rename"])
def test_killed_while_an_old_result_is_put_back_nothing_is_lost(tmp_path, commands, monkeypatch, killed_at):
    run_steps(three(tmp_path), tmp_path)
    (tmp_path / "a" / "hours").write_text("of work")
    commands.fail.add("a")
    with pytest.raises(StepFailed):
        run_steps(three(tmp_path, text="typo"), tmp_path)
    commands.fail.clear()
    names(commands)

    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Record if killed_at == "_write" else Path, killed_at, killed)
        with pytest.raises(KeyboardInterrupt):
            run_steps(three(tmp_path), tmp_path)
    assert run_steps(three(tmp_path), tmp_path) == 0
    assert names(commands) == ""
    assert (tmp_path / "a" / "hours").exists()


def test_files_that_others_put_beside_a_result_do_not_count(tmp_path, commands):
    run_steps(three(tmp_path), tmp_path)
    (tmp_path / "a" / "notes.txt").write_text("mine")
    assert run_steps(three(tmp_path), tmp_path) == 0


def test_sigterm_stops_between_steps(tmp_path, commands, monkeypatch):
    calls = commands

    def asked(command):
        calls(command)
        return command[0] == "a"

    monkeypatch.setattr(process, "_run", asked)
    with pytest.raises(Interrupted, match="after step a"):
        run_steps(three(tmp_path), tmp_path)
    assert names(commands) == "a"
    run_steps(three(tmp_path)[1:], tmp_path)
    assert names(commands) == "bc"


@pytest.mark.parametrize(("status", "kind"), [(75, Interrupted), (-15, Interrupted), (2, StepFailed), (-9, StepFailed)])
def test_how_a_step_ends(monkeypatch, status, kind):
    code = f"import os, sys; sys.exit({status})" if status >= 0 else f"import os; os.kill(os.getpid(), {-status})"
    popen = process.subprocess.Popen
    monkeypatch.setattr(
        process.subprocess, "Popen", lambda command, **more: popen([sys.executable, "-c", code], **more)
    )
    with pytest.raises(kind, match="run the same command to continue") as raised:
        process._run(["x"])
    assert raised.value.status == {75: 75, -15: 75, 2: 2, -9: 137}[status]


def test_two_pipelines_do_not_share_a_folder(tmp_path, commands):
    run_steps(three(tmp_path), tmp_path)
    code = f"""
import sys
from pathlib import Path
from ezhoi_diffusion.pipeline.record import PipelineError
from ezhoi_diffusion.pipeline.run import run_steps
try:
    run_steps([], Path({str(tmp_path)!r}))
except PipelineError as error:
    sys.exit("somebody else is writing" in str(error) and 7)
"""
    with locked(tmp_path, PipelineError):
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 7


def test_contents_of_files_and_folders(tmp_path):
    data, work = tmp_path / "data", tmp_path / "data" / "work"
    work.mkdir(parents=True)
    (data / "a.txt").write_text("1")
    assert content(3, work) == 3
    assert content("no such file", work) == "no such file"
    assert content("x" * 5000, work) == "x" * 5000
    file, folder = content(str(data / "a.txt"), work), content(str(data), work)
    (work / "result").write_text("what the pipeline itself writes does not count")
    assert content(str(data), work) == folder
    (data / "a.txt").write_text("2")
    assert content(str(data / "a.txt"), work) != file
    assert content(str(data), work) != folder


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
    (work / "pipeline.json").write_text("{}}")  # it cannot be read
    with pytest.raises(PipelineError, match=r"pipeline\.json"):
        run_steps(three(work), work)
    assert names(commands) == "a"


def test_flags_that_the_pipeline_sets_itself_are_refused(tmp_path, capsys):
    for ours in (["--plugin", "capture"], ["--bridge=x"]):
        assert main(["pipeline", "main_tip_finetune.py", *ours, "--out", str(tmp_path)]) == 2
        assert f"the pipeline sets {ours[0].partition('=')[0]} itself" in capsys.readouterr().err
    assert main(["pipeline", "main_tip_finetune.py", "--eval"]) == 2
    assert "--out DIR is missing" in capsys.readouterr().err
    assert main(["pipeline", str(tmp_path / "none.py"), "--out", str(tmp_path / "w")]) == 2
    assert "run this from the EZ-HOI folder" in capsys.readouterr().err


@pytest.fixture
def checkpoint(make_ezhoi, tmp_path):
    """A checkpoint of the miniature."""
    torch.save({"model_state_dict": make_ezhoi().model.state_dict()}, tmp_path / "ckpt.pt")
    return ["--resume", str(tmp_path / "ckpt.pt")]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--resume", "/nowhere/ckpt.pt"], "--resume must name a trained checkpoint, not '/nowhere/ckpt.pt'"),
        (["--resume="], "starts from random weights"),
        (["--bogus-flag"], "unrecognized arguments: --bogus-flag"),
        (["--max_images", "0"], "--max-images must be at least 1"),
        (["--recipe", "bogus"], "there is no recipe 'bogus'"),
        (["--scale_factor", "-1"], "scale_factor must be positive"),
        (["--denoiser", "bogus"], "unknown denoiser 'bogus'"),
        (["--bridges", "none,bogus"], "unknown bridge 'bogus'"),
        (["--bridges", "none,diffusion=/nowhere"], "there is no folder /nowhere"),
        (["--dataset", "vcoco"], "no evaluation of vcoco"),
    ],
)
def test_what_a_later_step_would_refuse_is_refused_at_once(
    small_world, checkpoint, tmp_path, capsys, monkeypatch, flags, message
):
    monkeypatch.chdir(MINIATURE)
    line = [*ezhoi_flags(small_world, evaluate=True), *checkpoint, "--out", str(tmp_path / "w"), *flags]
    assert main(["pipeline", "main_tip_finetune.py", *line]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "w").exists()


@pytest.mark.slow
def test_the_pipeline_on_the_miniature(small_world, checkpoint, tmp_path):
    """Twice, then with more steps, then with a step that cannot succeed."""
    work = tmp_path / "work"
    flags = [*ezhoi_flags(small_world, evaluate=True), *checkpoint]

    def run(*ours):
        return run_in_miniature(
            "-m", "ezhoi_diffusion", "pipeline", "main_tip_finetune.py", *flags, "--out", str(work), *ours, timeout=900
        )

    quick = [
        "--max-images",
        "12",
        "--num-test-images",
        "3",
        "--inference-steps",
        "5",
        "--scale-factor",
        "4",
        "--folds",
        "3",
    ]
    first = run("--train-steps", "10", *quick)
    assert first.returncode == 0, first.stderr
    assert "6 of 6 steps ran" in first.stdout
    report = json.loads((work / "report" / "report.json").read_text())
    assert report["images"] == 12
    assert [one["name"] for one in report["variants"]][:2] == ["none", f"tuned={work / 'tuned'}"], "the main row"
    recipe = json.loads((work / "bridge" / "config.json").read_text())["recipe"]
    assert (recipe["start_timestep"], recipe["num_steps"], recipe["scale_factor"]) == (5, 5, 4)
    assert (work / "test" / "diffusion_effect.png").stat().st_size > 10_000

    second = run("--train-steps", "10", *quick)
    assert second.returncode == 0, second.stderr
    assert "everything was up to date" in second.stdout

    failed = run("--train_steps", "0", *quick)
    assert failed.returncode == 2
    assert "train_steps must be" in failed.stderr
    assert "Traceback" not in failed.stderr
    flags[flags.index("--port") + 1] = "29999"  # changes no feature
    assert "everything was up to date" in run("--train-steps", "10", *quick).stdout

    third = run("--train-steps", "12", *quick)
    assert third.returncode == 0, third.stderr
    assert "4 of 6 steps ran" in third.stdout


def test_killed_when_a_result_is_there_and_not_in_the_record_it_is_not_made_again(tmp_path, commands, monkeypatch):
    """`tune` would refuse the folder, and take hours again."""
    steps = [Step("a", "first", tmp_path / "out" / "a", ["a", str(tmp_path / "out" / "a")], {}, whole=True)]

    class Killed(BaseException):
        pass

    def die(*args):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Record, "finish", die)
        with pytest.raises(Killed):
            run_steps(steps, tmp_path / "out")
    assert run_steps(steps, tmp_path / "out") == 0
    assert names(commands) == "a"
    assert run_steps(steps, tmp_path / "out") == 0
    assert names(commands) == ""
