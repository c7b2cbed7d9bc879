"""The packages of `plugins/`, without installing them."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

import ezhoi_diffusion
from ezhoi_diffusion.plugins import PluginManager

PACKAGES = Path(ezhoi_diffusion.__file__).parents[1] / "plugins"


def with_packages(monkeypatch: pytest.MonkeyPatch, *names: str) -> PluginManager:
    """A plugin manager that knows the packages `names`; those that need another library are left to their own tests."""
    manager = PluginManager()
    for folder in sorted(PACKAGES.glob("ezhoi-bridge-*")):
        name = folder.name.removeprefix("ezhoi-bridge-")
        if name in names and name not in manager.found:
            monkeypatch.syspath_prepend(str(folder))
            manager.register(importlib.import_module(f"ezhoi_bridge_{name}").plugin, name)
    return manager
