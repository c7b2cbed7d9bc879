"""The plugin manager: it finds plugins, checks them, and calls their hooks in one of three modes.

The modes are notify, first and fold. Every installed plugin contributes through `register_*`. Only the plugins that a run
enables, and those of ON_BY_DEFAULT, take part in the other hooks.
"""

from __future__ import annotations

import argparse
import difflib
import functools
import inspect
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points, version
from typing import Any, TypeVar

import pluggy

from ezhoi_diffusion import hookspecs
from ezhoi_diffusion.defaults import kept_globals
from ezhoi_diffusion.errors import EzhoiDiffusionError, described
from ezhoi_diffusion.hookspecs import HOOKS, PROJECT
from ezhoi_diffusion.inputs import read_only
from ezhoi_diffusion.registry import Registry

log = logging.getLogger(__name__)
T = TypeVar("T")

ENTRY_POINT_GROUP = "ezhoi_diffusion"
BUILTIN = {
    "capture": "ezhoi_diffusion.builtin.capture:plugin",
    "chain": "ezhoi_diffusion.builtin.chain:plugin",
    "diffusion": "ezhoi_diffusion.builtin.diffusion:plugin",
    "identity": "ezhoi_diffusion.builtin.identity:plugin",
    "mean_shift": "ezhoi_diffusion.builtin.mean_shift:plugin",
    "tuned": "ezhoi_diffusion.builtin.tuned:plugin",
    "text_cache": "ezhoi_diffusion.builtin.text_cache:plugin",
    "compete": "ezhoi_diffusion.builtin.scoring:compete",
    "eszsl": "ezhoi_diffusion.builtin.scoring:eszsl",
    "gaussian_classes": "ezhoi_diffusion.builtin.scoring:gaussian_classes",
    "interactive": "ezhoi_diffusion.builtin.scoring:interactive",
    "prior_only": "ezhoi_diffusion.builtin.scoring:prior_only",
    "pseudo": "ezhoi_diffusion.builtin.scoring:pseudo",
    "test_time_cache": "ezhoi_diffusion.builtin.scoring:test_time_cache",
    "random_move": "ezhoi_diffusion.builtin.scoring:random_move",
    "residual": "ezhoi_diffusion.builtin.scoring:residual",
    "scale": "ezhoi_diffusion.builtin.scoring:scale",
}
ON_BY_DEFAULT = ("text_cache",)  # they change no result
ENV_STRICT = "EZHOI_DIFFUSION_STRICT"
ENV_DISABLE = "EZHOI_DIFFUSION_DISABLE"
ENV_ALLOW = "EZHOI_DIFFUSION_ALLOW"


class PluginError(EzhoiDiffusionError):
    """A plugin is broken, missing, or breaks a rule of its hook. The message names it."""


@dataclass
class PluginInfo:
    """One plugin that was found, loaded or not: a line of `ezhoi-diffusion plugins`."""

    name: str
    version: str
    source: str  # "built in", or the distribution that brings it
    status: str  # "loaded", "blocked", "broken"
    reason: str = ""
    hooks: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"plugin '{self.name}' {self.version} ({self.source})"


class _Hooks(pluggy.PluginManager):
    """Looks for hooks among methods only. pluggy before 1.7 also reads every property, and ours import torch."""

    def parse_hookimpl_opts(self, plugin: object, name: str) -> Any:
        if isinstance(inspect.getattr_static(type(plugin), name, None), property):
            return None
        return super().parse_hookimpl_opts(plugin, name)


def _env_names(variable: str) -> set[str]:
    return {name.strip() for name in os.environ.get(variable, "").split(",") if name.strip()}


class PluginManager:
    """The plugins of one process.

    Three environment variables act on it. EZHOI_DIFFUSION_DISABLE=a,b blocks plugins (`*` blocks every installed one).
    EZHOI_DIFFUSION_ALLOW=a,b admits only these installed ones. EZHOI_DIFFUSION_STRICT=1 makes a broken plugin an error.

    Args:
        blocked: Names that are not even imported (`--no-plugin`).
        discover: Look for built-in and installed plugins.

    Raises:
        PluginError: A plugin is broken, under EZHOI_DIFFUSION_STRICT.
    """

    def __init__(self, blocked: Iterable[str] = (), *, discover: bool = True) -> None:
        self._manager = _Hooks(PROJECT)
        self._manager.add_hookspecs(hookspecs)
        self._enabled: list[str] = []
        self._disabled: dict[str, str] = {}
        self._warned: set[tuple[str, str]] = set()
        self.found: dict[str, PluginInfo] = {}
        self.raise_errors = True
        self._blocked = set(blocked) | _env_names(ENV_DISABLE)
        if discover:
            self._discover()

    # -- finding -----------------------------------------------------------------------------------------

    def _discover(self) -> None:
        own = version("ezhoi-diffusion")
        for name, target in BUILTIN.items():
            self._load(PluginInfo(name, own, "built in", "loaded"), functools.partial(_resolve, target))
        allowed = _env_names(ENV_ALLOW)
        for point in sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda point: point.name):
            info = PluginInfo(point.name, *_origin(point), status="loaded")
            if allowed and point.name not in allowed:
                info.status, info.reason = "blocked", f"not in {ENV_ALLOW}"
                self.found.setdefault(point.name, info)
            else:
                self._load(info, point.load)

    def _load(self, info: PluginInfo, load: Callable[[], object]) -> None:
        if info.name in self._blocked or ("*" in self._blocked and info.source != "built in"):
            info.status, info.reason = "blocked", f"by --no-plugin or {ENV_DISABLE}"
            self.found.setdefault(info.name, info)  # a built-in plugin of that name stays
            return
        try:
            if info.name in self.found:
                raise PluginError(f"the name is taken by {self.found[info.name]}")
            with kept_globals() as changed:
                self._register(info, load())
            self._warn_of(info, changed, "when it is imported")
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a plugin may raise anything at import, and the others must still load
            info.status, info.reason = "broken", described(error)
            self.found.setdefault(info.name, info)
            message = f"{info} could not be loaded: {info.reason}"
            if os.environ.get(ENV_STRICT, "") not in ("", "0"):
                raise PluginError(message) from error
            log.warning("%s; the run goes on without it (--no-plugin %s silences this)", message, info.name)

    def _warn_of(self, info: PluginInfo, changed: Sequence[str], when: str) -> None:
        if changed and (info.name, when) not in self._warned:
            self._warned.add((info.name, when))
            log.warning("%s sets the %s for all %s; they are put back", info, " and ".join(changed), when)

    def register(self, plugin: object, name: str) -> None:
        """Register a plugin object that is not installed, for example from a notebook. Raises PluginError."""
        if name in self.found:
            raise PluginError(f"plugin name '{name}' is taken by {self.found[name]}")
        self._register(PluginInfo(name, getattr(plugin, "__version__", "-"), "registered", "loaded"), plugin)

    def _register(self, info: PluginInfo, plugin: object) -> None:
        _check(plugin, info.name)
        try:
            self._manager.register(plugin, info.name)
        except pluggy.PluginValidationError as error:
            self._manager.unregister(name=info.name)
            raise PluginError(f"plugin '{info.name}': {_signature_problem(plugin) or error}") from error
        info.hooks = [name for name in HOOKS if any(i.plugin_name == info.name for i in self._all(name))]
        self.found[info.name] = info

    # -- enabling ----------------------------------------------------------------------------------------

    def enable(self, names: Sequence[str], *, raise_errors: bool = True) -> None:
        """Let plugins take part in the run.

        Args:
            names: In calling order.
            raise_errors: What fails at eval ends the run, instead of being switched off.

        Raises:
            PluginError: A plugin is not installed, or not loaded.
        """
        for name in names:
            info = self.found.get(name)
            if info is None:
                close = difflib.get_close_matches(name, self.found, n=1)
                hint = f"; did you mean '{close[0]}'?" if close else "."
                known = ", ".join(sorted(self.found))
                raise PluginError(
                    f"there is no plugin '{name}'{hint} Installed: {known}. Is its package installed in this "
                    f"environment? `ezhoi-diffusion plugins` lists what was found."
                )
            if info.status != "loaded":
                raise PluginError(f"{info} cannot be enabled, it is {info.status}: {info.reason}")
        self._enabled = list(dict.fromkeys(names))
        self.raise_errors = raise_errors

    def enable_defaults(self) -> None:
        """Let the plugins of ON_BY_DEFAULT take part too, after those that the run names."""
        loaded = self.contributors()
        self._enabled += [name for name in ON_BY_DEFAULT if name in loaded and name not in self._enabled]

    @property
    def enabled(self) -> list[str]:
        """Names of the plugins that take part, in calling order."""
        return list(self._enabled)

    def implementing(self, hook: str) -> list[str]:
        """Names of the enabled plugins with this hook."""
        return [impl.plugin_name for impl in self._taking_part(hook)]

    def contributors(self) -> dict[str, PluginInfo]:
        """Every plugin that is loaded, enabled or not, by name."""
        return {name: info for name, info in self.found.items() if info.status == "loaded"}

    @property
    def degraded(self) -> dict[str, str]:
        """Plugins that failed and were switched off (`--plugin-errors disable`), with the reason."""
        return dict(self._disabled)

    # -- calling -----------------------------------------------------------------------------------------

    def _all(self, hook: str) -> list[pluggy.HookImpl]:
        # In the order of registration. pluggy itself would call from the end of this list.
        return list(getattr(self._manager.hook, hook).get_hookimpls())

    def _taking_part(self, hook: str) -> Iterator[pluggy.HookImpl]:
        by_name = {impl.plugin_name: impl for impl in self._all(hook)}
        names = by_name if hook.startswith("register_") else self._enabled
        return (by_name[name] for name in names if name in by_name)

    def _call(self, impl: pluggy.HookImpl, hook: str, arguments: dict[str, Any]) -> Any:
        # pluggy would stop at the first exception without naming the plugin.
        given = {name: arguments[name] for name in impl.argnames}
        try:
            with kept_globals() as changed, read_only("it", **given):
                answer = impl.function(**given)
        except EzhoiDiffusionError as error:
            raise PluginError(self._blame(impl.plugin_name, hook, str(error))) from error
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # SystemExit(0) would pass for a run that went well
            raise PluginError(self._blame(impl.plugin_name, hook, f"raised {described(error)}")) from error
        self._warn_of(self.found[impl.plugin_name], changed, f"in {hook}")
        return answer

    def _blame(self, name: str, hook: str, problem: str) -> str:
        return f"{self.found[name]} in {hook}: {problem}"

    def notify(self, hook: str, **arguments: Any) -> None:
        """Call the hook on every plugin that takes part. Raises PluginError at the first that fails."""
        for impl in self._taking_part(hook):
            self._call(impl, hook, arguments)

    def notify_all(self, hook: str, **arguments: Any) -> None:
        """Call the hook on every plugin even where one fails. Raises the first PluginError afterwards."""
        first: PluginError | None = None
        for impl in self._taking_part(hook):
            try:
                self._call(impl, hook, arguments)
            except PluginError as error:
                first = first or error
        if first:
            raise first

    def first(self, hook: str, check: Callable[[Any], str | None], **arguments: Any) -> Any:
        """The first answer that is not None, or None.

        Args:
            hook: A `locate_*` hook.
            check: Says what is wrong with an answer, or returns None.
            arguments: The hook's arguments.

        Raises:
            PluginError: A plugin fails, or its answer is wrong.
        """
        for impl in self._taking_part(hook):
            answer = self._call(impl, hook, arguments)
            if answer is not None:
                problem = check(answer)
                if problem:
                    raise PluginError(self._blame(impl.plugin_name, hook, problem))
                return answer
        return None

    def fold(
        self, hook: str, value: T, check: Callable[[T, Any], str | None], *, only: str | None = None, **arguments: Any
    ) -> T:
        """Chain the hook's first argument through the plugins that take part.

        Args:
            hook: A `post_*` hook.
            value: Its first argument.
            check: check(before, after) says what is wrong with `after`, or returns None.
            only: Ask this plugin alone.
            arguments: The hook's other arguments.

        Returns:
            What the last plugin returned.

        Raises:
            PluginError: A plugin fails or breaks a rule, unless errors switch it off (`--plugin-errors disable`).
        """
        argument = HOOKS[hook].__code__.co_varnames[0]
        for impl in list(self._taking_part(hook)):
            if only not in (None, impl.plugin_name) or impl.plugin_name in self._disabled:
                continue
            try:
                answer = self._call(impl, hook, {argument: value, **arguments})
                if answer is None:
                    continue
                problem = check(value, answer)
                if problem:
                    raise PluginError(self._blame(impl.plugin_name, hook, problem))
                value = answer
            except PluginError as error:
                if self.raise_errors:
                    raise
                self._disabled[impl.plugin_name] = str(error)
                log.error("%s; it is off for the rest of this run, results are DEGRADED", error)
        return value

    def options(self) -> dict[str, list[argparse.Action]]:
        """The flags that each plugin adds to EZ-HOI's command line. Raises PluginError."""
        found = {}
        for name in self.contributors():
            group = argparse.ArgumentParser(add_help=False).add_argument_group()
            self.add_options(name, group)
            if group._group_actions:
                found[name] = list(group._group_actions)
        return found

    def add_options(self, name: str, group: argparse._ArgumentGroup) -> None:
        """Let one plugin add its flags to a group of the script's parser. Raises PluginError."""
        for impl in self._taking_part("register_options"):
            if impl.plugin_name == name:
                self._call(impl, "register_options", {"group": group})

    def collect(self, hook: str, registry: Registry[T]) -> Registry[T]:
        """Let every installed plugin add to `registry` through a `register_*` hook."""
        for impl in self._taking_part(hook):
            self._call(impl, hook, {"register": registry.register, "plugins": self})
        return registry


def _origin(point: EntryPoint) -> tuple[str, str]:
    if point.dist is None:
        return "-", point.value
    metadata = point.dist.metadata
    found = {key: metadata[key] for key in ("Version", "Name") if key in metadata}  # damaged, it has neither
    return found.get("Version", "-"), found.get("Name", point.value)


def _resolve(target: str) -> object:
    module, _, attribute = target.partition(":")
    loaded: object = import_module(module)
    return getattr(loaded, attribute) if attribute else loaded


def _check(plugin: object, name: str) -> None:
    """Refuse what pluggy accepts silently, or refuses without saying what to do."""
    if inspect.isclass(plugin):
        raise PluginError(f"plugin '{name}' is the class {plugin.__name__}, not an instance: forgot the ()?")
    marked = []
    for attribute in dir(plugin):
        value = inspect.getattr_static(plugin, attribute)
        options = getattr(value, f"{PROJECT}_impl", None)
        if options is None:
            if attribute in HOOKS and callable(value):
                raise PluginError(f"plugin '{name}': {attribute} has a hook's name but no @hookimpl above it")
            continue
        marked.append(attribute)
        if (options.get("specname") or attribute) not in HOOKS:
            close = difflib.get_close_matches(attribute, HOOKS, n=1)
            hint = f"did you mean {close[0]}?" if close else f"hooks are {', '.join(HOOKS)}"
            raise PluginError(f"plugin '{name}': there is no hook {attribute}; {hint}")
        unsupported = [o for o in ("wrapper", "hookwrapper", "tryfirst", "trylast") if options.get(o)]
        if unsupported:
            raise PluginError(
                f"plugin '{name}': {attribute} uses {unsupported[0]}, which is not supported; plugins are called in "
                f"the order of their --plugin flags"
            )
    if not marked:
        raise PluginError(f"plugin '{name}' has no hook: mark its functions with @hookimpl")


def _signature_problem(plugin: object) -> str | None:
    for attribute in dir(plugin):
        value = getattr(plugin, attribute)
        if attribute in HOOKS and callable(value):
            offered = list(inspect.signature(HOOKS[attribute]).parameters)
            extra = [p for p in inspect.signature(value).parameters if p not in offered]
            if extra:
                return f"{attribute} asks for {', '.join(extra)}; the hook offers {', '.join(offered)}"
    return None
