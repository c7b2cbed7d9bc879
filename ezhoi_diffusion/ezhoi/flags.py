"""The flags that an EZ-HOI script gains."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from ezhoi_diffusion.errors import EzhoiDiffusionError
from ezhoi_diffusion.evaluation.variants import known_bridges, parse_bridges, parse_chain, parse_settings, parse_sweep
from ezhoi_diffusion.plugins import PluginError, PluginManager


def blocked_in(argv: Sequence[str]) -> list[str]:
    """Names given with `--no-plugin`. Plugins add flags to the parser, so these are needed before it exists."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--no-plugin", action="append", default=[])
    blocked: list[str] = early.parse_known_args(argv)[0].no_plugin
    return blocked


def add_arguments(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> None:
    """Add our flags, and those of every installed plugin, to the parser of an EZ-HOI script.

    From here on an uncaught EzhoiDiffusionError prints one line on stderr instead of a traceback.

    Args:
        parser: The script's own parser.
        argv: The command line without the program; by default that of this process.

    Raises:
        PluginError: A flag exists already.
        EzhoiDiffusionError: The command line has flags of the guide's edited EZ-HOI.
    """
    _say_errors_in_a_line()
    argv = sys.argv[1:] if argv is None else argv
    _refuse_flags_of_the_guide(parser, argv)
    plugins = PluginManager(blocked_in(argv))
    try:
        _add_own_options(parser, plugins.contributors())
        for name in plugins.contributors():
            _add_plugin_options(plugins, name, parser)
    except argparse.ArgumentError as error:
        raise PluginError(
            f"the script and ezhoi-diffusion declare the same flag ({error}): rename it in the script. If the flag is ours, call "
            f"add_arguments only once"
        ) from error


def add_missing_arguments(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> None:
    """Call `add_arguments` unless the script has called it already."""
    if "--no-plugin" not in parser._option_string_actions:
        add_arguments(parser, argv)


@functools.cache  # once a process
def _say_errors_in_a_line() -> None:
    """For scripts that plain python runs. The hook that torch.distributed installs later calls this one."""
    before = sys.excepthook

    def one_line(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, EzhoiDiffusionError):
            sys.stderr.write(f"ezhoi-diffusion: error: {error}\n")
        else:
            before(kind, error, trace)

    sys.excepthook = one_line


def _refuse_flags_of_the_guide(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Refuse --diffusion_bridge and similar flags with their name here, unless the script is a fork that has them."""
    given = {word.partition("=")[0] for word in argv if word.startswith(("--diffusion_", "--diffusion-"))}
    unknown = sorted(given - parser._option_string_actions.keys())
    if unknown:
        raise EzhoiDiffusionError(
            f"{', '.join(unknown)}: flags of the guide's edited EZ-HOI. Use --plugin diffusion=DIR instead: the folder, made by "
            f"`ezhoi-diffusion train`, holds weights, means and steps"
        )


class _EnablePlugin(argparse.Action):
    """`--plugin NAME=DIR`: NAME joins `args.plugin`, DIR becomes its folder in `args.plugin_folders`.

    `--plugin NAME+NAME` is the same as two flags.
    """

    def __init__(self, *args: Any, known: Collection[str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._known = known

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, word: Any, option: str | None = None
    ) -> None:
        for one in parse_chain(str(word), self._known):
            namespace.plugin = [*namespace.plugin, one.name]
            if one.folder:
                namespace.plugin_folders = {**namespace.plugin_folders, one.name: one.folder}


def _add_own_options(parser: argparse.ArgumentParser, known: Collection[str]) -> None:
    group = parser.add_argument_group("ezhoi-diffusion", "plugins for this run; `ezhoi-diffusion plugins` lists them")
    parser.set_defaults(plugin_folders={})
    add = group.add_argument
    add(
        "--plugin", action=_EnablePlugin, known=known, default=[], metavar="NAME[=DIR]",
        help="enable a plugin, with its bridge's folder; several in calling order: repeat it, or write NAME+NAME",
    )  # fmt: skip
    add(
        "--compare", default="", metavar="none,NAME[=DIR],…",
        help="with --eval: score EZ-HOI without and with each bridge on the same pairs, in one pass",
    )  # fmt: skip
    add(
        "--bridge", default="", metavar="DIR",
        help="folder made by `ezhoi-diffusion train`, or hf:USER/REPO[@REVISION], for names without one of their own",
    )  # fmt: skip
    add("--set", action="append", default=[], metavar="K=V", help="apply bridges with this setting; may be repeated")
    add(
        "--sweep", action="append", default=[], metavar="K=V,V",
        help="with --compare: also apply bridges with each of these values; several sweeps make a grid",
    )  # fmt: skip
    add(
        "--inference-steps", type=int, default=None, metavar="N",
        help="the guide's: --set start_timestep=N --set num_steps=N",
    )  # fmt: skip
    add("--out", default="", metavar="DIR", help="with --compare: write report.html, report.json and pictures there")
    add("--force", action="store_true", help="use a bridge that was made for another EZ-HOI run; results say so")
    add("--restore-context", action="store_true", help="put the context vectors stored with the bridge into EZ-HOI")
    add(
        "--capture-split", choices=("train", "test"), default=None,
        help="split of a capture (default: train, or test with --eval)",
    )  # fmt: skip
    add("--max-images", type=int, default=None, metavar="N", help="capture the first N images of the split only")
    add(
        "--no-plugin", action="append", default=[], metavar="NAME",
        help="do not import this plugin, for example text_cache, which is on by default; may be repeated",
    )  # fmt: skip
    add(
        "--plugin-errors", choices=("raise", "disable"), default="raise",
        help="when a plugin fails at eval: end the run (default), or go on without it, which every report then says. A "
        "bridge of --compare always ends the run",
    )  # fmt: skip


def _add_plugin_options(plugins: PluginManager, name: str, parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(f"plugin {name}")
    plugins.add_options(name, group)
    if not group._group_actions:
        parser._action_groups.remove(group)


def check_options(plugins: PluginManager, args: argparse.Namespace) -> None:
    """Refuse flags that would silently do nothing.

    Raises:
        EzhoiDiffusionError: A flag has no effect in this run, or has a wrong value.
        PluginError: An enabled plugin has no effect in this run, or a flag needs a plugin that is not enabled.
    """
    for name, actions in plugins.options().items():
        given = [a.option_strings[0] for a in actions if getattr(args, a.dest, a.default) != a.default]
        if given and name not in plugins.enabled:
            raise PluginError(f"{given[0]} belongs to plugin '{name}', which is not enabled: add --plugin {name}")
    for name in plugins.enabled:
        if all(hook.startswith("register_") for hook in plugins.found[name].hooks):
            raise PluginError(
                f"--plugin {name} has no effect on a run, the plugin only contributes to others: name its bridge in --compare"
            )
    if args.compare and not args.eval:
        raise EzhoiDiffusionError("--compare scores an evaluation: add --eval")
    if args.compare and getattr(args, "cache", False):
        raise EzhoiDiffusionError(
            "--cache ends EZ-HOI before it evaluates, so --compare has nothing to score: drop one of them"
        )
    items = parse_bridges(args.compare, [*known_bridges(plugins).names(), *plugins.enabled])
    compared = [one.name for named in items.values() for one in named]
    for name in plugins.implementing("post_adapter_feat") if args.compare else ():
        if name not in compared:
            raise PluginError(
                f"--plugin {name} replaces adapter_feat, but --compare scores only what it names: add '{name}' there, or drop "
                f"--plugin {name}"
            )
    for flag, is_given in (("--out", bool(args.out)), ("--sweep", bool(args.sweep))):
        if is_given and not args.compare:
            raise EzhoiDiffusionError(f"{flag} is for a comparison: add --compare none,NAME")
    captures = bool(plugins.implementing("on_train_batch"))
    for flag, value in (("--capture-split", args.capture_split), ("--max-images", args.max_images)):
        if value is not None and not captures:
            raise EzhoiDiffusionError(f"{flag} is for a capture, and no enabled plugin makes one: add --plugin capture")
    if args.max_images is not None and args.max_images < 1:
        raise EzhoiDiffusionError(f"--max-images must be at least 1, not {args.max_images}")
    if captures and args.compare:
        raise EzhoiDiffusionError("a capture ends the run, so --compare has nothing to score: make two runs")
    for flag, is_given in (
        ("--force", args.force),
        ("--restore-context", args.restore_context),
        ("--set", bool(args.set)),
        ("--inference-steps", args.inference_steps is not None),
    ):
        if is_given and not (args.compare or args.bridge or args.plugin_folders):
            raise EzhoiDiffusionError(f"{flag} is for a bridge, and this run uses none: add --bridge DIR")
    parse_settings(args.set, args.inference_steps)  # raises now, not after the model is built
    parse_sweep(args.sweep)
    if args.bridge and not (args.compare or plugins.implementing("post_adapter_feat")):
        raise PluginError("nothing uses --bridge: add --plugin diffusion, or --compare none,diffusion")
    resume = getattr(args, "resume", None)
    if resume and not Path(resume).is_file() and (plugins.enabled or args.compare):
        raise EzhoiDiffusionError(
            f"--resume {resume}: there is no such file, and EZ-HOI would silently start from random weights"
        )
