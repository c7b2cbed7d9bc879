"""`ezhoi-diffusion pipeline SCRIPT … --out DIR`: capture, statistics, training, test and comparison in one go."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ezhoi_diffusion.cli.compare import BRIDGES as DEFAULT
from ezhoi_diffusion.errors import EzhoiDiffusionError

if TYPE_CHECKING:
    from ezhoi_diffusion.pipeline import Step

DESCRIPTION = """\
From an EZ-HOI checkpoint to a compared bridge, in one command and without a question: capture the training images, look at
the features, train, capture the test images, test, compare. Give it in the EZ-HOI folder, with the flags of your test script
(`--eval --resume CKPT …`). What is done and still valid is skipped: by the contents of checkpoint, weights
and the host's own sources, the names, sizes and times of the files in data folders, and all flags, not by a file's existence. An interrupted step goes on where it was."""
EPILOG = """\
what the numbers mean:
  --max-images       the first N images of each split: for a quick look, not for a result. Expect at least 15 pairs an image,
                     most of them background
  --train-steps      optimizer steps. The default network needs one or two thousand on texts (5000 on visual rows), not the
                     500,000 of the 1-D UNet
  --scale-factor     norm of every network input, the same in training and at eval, stored with the bridge; it says how
                     large a row is beside the schedule's noise
  --inference-steps  the training guide's one number is two things: the level at which a feature enters, which is how
                     strongly it is bridged, and the number of network evaluations, which is what that costs. N sets both;
                     more is not better. Left out, the recipe decides (5 evaluations from level 100)

in DIR:
  features/       adapter_feat of the training images      statistics/   figures of them (gap, means, norms)
  bridge/         the bridge, its checkpoints and curve    test/         diffusion_effect.png, effect.json
  features-test/  adapter_feat of the test images          report/       report.html, report.json, pictures

example:
  ezhoi-diffusion pipeline main_tip_finetune.py … --eval --resume CKPT --out DIR
"""
UNREAD = ("output_dir", "port", "num_workers", "print_interval")  # flags of the host that change no feature


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    _declare(parser)
    parser.add_argument("script", type=Path, help="the host's script, main_tip_finetune.py")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="…", help="its flags, and those above")


def _declare(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--out", type=Path, metavar="DIR", help="folder for all results (required)")
    add("--max-images", type=int, metavar="N", help="the first N images of each split only")
    add("--recipe", metavar="NAME", help="gentle (default), paper, paired or guide; see `ezhoi-diffusion train --help`")
    add("--denoiser", metavar="NAME", help="the network: mlp (default), unet1d, gaussian, empirical, or a plugin's")
    add("--train-steps", type=int, metavar="N", help="optimizer steps")
    add("--scale-factor", type=float, metavar="S", help="norm of every network input (5)")
    add("--inference-steps", type=int, metavar="N", help="start level and number of evaluations, both N")
    add("--num-test-images", type=int, default=20, metavar="N", help="images of the test step (20)")
    add("--bridges", default=DEFAULT, metavar="none,NAME[=DIR],…", help="what to compare")


def run(args: argparse.Namespace) -> int:
    """Make the steps and run them."""
    from ezhoi_diffusion.cli.arguments import accept_underscores
    from ezhoi_diffusion.pipeline import run_steps

    flags = argparse.ArgumentParser(add_help=False, allow_abbrev=False)  # ours stand among the host's, in any order
    _declare(flags)
    accept_underscores(flags)
    args, host_flags = flags.parse_known_args(args.arguments, args)
    if args.out is None:
        raise EzhoiDiffusionError("--out DIR is missing: the folder for features, bridge and results")
    given = {word.partition("=")[0] for word in host_flags}
    for ours in ("--plugin", "--capture", "--compare", "--bridge"):
        if ours in given:
            raise EzhoiDiffusionError(f"the pipeline sets {ours} itself: leave it out, or use `ezhoi-diffusion run`")
    steps = make_steps(args, host_flags if "--eval" in given else [*host_flags, "--eval"])
    done = run_steps(steps, args.out)
    what = f"{done} of {len(steps)} steps were done" if done else "everything was up to date"
    print(f"{what}; look at {args.out / 'test' / 'diffusion_effect.png'} and {args.out / 'report' / 'report.html'}")
    return 0


def make_steps(args: argparse.Namespace, host_flags: list[str]) -> list[Step]:
    """The five steps for these flags. Raises EzhoiDiffusionError for a flag that a later step would refuse."""
    from importlib.metadata import version

    from ezhoi_diffusion.cli import build_parser
    from ezhoi_diffusion.cli.train import train_config
    from ezhoi_diffusion.ezhoi.launch import read_flags
    from ezhoi_diffusion.pipeline import Step, content

    work: Path = args.out
    folders = {name: work / name for name in ("features", "bridge", "features-test", "test", "report")}
    package = {"package": version("ezhoi-diffusion")}
    given = vars(read_flags(args.script, host_flags))  # its defaults as well
    _require_usable(given, args)
    host = {**package, "sources of the host": source_digest(args.script)}
    host |= {f"--{name}": content(value, work) for name, value in given.items() if name not in UNREAD}
    limit = [] if args.max_images is None else ["--max-images", str(args.max_images)]

    def capture(name: str, split: str) -> Step:
        ours = ["--plugin", "capture", "--capture", str(folders[name].resolve()), "--capture-split", split, *limit]
        return Step(
            name, f"capture the {split} images", folders[name], ["run", str(args.script), *host_flags, *ours],
            {**host, "split": split, "max_images": args.max_images},
        )  # fmt: skip

    chosen = {
        "--recipe": args.recipe, "--denoiser": args.denoiser, "--train-steps": args.train_steps,
        "--scale-factor": args.scale_factor, "--inference-steps": args.inference_steps,
    }  # fmt: skip
    training = [part for flag, value in chosen.items() if value is not None for part in (flag, str(value))]
    line = ["train", "FEATURES", "--out", "BRIDGE", *training]
    train_config(build_parser(line).parse_args(line))  # refused now, not after the capture
    blocked = [part for name in given.get("no_plugin", []) for part in ("--no-plugin", name)]
    named = {
        f"contents of {folder}": content(folder, work) for folder in _require_bridges(args.bridges, given["no_plugin"])
    }
    features, test_features, bridge = (str(folders[name]) for name in ("features", "features-test", "bridge"))
    looks = ["test", test_features, "--bridge", bridge, "--out", str(folders["test"])]
    return [
        capture("features", "train"),
        Step(
            "bridge", "train the bridge", folders["bridge"], ["train", features, "--out", bridge, *training],
            {**package, "flags": training}, ["features"], ["--resume"],
        ),
        capture("features-test", "test"),
        Step(
            "test", "test on a few images", folders["test"],
            [*looks, "--num-test-images", str(args.num_test_images)], {**package, "images": args.num_test_images},
            ["bridge", "features-test"],
        ),
        Step(
            "report", "compare on all test images", folders["report"],
            [
                "compare", test_features, "--bridge", bridge, "--bridges", args.bridges, *blocked,
                "--out", str(folders["report"]),
            ],
            {**package, "bridges": args.bridges, **named}, ["bridge", "features-test"],
        ),
    ]  # fmt: skip


def _require_usable(given: dict[str, Any], args: argparse.Namespace) -> None:
    """Raises EzhoiDiffusionError for what would fail, or be worth nothing, hours later."""
    if given.get("dataset") != "hicodet":
        raise EzhoiDiffusionError(
            f"the host has no evaluation of {given.get('dataset')} to test and compare by: capture and train as single steps, and "
            f"run --cache with and without --plugin diffusion"
        )
    if not given.get("resume") or not Path(given["resume"]).is_file():
        raise EzhoiDiffusionError(
            f"--resume must name a trained checkpoint, not {given.get('resume')!r}: without one the host starts from random weights"
        )
    for flag, value in (("--max-images", args.max_images), ("--num-test-images", args.num_test_images)):
        if value is not None and value < 1:
            raise EzhoiDiffusionError(f"{flag} must be at least 1, not {value}")


def _require_bridges(names: str, blocked: list[str]) -> list[str]:
    """Raises EzhoiDiffusionError for a name that the comparison would refuse; returns the folders that are named."""
    from ezhoi_diffusion.evaluation.variants import known_bridges
    from ezhoi_diffusion.hub import local
    from ezhoi_diffusion.plugins import PluginManager

    bridges = known_bridges(PluginManager(blocked))
    parts = [part.strip().partition("=") for part in names.split(",") if part.strip()]
    for name, _, folder in parts:
        if name != "none":
            _ = bridges[name]
        if folder and not local(folder).is_dir():
            raise EzhoiDiffusionError(f"--bridges: there is no folder {folder}")
    return [str(local(folder)) for _, _, folder in parts if folder]


def source_digest(script: Path) -> str:
    """SHA-256 over the Python files in the script's folder, by name and content; lines that `patch` wrote do not count."""
    import hashlib

    from ezhoi_diffusion.ezhoi.patch import PatchError, reverted

    digest, folder = hashlib.sha256(), script.resolve().parent
    for path in sorted(folder.rglob("*.py")):
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        data = path.read_bytes()
        with contextlib.suppress(PatchError):
            data = reverted(data)
        digest.update(f"{path.relative_to(folder)} {hashlib.sha256(data).hexdigest()}\n".encode())
    return digest.hexdigest()
