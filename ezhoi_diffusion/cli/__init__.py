"""The command line: one file for each command. Heavy imports wait until a command runs."""

from __future__ import annotations

import argparse
import errno
import os
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import nullcontext
from importlib import import_module
from typing import NoReturn

GRACE = 5.0  # seconds for threads that others have started
SCRIPTS = ("run", "capture")  # commands that run EZ-HOI's script in this process
# Errors of a full, read-only or broken disk. They are never a mistake of the program.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO)

GROUPS = {
    "run EZ-HOI": {
        "run": "run an EZ-HOI script with plugins, without editing it",
        "capture": "store the features of a split",
        "pipeline": "capture, train, test and compare in one command",
        "patch": "add the three lines with which a fork takes our flags itself",
    },
    "make a bridge": {
        "train": "train a diffusion bridge, fit a plugin's bridge, or distil one",
        "tune": "choose bridges and settings by cross-validation on training images",
        "import": "convert files of the training guide (.pkl, .pt)",
    },
    "measure": {
        "compare": "score bridges on captured test features, with intervals",
        "test": "look at a bridge on a few images: pictures, top 5, a verdict",
    },
    "share": {
        "push": "upload a bridge and its model card to the Hugging Face Hub",
    },
    "look after it": {
        "demo": "try everything on a miniature EZ-HOI, without data",
        "doctor": "check environment, features, bridge and flags; name the fix",
        "plugins": "list plugins, or start one: plugins new NAME",
    },
}
HIDDEN = {"bench": "measure what a bridge costs on this machine, next to the guide's system"}
COMMANDS = {name: summary for group in [*GROUPS.values(), HIDDEN] for name, summary in group.items()}

DESCRIPTION = """\
Close the gap between EZ-HOI's visual and text features with a diffusion bridge, without editing EZ-HOI."""
WORKFLOW = """\
typical workflow, in an EZ-HOI folder (… stands for the flags of your test script):
  ezhoi-diffusion demo                                  try it first: some minutes, no data
  ezhoi-diffusion capture main_tip_finetune.py … --eval --resume CKPT --split train --out FEATURES
  ezhoi-diffusion train FEATURES --out BRIDGE
  ezhoi-diffusion run main_tip_finetune.py … --eval --resume CKPT --bridge BRIDGE --compare none,diffusion
  ezhoi-diffusion pipeline main_tip_finetune.py … --eval --resume CKPT --out DIR     all of that at once

`ezhoi-diffusion COMMAND --help` explains a command.
"""


def build_parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of `ezhoi-diffusion`. Only the command in `argv` declares its flags, because that may be slow."""
    from ezhoi_diffusion.cli.arguments import accept_underscores
    from ezhoi_diffusion.cli.terminal import Parser

    listed = [
        f"{title}:\n" + "\n".join(f"  {name:10} {summary}" for name, summary in group.items())
        for title, group in GROUPS.items()
    ]
    parser = Parser(
        prog="ezhoi-diffusion",
        usage="%(prog)s COMMAND …",
        description=DESCRIPTION,
        epilog="\n\n".join([*listed, WORKFLOW]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(
        dest="command", metavar="COMMAND", required=True, help=argparse.SUPPRESS, prog=parser.prog
    )
    chosen = next((word for word in argv if not word.startswith("-")), None)
    for name in COMMANDS:
        command = commands.add_parser(name, formatter_class=argparse.RawDescriptionHelpFormatter)
        if name == chosen:
            module = import_module(f"ezhoi_diffusion.cli.{name}")
            module.configure(command)
            accept_underscores(command)
            command.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    Returns:
        0, or 1 where `doctor` finds a problem and `patch --check` an unpatched script; 2 for an error that the user can
        fix; 75 where the same command resumes later; 130 for Ctrl-C.
    """
    from ezhoi_diffusion.cli.terminal import accept_all_characters, escaped_stdout, log_warnings
    from ezhoi_diffusion.errors import EzhoiDiffusionError, Interrupted

    accept_all_characters()
    log_warnings()
    own, script_line = _split_script_line(list(sys.argv[1:] if argv is None else argv))
    runs_script = next(iter(own), None) in SCRIPTS
    try:
        with nullcontext() if runs_script else escaped_stdout():
            args = build_parser(own).parse_args(own)
            args.script_line = script_line
            status: int = args.run(args)
    except Interrupted as error:
        sys.stderr.write(f"ezhoi-diffusion: {error}\n")
        return error.status
    except EzhoiDiffusionError as error:
        sys.stderr.write(f"ezhoi-diffusion: error: {error}\n")
        return error.status
    except OSError as error:
        if error.errno in DISK_ERRORS:
            sys.stderr.write(f"ezhoi-diffusion: error: the disk refused ({error}): free space and try again\n")
        elif error.filename is not None and not runs_script:  # a script's error keeps its traceback
            sys.stderr.write(f"ezhoi-diffusion: error: {error}\n")
        else:
            raise
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("ezhoi-diffusion: interrupted\n")
        return 130
    return status


def command() -> NoReturn:
    """The console script: run `main` as a process. A thread that a plugin has left behind does not hold it, which Python would."""
    is_own = bool(sys.argv[1:2]) and sys.argv[1] not in SCRIPTS
    if is_own:
        # Before torch is imported: its threads then sleep while they wait. By default they spin, and where others use the same
        # cores a step of a training took up to ten times as long.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    status = main()
    if is_own:  # a script's threads may have work to finish
        threading.Thread(target=_end, args=(status,), daemon=True).start()
    sys.exit(status)


def _end(status: int) -> None:
    """End the process if threads hold it for GRACE seconds."""
    from ezhoi_diffusion.errors import printable

    time.sleep(GRACE)
    main_thread = threading.main_thread()
    held_by = [one.name for one in threading.enumerate() if one is not main_thread and not one.daemon]
    if held_by:
        sys.stderr.write(
            f"ezhoi-diffusion: ended although threads of a plugin go on: {printable(', '.join(held_by))}\n"
        )
        for stream in filter(None, (sys.stdout, sys.stderr)):  # None where the shell has closed it
            stream.flush()
        os._exit(status)


def _split_script_line(argv: list[str]) -> tuple[list[str], list[str]]:
    """The words before and after `--` of doctor. Versions of argparse treat that mark in different ways."""
    if argv[:1] != ["doctor"] or "--" not in argv:
        return argv, []
    mark = argv.index("--")
    return argv[:mark], argv[mark + 1 :]
