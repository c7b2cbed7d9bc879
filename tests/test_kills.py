"""kill -9 at any moment, many times: a new process resumes and ends with the same result.

EZHOI_DIFFUSION_KILLS=100 asks for that many random kills of each kind instead of a few.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch._dynamo  # the first optimizer of a process imports it, and that takes seconds

from ezhoi_diffusion.diffusion.bridge import DiffusionBridge
from ezhoi_diffusion.errors import Interrupted
from ezhoi_diffusion.features.store import FeatureStore, FeatureStoreError
from ezhoi_diffusion.features.writer import FeatureWriter, finish_store
from ezhoi_diffusion.files import REPLACED, new_folder
from ezhoi_diffusion.training.checkpoint import read_newest
from ezhoi_diffusion.training.processes import exit_distributed
from ezhoi_diffusion.training.trainer import TrainingError, train
from helpers import TESTS, crash
from helpers.kills import ended, processes, serve
from helpers.miniature import MINIATURE, ezhoi_flags, free_port, launch
from helpers.stores import META, D, image
from helpers.trainings import QUICK, equal, low_rank, weights

KILLS = int(os.environ.get("EZHOI_DIFFUSION_KILLS", "6"))
STRIDE = 1 if KILLS > 6 else 11  # between the calls that are aimed at
PATIENCE = 120.0  # seconds

LEAST_AIMED = {"capture": 16, "training": 31}  # 18 and 35 were counted with a stride of 11

pytestmark = pytest.mark.slow
PAIRS = [3, 0, 5, 2, 0, 4, 1, 6, 0, 2, 7, 3]
TEXT = torch.randn(7, D, generator=torch.Generator().manual_seed(0))
# nearly all of the time goes into saving
SAVING = replace(QUICK, train_steps=8, checkpoint_every=2, val_every=3)

_server = pytest.fixture(scope="module", autouse=True)(serve)


def capture(folder: Path, pause: float = 0.0) -> None:
    """What the capture plugin does to a folder in a run over all images."""
    writer = FeatureWriter(folder, META, rows_per_shard=4)
    for index in range(writer.next_index, len(PAIRS)):
        writer.keep_ezhoi_tensors({"text": TEXT, "context/ctx.0": torch.ones(2)})
        writer.add(image(index, PAIRS[index]))
        time.sleep(pause)
    writer.flush()
    finish_store(folder)
    writer.close()


def training(folder: Path) -> None:
    torch.set_num_threads(1)
    train(low_rank(), SAVING, folder, resume=True)


def job(work, folder: Path, call: int | None) -> None:
    if call is not None:
        crash.crash_at(call)
    work(folder)


def started(work, folder: Path, call: int | None = None):
    process = processes.Process(target=job, args=(work, folder, call))
    process.start()
    return process


def wait_until(happened, process) -> None:
    """Raises AssertionError where the process that is to make it happen has ended, or takes too long."""
    deadline = time.monotonic() + PATIENCE
    lives = process.is_alive if hasattr(process, "is_alive") else lambda: process.poll() is None
    while not happened():
        assert lives(), "it ended before"
        assert time.monotonic() < deadline, "it hangs"
        time.sleep(0.005)


def finished(work, folder: Path) -> bool:
    return (folder / ("index.json" if work is capture else "config.json")).exists()


def content(work, folder: Path):
    """What has to be equal, bit for bit."""
    if work is capture:
        store = FeatureStore(folder)
        names = ("adapter_feat", "labels", "pairing", "boxes", "gt_boxes")
        return {**{name: store.rows(name) for name in names}, **store.ezhoi}, [i["name"] for i in store.images]
    DiffusionBridge.from_pretrained(folder)
    return weights(folder), None


def same(work, folder: Path, reference: Path) -> bool:
    (a, listed), (b, expected) = content(work, folder), content(work, reference)
    left = [path for path in folder.rglob("*") if path.name.endswith((".tmp", ".staged", ".replaced", ".committed"))]
    return equal(a, b) and listed == expected and not left


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Both works, never interrupted, and how long they take."""
    folders, seconds = {}, {}
    for work in (capture, training):
        folders[work] = tmp_path_factory.mktemp("whole") / work.__name__
        for _ in range(2):  # the second is not slowed down by imports
            begun = time.monotonic()
            folder = folders[work].with_name(f"{work.__name__}-{len(seconds)}") if work in seconds else folders[work]
            assert ended(started(work, folder)) == 0
            seconds[work] = time.monotonic() - begun
    return folders, seconds


@pytest.mark.parametrize("work", [capture, training])
def test_killed_at_every_call_that_changes_the_disk(work, reference, tmp_path):
    """Each run dies at one call further than the one before, until one does not die."""
    kills = 0
    for call in itertools.count(0, STRIDE):
        folder = tmp_path / str(call)
        code = ended(started(work, folder, call))
        if code == 0:
            break
        assert code == -signal.SIGKILL
        kills += 1
        # what a kill during the resumed run leaves, too
        if call % 2 and not finished(work, folder):
            kills += ended(started(work, folder, call // 2)) == -signal.SIGKILL
        if work is training or not finished(work, folder):
            assert ended(started(work, folder)) == 0, f"killed at call {call}, it does not go on"
        assert same(work, folder, reference[0][work]), f"killed at call {call}, it ends otherwise"
    print(f"{work.__name__}: {kills} aimed kills, runs lost 0")
    assert kills >= LEAST_AIMED[work.__name__]


def rewriting(folder: Path) -> None:
    with new_folder(folder) as staged:
        (staged / "name").write_text("new")


def test_a_folder_that_is_replaced_is_there_at_every_moment(tmp_path):
    kills = 0
    for call in itertools.count():
        folder = tmp_path / str(call) / "step"
        folder.mkdir(parents=True)
        (folder / "name").write_text("old")
        code = ended(started(rewriting, folder, call))
        assert code in (0, -signal.SIGKILL)
        aside = folder.with_name(folder.name + REPLACED)
        assert ((folder if folder.exists() else aside) / "name").read_text() in ("old", "new")
        rewriting(folder)
        assert [path.name for path in folder.parent.iterdir()] == ["step"]
        assert (folder / "name").read_text() == "new"
        if code == 0:
            break
        kills += 1
    assert kills >= 5


STOPS_AT = 2  # the first step that has a checkpoint of its own


def asked_and_killed(folder: Path, call: int | None) -> None:
    """SIGTERM at a step whose checkpoint was just written, then a kill at a call that changes the disk."""
    torch.set_num_threads(1)

    def on_step(step):
        if step == STOPS_AT:
            if call is not None:
                crash.crash_at(call)
            os.kill(os.getpid(), signal.SIGTERM)

    try:
        train(low_rank(), SAVING, folder, resume=True, on_step=on_step)
    except Interrupted as stopped:
        sys.exit(stopped.status)


def test_asked_to_end_where_a_checkpoint_was_just_written_and_killed_there(reference, tmp_path):
    """The checkpoint is not written again, let alone removed."""
    for call in itertools.count():
        folder = tmp_path / str(call)
        process = processes.Process(target=asked_and_killed, args=(folder, call))
        process.start()
        code = ended(process)
        assert code in (75, -signal.SIGKILL)
        _, state = read_newest(folder / "checkpoints")
        assert state["step"] == STOPS_AT
        assert ended(started(training, folder)) == 0
        assert same(training, folder, reference[0][training])
        if code == 75:
            break
    assert call == 1  # the lock's removal alone changes the disk


@pytest.mark.parametrize("work", [capture, training])
def test_killed_at_random_moments(work, reference, tmp_path):
    """Killed again and again, also while it goes on, until it was let through once."""
    chance, kills, runs = random.Random(work.__name__), 0, 0
    while kills < KILLS:
        folder = tmp_path / str(runs)
        runs += 1
        for _ in range(4):
            process = started(work, folder)
            time.sleep(chance.uniform(0.0, 0.9) * reference[1][work])
            process.kill()
            kills += ended(process) == -signal.SIGKILL
            if finished(work, folder):
                break
        if work is training or not finished(work, folder):
            assert ended(started(work, folder)) == 0
        assert same(work, folder, reference[0][work])
    print(f"{work.__name__}: {kills} random kills over {runs} runs, runs lost 0")


# -- asked to end --------------------------------------------------------------------------------------------------


def slowly(folder: Path) -> None:
    torch.set_num_threads(1)
    train(low_rank(), SAVING, folder, resume=True, on_step=lambda step: time.sleep(0.05))


def test_sigterm_is_a_checkpoint_and_a_status_that_schedulers_know(reference, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "test_kills", str(out)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(TESTS), *sys.path))}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: list(out.glob("checkpoints/step-*/manifest.json")), process)
    process.terminate()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75, said
    assert "with a checkpoint in" in said
    assert "--resume to go on" in said
    assert "Traceback" not in said
    assert ended(started(training, out)) == 0
    assert same(training, out, reference[0][training])


def main(out: str) -> int:
    """Raise the error of a stopped training inside the command line."""
    from ezhoi_diffusion import cli

    cli.build_parser = lambda argv: type(
        "P", (), {"parse_args": lambda self, argv: type("A", (), {"run": work, "command": "train"})}
    )()

    def work(args):
        slowly(Path(out))
        return 0

    return cli.main([])


def test_one_folder_has_one_writer(tmp_path):
    process = started(slowly, tmp_path / "out")
    wait_until(lambda: list((tmp_path / "out").glob("checkpoints/step-*")), process)
    with pytest.raises(TrainingError, match="somebody else is writing into"):
        train(low_rank(), SAVING, tmp_path / "out", resume=True)
    assert ended(process) == 0

    process = processes.Process(target=capture, args=(tmp_path / "features", 0.3))
    process.start()
    wait_until(lambda: list((tmp_path / "features").glob("shard-*.json")), process)
    with pytest.raises(FeatureStoreError, match="somebody else is writing into"):
        FeatureWriter(tmp_path / "features", META)
    process.kill()
    ended(process)
    FeatureWriter(tmp_path / "features", META).close()  # the lock died with its process


def member(rank: int, out: Path, port: str, pause: float) -> None:
    """One of two processes of a training."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    os.environ.update(shared, RANK=str(rank), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    config = replace(QUICK, train_steps=60, checkpoint_every=50, val_every=25)
    try:
        train(low_rank(), config, out, resume=True, on_step=lambda step: time.sleep(pause))
    except Interrupted as stopped:
        exit_distributed(stopped.status)
    exit_distributed()


def two(out: Path, pause: float = 0.0):
    port = free_port()
    both = [processes.Process(target=member, args=(rank, out, port, pause)) for rank in range(2)]
    for process in both:
        process.start()
    return both


def test_two_processes_stop_at_the_same_step_when_one_is_asked(tmp_path):
    assert [ended(process) for process in two(tmp_path / "whole")] == [0, 0]
    both = two(tmp_path / "out", 0.05)
    wait_until(lambda: list((tmp_path / "out").glob("best/config.json")), both[1])  # step 25
    both[1].terminate()
    assert [ended(process) for process in both] == [75, 75]
    (checkpoint,) = (tmp_path / "out" / "checkpoints").iterdir()
    assert checkpoint.name != "step-000000050"
    assert [ended(process) for process in two(tmp_path / "out")] == [0, 0]
    assert equal(weights(tmp_path / "out"), weights(tmp_path / "whole"))


# -- the launcher --------------------------------------------------------------------------------------------------


def test_a_capture_through_the_launcher_is_killed_and_asked_to_end(small_world, tmp_path):
    flags = [*ezhoi_flags(small_world, evaluate=True), "--capture-split", "train", "--plugin", "capture", "--capture"]
    whole = launch(*flags, str(tmp_path / "whole"))
    assert whole.returncode == 0, whole.stderr
    seam = "import sys, ezhoi_diffusion.features.writer as w; w.FeatureWriter.__init__.__kwdefaults__['seconds_per_shard'] = 0.0"
    command = f"{seam}; from ezhoi_diffusion.cli import main; sys.exit(main(sys.argv[1:]))"
    folder = tmp_path / "cut"
    for number in (signal.SIGKILL, signal.SIGTERM):
        wanted = len(list(folder.glob("shard-*.json"))) + 3
        process = subprocess.Popen(
            [sys.executable, "-c", command, "run", "main_tip_finetune.py", *flags, str(folder)],
            cwd=MINIATURE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        wait_until(lambda wanted=wanted: len(list(folder.glob("shard-*.json"))) >= wanted, process)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
        assert process.returncode == (-9 if number == signal.SIGKILL else 75), said
    assert "run the same command again to resume" in said
    assert "Traceback" not in said
    done = launch(*flags, str(folder))
    assert done.returncode == 0, done.stderr
    assert "is unfinished, resuming at image" in done.stdout
    assert torch.equal(FeatureStore(folder).adapter_feat(), FeatureStore(tmp_path / "whole").adapter_feat())


def spawned_by(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def test_two_processes_of_a_capture_are_asked_to_end_through_their_parent(small_world, tmp_path):
    """And one of them is killed; with another number of processes the capture is refused."""
    flags = [*ezhoi_flags(small_world, evaluate=False), "--plugin", "capture", "--capture"]
    whole = launch(*flags, str(tmp_path / "whole"))
    assert whole.returncode == 0, whole.stderr
    folder = tmp_path / "cut"
    for number in (signal.SIGTERM, signal.SIGKILL):
        process = subprocess.Popen(
            [sys.executable, "-m", "ezhoi_diffusion", "run", "main_tip_finetune.py", *flags, str(folder), "--world-size", "2"],
            cwd=MINIATURE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        wait_until(lambda: (folder / "ezhoi.json").exists() and list(folder.glob(".lock-001")), process)
        if number == signal.SIGTERM:
            process.terminate()
        else:
            os.kill(spawned_by(process.pid)[0], number)
        _, said = process.communicate(timeout=90)
        assert process.returncode == (75 if number == signal.SIGTERM else 1), said
        for lock in folder.glob(".lock-*"):
            lock.unlink()
    refused = launch(*flags, str(folder))
    assert refused.returncode == 2
    assert "processes: there 2, now 1" in refused.stderr
    done = launch(*flags, str(folder), "--world-size", "2")
    assert done.returncode == 0, done.stderr
    assert torch.allclose(
        FeatureStore(folder).adapter_feat(), FeatureStore(tmp_path / "whole").adapter_feat(), atol=1e-5
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
