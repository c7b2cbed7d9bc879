"""The baselines do what they say, and know nothing."""

from __future__ import annotations

import pytest
import torch

from ezhoi_diffusion import EzHoiScore
from ezhoi_diffusion.bridge import BridgeError
from ezhoi_diffusion.features.score import relative_change
from ezhoi_diffusion.scoring.controls import PriorOnly, RandomMove, Scale


@pytest.fixture(scope="module")
def x(store):
    return store.adapter_feat()


def test_prior_only_leaves_the_detector_alone(store, x):
    assert not EzHoiScore.from_store(store).logits(PriorOnly()(x)).any()


def test_scale_multiplies_the_logits(store, x):
    score = EzHoiScore.from_store(store)
    torch.testing.assert_close(score.logits(Scale()(x)), 2 * score.logits(x))
    torch.testing.assert_close(score.logits(Scale().override(factor=0.5)(x)), score.logits(x) / 2)


def test_a_random_move_has_its_size_and_no_direction(x):
    bridge = RandomMove()
    for size in (0.3, 0.05, 0):
        moved = bridge.override(size=size)(x)
        torch.testing.assert_close(relative_change(x, moved), torch.full((len(x),), float(size)), rtol=1e-4, atol=1e-6)
    move = torch.nn.functional.normalize(bridge(x) - x)
    among = (move @ move.T).fill_diagonal_(0)
    assert among.abs().mean() < 1.5 * (2 / torch.pi / x.shape[1]) ** 0.5  # of independent directions in D dimensions
    assert torch.cosine_similarity(move, x).abs().mean() < 0.3


def test_a_random_move_hardly_moves_with_rounding(x):
    near = x * (1 + 1e-6 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)))
    assert relative_change(RandomMove()(x), RandomMove()(near)).max() < 1e-4


@pytest.mark.parametrize(("bridge", "setting"), [(Scale(), "factor"), (RandomMove(), "size")])
def test_other_values_are_refused(bridge, setting):
    for value in (-1, "much", True, None):
        with pytest.raises(BridgeError, match=setting):
            bridge.override(**{setting: value})
