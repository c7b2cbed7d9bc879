"""`ezhoi-diffusion patch EZ-HOI-DIR`: the three lines a fork needs, in or out."""

from __future__ import annotations

import argparse
from pathlib import Path


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.description = """\
Write three lines into main_tip_finetune.py, so that `python main_tip_finetune.py` knows our flags by itself:
the import, the flags, and the joining. Without our flags it then runs as before. No other file is touched.
You need this only if you want to keep calling python: `ezhoi-diffusion run` needs no patch, and runs a script
with these lines as one without."""
    parser.epilog = """\
examples:
  ezhoi-diffusion patch ~/EZ-HOI              show the change and make it
  ezhoi-diffusion patch ~/EZ-HOI --check      change nothing; say what is the case
  ezhoi-diffusion patch ~/EZ-HOI --revert     take our lines out; all else stays, byte for byte
  cd ~/EZ-HOI && python main_tip_finetune.py … --eval --resume CKPT --plugin diffusion --bridge BRIDGE

Where the lines belong is found by the structure of the script, so most forks are understood; another is refused, and
the message says what to add by hand. Patching twice is patching once.

exit status: 0 done, or with --check: patched; 1 with --check: not patched, and can be; 2 cannot be patched.
"""
    parser.add_argument("folder", type=Path, metavar="EZ-HOI-DIR", help="the folder that has main_tip_finetune.py")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="write nothing; say whether the script is patched")
    what.add_argument("--revert", action="store_true", help="take out the lines that this command has put in")


def run(args: argparse.Namespace) -> int:
    """Patch, check or revert."""
    from ezhoi_diffusion.ezhoi.patch import PatchError, diff, patched, read_script, reverted, write_script

    path, before = read_script(args.folder)
    try:
        after = reverted(before) if args.revert else patched(before)
        clean = before == reverted(before)
    except PatchError as error:
        raise PatchError(f"{path} was left as it is: {error}") from error
    if args.check:
        state = "patched" if after == before else "not patched" if clean else "patched in part, or elsewhere than now"
        print(f"{path}: {state}{'' if after == before else '; `ezhoi-diffusion patch` can do it'}")
        return int(after != before)
    if after == before:
        print(f"{path}: {'has no line of ours' if args.revert else 'is patched already'}, nothing to do")
        return 0
    print(diff(path, before, after))
    write_script(path, after)
    print(f"{path}: {'our lines are out' if args.revert else 'patched; take the lines out again with --revert'}")
    return 0
