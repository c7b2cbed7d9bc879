"""`ezhoi-diffusion demo`: the whole way on a miniature EZ-HOI."""

from __future__ import annotations

import argparse
from itertools import count
from pathlib import Path

DEFAULT_OUT = "ezhoi-diffusion-demo"


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.description = """\
Train a miniature EZ-HOI on scenes of real handwritten digits, capture its features, train a diffusion bridge, and
compare the host with and without it: the code that serves the real EZ-HOI, all of it, in about two minutes on
two cores. It prints what it measures, gain or loss."""
    parser.add_argument(
        "--out", type=Path, default=None, metavar="DIR", help=f"folder for the results (a new ./{DEFAULT_OUT})"
    )


def run(args: argparse.Namespace) -> int:
    """Walk."""
    from ezhoi_diffusion.demo.run_demo import run_demo

    free = (Path(DEFAULT_OUT + (f"-{number}" if number > 1 else "")) for number in count(1))
    run_demo(args.out or next(path for path in free if not path.exists()))
    return 0
