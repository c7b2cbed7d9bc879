"""Fits of plugins: what they are given."""

from __future__ import annotations

import io
import sys
import time

from ezhoi_diffusion.artifact import Artifact
from ezhoi_diffusion.testing import synthetic_store
from ezhoi_diffusion.training import fitted
from ezhoi_diffusion.training.fitted import fit_artifact


class Terminal(io.StringIO):
    def isatty(self):
        return True


def slow(features):
    """A fit that takes a while for its second shard."""
    for number, _ in enumerate(features.shards()):
        time.sleep(0.3 if number == 1 else 0)
    return Artifact("slow", {}, {}, {})


def test_a_slow_pass_over_the_features_shows_on_a_terminal_how_far_it_is(tmp_path, monkeypatch):
    store = synthetic_store(tmp_path / "f", images=20)
    number = len(store.index["shards"])
    assert number > 2
    for stream, shown_after, is_shown in (
        (Terminal(), 0.2, True),
        (Terminal(), 60, False),
        (io.StringIO(), 0.2, False),
    ):
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setattr(fitted, "SHOWN_AFTER", shown_after)
        fit_artifact("slow", slow, store, {})
        assert ("fit slow:" in stream.getvalue() and f"/{number} " in stream.getvalue()) == is_shown
