"""Captures whose texts have full rank, as the score needs it."""

from __future__ import annotations

import pytest

from ezhoi_diffusion.testing import synthetic_store, with_full_rank_texts


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    return with_full_rank_texts(synthetic_store(tmp_path_factory.mktemp("scoring") / "train", images=60))
