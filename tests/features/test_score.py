"""Features with given logits, against least squares."""

from __future__ import annotations

import re

import pytest
import torch

from ezhoi_diffusion import EzHoiScore
from ezhoi_diffusion.features.score import ScoreError, relative_change
from ezhoi_diffusion.testing import synthetic_store, with_full_rank_texts


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return synthetic_store(tmp_path_factory.mktemp("features") / "train")


@pytest.fixture(scope="module")
def score(store):
    return EzHoiScore.from_store(with_full_rank_texts(store))


@pytest.fixture(scope="module")
def x(store):
    return store.adapter_feat()


@pytest.fixture(scope="module")
def wanted(x, score):
    """Logits that have nothing to do with those of x."""
    return 3 * torch.randn(len(x), score.label.shape[1], generator=torch.Generator().manual_seed(0))


def test_the_feature_has_the_logits(score, x, wanted):
    torch.testing.assert_close(score.logits(score.feature(x, wanted)), wanted, rtol=0, atol=1e-4)
    exact = score.feature(x.double(), wanted)
    torch.testing.assert_close(exact @ score.matrix.T, wanted.double(), rtol=0, atol=1e-12)


def test_it_is_the_nearest_to_x(score, x, wanted):
    left = wanted.double() - x.double() @ score.matrix.T
    change = torch.linalg.lstsq(score.matrix, left.T, driver="gelsd").solution.T  # of all solutions the shortest
    torch.testing.assert_close(score.feature(x.double(), wanted), x.double() + change)


def test_own_logits_change_nothing(score, x):
    torch.testing.assert_close(score.feature(x, score.logits(x)), x, rtol=1e-5, atol=1e-5)
    own = x.double()
    torch.testing.assert_close(score.feature(own, own @ score.matrix.T), own, rtol=0, atol=1e-12)


def test_the_matrix_gives_the_logits(score, x):
    torch.testing.assert_close((x.double() @ score.matrix.T).float(), score.logits(x), rtol=1e-5, atol=1e-5)


def test_logits_of_class_texts_are_the_published_ones_to_rounding(score, x):
    published = score.logits(x)
    difference = (score.class_logits(x) - published).abs().max()
    assert difference < 1e-6 * published.abs().max()


def test_the_change_is_measured_against_x(score, x):
    assert relative_change(x, 1.5 * x).tolist() == pytest.approx([0.5] * len(x), abs=1e-5)
    assert relative_change(torch.zeros(2, 3), torch.zeros(2, 3)).tolist() == [0, 0]


def test_the_dtype_is_that_of_x(score, x, wanted):
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        assert score.feature(x.to(dtype), wanted).dtype == dtype
    assert score.feature(x[:0], wanted[:0]).shape == (0, x.shape[1])


def test_dependent_texts_are_refused_with_the_numbers(store, x, wanted):
    score = EzHoiScore.from_store(store)
    rank = int(torch.linalg.matrix_rank(score.class_text))
    assert rank < len(score.class_text)
    with pytest.raises(ScoreError) as refused:
        score.feature(x, wanted)
    assert {"10", "32", str(rank)} <= set(re.findall(r"\d+", str(refused.value)))
