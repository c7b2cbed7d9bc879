"""`ezhoi-diffusion patch EZ-HOI-DIR`: add or remove the three lines with which a script takes our flags."""

from __future__ import annotations

import argparse
from pathlib import Path

DESCRIPTION = """\
Write three lines into main_tip_finetune.py, so that `python main_tip_finetune.py` knows our flags itself: the import, the
flags, and the call that attaches. Without our flags the script runs as before. No other file changes. You need this only to
keep calling python: `ezhoi-diffusion run` works without it, and runs a patched script too."""
EPILOG = """\
The place of the lines follows from the structure of the script, which fits most forks. A script that does not fit is refused,
and the message says what to add by hand. Patching a patched script changes nothing.

exit status:
  0   done, or with --check: patched
  1   with --check: not patched yet
  2   the script cannot be patched

examples:
  ezhoi-diffusion patch ~/EZ-HOI              show the change and make it
  ezhoi-diffusion patch ~/EZ-HOI --check      only say whether the script is patched
  ezhoi-diffusion patch ~/EZ-HOI --revert     remove our lines; the rest stays, byte for byte
  cd ~/EZ-HOI && python main_tip_finetune.py … --eval --resume CKPT --plugin diffusion=BRIDGE
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.add_argument("folder", type=Path, metavar="EZ-HOI-DIR", help="folder of main_tip_finetune.py")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="change nothing; say whether the script is patched")
    what.add_argument("--revert", action="store_true", help="remove the lines that this command wrote")


def run(args: argparse.Namespace) -> int:
    """Patch, check or revert."""
    from ezhoi_diffusion.ezhoi.patch import PatchError, diff, patched, read_script, reverted, write_script

    path, before = read_script(args.folder)
    try:
        after = reverted(before) if args.revert else patched(before)
        clean = before == reverted(before)
    except PatchError as error:
        raise PatchError(f"{path} was not changed: {error}") from error
    if args.check:
        state = (
            "patched" if after == before else "not patched" if clean else "partly patched, or patched in another place"
        )
        print(f"{path}: {state}{'' if after == before else '; run `ezhoi-diffusion patch` to patch it'}")
        return int(after != before)
    if after == before:
        print(f"{path}: {'has none of our lines' if args.revert else 'is already patched'}, nothing to do")
        return 0
    print(diff(path, before, after))
    write_script(path, after)
    print(f"{path}: {'our lines are removed' if args.revert else 'patched; --revert removes the lines'}")
    return 0
