"""`ezhoi-diffusion doctor [FEATURES] [BRIDGE] [-- SCRIPT …]`: what is wrong, and what to do."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path

from ezhoi_diffusion.cli.arguments import add_out

DESCRIPTION = """\
Check the environment and, where given, captured features, a bridge and the flags of a script, alone or together. Each line has
a level, a name, what was found and, after ->, what to do. Of features it also prints statistics. Nothing is changed, and EZ-HOI
does not run: its script is read up to its flags. Reading all features takes a while."""
EPILOG = """\
levels:
  ok, note (worth knowing), warning (may cost results, or stop some runs), problem (does not work)
exit status:
  1 if there is a problem, otherwise 0

statistics of features:
  pairs              at least 15 an image, most of them background: EZ-HOI keeps at least three humans and three objects whatever
                     their score. That is 570,000 or more on HICO-DET's 38,000 training images, not the guide's 50-100,000
  norm of the mean   about 0.7-0.9 for CLIP text; the guide's 0.01-0.05 is impossible
  common to all      small after the visual mean. Where it is large after the text mean, subtracting that mean (recipe guide)
                     leaves a common vector in the features, and such bridges hurt wherever they were measured

examples, in an EZ-HOI folder:
  ezhoi-diffusion doctor
  ezhoi-diffusion doctor FEATURES BRIDGE
  ezhoi-diffusion doctor FEATURES --out STATISTICS
  ezhoi-diffusion doctor BRIDGE -- main_tip_finetune.py … --eval --resume CKPT
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.usage = "%(prog)s [-h] [--json] [--out DIR] [FEATURES] [BRIDGE] [-- SCRIPT …]"
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.add_argument(
        "folders", nargs="*", type=Path, metavar="FEATURES, BRIDGE", help="folders; their contents say which is which"
    )
    parser.add_argument(
        "--json", action="store_true", help="print the findings as a list of name, level, found, fix, details"
    )
    add_out(parser, "write statistics.json and statistics.png of FEATURES there")


def run(args: argparse.Namespace) -> int:
    """Print the findings, and below them the statistics of the features."""
    from dataclasses import asdict

    from ezhoi_diffusion.doctor.checks import kind_of, run_checks
    from ezhoi_diffusion.doctor.finding import FEATURES
    from ezhoi_diffusion.errors import EzhoiDiffusionError

    if args.out is not None:
        from ezhoi_diffusion.files import check_writable  # imports torch, which may be what is broken

        if FEATURES not in map(kind_of, args.folders):
            raise EzhoiDiffusionError("--out is for statistics of captured features: give their folder too")
        check_writable(args.out)
    findings = []
    for finding in run_checks(args.folders, args.script_line, args.out):
        findings.append(finding)
        if not args.json:
            print(finding, flush=True)
    count = Counter(finding.level for finding in findings)
    if args.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        print(f"\n{count['problem']} problems, {count['warning']} warnings, {count['note']} notes, {count['ok']} ok")
    return 1 if count["problem"] else 0
