"""`ezhoi-diffusion plugins`: the installed plugins; `plugins new NAME`: the package of a new one."""

from __future__ import annotations

import argparse
import json
import shlex
from dataclasses import asdict
from pathlib import Path

from ezhoi_diffusion.cli.arguments import add_no_plugin, add_out
from ezhoi_diffusion.cli.terminal import print_table

DESCRIPTION = """\
List the plugins of this environment: name, version, status, source and hooks. A broken plugin is listed with the reason.
`plugins new NAME` starts a plugin of your own."""
EPILOG = """\
environment variables:
  EZHOI_DIFFUSION_DISABLE=a,b   do not import these plugins (* for every installed one)
  EZHOI_DIFFUSION_ALLOW=a,b     of the installed plugins, import only these
  EZHOI_DIFFUSION_STRICT=1      a broken plugin is an error

examples:
  ezhoi-diffusion plugins
  ezhoi-diffusion plugins new my-bridge
"""
NEW = """\
Write an installable package with a working bridge as a plugin: one module, its tests, README.md and pyproject.toml. It passes
its tests, ruff and mypy --strict as it is. plugins/README.md is the tutorial."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.add_argument("--json", action="store_true", help="print the list as JSON")
    add_no_plugin(parser)
    actions = parser.add_subparsers(dest="action", metavar="new", title="start a plugin")
    new = actions.add_parser("new", help="plugins new NAME: write the package of a new plugin", description=NEW)
    new.add_argument("name", metavar="NAME", help="name of the package; with underscores, name of its bridge")
    add_out(new, "folder of the package, a new one (default: NAME)")


def run(args: argparse.Namespace) -> int:
    """Print the list, or write a new plugin."""
    if args.action == "new":
        return _new(args.name, args.out)
    from ezhoi_diffusion.plugins import PluginManager

    found = list(PluginManager(args.no_plugin).found.values())
    if args.json:
        print(json.dumps([asdict(info) for info in found], indent=2))
        return 0
    print_table(
        ("name", "version", "status", "source", "hooks"),
        [(one.name, one.version, one.status, one.source, ", ".join(one.hooks) or one.reason) for one in found],
    )
    return 0


def _new(name: str, out: Path | None) -> int:
    from ezhoi_diffusion.testing.scaffold import new_plugin

    bridge, folder = new_plugin(name, out)
    print(f"plugin '{bridge}': {folder}. Next:")
    print(f"  pip install -e {shlex.quote(f'{folder}[test]')}")
    print(f"  pytest {shlex.quote(str(folder))}")
    print(f"  ezhoi-diffusion train FEATURES --bridge {bridge} --out BRIDGE", flush=True)
    return 0
