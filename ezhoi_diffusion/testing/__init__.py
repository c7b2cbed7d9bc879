"""For authors of bridges: captured features whose truth is known, and the rules that every bridge keeps.

    from ezhoi_diffusion.testing import check_bridge, check_fit, synthetic_store

Needs no host, no data and no test runner.
"""

from __future__ import annotations

from ezhoi_diffusion.testing.synthetic import Truth, synthetic_store

__all__ = ["Truth", "synthetic_store"]
