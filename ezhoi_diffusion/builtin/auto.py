"""The bridge that `ezhoi-diffusion tune` chose: `--compare none,auto=DIR`, or `--plugin auto --bridge DIR`."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from ezhoi_diffusion.bridge_plugin import Bridge, BridgePlugin, Load
from ezhoi_diffusion.builtin.identity import Identity
from ezhoi_diffusion.errors import EzhoiDiffusionError
from ezhoi_diffusion.plugins import PluginManager


def load(folder: Path | None, plugins: PluginManager | None = None) -> Bridge:
    """The chosen bridge, applied as it was chosen. Raises BridgeError, or EzhoiDiffusionError without a folder."""
    from ezhoi_diffusion.artifact import Artifact, BridgeError
    from ezhoi_diffusion.evaluation.comparison import REFERENCE
    from ezhoi_diffusion.evaluation.tune import AUTO, INSIDE, TunedBridge
    from ezhoi_diffusion.evaluation.variants import known_bridges

    if folder is None:
        raise EzhoiDiffusionError("auto needs --bridge DIR, a folder made by `ezhoi-diffusion tune`")
    artifact = Artifact.load(folder, AUTO)
    try:
        chosen = artifact.config["chosen"]
        name, settings = chosen["bridge"], dict(chosen["settings"])
    except (KeyError, TypeError, ValueError) as error:
        raise BridgeError(
            f"{folder} does not say what was chosen ({error}): run `ezhoi-diffusion tune` again"
        ) from error
    if name == REFERENCE:
        return TunedBridge(Identity(), artifact)
    inside = folder / INSIDE
    bridge: Any = known_bridges(plugins or PluginManager())[name](inside if inside.exists() else None)
    return TunedBridge(bridge.sweep([settings])[0] if settings else bridge, artifact)


class AutoPlugin(BridgePlugin):
    """What was chosen may be any bridge that a plugin contributes."""

    def loader(self, plugins: PluginManager) -> Load:
        """`load` with what `plugins` contribute."""
        return functools.partial(load, plugins=plugins)


plugin = AutoPlugin("auto", load)
