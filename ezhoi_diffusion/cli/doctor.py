"""`ezhoi-diffusion doctor [FEATURES] [BRIDGE] [-- SCRIPT FLAGS]`: what is wrong, and what to do about it."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.usage = "%(prog)s [-h] [--json] [FEATURES] [BRIDGE] [-- main_tip_finetune.py HOST FLAGS …]"
    parser.description = """\
Look at the environment, and at captured features, a bridge and a host's command line where they are given, alone or
together. One line a finding: how bad it is, what was found, and after -> what to do. Nothing is changed, and the host
is not run: its script is read up to where it has parsed its flags. Reading all features takes a while."""
    parser.epilog = """\
levels:  ok · note (worth knowing) · warning (may cost results, or stop some runs) · problem (does not work)
exit status:  1 if there is a problem, else 0

examples, from the EZ-HOI folder:
  ezhoi-diffusion doctor
  ezhoi-diffusion doctor FEATURES BRIDGE
  ezhoi-diffusion doctor BRIDGE -- main_tip_finetune.py … --eval --resume CKPT
"""
    parser.add_argument(
        "folders", nargs="*", type=Path, metavar="FEATURES, BRIDGE", help="told apart by what they hold"
    )
    parser.add_argument("--json", action="store_true", help="machine-readable: a list of name, level, found, fix")


def run(args: argparse.Namespace) -> int:
    """Print the findings."""
    from dataclasses import asdict

    from ezhoi_diffusion.doctor.checks import run_checks

    findings = []
    for finding in run_checks(args.folders, args.script_line):
        findings.append(finding)
        if not args.json:
            fix = f" -> {finding.fix}" if finding.fix else ""
            print(f"{finding.level:8} {finding.name:25} {finding.found}{fix}".replace("\n", " "), flush=True)
    count = Counter(finding.level for finding in findings)
    if args.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        print(f"\n{count['problem']} problems, {count['warning']} warnings, {count['note']} notes, {count['ok']} ok")
    return 1 if count["problem"] else 0
