"""V-COCO's role AP against its definition written out in loops, cases done by hand, and V-COCO's own tool."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ezhoi_diffusion.evaluation.average_precision import Scored, average_precision
from ezhoi_diffusion.evaluation.bootstrap import resampled_ap
from ezhoi_diffusion.evaluation.protocols import Detections
from ezhoi_diffusion.evaluation.vcoco import match_roles, overlap
from ezhoi_diffusion.evaluation.vcoco_annotations import BOXES, RoleAnnotations, VcocoError, read_vcoco
from helpers.vcoco_files import Case, by_definition, by_tool, write

NAN = float("nan")
ACTIONS = {
    "hold": ["agent", "obj"],
    "stand": ["agent"],
    "cut": ["agent", "instr", "obj"],
    "talk_on_phone": ["agent", "instr"],
}
ROLES = [(action, role) for action, roles in ACTIONS.items() for role in roles[1:]]


def moved(rng: random.Random, box: list[float], far: float = 8) -> list[float]:
    x1, y1, x2, y2 = (at + rng.uniform(-far, far) for at in box)
    return [min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)]


def made_up(seed: int) -> Case:
    """Files as V-COCO and COCO have them, and detections as its tool reads them; no two scores are equal."""
    rng = random.Random(seed)
    images, annotations, acting = [], [], []
    for image in rng.sample(range(1, 1000), rng.randint(2, 7)):
        images.append({"id": image, "file_name": f"COCO_val2014_{image:012d}.jpg", "width": 120, "height": 90})
        here = []
        for number in range(rng.randint(2, 8)):
            x, y = rng.uniform(-5, 80), rng.uniform(-5, 60)
            one = {
                "id": 10 * image + number, "image_id": image, "bbox": [x, y, rng.uniform(8, 60), rng.uniform(8, 50)],
                "category_id": 1 if number == 0 else rng.choice([1, 44, 90]), "area": 50.0, "iscrowd": int(number and rng.random() < 0.1),
            }  # fmt: skip
            here.append(one)
            if number and rng.random() < 0.4:  # such are not valid, or to be ignored; nothing is done with them
                what = rng.choice([{"area": 0}, {"bbox": [x, y, 0.5, 30]}, {"bbox": [300, 10, 30, 30]}, {"ignore": 1}])
                here.append({**one, **what, "id": 10_000 + 10 * image + number})
        annotations += here
        usable = [one["id"] for one in here if one["id"] < 10_000]
        for one in here:
            if one["category_id"] == 1 and one["id"] in usable and (one is here[0] or rng.random() < 0.6):
                does = {action: one is here[0] or rng.random() < 0.5 for action in ACTIONS}
                filled = {key: rng.choice([0, rng.choice(usable)]) if does[key[0]] else 0 for key in ROLES}
                acting.append((image, one["id"], does, filled))
    rng.shuffle(annotations)
    boxes = {one["id"]: one["bbox"] for one in annotations}
    vsrl = [
        {
            "action_name": action, "role_name": roles, "include": [[] for _ in roles],
            "image_id": [image for image, *_ in acting], "ann_id": [person for _, person, *_ in acting],
            "label": [int(does[action]) for _, _, does, _ in acting],
            "role_object_id": [person for _, person, *_ in acting]
            + [filled[action, role] for role in roles[1:] for *_, filled in acting],
        }
        for action, roles in ACTIONS.items()
    ]  # fmt: skip
    categories = [{"id": number, "name": name} for number, name in ((1, "person"), (44, "bottle"), (90, "toothbrush"))]
    detections = []
    for image in images:
        # the first goes for what is annotated, so that every action-role has a detection that counts
        first = next(found for found in acting if found[0] == image["id"])
        for number in range(rng.randint(1, 14)):
            _, person, _, filled = first if number == 0 else rng.choice([f for f in acting if f[0] == image["id"]])
            x, y, w, h = boxes[person]
            found = {"image_id": image["id"], "person_box": moved(rng, [x, y, x + w, y + h], 1 if number == 0 else 12)}
            for action, roles in ACTIONS.items():
                found[f"{action}_agent"] = rng.random()
                for role in roles[1:]:
                    other = filled[action, role] or rng.choice(list(boxes))
                    x, y, w, h = boxes[other]
                    kinds = [moved(rng, [x, y, x + w, y + h], 6)] * 4 + [[0.0] * 4, [NAN] * 4]
                    found[f"{action}_{role}"] = [*rng.choice(kinds), NAN if number and rng.random() < 0.3 else 0.0]
            detections.append(found)
    places = [(found, f"{action}_{role}") for found in detections for action, role in ROLES]
    for (found, key), score in zip(places, rng.sample(range(1, 4096), len(places)), strict=True):
        found[key][4] += score / 4096
    return Case(vsrl, {"images": images, "annotations": annotations, "categories": categories}, detections)


def ours(case: Case, folder: Path) -> tuple[torch.Tensor, Scored, torch.Tensor]:
    """Role AP [2R], and what it is made of: the scored detections and the annotations of each image."""
    names = {image["id"]: image["file_name"] for image in case.coco["images"]}
    data = read_vcoco(write(case, folder), list(names.values()))
    assert data.roles == [f"{action}-{role}" for action, role in ROLES]
    images, scores = [], []
    for number, name in names.items():
        rows = [
            (found["person_box"], found[f"{action}_{kind}"], role)
            for found in case.detections
            for role, (action, kind) in enumerate(ROLES)
            if found["image_id"] == number and found[f"{action}_{kind}"][4] == found[f"{action}_{kind}"][4]
        ]
        images.append(SimpleNamespace(name=name, rows=rows, pairs=rows))
        scores += [other[4] for _, other, _ in rows]

    def find(image):
        persons, others = (torch.tensor([row[i][:4] for row in image.rows]) for i in (0, 1))
        role = torch.tensor([row[2] for row in image.rows])
        kept, classes, *candidates = match_roles(data.annotations[image.name], persons, others, role)
        return kept, classes, classes, torch.ones(len(kept)), *candidates

    detections = Detections.from_images(images, find)
    found = torch.tensor(scores)[detections.row]
    counts = torch.stack([data.annotations[image.name].counts() for image in images])
    scored = Scored(found.double(), detections.classes, detections.labels(found).double(), detections.image)
    return average_precision(scored, counts.sum(0), "VOC"), scored, counts


@pytest.mark.parametrize("seed", range(40))
def test_role_ap_is_its_definition(seed, tmp_path):
    case = made_up(seed)
    assert ours(case, tmp_path)[0].tolist() == pytest.approx(by_definition(case), abs=1e-12)


@pytest.mark.parametrize("seed", range(200))
def test_role_ap_is_that_of_vcoco_s_own_tool(seed, tmp_path):
    case = made_up(seed)
    assert by_tool(case, tmp_path) == pytest.approx(ours(case, tmp_path)[0].tolist(), abs=1e-6)


# -- by hand ---------------------------------------------------------------------------------------------------------

PERSON, OTHER, FAR = [10.0, 10, 29, 39], [40.0, 10, 49, 19], [80.0, 50, 99, 69]


def outcome(other, *, person=PERSON, box=OTHER, acts=True, known=True):
    """(kept, right) in scenario 1 and 2 of one detection of the second of two action-roles."""
    annotated = RoleAnnotations(
        torch.tensor([FAR, PERSON]),
        torch.tensor([True, known]),
        torch.tensor([[False, False], [False, acts]]),
        torch.tensor([[[NAN] * 4] * 2, [[NAN] * 4, box]]),
    )
    kept, classes, candidate, annotation = match_roles(
        annotated, torch.tensor([person]), torch.tensor([other]), torch.tensor([1])
    )
    assert kept.tolist() == [0] * len(classes)
    assert annotation.tolist() == (4 + classes[candidate]).tolist()
    return [(n in classes.tolist(), n in classes[candidate].tolist()) for n in (1, 3)]


def test_a_role_is_right_where_person_action_and_role_are():
    right, wrong, ignored = [(True, True)] * 2, [(True, False)] * 2, [(False, False)] * 2
    assert outcome(OTHER) == right
    assert outcome(FAR) == wrong
    assert outcome([0.0] * 4) == wrong
    assert outcome([NAN] * 4) == wrong
    assert outcome(OTHER, acts=False) == wrong
    assert outcome(OTHER, person=[10.0, 30, 29, 39]) == wrong
    assert outcome(OTHER, known=False) == ignored
    # of persons that are not overlapped at all the first is meant, as to V-COCO's tool: it acts in no way
    assert outcome(OTHER, person=[50.0, 50, 60, 60], known=False) == wrong


def test_scenarios_differ_where_no_role_is_annotated():
    nothing = [NAN] * 4
    assert outcome(OTHER, box=nothing) == [(True, False), (True, True)]
    assert outcome([0.0] * 4, box=nothing) == [(True, True), (True, True)]
    assert outcome(nothing, box=nothing) == [(True, True), (True, True)]
    assert outcome(nothing, box=nothing, acts=False) == [(True, False), (True, False)]


def test_half_is_enough_and_both_corners_are_pixels_of_a_box():
    a, b = torch.tensor([0.0, 0, 9, 9]), torch.tensor([[0.0, 0, 9, 4], [9, 9, 9, 9], [10, 0, 19, 9]])
    assert overlap(a, b).tolist() == pytest.approx([0.5, 0.01, 0])
    assert outcome([40.0, 10, 49, 14]) == [(True, True)] * 2
    assert outcome([40.0, 10, 49, 13.9]) == [(True, False)] * 2
    assert outcome(OTHER, person=[10.0, 10, 29, 24]) == [(True, True)] * 2
    assert outcome(OTHER, person=[10.0, 10, 29, 23.9]) == [(True, False)] * 2


def test_an_image_without_persons_has_false_positives():
    nobody = RoleAnnotations(torch.zeros(0, 4), torch.zeros(0).bool(), torch.zeros(0, 3).bool(), torch.zeros(0, 3, 4))
    kept, classes, candidate, annotation = match_roles(
        nobody, torch.tensor([PERSON] * 2), torch.tensor([OTHER] * 2), torch.tensor([2, 0])
    )
    assert (kept.tolist(), classes.tolist()) == ([0, 1, 0, 1], [2, 0, 5, 3])
    assert len(candidate) == len(annotation) == 0
    assert nobody.counts().tolist() == [0] * 6


def test_area_under_the_interpolated_curve_by_hand():
    labels = torch.tensor([1.0, 0, 0, 1, 1, 0], dtype=torch.float64)
    scored = Scored(torch.arange(6, 0, -1).double(), torch.zeros(6).long(), labels, torch.zeros(6).long())
    # recall rises at precisions 1, 2/4 and 3/5; the second is interpolated to the third
    assert average_precision(scored, [4], "VOC").tolist() == pytest.approx([(1 + 3 / 5 + 3 / 5) / 4])
    assert average_precision(scored, [0], "VOC").tolist() == [0]


@pytest.mark.parametrize("seed", range(5))
def test_role_ap_of_images_drawn_twice_is_that_of_their_copies(seed, tmp_path):
    """The bootstrap against making the copies; those of one detection are alike in score, so their order must not count."""
    _, scored, counts = ours(made_up(seed), tmp_path)
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(len(counts), np.full(len(counts), 1 / len(counts)), size=20).T.astype(np.int32)
    annotated = counts.numpy().T.astype(np.int32) @ weights
    everything = np.ones((len(counts), 1), np.int32)
    found = resampled_ap(scored, np.c_[everything, weights], np.c_[counts.sum(0).numpy(), annotated], "VOC")
    for column, weight in enumerate(weights.T):
        copies = torch.from_numpy(weight).long()[scored.image]
        drawn = Scored(
            *(getattr(scored, key).repeat_interleave(copies) for key in ("scores", "classes", "labels", "image"))
        )
        expected = average_precision(drawn, torch.from_numpy(annotated[:, column]), "VOC")
        there = annotated[:, column] > 0
        assert found[there, column + 1].tolist() == pytest.approx(expected[there].tolist(), abs=1e-12)
    assert found[:, 0].tolist() == pytest.approx(average_precision(scored, counts.sum(0), "VOC").tolist(), abs=1e-12)


# -- V-COCO's files --------------------------------------------------------------------------------------------------


def test_the_smallest_split_that_has_the_images_is_read(tmp_path):
    case = made_up(1)
    (first, *_), names = case.vsrl[0]["image_id"], [image["file_name"] for image in case.coco["images"]]
    part = []
    for entry in case.vsrl:
        kept = [image == first for image in entry["image_id"]]
        columns = {
            key: list(itertools.compress(entry[key], itertools.cycle(kept)))
            for key in ("image_id", "ann_id", "label", "role_object_id")
        }
        part.append({**entry, **columns})
    write(case, tmp_path, "trainval")
    write(Case(part, case.coco, []), tmp_path, "train")
    mine = [name for name in names if int(name[-16:-4]) == first]
    assert len(names) > len(mine) == 1
    assert set(read_vcoco(tmp_path, mine).annotations) == set(mine)
    assert set(read_vcoco(tmp_path / "data", names).annotations) == set(names)
    with pytest.raises(
        VcocoError, match=r"none of .*vcoco_train.json.* has all 2 captured images \(e.g. COCO_val2014_"
    ):
        read_vcoco(tmp_path, [*mine, "HICO_test2015_00000001.jpg"])
    coco = {**case.coco, "images": [image for image in case.coco["images"] if image["id"] != first]}
    write(Case(case.vsrl, coco, []), tmp_path / "less")
    with pytest.raises(VcocoError, match=r"instances_vcoco_all_2014.json is not .*it lacks images of vcoco_test.json"):
        read_vcoco(tmp_path / "less", [name for name in names if name not in mine])


DAMAGED = {
    "no boxes": (BOXES, None, f"has no {BOXES}"),
    "no actions": ("vcoco/vcoco_test.json", None, "has no vcoco/vcoco_test.json"),
    "cut": (BOXES, "{", "is no JSON"),
    "a list": (BOXES, "[]", "is not V-COCO's"),
    "deep": ("vcoco/vcoco_test.json", "[" * 100_000, "is no JSON"),
    "an object": ("vcoco/vcoco_test.json", "{}", "is not V-COCO's"),
    "no size": (BOXES, ("width", "with"), "KeyError: 'width'"),
    "no person": (BOXES, ('"person"', '"human"'), "is not V-COCO's"),
    "boxes of words": (BOXES, ('"bbox": [', '"bbox": ["a", '), "is not V-COCO's"),
    "an infinite picture": (BOXES, ('"width": 120', '"width": 1e999'), "OverflowError"),
    "a role too many": ("vcoco/vcoco_test.json", ('"role_object_id": [', '"role_object_id": [77, '), " roles for "),
    "a role without box": (BOXES, ('44, "area": 50.0', '44, "area": 0.0'), "has no valid box in the image of person"),
    "other persons": (
        "vcoco/vcoco_test.json", lambda text: '"ann_id": [77, '.join(text.rsplit('"ann_id": [', 1)),
        "talk_on_phone has other persons than hold",
    ),
    "too few labels": ("vcoco/vcoco_test.json", ('"label": [1, ', '"label": ['), "is not V-COCO's"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files_are_one_error_that_says_what_to_do(name, tmp_path):
    case = made_up(5)
    path, content, message = DAMAGED[name]
    path = write(case, tmp_path) / "data" / path
    before = path.read_text()
    if content is None:
        path.unlink()
    else:
        path.write_text(
            content(before) if callable(content) else content if isinstance(content, str) else before.replace(*content)
        )
        assert path.read_text() != before
    with pytest.raises(VcocoError) as error:
        read_vcoco(tmp_path, [image["file_name"] for image in case.coco["images"]])
    assert message in str(error.value)
    assert "script_pick_annotations.py" in str(error.value)
