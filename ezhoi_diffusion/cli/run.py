"""`ezhoi-diffusion run SCRIPT …`: an unmodified EZ-HOI script, with plugins."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ezhoi_diffusion.cli.arguments import add_script

DESCRIPTION = """\
Run an EZ-HOI script (main_tip_finetune.py, inference.py) as python would, with plugins attached. Use it in the EZ-HOI folder,
in the environment in which the script runs. All flags stand after the script. To list them, the script's and ours:
  ezhoi-diffusion run main_tip_finetune.py --help"""
EPILOG = """\
examples (… stands for the script's own flags, as in EZ-HOI's scripts/):
  evaluate with a bridge:
    ezhoi-diffusion run main_tip_finetune.py … --eval --resume CKPT --plugin diffusion=BRIDGE
  compare in one pass, with a report:
    ezhoi-diffusion run main_tip_finetune.py … --eval --resume CKPT --bridge BRIDGE \\
      --compare none,mean_shift,diffusion --out REPORT
  capture the train split (or use `ezhoi-diffusion capture`):
    ezhoi-diffusion run main_tip_finetune.py … --resume CKPT --plugin capture --capture FEATURES
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.usage = "%(prog)s [-h] SCRIPT …"
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    add_script(parser)


def run(args: argparse.Namespace) -> int:
    """Run the script and return its exit status."""
    return run_with(args.script, args.arguments)


def run_with(script: Path, flags: Sequence[str]) -> int:
    """Run `script` with `flags` and return its exit status."""
    from ezhoi_diffusion.ezhoi.launch import run_script

    try:
        run_script(script, flags)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        raise
    return 0
