"""The command line, one file a command. Heavy imports wait until a command runs."""

from __future__ import annotations

import argparse
import errno
import logging
import sys
from collections.abc import Sequence
from importlib import import_module

# What a disk says that is full, over quota, read-only or broken: never a mistake of the program
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO)

COMMANDS = {
    "run": "run an EZ-HOI script, unmodified, with plugins",
    "pipeline": "capture, train, test and compare in one go",
    "statistics": "what was captured, in figures",
    "train": "train a diffusion bridge on captured features",
    "distill": "train a student that gives a bridge's result in one network evaluation",
    "fit": "fit a bridge of an installed plugin to captured features",
    "tune": "choose bridge and settings by mAP on held-out training images",
    "test": "what a bridge does on a few images: pictures, top 5, a verdict",
    "compare": "score bridges on captured features of the test split, without the host",
    "bench": "measure what a bridge costs here, beside the guide's system",
    "push": "put a bridge and its model card on the Hugging Face Hub",
    "import": "turn files of the training guide (.pkl, .pt) into ours",
    "demo": "see all of it on a miniature EZ-HOI, without data",
    "doctor": "find out what is wrong with environment, features, bridge or host flags, and the fix",
    "patch": "write the three lines a fork needs into its main_tip_finetune.py, or take them out",
    "plugins": "list plugins: name, version, status, source, hooks; or begin one: plugins new NAME",
}


def build_parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of `ezhoi-diffusion`; of the commands only that in `argv` declares its flags, which may be slow."""
    parser = argparse.ArgumentParser(
        prog="ezhoi-diffusion",
        description="Close the gap between EZ-HOI's visual and text features with a diffusion bridge, without editing EZ-HOI.",
        epilog="""\
the way, from an EZ-HOI folder:
  ezhoi-diffusion demo                       see all of it on a miniature first (2 minutes, no data needed)
  ezhoi-diffusion pipeline main_tip_finetune.py <its flags> --eval --resume CKPT --work DIR     all of the below
  ezhoi-diffusion run main_tip_finetune.py <its flags> --resume CKPT --plugin capture --capture FEATURES
  ezhoi-diffusion train FEATURES --out BRIDGE
  ezhoi-diffusion run main_tip_finetune.py <its flags> --eval --resume CKPT --bridge BRIDGE --compare none,diffusion
""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    chosen = next((word for word in argv if not word.startswith("-")), None)
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, formatter_class=argparse.RawDescriptionHelpFormatter)
        if name == chosen:
            module = import_module(f"ezhoi_diffusion.cli.{name}")
            module.configure(command)
            accept_underscores(command)
            command.set_defaults(run=module.run)
    return parser


def accept_underscores(parser: argparse.ArgumentParser) -> None:
    """Let --train_steps stand for --train-steps: the training guide writes underscores. --help shows dashes alone."""
    known = parser._option_string_actions
    known.update({"--" + flag[2:].replace("-", "_"): action for flag, action in [*known.items()] if flag[:2] == "--"})


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status: 2 for an error that the user can act on, 75 where it may go on later."""
    from ezhoi_diffusion.errors import EzhoiDiffusionError, Interrupted

    logging.basicConfig(format="ezhoi-diffusion: %(message)s", level=logging.WARNING)
    argv = sys.argv[1:] if argv is None else argv
    own, host_line = _split(list(argv))
    args = build_parser(own).parse_args(own)
    args.host_line = host_line
    try:
        status: int = args.run(args)
    except Interrupted as error:
        sys.stderr.write(f"ezhoi-diffusion: {error}\n")
        return error.status
    except EzhoiDiffusionError as error:
        sys.stderr.write(f"ezhoi-diffusion: error: {error}\n")
        return error.status
    except OSError as error:
        if error.errno in DISK:
            sys.stderr.write(f"ezhoi-diffusion: error: the disk refused ({error}): free space and try again\n")
        elif error.filename is not None and args.command != "run":  # a host's own error keeps its traceback
            sys.stderr.write(f"ezhoi-diffusion: error: {error}\n")
        else:
            raise
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("ezhoi-diffusion: interrupted\n")
        return 130
    return status


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    """The words before and after `--` for doctor: argparse loses that mark, in another way in every version."""
    if argv[:1] != ["doctor"] or "--" not in argv:
        return argv, []
    mark = argv.index("--")
    return argv[:mark], argv[mark + 1 :]
