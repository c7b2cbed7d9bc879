"""A plugin that changes features in a hook, as a bridge that can be compared."""

from __future__ import annotations

import pickle
from typing import Any

from torch import Tensor

from ezhoi_diffusion.bridge import Bridge, replacement_problem
from ezhoi_diffusion.features.batch import Pairs
from ezhoi_diffusion.plugins import PluginManager


class PluginBridge(Bridge):
    """An enabled plugin that has `post_adapter_feat` and registers no bridge."""

    needs_pairs = True

    def __init__(self, plugins: PluginManager, name: str) -> None:
        super().__init__()
        self._plugins, self._name = plugins, name

    def __copy__(self) -> PluginBridge:
        return PluginBridge(self._plugins, self._name)

    def __reduce__(self) -> Any:
        raise pickle.PicklingError(f"plugin '{self._name}' registers no bridge, and may keep what it sees")

    def forward(self, adapter_feat: Tensor, pairs: Pairs | None = None) -> Tensor:
        """Features [P, D] after the plugin's hook."""
        return self._plugins.fold("post_adapter_feat", adapter_feat, replacement_problem, only=self._name, pairs=pairs)
