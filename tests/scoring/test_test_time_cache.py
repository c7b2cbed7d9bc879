"""The test-time cache: which pairs it holds, and what it adds to the logits."""

from __future__ import annotations

import math

import pytest
import torch

from ezhoi_diffusion import EzHoiScore
from ezhoi_diffusion.bridge import BridgeError
from ezhoi_diffusion.features.images import stored_images
from ezhoi_diffusion.scoring.surest import Surest
from ezhoi_diffusion.scoring.test_time_cache import SHARPNESS, TENSORS, examples, fit, load, similarity
from ezhoi_diffusion.testing import reloaded, synthetic_store, with_full_rank_texts


@pytest.fixture(scope="module")
def captured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache") / "test"
    return with_full_rank_texts(synthetic_store(folder, split="test", images=40))


def test_the_surest_pairs_by_hand():
    x = torch.tensor([[3.0, 4.0], [0.0, 2.0], [5.0, 0.0]], dtype=torch.float64)
    confidence = torch.tensor([[0.2, 0.0, 0], [0.5, 0.3, 0], [0.9, 0.0, 0]], dtype=torch.float64)
    surest = Surest.none(3)
    for rows in torch.arange(3).split([1, 0, 2]):
        surest = surest.among(rows, confidence[rows], 2)
    cached = examples(surest, x, torch.zeros(2, dtype=torch.float64))
    expected = [[[1, 0], [0, 1]], [[0, 1], [0, 0]], [[0, 0], [0, 0]]]  # an impossible pair leaves its place empty
    torch.testing.assert_close(cached, torch.tensor(expected, dtype=torch.float64))


def test_the_surest_of_blocks_are_the_first_of_a_stable_sort():
    draw = torch.Generator().manual_seed(0)
    confidence = torch.randint(20, (500, 4), generator=draw).double()  # many are equal
    surest = Surest.none(4)
    for rows in torch.arange(500).split(37):
        surest = surest.among(rows, confidence[rows], 9)
    order = confidence.argsort(dim=0, descending=True, stable=True)[:9]
    assert torch.equal(surest.rows, order)
    assert torch.equal(surest.confidence, confidence.gather(0, order))


def test_the_similarity_by_hand():
    cached = torch.tensor([[[1, 0], [0, 1]], [[0, 1], [0, 0]], [[0, 0], [0, 0]]], dtype=torch.float64)
    found = similarity(torch.tensor([[7.0, 0.0], [-1.0, 0.0]], dtype=torch.float64), cached)
    far, opposite = math.exp(-SHARPNESS), math.exp(-2 * SHARPNESS)
    expected = [[(1 + far) / 2, far, 0], [(opposite + far) / 2, far, 0]]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_it_adds_the_similarity_for_verbs_of_the_object_alone(captured):
    score, bridge = EzHoiScore.from_store(captured), reloaded(fit(captured, weight=0.3), load)
    moved = 0
    for image in stored_images(captured):
        if not len(image.pairs):
            continue
        x = image.adapter_feat
        change = (bridge(x, image.pairs).double() - x.double()) @ score.matrix.T
        allowed = score.object_to_target[image.pairs.objects]
        expected = 0.3 * bridge.unit * similarity(x.double() - bridge.mean, bridge.cached)
        torch.testing.assert_close(change, torch.where(allowed, expected, 0.0), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(bridge.override(weight=0.0)(x, image.pairs), x)
        moved += int((change > 1e-3).sum())
    assert moved > 0
    assert bridge.protocol == "test-transductive"


def test_at_weight_1_similarities_vary_as_much_as_logits(captured):
    score, artifact = EzHoiScore.from_store(captured), fit(captured)
    tensors = artifact.files[TENSORS]
    x = captured.adapter_feat().double()
    possible = score.object_to_target[captured.rows("objects").long()]
    similar = tensors["unit"] * similarity(x - tensors["mean"], tensors["cached"])[possible]
    assert similar.std().item() == pytest.approx((x @ score.matrix.T).std().item())


@pytest.mark.parametrize("options", [{"count": 0}, {"count": 2.5}, {"count": True}, {"weight": -1}])
def test_other_options_are_refused(captured, options):
    with pytest.raises(BridgeError, match=r"is a (whole )?number"):
        fit(captured, **options)
