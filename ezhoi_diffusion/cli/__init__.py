"""The command line, one file a command. Heavy imports wait until a command runs."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from importlib import import_module

COMMANDS = ("run", "train", "demo", "plugins")


def build_parser() -> argparse.ArgumentParser:
    """The parser of `ezhoi-diffusion`."""
    parser = argparse.ArgumentParser(
        prog="ezhoi-diffusion",
        description="Close the gap between EZ-HOI's visual and text features with a diffusion bridge, without editing EZ-HOI.",
        epilog="""\
the way, from an EZ-HOI folder:
  ezhoi-diffusion demo                       see all of it on a miniature first (3 minutes, no data needed)
  ezhoi-diffusion run main_tip_finetune.py <its flags> --resume CKPT --plugin capture --capture FEATURES
  ezhoi-diffusion train FEATURES --out BRIDGE
  ezhoi-diffusion run main_tip_finetune.py <its flags> --eval --resume CKPT --bridge BRIDGE --compare none,diffusion
""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in COMMANDS:
        import_module(f"ezhoi_diffusion.cli.{name}").add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status, 2 for an error that the user can act on."""
    from ezhoi_diffusion.errors import EzhoiDiffusionError

    logging.basicConfig(format="ezhoi-diffusion: %(message)s", level=logging.WARNING)
    args = build_parser().parse_args(argv)
    try:
        status: int = args.run(args)
    except EzhoiDiffusionError as error:
        sys.stderr.write(f"ezhoi-diffusion: error: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("ezhoi-diffusion: interrupted\n")
        return 130
    return status
