"""The miniature on V-COCO: `compare --vcoco` against EZ-HOI's cache, scored by the definition and by V-COCO's tool."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from ezhoi_diffusion.cli import main
from ezhoi_diffusion.demo.scenes import HEIGHT, WIDTH
from ezhoi_diffusion.demo.vocabulary import OBJECTS
from ezhoi_diffusion.evaluation.replay import replay
from ezhoi_diffusion.evaluation.vcoco import vcoco_protocol
from ezhoi_diffusion.features.images import stored_images
from ezhoi_diffusion.features.score import ScoreError
from ezhoi_diffusion.features.store import FeatureStore
from helpers.miniature import VCOCO_ACTIONS, launch, rows_of, vcoco_flags
from helpers.vcoco_files import Case, by_definition, by_tool, write

KNOWN = len(VCOCO_ACTIONS)  # action-roles that EZ-HOI knows …
ROLES = KNOWN + 1  # … and those of V-COCO: `annotations` adds one


def replay_roles(store, folder):
    return replay(store, {}, protocol=vcoco_protocol(store, folder))


def annotations(folder) -> Case:
    """V-COCO's own annotations of the miniature's scenes, with cases that only V-COCO has.

    Persons without annotation, roles without a box, an action-role and an action that EZ-HOI does not know, and a person in
    every image without pairs.
    """
    anno = json.loads((folder / "data" / "instances_vcoco_test.json").read_text())
    known = [name.split() for name in reversed(VCOCO_ACTIONS)]  # in an order that is not EZ-HOI's
    actions = {"standing": ["agent"], **{action: ["agent", role] for action, role in known}}
    actions["slowly_lifting"] = ["agent", "obj", "instr"]
    boxes: list[dict] = []
    acting: list[tuple[int, int, dict[str, int]]] = []

    def add(image: int, box: list[float], category: int) -> int:
        x1, y1, x2, y2 = box
        for one in boxes:
            if (one["image_id"], one["bbox"][:2], one["category_id"]) == (image, [x1, y1], category):
                return one["id"]
        new = {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": 1.0, "iscrowd": 0}
        boxes.append({**new, "id": len(boxes) + 1, "image_id": image, "category_id": category})
        return len(boxes)

    for image, found in zip(anno["images"], anno["annotations"], strict=True):
        does: dict[int, dict[str, int]] = {}
        for human, other, verb, obj in zip(
            *(found[k] for k in ("boxes_h", "boxes_o", "actions", "objects")), strict=True
        ):
            role = add(image, other, obj)
            does.setdefault(add(image, human, 1), {})[VCOCO_ACTIONS[verb]] = role if role % 5 else 0
        acting += [(image, person, filled) for person, filled in does.items() if person % 3 or len(does) == 1]
        if not does:
            acting.append((image, add(image, [2, 2, 20, 20], 1), {VCOCO_ACTIONS[image % len(VCOCO_ACTIONS)]: 0}))
    for number, name in enumerate(VCOCO_ACTIONS):  # so few images do not show every action
        image = anno["images"][number % len(anno["images"])]
        acting.append((image, add(image, [number, 1, number + 20, 21], 1), {name: 0}))
    vsrl = [
        {
            "action_name": action, "role_name": roles,
            "image_id": [image for image, *_ in acting], "ann_id": [person for _, person, _ in acting],
            "label": [int(action in {name.split()[0] for name in filled}) for *_, filled in acting],
            "role_object_id": [person for _, person, _ in acting]
            + [filled.get(f"{action} {role}", 0) for role in roles[1:] for *_, filled in acting],
        }
        for action, roles in actions.items()
    ]  # fmt: skip
    images = [
        {"id": number, "file_name": found["file_name"], "width": WIDTH, "height": HEIGHT}
        for number, found in zip(anno["images"], anno["annotations"], strict=True)
    ]
    categories = [{"id": number, "name": name} for number, name in enumerate(OBJECTS, 1)]
    return Case(vsrl, {"images": images, "annotations": boxes, "categories": categories}, [])


@pytest.fixture(scope="module")
def made(vcoco, tmp_path_factory):
    """Captures of both splits, a bridge, and V-COCO's annotations."""
    folder = tmp_path_factory.mktemp("made")
    for split in ("train", "test"):
        flags = [*vcoco_flags(vcoco, folder / "out", cache=True), "--plugin", "capture", "--capture-split", split]
        done = launch(*flags, "--capture", str(folder / split))
        assert done.returncode == 0, done.stderr
    strongly = ["--start-timestep", "900", "--num-steps", "2"]  # a gentle one moves no AP after so short a training
    assert (
        main(["train", str(folder / "train"), "--out", str(folder / "bridge"), "--train-steps", "20", *strongly]) == 0
    )
    write(annotations(vcoco), folder / "vcoco")
    return folder


def test_a_comparison_is_what_v_coco_says_of_the_cache_with_and_without_the_bridge(vcoco, made, tmp_path, capsys):
    line = ["compare", str(made / "test"), "--vcoco", str(made / "vcoco"), "--bridge", str(made / "bridge")]
    settings = ["--set", "blend=1", "--set", "output=unit_norm"]  # they change the ranking of an untrained EZ-HOI
    assert main([*line, *settings, "--replicates", "100", "--out", str(tmp_path / "report")]) == 0
    rows = rows_of(capsys.readouterr().out)
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    per_class = {variant["name"]: variant["per_class_ap"] for variant in report["variants"]}
    case = annotations(vcoco)
    assert report["images"] == len(case.coco["images"]) > len(FeatureStore(made / "test").images)
    for name, ours in (
        ("none", []),
        ("diffusion", ["--plugin", "diffusion", "--bridge", str(made / "bridge"), *settings]),
    ):
        done = launch(*vcoco_flags(vcoco, tmp_path / name, cache=True), *ours)
        assert done.returncode == 0, done.stderr
        case.detections = json.loads((tmp_path / name / "cache.json").read_text())
        expected = [100 * ap for ap in by_definition(case)]
        assert per_class[name] == pytest.approx(expected, abs=1e-9)
        first, second = sum(expected[:ROLES]) / ROLES, sum(expected[ROLES:]) / ROLES
        assert 0 < first < second
        assert float(rows[name]["scenario 1"]) == pytest.approx(first, abs=0.00501)
        assert float(rows[name]["full"]) == pytest.approx((first + second) / 2, abs=0.00501)
        assert float(rows[name]["scenario 2"]) == pytest.approx(second, abs=0.00501)
        assert float(rows[name][f"scenario 2 of {KNOWN}"]) == pytest.approx(second * ROLES / KNOWN, abs=0.00501)
    assert per_class["diffusion"] != per_class["none"]
    assert per_class["identity"] == pytest.approx(per_class["none"])


def test_vcoco_s_tool_prints_the_same_for_the_cache_of_ezhoi(vcoco, made, tmp_path):
    """To the tool, the published cache also names each detection of one action as one of all others, with score 0.

    In scenario 1 that changes nothing. In scenario 2 such are right where no role is annotated and nothing else was: by
    how much that adds depends on how numpy orders what is equal.
    """
    done = launch(*vcoco_flags(vcoco, tmp_path, cache=True))
    assert done.returncode == 0, done.stderr
    case = annotations(vcoco)
    case.detections = json.loads((tmp_path / "cache.json").read_text())
    is_significant = by_tool(case, tmp_path, absent=[0.0, 0.0, 0.1, 0.1, 0.0])
    found = replay_roles(FeatureStore(made / "test"), made / "vcoco").variants["none"].ap.tolist()
    assert is_significant[:ROLES] == pytest.approx(found[:ROLES], abs=1e-6)
    assert all(given >= own - 1e-6 for given, own in zip(is_significant[ROLES:], found[ROLES:], strict=True))


def test_of_the_first_images_only_their_own_annotations_count(made, mocker):
    store = FeatureStore(made / "test")
    whole = replay_roles(store, made / "vcoco")
    mocker.patch.dict(store.meta, max_images=30)
    part = replay_roles(store, made / "vcoco")
    assert whole.images > part.images == len(store.images)
    assert 0 < part.annotations.sum() < whole.annotations.sum()
    assert (part.variants["none"].ap >= whole.variants["none"].ap).all()
    assert whole.names[:3] == [
        "no_interaction-obj, scenario 1",
        "proudly_painting-instr, scenario 1",
        "slowly_painting-obj, scenario 1",
    ]
    assert {name: len(index) for name, index in whole.groups.items()} == {
        "full": 2 * ROLES, "scenario 1": ROLES, "scenario 2": ROLES,
        f"scenario 1 of {KNOWN}": KNOWN, f"scenario 2 of {KNOWN}": KNOWN,
    }  # fmt: skip


def test_boxes_are_scaled_to_the_picture_by_width_and_by_height(made):
    store = FeatureStore(made / "test")
    find = vcoco_protocol(store, made / "vcoco").match
    right = 0
    for image in stored_images(store):
        narrow = replace(
            image.pairs,
            size=image.pairs.size // torch.tensor([1, 2]),
            boxes=image.pairs.boxes * torch.tensor([0.5, 1, 0.5, 1]),
        )
        before, after = find(image), find(replace(image, pairs=narrow))
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        right += len(before[-1])
    assert right


def test_a_comparison_that_cannot_work_is_refused_with_a_remedy(made, captured, mocker, capsys):
    store, line = made / "test", ["--bridges", "none,identity"]
    assert main(["compare", str(store), *line]) == 2
    assert f"for V-COCO give its annotations, `ezhoi-diffusion compare {store} --vcoco DIR`" in capsys.readouterr().err
    assert main(["compare", str(store), *line, "--vcoco", str(made)]) == 2
    assert "has no instances_vcoco_all_2014.json: give the folder of a V-COCO checkout" in capsys.readouterr().err
    line += ["--vcoco", str(made / "vcoco")]
    assert main(["compare", str(store), *line, "--ap", "AUC"]) == 2
    assert "--ap and --setting are for HICO-DET" in capsys.readouterr().err
    assert main(["compare", str(captured[0].folder), *line]) == 2
    assert "is a capture of hicodet, not of V-COCO: leave --vcoco out" in capsys.readouterr().err
    for names, message in (
        (None, "does not name V-COCO's actions"),
        (["waving obj"], "no action-role called waving obj"),
    ):
        opened = FeatureStore(store)
        mocker.patch.dict(opened.meta, interactions=names)
        with pytest.raises(ScoreError, match=message):
            replay_roles(opened, made / "vcoco")
