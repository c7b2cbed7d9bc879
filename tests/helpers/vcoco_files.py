"""V-COCO's files, and its role AP computed twice without our code: by loops, and by V-COCO's own tool."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ezhoi_diffusion.evaluation.vcoco_annotations import BOXES

TOOL = os.environ.get("VCOCO_ROOT")  # a checkout of V-COCO, for its vsrl_eval.py


@dataclass
class Case:
    """vsrl: what vcoco_test.json holds. coco: COCO's annotations. detections: the cache.pkl; a key left out is no detection."""

    vsrl: list[dict[str, Any]]
    coco: dict[str, Any]
    detections: list[dict[str, Any]]

    @property
    def roles(self) -> list[tuple[str, str]]:
        return [(entry["action_name"], role) for entry in self.vsrl for role in entry["role_name"][1:]]


def write(case: Case, folder: Path, split: str = "test") -> Path:
    (folder / "data" / "vcoco").mkdir(parents=True, exist_ok=True)
    (folder / "data" / BOXES).write_text(json.dumps(case.coco))
    (folder / "data" / "vcoco" / f"vcoco_{split}.json").write_text(json.dumps(case.vsrl))
    return folder


def _iou(a: list[float], b: list[float]) -> float:
    across, down = (max(min(a[i + 2], b[i + 2]) - max(a[i], b[i]) + 1, 0) for i in (0, 1))
    areas = [(x[2] - x[0] + 1) * (x[3] - x[1] + 1) for x in (a, b)]
    return across * down / (sum(areas) - across * down)


def by_definition(case: Case) -> list[float]:
    """As V-COCO's README and paper say it, one detection after the other, for each scenario and action-role."""
    sizes = {image["id"]: (image["width"] - 1, image["height"] - 1) for image in case.coco["images"]}
    persons: dict[int, list[tuple[int, list[float]]]] = {image: [] for image in sizes}
    boxes = {}
    for one in case.coco["annotations"]:
        x, y, w, h = one["bbox"]
        right, bottom = sizes[one["image_id"]]
        box = [min(max(x, 0), right), min(max(y, 0), bottom)]
        box += [min(max(x + w - 1, 0), right), min(max(y + h - 1, 0), bottom)]
        if one.get("ignore") or one["area"] <= 0 or w <= 1 or h <= 1 or box[0] >= box[2] or box[1] >= box[3]:
            continue
        boxes[one["id"]] = box
        if one["category_id"] == 1:
            persons[one["image_id"]].append((one["id"], box))
    result = []
    for scenario in (1, 2):
        for action, role in case.roles:
            (entry,) = (entry for entry in case.vsrl if entry["action_name"] == action)
            count, column = len(entry["ann_id"]), entry["role_name"].index(role)
            filled = dict(zip(entry["ann_id"], entry["role_object_id"][column * count :][:count], strict=True))
            acting = {person for person, label in zip(entry["ann_id"], entry["label"], strict=True) if label}
            found = [(one, one.get(f"{action}_{role}", [float("nan")] * 5)) for one in case.detections]
            outcomes, covered = [], set()
            for one, (*other, _) in sorted(
                (pair for pair in found if pair[1][4] == pair[1][4]), key=lambda pair: -pair[1][4]
            ):
                overlaps = [_iou(one["person_box"], box) for _, box in persons[one["image_id"]]]
                person, _ = persons[one["image_id"]][overlaps.index(max(overlaps))]
                if person not in filled:
                    continue  # nobody said what this one does
                if filled[person]:
                    fits = other[0] == other[0] and _iou(other, boxes[filled[person]]) >= 0.5
                else:
                    fits = scenario == 2 or other == [0] * 4 or other[0] != other[0]
                right = person in acting and max(overlaps) >= 0.5 and fits and person not in covered
                covered |= {person} if right else set()
                outcomes.append(right)
            precision = [sum(outcomes[: i + 1]) / (i + 1) for i in range(len(outcomes))]
            area = sum(max(precision[i:]) for i, right in enumerate(outcomes) if right)
            result.append(area / len(acting & boxes.keys()))
    return result


def tool() -> ModuleType:
    """V-COCO's own evaluation; skips the test where there is none."""
    if not TOOL:
        pytest.skip("VCOCO_ROOT, a checkout of V-COCO, is not set")
    pytest.importorskip("pycocotools", reason="V-COCO's tool needs pycocotools")
    module = ModuleType("vsrl_eval")
    source = (Path(TOOL) / "vsrl_eval.py").read_text()
    exec(source.replace("role_id[i, j - 1] = aid", "role_id[i, j - 1] = aid[0]"), vars(module))  # numpy asks for it
    return module


def by_tool(case: Case, folder: Path, absent: Sequence[float] = (float("nan"),) * 5) -> list[float]:
    """As `by_definition`; its precision and recall are float32. absent: what a detection leaves out, NaN for nothing."""
    module = tool()
    write(case, folder)
    blank: dict[str, Any] = {f"{entry['action_name']}_agent": 0.0 for entry in case.vsrl}
    blank |= {f"{action}_{role}": list(absent) for action, role in case.roles}
    (folder / "cache.pkl").write_bytes(pickle.dumps([{**blank, **one} for one in case.detections], 2))
    (folder / "test.ids").write_text("\n".join(map(str, sorted(set(case.vsrl[0]["image_id"])))))
    files = folder / "data" / "vcoco" / "vcoco_test.json", folder / "data" / BOXES, folder / "test.ids"
    evaluation = module.VCOCOeval(*map(str, files))
    seen: list[float] = []
    curve = module.voc_ap
    module.voc_ap = lambda *args: seen.append(float(curve(*args))) or seen[-1]
    for scenario in ("scenario_1", "scenario_2"):
        evaluation._do_role_eval(evaluation._get_vcocodb(), str(folder / "cache.pkl"), eval_type=scenario)
    return seen
