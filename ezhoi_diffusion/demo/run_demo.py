"""Run the whole workflow on a miniature EZ-HOI, with the commands that a user runs in EZ-HOI."""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path

from ezhoi_diffusion.demo.world import ezhoi_args, make_world
from ezhoi_diffusion.errors import EzhoiDiffusionError
from ezhoi_diffusion.files import require_unused

MINIATURE = Path(__file__).parent / "miniature"
SCRIPT = "main_tip_finetune.py"
# Small, so that all of it takes minutes
NUM_TRAIN, NUM_TEST = 450, 300
EPOCHS, TRAIN_STEPS = 5, "500"
FOLDS = "3"  # of `tune`: five take four times as long
STUDY = (
    "One seed of a toy says nothing about HICO-DET. The study in ezhoi_diffusion/bench/README.md says what several worlds and "
    "splits show together. For your EZ-HOI, compare there."
)


class DemoError(EzhoiDiffusionError):
    """A step of the demo failed; the message shows the command and the end of its output."""


def run_demo(out: Path) -> None:
    """Make a small data set, train the miniature, capture features, train a bridge and compare. All files go to `out`.

    Raises:
        DemoError: `out` is in use, or a step fails.
    """
    require_unused(out, DemoError)
    out.mkdir(parents=True, exist_ok=True)
    out = out.resolve()
    start = time.monotonic()
    world, checkpoints, results = (out / name for name in ("world", "checkpoints", "results"))
    _say(1, "a world of 31 verbs and 16 objects made of parts, in HICO-DET's layout; pretrained detector and towers")
    make_world(world, n_train=NUM_TRAIN, n_test=NUM_TEST)
    training = ["run", SCRIPT, *ezhoi_args(world, evaluate=False), "--output-dir", str(checkpoints)]

    _say(2, "fine-tune the miniature EZ-HOI on seen classes, as its own script does")
    _command([*training, "--epochs", str(EPOCHS)])
    checkpoint = max(checkpoints.glob("ckpt_*.pt"))

    _say(3, "capture, train a bridge, test and compare: the pipeline, as you run it in an EZ-HOI folder")
    testing = [*ezhoi_args(world, evaluate=True), "--output-dir", str(checkpoints), "--resume", str(checkpoint)]
    _command(["pipeline", SCRIPT, *testing, "--out", str(results), "--train-steps", TRAIN_STEPS, "--folds", FOLDS])

    print(f"\n{verdict(results / 'report' / 'report.json')}")
    print(
        f"{time.monotonic() - start:.0f} s. Results are in {results}: report/report.html, test/diffusion_effect.png, bridge/."
    )


def _say(step: int, what: str) -> None:
    print(f"\n[{step}/3] {what}", flush=True)


def _command(arguments: list[str]) -> None:
    """Run `ezhoi-diffusion arguments…` in the miniature's folder, and show its output as it comes."""
    if arguments[0] in ("run", "pipeline"):
        arguments = [*arguments, "--port", free_port()]
    print(f"$ ezhoi-diffusion {shlex.join(_shortened(arguments))}", flush=True)
    # One thread: more slow down matrices this small, badly so where cores are shared.
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "ezhoi_diffusion", *arguments], cwd=MINIATURE, env=environment, stdout=subprocess.PIPE, text=True
    )  # fmt: skip
    lines: list[str] = []
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        if not line.startswith(("Namespace(", "Rank ")):  # printed by EZ-HOI's script
            print(line, end="", flush=True)
    if process.wait():
        raise DemoError(
            f"`ezhoi-diffusion {shlex.join(arguments)}` failed with status {process.returncode}:\n{''.join(lines[-30:])}"
        )


def _shortened(arguments: list[str]) -> list[str]:
    """Leave out the miniature's own flags, which say nothing about this package."""
    shown = ("--epochs", "--resume", "--eval", "--out", "--train-steps")
    kept = ["…"]
    for position, word in enumerate(arguments):
        if word in shown:
            kept.append(word)
            kept += [a for a in arguments[position + 1 : position + 2] if not a.startswith("--")]
    return [*arguments[:2], *kept]


def free_port() -> str:
    """A port that no other process listens on."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return str(probe.getsockname()[1])


def verdict(report: Path) -> str:
    """What happened in this demo, gain or loss, and where to read what happens in general."""
    found = json.loads(report.read_text())["headline"]
    return f"In this small world: {found}\n{STUDY}"
