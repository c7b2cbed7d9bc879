"""Fixtures for detectors in this process and the plugins that attach finds."""

from __future__ import annotations

import pytest

from ezhoi_diffusion.builtin import text_cache
from ezhoi_diffusion.plugins import PluginManager


@pytest.fixture
def ezhoi(make_ezhoi):
    """A miniature detector with the usual flags; see make_ezhoi."""
    return make_ezhoi()


@pytest.fixture
def use(mocker):
    """Let attach find the built-in text cache and these plugins only: use(name=plugin)."""

    def patch(**plugins):
        def make(blocked=()):
            manager = PluginManager(blocked, discover=False)
            for name, plugin in {"text_cache": text_cache.plugin, **plugins}.items():
                if name not in blocked:
                    manager.register(plugin, name)
            return manager

        mocker.patch("ezhoi_diffusion.ezhoi.attach.PluginManager", make)

    return patch
