"""The whole way on the miniature, by the very commands that a user gives for the real host."""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path

from ezhoi_diffusion.demo.world import host_args, make_world
from ezhoi_diffusion.errors import EzhoiDiffusionError
from ezhoi_diffusion.files import require_unused

HOST = Path(__file__).parent / "miniature"
SCRIPT = "main_tip_finetune.py"
EPOCHS = 6


class DemoError(EzhoiDiffusionError):
    """A step of the demo failed; the message names the command and shows its last words."""


def run_demo(out: Path) -> None:
    """Make a world, train the miniature, capture, train a bridge, compare; everything lands in `out`.

    Raises DemoError where `out` is in use or a step fails.
    """
    require_unused(out, DemoError)
    out.mkdir(parents=True, exist_ok=True)
    out = out.resolve()
    begun = time.monotonic()
    world, checkpoints, results = (out / name for name in ("world", "checkpoints", "results"))
    _say(1, "a world of handwritten digits: a person's digit is the verb, the other the object; contrastive towers")
    make_world(world)
    training = ["run", SCRIPT, *host_args(world, evaluate=False), "--output-dir", str(checkpoints)]

    _say(2, "fine-tune the miniature EZ-HOI on seen classes, as its own script does")
    _command([*training, "--epochs", str(EPOCHS)])
    checkpoint = max(checkpoints.glob("ckpt_*.pt"))

    _say(3, "capture, train a bridge, test and compare: the pipeline, as you would give it in an EZ-HOI folder")
    testing = [*host_args(world, evaluate=True), "--output-dir", str(checkpoints), "--resume", str(checkpoint)]
    _command(["pipeline", SCRIPT, *testing, "--out", str(results)])

    print(f"\n{verdict(results / 'report' / 'report.json')}")
    print(
        f"{time.monotonic() - begun:.0f} s. Look into {results}: report/report.html, test/diffusion_effect.png, bridge/."
    )


def _say(step: int, what: str) -> None:
    print(f"\n[{step}/3] {what}", flush=True)


def _command(arguments: list[str]) -> None:
    """Run `ezhoi-diffusion arguments…` in the miniature's folder; its tables and bars are shown as they come."""
    if arguments[0] in ("run", "pipeline"):
        arguments = [*arguments, "--port", _free_port()]
    print(f"$ ezhoi-diffusion {shlex.join(_shortened(arguments))}", flush=True)
    # the host's own prints go on stdout; only what is ours, or an error, is worth a reader's time here
    # one thread: matrices this small only lose by more, and lose badly where cores are shared
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "ezhoi_diffusion", *arguments], cwd=HOST, env=environment, stdout=subprocess.PIPE, text=True
    )  # fmt: skip
    lines: list[str] = []
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        if not line.startswith(("Namespace(", "Rank ")):
            print(line, end="", flush=True)
    if process.wait():
        raise DemoError(
            f"`ezhoi-diffusion {shlex.join(arguments)}` failed with status {process.returncode}:\n{''.join(lines[-30:])}"
        )


def _shortened(arguments: list[str]) -> list[str]:
    """The command without the miniature's own flags, which say nothing about the package."""
    ours = ("--epochs", "--resume", "--eval", "--out", "--train-steps")
    kept = ["…"]
    for position, word in enumerate(arguments):
        if word in ours:
            kept.append(word)
            kept += [a for a in arguments[position + 1 : position + 2] if not a.startswith("--")]
    return [*arguments[:2], *kept]


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return str(probe.getsockname()[1])


def verdict(report: Path) -> str:
    """What the comparison says of the bridge, in words, gain or loss."""
    found = json.loads(report.read_text())["headline"]
    return f"In this small world: {found} One seed of a toy says nothing about HICO-DET: compare on your own host."
