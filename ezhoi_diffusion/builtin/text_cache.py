"""On by default: what the host's text encoder makes of its prompts is used again while it would be the same.

In eval the host encodes the same prompts for every image. Detections stay what they are, bit for bit: see TextCache.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from ezhoi_diffusion.hookspecs import hookimpl

if TYPE_CHECKING:
    from ezhoi_diffusion.ezhoi.run import EzHoiRun
    from ezhoi_diffusion.ezhoi.text_cache import TextCache

log = logging.getLogger(__name__)


class TextCachePlugin:
    """One cache for each host that is attached."""

    def __init__(self) -> None:
        self._caches: dict[int, TextCache] = {}

    @hookimpl
    def on_attach(self, run: EzHoiRun) -> None:
        """Put the cache into the text encoder, where this host has one."""
        from ezhoi_diffusion.ezhoi.text_cache import TextCache, find_text_encoder

        encoder = find_text_encoder(run.model)
        if encoder is None:
            log.debug("text_cache is off: %s has no clip_head.text_encoder", type(run.model).__name__)
            return
        self._caches[id(run)] = TextCache(encoder).attach()

    @hookimpl
    def on_detach(self, run: EzHoiRun) -> None:
        """Take it out."""
        cache = self._caches.pop(id(run), None)
        if cache is not None:
            cache.remove()


plugin = TextCachePlugin()
