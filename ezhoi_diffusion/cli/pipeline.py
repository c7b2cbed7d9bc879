"""`ezhoi-diffusion pipeline SCRIPT … --out DIR`: capture, train, tune, test and compare in one command."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ezhoi_diffusion.cli.arguments import Container, add_out, add_script, split_script_flags
from ezhoi_diffusion.cli.compare import BRIDGES
from ezhoi_diffusion.errors import EzhoiDiffusionError
from ezhoi_diffusion.evaluation.defaults import FOLDS, MIN_FOLDS

DESCRIPTION = """\
Go from an EZ-HOI checkpoint to a compared bridge: capture the training images, train, choose bridges and settings by
cross-validation (`ezhoi-diffusion tune`), capture the test images, test on a few, compare on all. Use it in the EZ-HOI folder,
with the flags of your test script (--eval --resume CKPT …). Run it again to resume, or to redo only what changed: it compares
contents of files and all flags, not only whether files exist."""
EPILOG = """\
what the numbers mean: see `ezhoi-diffusion train --help`. --max-images is for a quick look, not for a result.

DIR gets:
  features/       adapter_feat of the training images      test/     diffusion_effect.png, effect.json, a report
  bridge/         the bridge, its checkpoints and curve    report/   report.html, report.json, pictures
  tuned/          the chosen bridges, with the evidence    features-test/  adapter_feat of the test images
Statistics of the features: ezhoi-diffusion doctor DIR/features --out STATISTICS

example:
  ezhoi-diffusion pipeline main_tip_finetune.py … --eval --resume CKPT --out DIR
"""
TRAINING_FLAGS = ("--recipe", "--denoiser", "--train-steps", "--scale-factor", "--inference-steps")
OWN_FLAGS = ("--plugin", "--capture", "--compare", "--bridge")  # what the pipeline sets itself


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.usage = "%(prog)s SCRIPT … --out DIR [options]"
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    _declare(parser)
    add_script(parser)


def _declare(parser: Container) -> None:
    add_out(parser, "folder for all results (required)")
    add = parser.add_argument
    add("--max-images", type=int, metavar="N", help="capture the first N images of each split only")
    add("--recipe", metavar="NAME", help="gentle (default), paper, paired, scored or guide")
    add("--denoiser", metavar="NAME", help="mlp (default), unet1d, gaussian, empirical, or a plugin's")
    add("--train-steps", type=int, metavar="N", help="optimizer steps")
    add("--scale-factor", type=float, metavar="S", help="norm of every network input (5)")
    add("--inference-steps", type=int, metavar="N", help="the guide's: start_timestep N and num_steps N")
    add(
        "--folds",
        type=int,
        default=FOLDS,
        metavar="K",
        help=f"folds of `tune` ({FOLDS}); 3 take a quarter of the time of 5",
    )
    add(
        "--num-images", "--num-test-images", type=int, default=20, metavar="N",
        help="images of the test step (20)",
    )  # fmt: skip
    add(
        "--bridges",
        default=BRIDGES,
        metavar="NAME[=DIR],…",
        help=f"what to compare beside the tuned bridge (default: {BRIDGES})",
    )


def run(args: argparse.Namespace) -> int:
    """Make the steps and run them."""
    from ezhoi_diffusion.pipeline.run import run_steps
    from ezhoi_diffusion.pipeline.steps import make_steps

    flags = split_script_flags(args, _declare)
    if args.out is None:
        raise EzhoiDiffusionError("--out DIR is missing: name the folder for features, bridge and results")
    given = {word.partition("=")[0] for word in flags}
    for flag in OWN_FLAGS:
        if flag in given:
            raise EzhoiDiffusionError(f"the pipeline sets {flag} itself: leave it out, or use `ezhoi-diffusion run`")
    for flag, value in (("--max-images", args.max_images), ("--num-images", args.num_images)):
        if value is not None and value < 1:
            raise EzhoiDiffusionError(f"{flag} must be at least 1, not {value}")
    if args.folds < MIN_FOLDS:
        raise EzhoiDiffusionError(f"--folds must be at least {MIN_FOLDS}, not {args.folds}")
    training = _training_flags(args)
    _check_training(training)
    steps = make_steps(
        args.script,
        flags if "--eval" in given else [*flags, "--eval"],
        args.out,
        training=training,
        bridges=args.bridges,
        num_images=args.num_images,
        folds=args.folds,
        max_images=args.max_images,
    )
    done = run_steps(steps, args.out)
    summary = f"{done} of {len(steps)} steps ran" if done else "everything was up to date"
    print(f"{summary}; see {args.out / 'report' / 'report.html'} and {args.out / 'test' / 'diffusion_effect.png'}")
    return 0


def _training_flags(args: argparse.Namespace) -> list[str]:
    values = {flag: getattr(args, flag[2:].replace("-", "_")) for flag in TRAINING_FLAGS}
    return [word for flag, value in values.items() if value is not None for word in (flag, str(value))]


def _check_training(flags: Sequence[str]) -> None:
    """Raise what `train` would raise for these flags, before the capture."""
    from ezhoi_diffusion.cli import build_parser
    from ezhoi_diffusion.cli.train import train_config

    line = ["train", "FEATURES", "--out", "BRIDGE", *flags]
    train_config(build_parser(line).parse_args(line))
