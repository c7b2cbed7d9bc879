"""On by default: reuse the output of EZ-HOI's text encoder while it would be the same.

In eval EZ-HOI encodes the same prompts for every image. Detections stay the same, bit for bit: see TextCache.
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
    """One cache for each attached run."""

    def __init__(self) -> None:
        self._caches: dict[int, TextCache] = {}

    @hookimpl
    def on_attach(self, run: EzHoiRun) -> None:
        """Put the cache into the text encoder, if the model has one."""
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
