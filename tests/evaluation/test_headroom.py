"""Headroom and calibration against what can be counted by hand, and on a capture."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from ezhoi_diffusion.evaluation.calibration import ObjectCalibration, object_names
from ezhoi_diffusion.evaluation.headroom import perfect_scores
from ezhoi_diffusion.evaluation.protocols import Detections, hicodet
from ezhoi_diffusion.evaluation.replay import replay
from ezhoi_diffusion.testing.synthetic import synthetic_store


@pytest.fixture(scope="module")
def test_store(tmp_path_factory):
    return synthetic_store(tmp_path_factory.mktemp("capture") / "test", split="test", images=48)


def test_each_oracle_changes_what_it_knows_and_nothing_else():
    """Three pairs with two classes each: the first interacts by its second class, the others are background."""
    zero = torch.zeros(6, dtype=torch.long)
    detections = Detections(
        row=torch.tensor([0, 0, 1, 1, 2, 2]), target=torch.tensor([0, 1] * 3), classes=zero, prior=torch.ones(6),
        image=zero, candidate=torch.tensor([1]), annotation=torch.tensor([0]),
    )  # fmt: skip
    probability = torch.tensor([0.5, 0.2, 0.9, 0.1, 0.3, 0.3])
    found = {name: scores.tolist() for name, scores in perfect_scores(detections, probability).items()}
    assert found["verbs"] == pytest.approx([0.0, 0.5, 0.9, 0.1, 0.3, 0.3])
    assert found["interactiveness"] == pytest.approx([0.5, 0.2, 0, 0, 0, 0])
    assert found["labels"] == [0, 1, 0, 0, 0, 0]


def test_perfect_labels_are_above_every_other_score(test_store):
    bare, measured = replay(test_store, {}), replay(test_store, {}, measured=True)
    found = measured.headroom
    assert list(found) == ["verbs", "interactiveness", "labels"]
    for group in bare.groups:
        assert max(found["verbs"][group], found["interactiveness"][group]) <= found["labels"][group] + 1e-9
        assert bare.mean_ap("none", group) < found["labels"][group] <= 100 + 1e-9
    half = replay(test_store, {}, measured=True, chosen=set(range(0, 48, 2)))
    assert half.headroom["verbs"] != found["verbs"]
    known = replay(test_store, {}, measured=True, protocol=hicodet(test_store, setting="known-object"))
    assert known.headroom["labels"]["full"] >= known.headroom["verbs"]["full"] > found["verbs"]["full"]


def test_every_object_is_calibrated_under_its_name(test_store):
    entries = replay(test_store, {}, measured=True).calibration["none"]
    table = test_store.ezhoi["object_n_verb_to_interaction"]
    known = test_store.rows("objects").long()
    assert len(entries) == len(known.unique())
    assert sum(entry["predictions"] for entry in entries) == int((table >= 0).sum(1)[known].sum())
    names = {"interactions": ["a person riding a horse", "a person feeding a horse", "a person riding an old car"]}
    other = SimpleNamespace(
        meta=names, ezhoi={"object_n_verb_to_interaction": torch.tensor([[0, 1], [2, -1], [-1, -1]])}
    )
    assert object_names(other) == {0: "a horse", 1: "a person riding an old car"}
    assert object_names(SimpleNamespace(**{**vars(other), "meta": {}})) == {}
    actions = torch.tensor([[0, 1], [0, 1]])  # as in V-COCO: "hit instr", "cut instr" name no object
    shared = SimpleNamespace(
        meta={"interactions": ["hit instr", "cut instr"]}, ezhoi={"object_n_verb_to_interaction": actions}
    )
    assert object_names(shared) == {}


def test_calibration_of_an_object_is_counted_over_its_predictions():
    calibration = ObjectCalibration()
    calibration.add(torch.zeros(0, dtype=torch.long), torch.zeros(0), torch.zeros(0, dtype=torch.bool))
    calibration.add(torch.tensor([2, 2, 0]), torch.tensor([0.9, 0.1, 0.5]), torch.tensor([True, True, False]))
    calibration.add(torch.tensor([2, 2]), torch.tensor([0.9, 1.0]), torch.tensor([True, False]))
    first, second = calibration.entries({2: "horse"})
    assert first == {
        "object": "object 0", "predictions": 1, "mean_score": 0.5, "annotated_rate": 0, "calibration_error": 0.5,
    }  # fmt: skip
    assert (second["object"], second["predictions"]) == ("horse", 4)
    assert second["mean_score"] == pytest.approx(2.9 / 4)
    assert second["annotated_rate"] == 0.75
    # bins of 1/15: [0.9, 0.9] miss 0.2, [1.0] misses 1.0, [0.1] misses 0.9
    assert second["calibration_error"] == pytest.approx((0.2 + 1.0 + 0.9) / 4)
