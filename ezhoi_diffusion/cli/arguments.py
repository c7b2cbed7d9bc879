"""The flags that several commands share, each declared once."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ezhoi_diffusion.bridge import Bridge
    from ezhoi_diffusion.features.store import FeatureStore

Container = argparse.ArgumentParser | argparse._ArgumentGroup

BRIDGES = "NAME, NAME=DIR or NAME=hf:USER/REPO[@REVISION]"


def add_features(parser: Container, split: str, **options: Any) -> None:
    """FEATURES, the folder of a capture of the train or test split."""
    parser.add_argument(
        "features", type=Path, metavar="FEATURES", help=f"folder of a capture of the {split} split", **options
    )


def add_bridges(parser: Container, default: str, meaning: str = "") -> None:
    """--bridges: what to compare, and --bridge: the folder for names without one. meaning: of an empty default."""
    parser.add_argument(
        "--bridges", default=default, metavar="NAME[=DIR],…",
        help=f"bridges, each as {BRIDGES} (default: {default or meaning})",
    )  # fmt: skip
    parser.add_argument(
        "--bridge", default="", metavar="DIR", help="folder, or hf:USER/REPO, for names without one of their own"
    )


def add_settings(parser: Container) -> None:
    """--set and --inference-steps: how bridges are applied."""
    parser.add_argument(
        "--set", action="append", default=[], metavar="K=V", help="apply bridges with this setting; may be repeated"
    )
    parser.add_argument(
        "--inference-steps", type=int, metavar="N",
        help="the guide's: --set start_timestep=N --set num_steps=N",
    )  # fmt: skip


def add_sweep(parser: Container, default: str = "") -> None:
    """--sweep: several values of a setting."""
    parser.add_argument(
        "--sweep", action="append", default=[], metavar="K=V,V",
        help="also apply bridges with each of these values; several sweeps make a grid" + (f" ({default})" if default else ""),
    )  # fmt: skip


def add_out(parser: Container, what: str, *, required: bool = False) -> None:
    """--out: the folder that the command writes."""
    parser.add_argument("--out", type=Path, metavar="DIR", required=required, help=what)


def add_device(parser: Container) -> None:
    """--device."""
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda or cuda:N (default: a GPU where there is one)")


def add_jobs(parser: Container) -> None:
    """--jobs."""
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N",
        help="processes that fit, apply and compare bridges on the CPU (1, which has all threads)",
    )  # fmt: skip


def add_force(parser: Container) -> None:
    """--force, which `fingerprint_check` reads."""
    parser.add_argument(
        "--force", action="store_true", help="use a bridge that was made for another EZ-HOI run; results say so"
    )


def add_no_plugin(parser: Container) -> None:
    """--no-plugin."""
    parser.add_argument(
        "--no-plugin", action="append", default=[], metavar="NAME", help="do not import this plugin; may be repeated"
    )


def accept_underscores(parser: argparse.ArgumentParser) -> None:
    """Let --train_steps stand for --train-steps, as the training guide writes it. The help shows dashes alone."""
    known = parser._option_string_actions
    known.update({"--" + flag[2:].replace("-", "_"): action for flag, action in [*known.items()] if flag[:2] == "--"})


def add_script(parser: argparse.ArgumentParser) -> None:
    """SCRIPT and everything after it."""
    parser.add_argument("script", type=Path, metavar="SCRIPT", help="EZ-HOI's script, for example main_tip_finetune.py")
    parser.add_argument(
        "arguments", nargs=argparse.REMAINDER, metavar="…", help="flags of the script and of this command"
    )


def split_script_flags(args: argparse.Namespace, declare: Callable[[Container], None]) -> list[str]:
    """Take the flags that `declare` adds out of `args.arguments` into `args`; return the script's own flags."""
    flags = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    declare(flags)
    accept_underscores(flags)
    return flags.parse_known_args(args.arguments, args)[1]


def fingerprint_check(store: FeatureStore, force: bool, forced: list[str]) -> Callable[[Bridge, str], None]:
    """A check that raises where a bridge was not made for the run that the features come from.

    With `force` it appends a message to `forced` instead.
    """
    from ezhoi_diffusion.bridge import fingerprint_mismatch
    from ezhoi_diffusion.errors import EzhoiDiffusionError

    def check(bridge: Bridge, name: str) -> None:
        mismatch = fingerprint_mismatch(bridge, name, store.fingerprint)
        if mismatch is None:
            return
        if not force:
            raise EzhoiDiffusionError(
                f"{mismatch.message} (here: the run that wrote {store.folder}). Capture both splits in one EZ-HOI setting with "
                f"the same --seed, and train on its features. To use the bridge all the same, add --force"
            )
        forced.append(mismatch.message)

    return check
