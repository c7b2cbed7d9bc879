"""`ezhoi-diffusion run SCRIPT …`: an unmodified EZ-HOI script, with plugins."""

from __future__ import annotations

import argparse
from pathlib import Path


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.description = """\
Run an EZ-HOI script (main_tip_finetune.py, inference.py) as python would, with our flags added to its own.
Give it from the EZ-HOI folder, in the environment in which the script runs. All flags, ours too, stand after
the script; `ezhoi-diffusion run main_tip_finetune.py --help` lists both."""
    parser.epilog = """\
examples (… stands for the script's own flags, as in EZ-HOI's scripts/):
  capture the train split:
    ezhoi-diffusion run main_tip_finetune.py … --resume CKPT --plugin capture --capture FEATURES
  evaluate with a bridge:
    ezhoi-diffusion run main_tip_finetune.py … --eval --resume CKPT --plugin diffusion --bridge BRIDGE
  compare in one pass:
    ezhoi-diffusion run main_tip_finetune.py … --eval --resume CKPT --bridge BRIDGE \\
      --compare none,mean_shift,diffusion --report REPORT
"""
    parser.add_argument("script", type=Path, help="the script, e.g. main_tip_finetune.py")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="…", help="its flags and ours")


def run(args: argparse.Namespace) -> int:
    """Run the script; its exit status is ours."""
    from ezhoi_diffusion.ezhoi.launch import run_script

    try:
        run_script(args.script, args.arguments)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        raise
    return 0
