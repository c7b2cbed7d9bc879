"""The kit for authors of bridges: its made-up captures are what they say, and its rules notice what breaks them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ezhoi_diffusion.evaluation.detection_ap import matches
from ezhoi_diffusion.features.statistics import unit
from ezhoi_diffusion.features.store import FeatureStore, FeatureStoreError
from ezhoi_diffusion.host.score import Score, require_replayable
from ezhoi_diffusion.host.supervision import seen_pairs
from ezhoi_diffusion.host.variants import Variant
from ezhoi_diffusion.testing import Truth, synthetic_store
from ezhoi_diffusion.testing.synthetic import INTERACTIONS

# -- made-up captures --------------------------------------------------------------------------------------------


def test_the_same_arguments_give_the_same_store_and_splits_are_of_one_host(tmp_path):
    a, b = (synthetic_store(tmp_path / name) for name in "ab")
    assert (tmp_path / "a" / "index.json").read_bytes() == (tmp_path / "b" / "index.json").read_bytes()
    test = synthetic_store(tmp_path / "test", split="test")
    assert test.fingerprint == a.fingerprint
    assert all(torch.equal(test.host[name], tensor) for name, tensor in a.host.items())
    assert (test.split, len(test)) == ("test", len(a))
    assert not torch.equal(test.adapter_feat(), b.adapter_feat())
    other = synthetic_store(tmp_path / "other", seed=1)
    assert other.fingerprint["weights"] != a.fingerprint["weights"]
    with pytest.raises(FeatureStoreError, match="finished capture already"):
        synthetic_store(tmp_path / "a")


def test_it_is_a_capture_like_any_other(tmp_path):
    store = synthetic_store(tmp_path / "f", images=16, pairs_per_image=5, dim=20)
    assert (len(store.images), len(store), store.adapter_feat().shape[1]) == (16, 14 * 5, 20)
    assert [i for i, image in enumerate(store.images) if not image["rows"]] == [7, 15]
    assert len(store.index["shards"]) > 1
    assert require_replayable(store, Score.of(store)) < 1e-5
    assert set(store.context) == {"ctx.0"}
    groups = {
        name.removeprefix("classes/"): set(index.tolist())
        for name, index in store.host.items()
        if name.startswith("classes/")
    }
    assert groups["seen"] | groups["unseen"] == groups["rare"] | groups["non-rare"] == groups["full"] == set(range(24))
    assert not groups["seen"] & groups["unseen"]
    assert len(store.meta["interactions"]) == 24
    everything = synthetic_store(tmp_path / "g", images=16, unseen=False)
    assert "classes/unseen" not in everything.host
    assert everything.fingerprint["zs_type"] is None


def test_labels_are_annotations_that_were_found(tmp_path):
    checked = []

    def check(batch):
        table = torch.tensor([v for _, v in INTERACTIONS])
        humans, others = batch.pairs.boxes[batch.pairs.pairing]
        expected = torch.zeros_like(batch.labels)
        for annotation, hoi in enumerate(batch.gt_hoi.tolist()):
            gt = batch.gt_boxes[:, annotation : annotation + 1]
            expected[matches((gt[0], gt[1]), (humans, others))[1], table[hoi]] = True
        checked.append((expected.sum(), len(batch.gt_hoi)))
        assert torch.equal(batch.labels, expected)
        return batch

    synthetic_store(tmp_path / "f", images=60, alter=check)
    labelled, annotated = (sum(column) for column in zip(*checked, strict=True))
    assert 0 < annotated - labelled < 0.2 * annotated


@pytest.mark.parametrize("dim", [4, 32, 512])
def test_the_truth_is_what_the_rows_hide(tmp_path, dim):
    store, truth = synthetic_store(tmp_path / "f", images=40, dim=dim), Truth.of(dim=dim)
    assert torch.allclose(truth.map @ truth.map.T, torch.eye(dim), atol=1e-5)
    assert torch.allclose(truth.text_of(truth.visual_of(truth.text)), unit(truth.text), atol=1e-5)
    pairs = seen_pairs(store)
    wanted = unit(pairs.text) - truth.text_mean
    centred = unit(pairs.visual) * truth.offset.norm() - truth.offset
    before, after = ((unit(x) * unit(wanted)).sum(1).mean() for x in (centred, centred @ truth.map))
    assert after > before + 0.2


def test_seen_pairs_are_seen_and_an_altered_store_is_altered(tmp_path):
    store = synthetic_store(tmp_path / "f", images=60)
    assert {8, 9}.isdisjoint(seen_pairs(store, held_out=None).target.tolist())  # the two verbs that are hidden
    doubled = synthetic_store(
        tmp_path / "g", images=60, alter=lambda batch: replace(batch, adapter_feat=2 * batch.adapter_feat)
    )
    assert torch.equal(doubled.adapter_feat(), 2 * store.adapter_feat())
    assert torch.equal(FeatureStore(tmp_path / "g").rows("labels"), store.rows("labels"))


def test_the_host_is_right_sometimes_and_the_truth_more_often(tmp_path):
    from ezhoi_diffusion.host.replay import replay

    store, truth = synthetic_store(tmp_path / "f", split="test", images=60), Truth.of()
    known = Variant(lambda x, pairs: x.norm(dim=1, keepdim=True) * unit(truth.text_of(unit(x))))
    comparison = replay(store, {"truth": known})
    assert 20 < comparison.mean_ap("none", "full") < 60
    assert comparison.difference("truth", "full") > 4
