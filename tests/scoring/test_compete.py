"""Competition against a softmax, and who is found to exclude whom."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ezhoi_diffusion import EzHoiScore
from ezhoi_diffusion.features.images import stored_images
from ezhoi_diffusion.features.labels import PairLabels, pair_labels
from ezhoi_diffusion.scoring.compete import TENSORS, exclusion_of, fit, load, rivals
from ezhoi_diffusion.testing import reloaded


def pairs_of(target, valid=None):
    """Labels in two blocks."""
    none = torch.zeros(len(target))
    valid = torch.ones_like(target) if valid is None else valid
    blocks = slice(len(target) // 3), slice(len(target) // 3, None)
    return [PairLabels((target & valid)[rows], valid[rows], none[rows], none[rows].long(), none) for rows in blocks]


def test_where_all_exclude_each_other_it_is_a_softmax_over_allowed_verbs(store):
    score = EzHoiScore.from_store(store)
    artifact = fit(store, alpha=0.7)
    everyone = replace(artifact, files={**artifact.files, TENSORS: {"exclusion": torch.ones(10, 10).double()}})
    bridge = reloaded(everyone, load)
    for image in list(stored_images(store))[:8]:
        z, allowed = score.logits(image.adapter_feat), score.object_to_target[image.pairs.objects]
        softmax = z.masked_fill(~allowed, -torch.inf).log_softmax(1)
        expected = torch.where(allowed, z + 0.7 * softmax, z)
        if len(z):
            torch.testing.assert_close(
                score.logits(bridge(image.adapter_feat, image.pairs)), expected, rtol=0, atol=1e-4
            )


def test_who_has_no_rival_stays(store):
    z = torch.tensor([[3.0, 1.0, -2.0], [800.0, 0.0, -800.0]], dtype=torch.double)
    alone = torch.eye(3, dtype=torch.double)
    torch.testing.assert_close(rivals(z, torch.ones(2, 3, dtype=torch.bool), alone), z)
    none = torch.zeros(2, 3, dtype=torch.bool)
    assert torch.isfinite(rivals(z, none, alone)).all()


def test_verbs_that_come_together_do_not_exclude_each_other():
    draw = torch.Generator().manual_seed(0)
    first, third = torch.rand(2, 4000, generator=draw) < 0.4
    together = first & (torch.rand(4000, generator=draw) < 0.9)  # with the first; never with the third
    target = torch.stack([first, together, third & ~first, torch.rand(4000, generator=draw) < 0.3], 1)
    e = exclusion_of(pairs_of(target))
    assert torch.equal(e, e.T)
    assert e.diagonal().tolist() == [1] * 4
    assert e[0, 1] == 0
    assert min(e[0, 2], e[1, 2]) > 0.98
    assert e[0, 3] < 0.3, "chance; not 0, because pairs without any annotation do not count"


@pytest.mark.parametrize("together", [0, 3, 20])
def test_a_hidden_verb_excludes_the_others_as_verbs_do_on_the_whole(together):
    alone, both = torch.eye(4).bool().repeat(5, 1), torch.tensor([[1, 1, 0, 0]]).bool().repeat(together, 1)
    target = torch.cat([alone, both])
    valid = torch.ones_like(target)
    valid[:, 3] = False
    first, number = 5 + together, 20 - 5 + together  # of seen verbs, in annotated pairs
    by_chance = 2 * (first * first + 2 * first * 5) / number
    expected = max(0, 1 - 2 * together / by_chance)
    assert exclusion_of(pairs_of(target, valid))[3, :3].tolist() == pytest.approx([expected] * 3)


def test_expected_pairs_are_counted_where_both_verbs_count():
    target = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 0], [0, 1, 1], [0, 0, 0]]).bool()
    valid = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 1], [1, 1, 1], [1, 1, 1]]).bool()
    # Verbs 0 and 1 both count in pairs 0, 1 and 3 of the annotated ones: 2 have verb 0, 2 have verb 1, 1 has both.
    # Verbs 0 and 2 in pairs 1, 2 and 3: 2 have verb 0, 1 has verb 2, none has both. Verbs 1 and 2 in 1 and 3: 1, 1, 1.
    by_chance = torch.tensor([2 * 2 / 3, 2 * 1 / 3, 1 * 1 / 2])
    together = torch.tensor([1.0, 0.0, 1.0])
    expected = (1 - (together + together.sum() / by_chance.sum()) / (by_chance + 1)).clamp_min(0)
    found = exclusion_of(pairs_of(target, valid))
    assert found[[0, 0, 1], [1, 2, 2]].tolist() == pytest.approx(expected.tolist())
    assert 0 < expected[1] < 1


def test_the_fit_is_of_all_labels_that_may_be_seen(store):
    artifact = fit(store)
    assert torch.equal(artifact.files[TENSORS]["exclusion"], exclusion_of([pair_labels(store)[:]]))
