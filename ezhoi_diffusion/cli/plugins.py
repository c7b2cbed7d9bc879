"""`ezhoi-diffusion plugins`: what is installed, and whether it works."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.description = "List the plugins found in this environment. Broken ones are listed with the reason."
    parser.epilog = """\
environment variables:
  EZHOI_DIFFUSION_DISABLE=a,b   do not import these plugins (* for every installed one)
  EZHOI_DIFFUSION_ALLOW=a,b     of the installed plugins, import only these
  EZHOI_DIFFUSION_STRICT=1      a broken plugin is an error
"""
    parser.add_argument("--json", action="store_true", help="machine-readable")
    parser.add_argument("--no-plugin", action="append", default=[], metavar="NAME", help="do not even import this one")


def run(args: argparse.Namespace) -> int:
    """Print the list."""
    from ezhoi_diffusion.plugins import PluginHost

    found = list(PluginHost(args.no_plugin).found.values())
    if args.json:
        print(json.dumps([asdict(info) for info in found], indent=2))
        return 0
    rows = [("name", "version", "status", "source", "hooks")]
    rows += [(i.name, i.version, i.status, i.source, ", ".join(i.hooks) or i.reason) for i in found]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]]))
    return 0
