"""`ezhoi-diffusion push BRIDGE USER/NAME`: a bridge and its model card on the Hugging Face Hub."""

from __future__ import annotations

import argparse
from pathlib import Path

DESCRIPTION = """\
Upload a bridge to the Hugging Face Hub in one commit: config.json, its safetensors files and a model card. Nothing else of the
folder is sent. A bridge that cannot be loaded is refused. Look first with --dry-run, which needs no network."""
EPILOG = """\
the model card (README.md), written from the files:
  results        the table of --report, as a gain, a loss or neither; without --report it says that nothing was measured. A
                 report that does not compare this very bridge is refused
  EZ-HOI         backbone, split, hashes of weights and context vectors: other runs refuse the bridge
  how it's made  recipe, training, features. Everything in config.json becomes public

use the bridge by its name, at a commit or tag if you like:
  --bridge hf:USER/NAME      --compare none,diffusion=hf:USER/NAME@REVISION      DiffusionBridge.from_pretrained("USER/NAME")
  A commit (@COMMIT) always gives the same bytes. Checksums detect damage; they do not say who wrote a file.

environment variables:
  HF_TOKEN        a token with write access, or log in once with `hf auth login`
  HF_ENDPOINT     another Hub
  HF_HUB_OFFLINE  1 uses what was downloaded before

examples:
  ezhoi-diffusion compare TEST_FEATURES --bridge BRIDGE --out REPORT
  ezhoi-diffusion push BRIDGE USER/NAME --report REPORT --license mit --dry-run
  ezhoi-diffusion push BRIDGE USER/NAME --report REPORT --license mit
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    add = parser.add_argument
    add("bridge", type=Path, metavar="BRIDGE", help="folder of a finished bridge of any kind")
    add("repository", metavar="USER/NAME", help="repository; created if it does not exist")
    add("--report", type=Path, metavar="DIR", help="folder of a report about this bridge, for the card")
    add("--private", action="store_true", help="create a private repository; an existing public one is refused")
    add("--license", metavar="ID", help="license by the Hub's name, for example mit; without it the card states none")
    add("--dry-run", action="store_true", help="print the card and the list of files, send nothing")


def run(args: argparse.Namespace) -> int:
    """Upload, or show what would be uploaded."""
    from ezhoi_diffusion.hub import PREFIX, build_upload, push
    from ezhoi_diffusion.report.hub_card import model_card, read_report, require_loadable

    require_loadable(args.bridge)
    report = None if args.report is None else read_report(args.report)
    card = model_card(args.bridge, report, repo_id=args.repository, license=args.license)
    if args.dry_run:
        files = build_upload(args.bridge, args.repository, card=card)
        print(card)
        for name, content in files.items():
            print(f"{len(content):12,} bytes  {name}")
        return 0
    url = push(args.bridge, args.repository, card=card, private=args.private)
    print(f"pushed: {url}; use it with --bridge {PREFIX}{args.repository}")
    return 0
