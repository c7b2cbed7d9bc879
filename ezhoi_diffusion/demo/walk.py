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

HOST = Path(__file__).parent / "host"
SCRIPT = "main_tip_finetune.py"
EPOCHS = 6
TRAIN_STEPS = 1500
ROWS_DRAWN = 3000
CHANCE = 0.5  # points of mAP; another --seed of the host alone moved it by about 3


class DemoError(EzhoiDiffusionError):
    """A step of the demo failed; the message names the command and shows its last words."""


def walk(out: Path) -> None:
    """Make a world, train the miniature, capture, train a bridge, compare; everything lands in `out`.

    Raises DemoError where `out` is in use or a step fails.
    """
    if out.exists() and any(out.iterdir()):
        raise DemoError(f"{out} is not empty: give another --out")
    out.mkdir(parents=True, exist_ok=True)
    out = out.resolve()
    begun = time.monotonic()
    world, checkpoints, features, bridge, report = (
        out / name for name in ("world", "checkpoints", "features", "bridge", "report")
    )
    _say(1, "a world of handwritten digits: a person's digit is the verb, the other the object; contrastive towers")
    make_world(world)
    training = ["run", SCRIPT, *host_args(world, evaluate=False), "--output-dir", str(checkpoints)]
    testing = ["run", SCRIPT, *host_args(world, evaluate=True), "--output-dir", str(checkpoints)]

    _say(2, "fine-tune the miniature EZ-HOI on seen classes, as its own script does")
    _command([*training, "--epochs", str(EPOCHS)])
    checkpoint = max(checkpoints.glob("ckpt_*.pt"))
    resume = ["--resume", str(checkpoint)]

    _say(3, "capture adapter_feat of the training images")
    _command([*training, *resume, "--plugin", "capture", "--capture", str(features)])

    _say(4, "train the diffusion bridge")
    _command(["train", str(features), "--out", str(bridge), "--train-steps", str(TRAIN_STEPS)])

    _say(5, "compare with and without, on the test images")
    variants = ["--bridge", str(bridge), "--compare", "none,identity,mean_shift,diffusion", "--report", str(report)]
    _command([*testing, *resume, *variants])

    _draw_effect(features, bridge, report / "effect.png")
    print(f"\n{verdict(report / 'comparison.json')}")
    print(
        f"{time.monotonic() - begun:.0f} s. Look at {report}: comparison.json, comparison.png, effect.png; and {bridge}."
    )


def _say(step: int, what: str) -> None:
    print(f"\n[{step}/5] {what}", flush=True)


def _command(arguments: list[str]) -> None:
    """Run `ezhoi-diffusion arguments…` in the miniature's folder; its tables and bars are shown as they come."""
    if arguments[0] == "run":
        arguments = [*arguments, "--port", _free_port()]
    print(f"$ ezhoi-diffusion {shlex.join(_shortened(arguments))}", flush=True)
    # the host's own prints go on stdout; only what is ours, or an error, is worth a reader's time here
    # one thread: matrices this small only lose by more, and lose badly where cores are shared
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    process = subprocess.run(
        [sys.executable, "-m", "ezhoi_diffusion", *arguments], cwd=HOST, env=environment, stdout=subprocess.PIPE, text=True,
        check=False,
    )  # fmt: skip
    if process.returncode:
        raise DemoError(
            f"`ezhoi-diffusion {shlex.join(arguments)}` failed with status {process.returncode}:\n{process.stdout[-2000:]}"
        )
    print(
        "\n".join(line for line in process.stdout.splitlines() if not line.startswith(("Namespace(", "Rank "))),
        flush=True,
    )


def _shortened(arguments: list[str]) -> list[str]:
    """The command without the miniature's own flags, which say nothing about the package."""
    if arguments[0] != "run":
        return arguments
    ours = ("--epochs", "--resume", "--eval", "--plugin", "--capture", "--bridge", "--compare", "--report")
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


def _draw_effect(features: Path, bridge: Path, path: Path) -> None:
    from ezhoi_diffusion.diffusion.bridge import DiffusionBridge
    from ezhoi_diffusion.evaluation.plots import plot_effect
    from ezhoi_diffusion.features.store import FeatureStore

    store = FeatureStore(features)
    rows = store.adapter_feat()[:ROWS_DRAWN]
    plot_effect(rows, DiffusionBridge.from_pretrained(bridge)(rows), store.text, path)


def verdict(comparison: Path) -> str:
    """What the comparison says of the bridge, in words, gain or loss."""
    found = json.loads(comparison.read_text())
    changes = {name: groups["full"] for name, groups in found["difference"].items()}
    change = changes.pop("diffusion")
    control, best = max(changes.items(), key=lambda item: item[1])
    if abs(change) < CHANCE:
        outcome = f"left full mAP where it was ({change:+.2f} points, which may be chance)"
    else:
        moved, against = (
            "raised" if change > 0 else "lowered",
            "more than" if change > best + CHANCE else "no more than",
        )
        outcome = f"{moved} full mAP by {abs(change):.2f} points, {against} the best control ({control}, {best:+.2f})"
    return f"In this small world the bridge {outcome}. One seed of a toy says nothing about HICO-DET: compare on your own host."
