"""`ezhoi-diffusion demo`: everything on a miniature EZ-HOI."""

from __future__ import annotations

import argparse
from itertools import count
from pathlib import Path

from ezhoi_diffusion.cli.arguments import add_out

DESCRIPTION = """\
Train a miniature EZ-HOI on drawn scenes of 31 verbs and 16 objects, capture its features, train a diffusion bridge, choose among
all bridges, and compare EZ-HOI without and with them. The code is that for the real EZ-HOI. It takes minutes and needs no data."""
DEFAULT_OUT = "ezhoi-diffusion-demo"


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.description = DESCRIPTION
    add_out(parser, f"folder for the results (default: a new ./{DEFAULT_OUT})")


def run(args: argparse.Namespace) -> int:
    """Run the demo."""
    from ezhoi_diffusion.demo.run_demo import run_demo

    candidates = (Path(DEFAULT_OUT + (f"-{number}" if number > 1 else "")) for number in count(1))
    run_demo(args.out or next(path for path in candidates if not path.exists()))
    return 0
