"""`ezhoi-diffusion push BRIDGE USER/NAME`: a bridge and its model card, on the Hugging Face Hub."""

from __future__ import annotations

import argparse
from pathlib import Path

DESCRIPTION = """\
Put a bridge on the Hugging Face Hub: config.json, the safetensors files that it names, and a model card, in one commit.
Nothing else of the folder is sent (no checkpoints, no trackers, no pictures), and a bridge that is not whole is refused."""
EPILOG = """\
the card (README.md) is written anew each time, from the files alone:
  what was measured   the table of --report, in words a gain, a loss, or neither; without --report it says that nothing was
                      measured. A report in which this very bridge was not compared is refused
  the host            backbone, split, hashes of weights and context vectors: elsewhere the bridge is refused
  how it was made     recipe, training, rows: all of config.json, which becomes public with it
Values from files stand there as code. Look at it first with --dry-run, which needs no network.

whoever has the name uses it wherever a bridge's folder is taken, at a fixed commit or tag if they like:
  --bridge hf:USER/NAME      --compare none,diffusion=hf:USER/NAME@REVISION      DiffusionBridge.from_pretrained("USER/NAME")
A seal notices damage; it does not say who wrote a file. A pin (@COMMIT) gives the same bytes for good.

environment:
  HF_TOKEN        a token that may write, or log in once with `hf auth login`
  HF_ENDPOINT     another Hub;   HF_HUB_OFFLINE=1 takes what was fetched before

examples:
  ezhoi-diffusion compare TEST_FEATURES --bridge BRIDGE --bridges none,identity,mean_shift,diffusion --report REPORT
  ezhoi-diffusion push BRIDGE USER/NAME --report REPORT --license mit --dry-run
  ezhoi-diffusion push BRIDGE USER/NAME --report REPORT --license mit
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.add_argument("bridge", type=Path, metavar="BRIDGE", help="the folder of a finished bridge, of any kind")
    parser.add_argument("repository", metavar="USER/NAME", help="the repository; it is made if it is not there")
    parser.add_argument(
        "--report", type=Path, metavar="DIR", help="a report of a comparison of this bridge, for the card"
    )
    parser.add_argument(
        "--private", action="store_true", help="make it private; a repository that is public is refused"
    )
    parser.add_argument(
        "--license", metavar="ID", help="by the Hub's names, e.g. mit; without it the card says that none is stated"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the card and the list of files, and send nothing")


def run(args: argparse.Namespace) -> int:
    """Upload, or show what would be."""
    from ezhoi_diffusion.hub import CARD, PREFIX, package, push

    if args.dry_run:
        files = package(args.bridge, args.repository, comparison=args.report, license=args.license)
        print(files[CARD].decode())
        for name, content in files.items():
            print(f"{len(content):12,} bytes  {name}")
        return 0
    options = {"comparison": args.report, "private": args.private, "license": args.license}
    print(f"pushed: {push(args.bridge, args.repository, **options)}; use it with --bridge {PREFIX}{args.repository}")
    return 0
