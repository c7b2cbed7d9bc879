"""`ezhoi-diffusion capture SCRIPT … --out DIR`: the features of a split."""

from __future__ import annotations

import argparse

from ezhoi_diffusion.cli.arguments import Container, add_out, add_script, split_script_flags
from ezhoi_diffusion.cli.run import run_with
from ezhoi_diffusion.errors import EzhoiDiffusionError

DESCRIPTION = """\
Store adapter_feat, pairs, labels and text features of a split in a folder, for train, tune, compare and test. EZ-HOI loads its
checkpoint and its data as usual; the run ends after the pass. Run it again to resume an interrupted capture."""
EPILOG = """\
examples (… stands for the script's own flags, as in EZ-HOI's scripts/):
  ezhoi-diffusion capture main_tip_finetune.py … --resume CKPT --out FEATURES
  ezhoi-diffusion capture main_tip_finetune.py … --eval --resume CKPT --out TEST_FEATURES
  ezhoi-diffusion capture main_tip_finetune.py … --eval --resume CKPT --split train --out FEATURES

The same as: ezhoi-diffusion run SCRIPT … --plugin capture --capture DIR [--capture-split SPLIT] [--max-images N]
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.usage = "%(prog)s SCRIPT … --out DIR [--split train|test] [--max-images N]"
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    _declare(parser)
    add_script(parser)


def _declare(parser: Container) -> None:
    add_out(parser, "folder for the features (required)")
    parser.add_argument(
        "--split", choices=("train", "test"), help="split to capture (default: train, or test with --eval)"
    )
    parser.add_argument("--max-images", type=int, metavar="N", help="capture the first N images only")


def run(args: argparse.Namespace) -> int:
    """Run the script with the capture plugin."""
    flags = split_script_flags(args, _declare)
    if args.out is None:
        raise EzhoiDiffusionError("--out DIR is missing: name the folder for the features")
    return run_with(args.script, [*flags, *capture_flags(str(args.out), args.split, args.max_images)])


def capture_flags(folder: str, split: str | None, max_images: int | None) -> list[str]:
    """Flags of `run` that capture a split into `folder`."""
    flags = ["--plugin", "capture", "--capture", folder]
    if split is not None:
        flags += ["--capture-split", split]
    if max_images is not None:
        flags += ["--max-images", str(max_images)]
    return flags
