"""`ezhoi-diffusion plugins`: what is installed, and whether it works; `plugins new NAME`: the package of a new one."""

from __future__ import annotations

import argparse
import json
import shlex
from dataclasses import asdict
from pathlib import Path

NEW = """\
Write an installable package with a bridge that works, as a plugin: one module, its tests, README.md and pyproject.toml. It
passes its tests, ruff and mypy --strict as it is. INTEGRATION.md, "Writing a plugin", says the rest."""


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
    actions = parser.add_subparsers(dest="action", metavar="new", title="to begin one of your own")
    new = actions.add_parser("new", help="plugins new NAME: write the package of a new plugin", description=NEW)
    new.add_argument("name", metavar="NAME", help="of the package; with underscores that of its bridge")
    new.add_argument("--out", type=Path, metavar="DIR", help="the package's folder, a new one (default: NAME)")


def run(args: argparse.Namespace) -> int:
    """Print the list, or write a new one."""
    if args.action == "new":
        return _new(args.name, args.out)
    from ezhoi_diffusion.plugins import PluginManager

    found = list(PluginManager(args.no_plugin).found.values())
    if args.json:
        print(json.dumps([asdict(info) for info in found], indent=2))
        return 0
    rows = [("name", "version", "status", "source", "hooks")]
    rows += [(i.name, i.version, i.status, i.source, ", ".join(i.hooks) or i.reason) for i in found]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]]))
    return 0


def _new(name: str, out: Path | None) -> int:
    from ezhoi_diffusion.testing.scaffold import new_plugin

    bridge, folder = new_plugin(name, out)
    print(f"plugin '{bridge}': {folder}. Next:", flush=True)
    print(f"  pip install -e {shlex.quote(f'{folder}[test]')}")
    print(f"  pytest {shlex.quote(str(folder))}")
    print(f"  ezhoi-diffusion fit {bridge} FEATURES --out BRIDGE", flush=True)
    return 0
