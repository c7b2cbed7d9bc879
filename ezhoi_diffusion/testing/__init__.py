"""For authors of bridges: made-up captures with a known truth, and rules that every bridge and every fit keeps.

    from ezhoi_diffusion.testing import check_bridge, check_fit, synthetic_store

It needs no EZ-HOI, no data and no test runner.
"""

from __future__ import annotations

from ezhoi_diffusion.testing.bridges import BRIDGE_RULES, check_bridge
from ezhoi_diffusion.testing.fits import FIT_RULES, check_fit, same_artifact
from ezhoi_diffusion.testing.rules import ConformanceError
from ezhoi_diffusion.testing.stores import relabelled, reloaded, with_full_rank_texts
from ezhoi_diffusion.testing.synthetic import Shape, Truth, hicodet_shape, hicodet_store, synthetic_store

__all__ = [
    "BRIDGE_RULES",
    "FIT_RULES",
    "ConformanceError",
    "Shape",
    "Truth",
    "check_bridge",
    "check_fit",
    "hicodet_shape",
    "hicodet_store",
    "relabelled",
    "reloaded",
    "same_artifact",
    "synthetic_store",
    "with_full_rank_texts",
]
