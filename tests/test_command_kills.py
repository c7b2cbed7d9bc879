"""kill -9 of the commands that write a result: nothing that was there is lost, nothing is left, the same command succeeds.

EZHOI_DIFFUSION_KILLS=20 asks for that many kills of each command instead of one, and for kills of a pipeline.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ezhoi_diffusion.cli import main
from ezhoi_diffusion.errors import EzhoiDiffusionError
from ezhoi_diffusion.files import current, read_json
from ezhoi_diffusion.testing import synthetic_store
from ezhoi_diffusion.training import distillation
from ezhoi_diffusion.training.data import TrainingData
from ezhoi_diffusion.training.trainer import train
from helpers import crash
from helpers.bridges import make
from helpers.kills import ended, processes, serve
from helpers.miniature import MINIATURE, ezhoi_flags
from helpers.trainings import QUICK

KILLS = int(os.environ.get("EZHOI_DIFFUSION_KILLS", "1"))
MAX_CALL = 90  # a command makes fewer calls that change the disk
TIMED = {"added_ms_per_image", "seconds"}

pytestmark = pytest.mark.slow
_server = pytest.fixture(scope="module", autouse=True)(serve)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Features, a teacher, and the command lines without their --out."""
    folder = tmp_path_factory.mktemp("work")
    store = synthetic_store(folder / "train", images=40)
    features = str(store.folder)
    test = str(synthetic_store(folder / "test", split="test", images=12).folder)
    config = replace(
        QUICK, recipe=replace(make("paper").config.recipe, num_steps=10), train_steps=100, learning_rate=2e-3
    )
    bridge = str(train(TrainingData.from_store(store, "text"), config, folder / "bridge"))
    return {
        "fit": ["train", features, "--bridge", "residual"],
        "tune": ["tune", features, "--bridges", "mean_shift", "--folds", "3", "--seeds", "1"],
        "distil": ["train", features, "--student-of", bridge, "--train-steps", "300"],
        "compare": ["compare", test, "--bridges", f"none,identity,diffusion={bridge}", "--replicates", "100"],
        "older": ["compare", test, "--bridges", "none,identity", "--replicates", "100"],
    }


def job(words: list[str], log: Path, call: int | None) -> None:
    """One command in a process of its own."""
    torch.set_num_threads(1)
    distillation.NUM_FEATURES = 300
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    if call is not None:
        crash.crash_at(call)
    sys.exit(main(words))


def started(words: list[str], log: Path, call: int | None = None):
    process = processes.Process(target=job, args=(words, log, call))
    process.start()
    return process


def without_times(value):
    """JSON without what a clock measured."""
    if isinstance(value, dict):
        return {key: without_times(one) for key, one in value.items() if key not in TIMED}
    return [without_times(one) for one in value] if isinstance(value, list) else value


def content(folder: Path) -> dict[str, object]:
    """What the second run has to give as the first: names, tensors and figures. A page and a picture only have to be whole."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".safetensors":
            found[name] = path.read_bytes()
        elif path.suffix == ".json":
            found[name] = without_times(read_json(path, dict, EzhoiDiffusionError, ""))
        else:
            found[name] = path.is_dir() or path.stat().st_size > 0
    return found


def report(folder: Path) -> list[str] | None:
    """The bridges of a report as a reader finds it."""
    path = current(folder, "report.json")
    if not path.exists():
        return None
    assert current(folder, "report.html").read_text().rstrip().endswith("</html>")
    return [one["name"] for one in read_json(path, dict, EzhoiDiffusionError, "")["variants"]]


@pytest.mark.parametrize("name", ["fit", "tune", "distil", "compare"])
def test_a_command_is_killed(name, work, tmp_path):
    whole, older, log = tmp_path / "whole" / "out", tmp_path / "older", tmp_path / "log"
    begun = time.monotonic()
    assert ended(started([*work[name], "--out", str(whole)], log)) == 0, log.read_text()
    seconds, reference = time.monotonic() - begun, content(whole)
    if name == "compare":
        assert ended(started([*work["older"], "--out", str(older)], log)) == 0, log.read_text()
    chance, kills, finished = random.Random(name), 0, 0
    while kills < KILLS:
        shutil.rmtree(tmp_path / "cut", ignore_errors=True)
        out = tmp_path / "cut" / "out"
        if name == "compare":
            shutil.copytree(older, out)
        elif kills % 3 == 0:
            out.mkdir(parents=True)  # an empty folder may be given
        words = [*work[name], "--out", str(out)]
        process = started(words, log, chance.randrange(MAX_CALL) if kills % 2 else None)
        if not kills % 2:
            time.sleep(chance.uniform(0.0, 1.0) * seconds)
            process.kill()
        if ended(process) != -signal.SIGKILL:
            continue
        kills += 1
        if name == "compare":
            assert report(out) in (report(older), report(whole)), "the older report is lost"
        is_whole = name != "compare" and out.exists() and any(out.iterdir())
        finished += is_whole
        status = ended(started(words, log))
        assert status == (2 if is_whole else 0), log.read_text()  # 2: the finished result is in use
        assert content(out) == reference
        assert [path.name for path in out.parent.iterdir()] == ["out"], "something is left"
    print(f"{name}: {kills} kills ({finished} after the result was there), lost 0, left 0, re-runs that failed 0")


def alive(group: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, 0)
        return True
    return False


def done(out: Path) -> dict[str, str]:
    """Finished steps of a pipeline, and the digest of what each wrote."""
    if not (out / "pipeline.json").exists():
        return {}
    steps = read_json(out / "pipeline.json", dict, EzhoiDiffusionError, "")["steps"]
    return {name: step["output"] for name, step in steps.items() if step["output"]}


@pytest.mark.skipif(KILLS == 1, reason="takes minutes: set EZHOI_DIFFUSION_KILLS=20")
def test_a_pipeline_is_killed(small_world, make_ezhoi, tmp_path):
    """With its step, or alone: then the step saves and ends by itself."""
    torch.save({"model_state_dict": make_ezhoi().model.state_dict()}, tmp_path / "ckpt.pt")
    quick = [
        "--max-images", "12", "--num-test-images", "3", "--inference-steps", "5", "--scale-factor", "4", "--folds", "3",
        "--train-steps", "10",
    ]  # fmt: skip
    flags = [*ezhoi_flags(small_world, evaluate=True), "--resume", str(tmp_path / "ckpt.pt"), *quick]
    log = tmp_path / "log"

    def start(out: Path) -> subprocess.Popen[bytes]:
        command = [
            sys.executable,
            "-m",
            "ezhoi_diffusion",
            "pipeline",
            "main_tip_finetune.py",
            *flags,
            "--out",
            str(out),
        ]
        with log.open("wb") as file:
            return subprocess.Popen(
                command, cwd=MINIATURE, stdout=file, stderr=file, start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
            )  # fmt: skip

    begun = time.monotonic()
    assert start(tmp_path / "whole" / "out").wait(900) == 0, log.read_text()
    seconds, reference = time.monotonic() - begun, done(tmp_path / "whole" / "out")
    names = {str(path.relative_to(tmp_path / "whole")) for path in (tmp_path / "whole").rglob("*")}
    chance, kills, runs = random.Random("pipeline"), 0, 0
    while kills < KILLS:
        runs += 1
        out = tmp_path / f"cut-{runs}" / "out"
        for _ in range(5):
            before = done(out)
            process = start(out)
            time.sleep(chance.uniform(0.1, 0.4) * seconds)
            if kills % 2:
                process.kill()
            else:
                os.killpg(process.pid, signal.SIGKILL)
            if process.wait(60) != -signal.SIGKILL:
                assert process.returncode == 0, log.read_text()
                break
            kills += 1
            deadline = time.monotonic() + 120
            while alive(process.pid):
                assert time.monotonic() < deadline, "a step goes on without its pipeline"
                time.sleep(0.05)
            assert before.items() <= done(out).items(), "a finished step is lost"
        finished = len(done(out))
        assert start(out).wait(900) == 0, log.read_text()
        assert log.read_text().count("up to date") >= finished, "a finished step ran again"
        assert done(out).keys() == reference.keys()
        assert {str(path.relative_to(out.parent)) for path in out.parent.rglob("*")} == names, "something is left"
    print(f"pipeline: {kills} kills over {runs} runs, lost 0, left 0, re-runs that failed 0")
