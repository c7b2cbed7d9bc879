"""The flags that a host's command line gains."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from ezhoi_diffusion.errors import EzhoiDiffusionError
from ezhoi_diffusion.plugins import PluginError, PluginManager


def blocked_in(argv: Sequence[str]) -> list[str]:
    """The plugins that `--no-plugin` names: needed before any plugin is imported, so before the parser exists."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--no-plugin", action="append", default=[])
    blocked: list[str] = early.parse_known_args(argv)[0].no_plugin
    return blocked


def add_arguments(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> None:
    """Add our flags, and those of every installed plugin, to a host's parser.

    argv: the command line, sys.argv without the program by default. Raises PluginError where a flag exists already.
    From here on an EzhoiDiffusionError that nobody catches is one line on stderr, without a traceback.
    """
    _say_errors_in_a_line()
    argv = sys.argv[1:] if argv is None else argv
    _refuse_flags_of_the_guide(parser, argv)
    plugins = PluginManager(blocked_in(argv))
    try:
        _add_own_options(parser)
        for name in plugins.contributors():
            _add_plugin_options(plugins, name, parser)
    except argparse.ArgumentError as error:
        raise PluginError(
            f"the script's own command line and ours clash ({error}): rename that flag in the script, or, if it is "
            f"ours, let the script call add_arguments once only"
        ) from error


def add_missing_arguments(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> None:
    """As `add_arguments`, but nothing where the script has called that itself. Raises what it does."""
    if "--no-plugin" not in parser._option_string_actions:
        add_arguments(parser, argv)


@functools.cache  # once a process
def _say_errors_in_a_line() -> None:
    """For scripts that plain python runs. torch.distributed puts a hook before this one later, which calls it."""
    before = sys.excepthook

    def one_line(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, EzhoiDiffusionError):
            sys.stderr.write(f"ezhoi-diffusion: error: {error}\n")
        else:
            before(kind, error, trace)

    sys.excepthook = one_line


def _refuse_flags_of_the_guide(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Say what --diffusion_bridge and its like are called here, unless the script is a fork that has them."""
    given = {word.partition("=")[0] for word in argv if word.startswith(("--diffusion_", "--diffusion-"))}
    unknown = sorted(given - parser._option_string_actions.keys())
    if unknown:
        raise EzhoiDiffusionError(
            f"{', '.join(unknown)}: flags of the guide's edited EZ-HOI. Here a bridge is one folder, which holds the means and "
            f"the steps too: --plugin diffusion --bridge DIR. `ezhoi-diffusion train` makes it"
        )


def _add_own_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("ezhoi-diffusion", "plugins for this run; `ezhoi-diffusion plugins` lists them")
    add = group.add_argument
    add(
        "--plugin",
        action="append",
        default=[],
        metavar="NAME",
        help="enable a plugin; repeat for several, in calling order",
    )
    add(
        "--no-plugin", action="append", default=[], metavar="NAME",
        help="do not even import a plugin; text_cache, which is on by default, is switched off so",
    )  # fmt: skip
    add(
        "--plugin-errors", choices=("raise", "disable"), default="raise",
        help="what a plugin that fails at eval does: end the run, or go off for the rest of it, which every report then says; a bridge of --compare always ends the run",
    )  # fmt: skip
    add(
        "--compare", default="", metavar="none,NAME[=DIR],…",
        help="with --eval: score the bare host and each named bridge on the same pairs, in one pass, and print a table",
    )  # fmt: skip
    add("--report", default="", metavar="DIR", help="with --compare: write report.html, report.json and pictures there")
    add(
        "--bridge",
        default="",
        metavar="DIR",
        help="the trained bridge, a folder made by `ezhoi-diffusion train`, or hf:USER/NAME[@REVISION] of the Hugging Face Hub",
    )
    add(
        "--inference-steps", type=int, default=None, metavar="N",
        help="apply diffusion bridges from level N with N evaluations, whatever their recipe says: the level is how strongly a "
        "feature is bridged, the evaluations are what that costs",
    )  # fmt: skip
    add(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="apply bridges with this setting, e.g. blend=0.3",
    )
    add("--force-bridge", action="store_true", help="use a bridge made for another host; every report then says so")
    add("--restore-context", action="store_true", help="put the context vectors stored with the bridge into the host")
    add(
        "--capture-split", choices=("train", "test"), default=None,
        help="split of a capture pass (default: train, or test with --eval)",
    )  # fmt: skip
    add("--max-images", type=int, default=None, metavar="N", help="capture the first N images of the split only")


def _add_plugin_options(plugins: PluginManager, name: str, parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(f"plugin {name}")
    plugins.add_options(name, group)
    if not group._group_actions:
        parser._action_groups.remove(group)


def check_options(plugins: PluginManager, args: argparse.Namespace) -> None:
    """Refuse flags that would silently do nothing. Raises EzhoiDiffusionError, PluginError."""
    for name, actions in plugins.options().items():
        given = [a.option_strings[0] for a in actions if getattr(args, a.dest, a.default) != a.default]
        if given and name not in plugins.enabled:
            raise PluginError(f"{given[0]} belongs to plugin '{name}', which is not enabled: add --plugin {name}")
    for name in plugins.enabled:
        if all(hook.startswith("register_") for hook in plugins.found[name].hooks):
            raise PluginError(
                f"plugin '{name}' takes no part in a run, it only contributes to others: name its bridge in --compare none,…"
            )
    if args.compare and not args.eval:
        raise EzhoiDiffusionError("--compare evaluates, so it needs --eval")
    if args.compare and getattr(args, "cache", False):
        raise EzhoiDiffusionError("--cache ends the host before it evaluates, so --compare cannot be combined with it")
    compared = [part.partition("=")[0].strip() for part in args.compare.split(",")]
    for name in plugins.implementing("post_adapter_feat") if args.compare else ():
        if name not in compared:
            raise PluginError(
                f"plugin '{name}' is enabled and would replace adapter_feat, but --compare scores only what it names: add "
                f"'{name}' there, or drop --plugin {name}"
            )
    if args.report and not args.compare:
        raise EzhoiDiffusionError("--report writes a comparison, so it needs --compare")
    captures = bool(plugins.implementing("on_train_batch"))
    for flag, value in (("--capture-split", args.capture_split), ("--max-images", args.max_images)):
        if value is not None and not captures:
            raise EzhoiDiffusionError(
                f"{flag} is about a capture pass, and no enabled plugin makes one: add --plugin capture"
            )
    if args.max_images is not None and args.max_images < 1:
        raise EzhoiDiffusionError(f"--max-images must be at least 1, not {args.max_images}")
    if captures and args.compare:
        raise EzhoiDiffusionError("a capture pass ends the run, so it cannot be combined with --compare: make two runs")
    for flag, is_given in (
        ("--force-bridge", args.force_bridge),
        ("--restore-context", args.restore_context),
        ("--inference-steps", args.inference_steps is not None),
    ):
        if is_given and not (args.compare or args.bridge):
            raise EzhoiDiffusionError(f"{flag} is about a bridge, and this run uses none: add --bridge DIR")
    uses_bridge = bool(args.compare or plugins.implementing("post_adapter_feat"))
    if args.bridge and not uses_bridge:
        raise PluginError("--bridge is given but nothing uses it: add --plugin diffusion, or --compare none,diffusion")
    resume = getattr(args, "resume", None)
    if resume and not Path(resume).is_file() and (plugins.enabled or args.compare):
        raise EzhoiDiffusionError(
            f"--resume {resume}: there is no such file; the host would start from random weights without a word"
        )
