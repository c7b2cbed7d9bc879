"""Reads V-COCO's annotation files: who does what in which role, and COCO's boxes of persons and objects."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ezhoi_diffusion.errors import EzhoiDiffusionError
from ezhoi_diffusion.files import read_whole

BOXES = "instances_vcoco_all_2014.json"
SPLITS = ("vcoco_test.json", "vcoco_val.json", "vcoco_train.json", "vcoco_trainval.json")
MAX_BYTES = 1 << 30  # COCO's whole annotations are smaller
GET = (
    "give the folder of a V-COCO checkout in which `python script_pick_annotations.py COCO_ANNOTATIONS` was run, which "
    f"makes data/{BOXES}"
)


class VcocoError(EzhoiDiffusionError):
    """V-COCO's annotations are missing, damaged, or of other images."""


@dataclass(frozen=True, eq=False)
class RoleAnnotations:
    """The G persons of one image, and what they do: R action-roles. Boxes are xyxy in pixels of the picture, float32.

    Attributes:
        boxes: [G, 4].
        known: Whether somebody annotated what a person does, [G] bool.
        acts: Whether a person does the action of an action-role, [G, R] bool.
        roles: The box that fills an action-role, [G, R, 4]; NaN where none is annotated.
    """

    boxes: Tensor
    known: Tensor
    acts: Tensor
    roles: Tensor

    def counts(self) -> Tensor:
        """Annotations of each action-role in scenario 1, then in scenario 2: [2R] int64."""
        return self.acts.sum(0).repeat(2)


@dataclass(frozen=True, eq=False)
class Vcoco:
    """One split of V-COCO.

    Attributes:
        roles: R action-roles, as V-COCO's tool prints them (`hit-instr`).
        sizes: Image -> width and height of its picture in pixels, [2] int64.
        annotations: Image -> its persons. Images are called by file name.
    """

    roles: list[str]
    sizes: dict[str, Tensor]
    annotations: dict[str, RoleAnnotations]


def read_vcoco(folder: Path, names: Collection[str]) -> Vcoco:
    """Read the smallest split that contains all images called `names`.

    Args:
        folder: A V-COCO checkout, or its data folder.
        names: File names of the captured images.

    Raises:
        VcocoError: A file is missing or damaged, or no split contains all images.
    """
    found = {
        path.name: path
        for data in (folder, folder / "data")
        for path in (data / BOXES, *(data / "vcoco" / name for name in SPLITS))
        if path.is_file()
    }
    boxes = found.pop(BOXES, None)
    if boxes is None or not found:
        raise VcocoError(f"{folder} has no {BOXES if boxes is None else f'vcoco/{SPLITS[0]}'}: {GET}")
    coco = _read(boxes)
    with _understood(boxes):
        ids = {str(image["file_name"]): image["id"] for image in coco["images"]}
    best: tuple[Path, Any, set[Any]] | None = None
    for path in found.values():
        actions = _read(path)
        with _understood(path):
            images = set(actions[0]["image_id"])
            if {ids.get(name) for name in names} <= images and (best is None or len(images) < len(best[2])):
                best = path, actions, images
    if best is None:
        raise VcocoError(
            f"none of {', '.join(map(str, found.values()))} has all {len(names)} captured images (e.g. {min(names)}) with "
            f"boxes in {boxes}: {GET}, and capture V-COCO's own images"
        )
    path, actions, images = best
    with _understood(boxes):
        if not images <= set(ids.values()):
            raise ValueError(f"it lacks images of {path.name}")
        sizes = {image["id"]: torch.tensor([int(image["width"]), int(image["height"])]) for image in coco["images"]}
        objects = _objects(coco, sizes)
    with _understood(path):
        roles, acting = _acting(actions)
        known = set(actions[0]["ann_id"])
        own = {name: number for name, number in ids.items() if number in images}
        return Vcoco(
            roles,
            {name: sizes[number] for name, number in own.items()},
            {name: _persons(objects[number], known, acting, len(roles)) for name, number in own.items()},
        )


def _read(path: Path) -> Any:
    try:
        return json.loads(read_whole(path, MAX_BYTES, None, VcocoError, GET))
    except (ValueError, RecursionError) as error:
        raise VcocoError(f"{path} is no JSON ({error}): {GET}") from error


@contextmanager
def _understood(path: Path) -> Iterator[None]:
    try:
        yield
    except (AttributeError, IndexError, KeyError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        raise VcocoError(f"{path} is not V-COCO's ({type(error).__name__}: {error}): {GET}") from error


def _objects(coco: Any, sizes: dict[Any, Tensor]) -> dict[Any, dict[Any, tuple[bool, list[float]]]]:
    """Image -> annotation -> (is a person, box xyxy), for the annotations that V-COCO's tool accepts as valid."""
    (person,) = (one["id"] for one in coco["categories"] if one["name"] == "person")
    objects: dict[Any, dict[Any, tuple[bool, list[float]]]] = {image: {} for image in sizes}
    for one in coco["annotations"]:
        if one["image_id"] not in sizes or one.get("ignore") == 1:
            continue
        last = [side - 1.0 for side in sizes[one["image_id"]].tolist()]
        low, extent = one["bbox"][:2], one["bbox"][2:]
        high = [start + max(0.0, side - 1.0) for start, side in zip(low, extent, strict=True)]
        low, high = ([min(end, max(0.0, at)) for at, end in zip(corner, last, strict=True)] for corner in (low, high))
        if one["area"] > 0 and high[0] > low[0] and high[1] > low[1]:
            objects[one["image_id"]][one["id"]] = one["category_id"] == person, [*low, *high]
    return objects


def _acting(actions: Any) -> tuple[list[str], dict[Any, dict[int, Any]]]:
    """The action-roles, and person -> action-role -> annotation that fills it, 0 for none."""
    roles: list[str] = []
    acting: dict[Any, dict[int, Any]] = {}
    for action in actions:
        count = len(action["ann_id"])
        if action["ann_id"] != actions[0]["ann_id"]:
            raise ValueError(f"{action['action_name']} has other persons than {actions[0]['action_name']}")
        if len(action["role_object_id"]) != count * len(action["role_name"]):
            raise ValueError(f"{action['action_name']} has {len(action['role_object_id'])} roles for {count} persons")
        for column, role in enumerate(action["role_name"][1:], 1):  # the first is the agent
            filled = action["role_object_id"][column * count : (column + 1) * count]
            for person, label, other in zip(action["ann_id"], action["label"], filled, strict=True):
                if label == 1:
                    if len(roles) in acting.setdefault(person, {}):
                        raise ValueError(f"annotation {person} has {action['action_name']} twice")
                    acting[person][len(roles)] = other
            roles.append(f"{action['action_name']}-{role}")
    return roles, acting


def _persons(
    objects: dict[Any, tuple[bool, list[float]]], known: set[Any], acting: dict[Any, dict[int, Any]], roles: int
) -> RoleAnnotations:
    persons = [number for number, (is_person, _) in objects.items() if is_person]
    acts = torch.zeros(len(persons), roles, dtype=torch.bool)
    filled = torch.full((len(persons), roles, 4), torch.nan)
    for row, person in enumerate(persons):
        for role, other in acting.get(person, {}).items():
            acts[row, role] = True
            if other:
                if other not in objects:
                    raise ValueError(f"annotation {other} has no valid box in the image of person {person}")
                filled[row, role] = torch.tensor(objects[other][1])
    boxes = torch.tensor([objects[person][1] for person in persons]).reshape(-1, 4)
    return RoleAnnotations(boxes, torch.tensor([person in known for person in persons], dtype=torch.bool), acts, filled)
