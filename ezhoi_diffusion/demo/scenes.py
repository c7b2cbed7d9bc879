"""Drawings of the miniature's world: persons who do something with an object, and others nearby.

Every part of a verb and of an object is a line of its own shape. A person is a head over a body with up to three columns, one
for each verb: the manner above, the action below. An object shows its material over its kind; it tends to be brighter in use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ezhoi_diffusion.demo.vocabulary import ACTIONS, KINDS, MANNERS, MATERIALS, action_of, manner_of

HEIGHT, WIDTH = 68, 80  # not square, so that swapped axes show
MARGIN = 3
PART, COLUMNS = 7, 3  # pixels of a part of a verb; verbs that a person has room for
HEAD = 3
PERSON_WIDTH, PERSON_HEIGHT = COLUMNS * PART + 2, HEAD + 2 * PART + 2

Canvas = NDArray[np.float32]


class Cell(NamedTuple):
    """Top left corner and size of a drawing, in pixels."""

    y: int
    x: int
    height: int
    width: int

    @property
    def box(self) -> list[float]:
        """xyxy."""
        return [float(v) for v in (self.x, self.y, self.x + self.width, self.y + self.height)]


@dataclass
class Scene:
    """One image and what is in it; boxes are xyxy in pixels."""

    image: NDArray[np.uint8] = field(default_factory=lambda: np.zeros(0, dtype=np.uint8))  # [HEIGHT, WIDTH]
    persons: list[tuple[list[float], tuple[int, ...]]] = field(default_factory=list)  # box, verbs
    things: list[tuple[list[float], int, bool]] = field(default_factory=list)  # box, object, in use
    pairs: list[tuple[int, int]] = field(default_factory=list)  # person and thing that interact
    idle_pairs: list[tuple[int, int]] = field(default_factory=list)  # annotated with no_interaction


def _line(points: NDArray[np.float64], size: int) -> Canvas:
    """Draw a line through points [V, 2] in 0..1 into [size, size], 0..1."""
    centres = (np.arange(size) + 0.5) / size
    pixels = np.stack(np.meshgrid(centres, centres, indexing="ij"), -1).reshape(-1, 1, 2)
    start, step = points[:-1], np.diff(points, axis=0)
    along = ((pixels - start) * step).sum(-1) / (step**2).sum(-1)
    distance = np.linalg.norm(pixels - start - along.clip(0, 1)[..., None] * step, axis=-1).min(1)
    drawn: Canvas = (1.1 - distance * size).clip(0, 1).reshape(size, size).astype(np.float32)
    return drawn


def new_shapes(rng: np.random.Generator) -> dict[str, NDArray[np.float64]]:
    """A line [4, 2] for every part of a verb or object, chosen as different from each other as they come."""
    candidates = rng.random((80, 4, 2)) * 0.9 + 0.05
    pictures = np.stack([_line(points, PART).ravel() for points in candidates])
    pictures /= np.linalg.norm(pictures, axis=1, keepdims=True)
    names = [*MANNERS, *ACTIONS, *MATERIALS, *KINDS]
    chosen = [0]
    while len(chosen) < len(names):
        chosen.append(int((pictures @ pictures[chosen].T).max(1).argmin()))
    return {name: candidates[row] for name, row in zip(names, rng.permutation(chosen), strict=True)}


class Painter:
    """Draw scenes. The shapes make the world; the generator makes the drawings.

    missed: Share of persons who are too faint for the detector, which never saw any in its training.
    """

    def __init__(self, shapes: dict[str, NDArray[np.float64]], rng: np.random.Generator, missed: float = 0.0) -> None:
        self.shapes, self.rng, self.missed = shapes, rng, missed

    def _part(self, name: str, size: int) -> Canvas:
        """No two drawings of a part are alike."""
        points = self.shapes[name]
        return _line(points + self.rng.normal(0, 0.06, points.shape), size)

    def _person(self, verbs: Sequence[int]) -> Canvas:
        patch = np.full((PERSON_HEIGHT, PERSON_WIDTH), 0.8, dtype=np.float32)
        patch[:HEAD] = 0
        patch[:HEAD, PERSON_WIDTH // 2 - HEAD : PERSON_WIDTH // 2 + HEAD + 1] = 1
        patch[HEAD + 1 : -1, 1:-1] = 0
        for column, verb in zip(self.rng.permutation(COLUMNS), verbs, strict=False):
            left = 1 + PART * int(column)
            patch[HEAD + 1 : HEAD + 1 + PART, left : left + PART] = self._part(MANNERS[manner_of(verb)], PART)
            patch[HEAD + 1 + PART : -1, left : left + PART] = self._part(ACTIONS[action_of(verb)], PART)
        return patch * (0.02 if self.rng.random() < self.missed else 1.0)

    def _thing(self, obj: int, in_use: bool, size: int) -> Canvas:
        material, kind = divmod(obj - 1, len(KINDS))
        patch = np.maximum(self._part(KINDS[kind], size), 0.6 * self._part(MATERIALS[material], size))
        shown: Canvas = patch * np.float32(self.rng.uniform(*((0.75, 1.0) if in_use else (0.5, 0.85))))
        return shown

    def _free_cell(self, canvas: Canvas, height: int, width: int) -> Cell | None:
        """A random place with nothing drawn on it; None if there is none."""
        used = np.pad((canvas > 0).astype(np.int64), ((1, 0), (1, 0))).cumsum(0).cumsum(1)
        inside = used[height:, width:] - used[:-height, width:] - used[height:, :-width] + used[:-height, :-width]
        free = inside[MARGIN:-MARGIN, MARGIN:-MARGIN] == 0
        places = np.flatnonzero(free)
        if not len(places):
            return None
        y, x = divmod(int(self.rng.choice(places)), free.shape[1])
        return Cell(y + MARGIN, x + MARGIN, height, width)

    def _pair_cells(self, canvas: Canvas, size: int) -> tuple[Cell, Cell] | None:
        """Free places for a person and an object of `size` pixels beside, above or below, at most 3 pixels apart."""
        gap = int(self.rng.integers(0, 4))
        height, width = PERSON_HEIGHT, PERSON_WIDTH
        beside = bool(self.rng.random() < 0.5)
        area = (height, width + gap + size) if beside else (height + gap + size, width)
        place = self._free_cell(canvas, *area)
        if place is None:
            return None
        slack = int(self.rng.integers(0, (height if beside else width) - size + 1))
        first = bool(self.rng.random() < 0.5)  # the person is on the left, or above
        if beside:
            person = Cell(place.y, place.x + (0 if first else size + gap), height, width)
            thing = Cell(place.y + slack, place.x + (width + gap if first else 0), size, size)
        else:
            person = Cell(place.y + (0 if first else size + gap), place.x, height, width)
            thing = Cell(place.y + (height + gap if first else 0), place.x + slack, size, size)
        return person, thing

    def _size(self) -> int:
        return int(self.rng.integers(11, 14))

    def scene(
        self,
        acting: Sequence[tuple[int, Sequence[int]]],
        beside: Sequence[int] = (),
        idle: Sequence[int] = (),
        alone: Sequence[Sequence[int]] = (),
    ) -> Scene:
        """Draw a scene. What finds no room is left out, the last first.

        Args:
            acting: Object and verbs of each pair that interacts.
            beside: Objects with a person beside them who does nothing.
            idle: Objects on their own, not in use.
            alone: Verbs of persons who do something without an object.
        """
        canvas = np.zeros((HEIGHT, WIDTH), dtype=np.float32)
        scene = Scene()

        def put(cell: Cell, patch: Canvas) -> list[float]:
            # What is there is not nothing, even where it is dark.
            canvas[cell.y : cell.y + cell.height, cell.x : cell.x + cell.width] = patch.clip(1e-6)
            return cell.box

        def pair(obj: int, verbs: Sequence[int], found: list[tuple[int, int]]) -> None:
            cells = self._pair_cells(canvas, size := self._size())
            if cells is not None:
                in_use = len(verbs) > 0
                scene.persons.append((put(cells[0], self._person(verbs)), tuple(verbs)))
                scene.things.append((put(cells[1], self._thing(obj, in_use, size)), obj, in_use))
                found.append((len(scene.persons) - 1, len(scene.things) - 1))

        for obj, verbs in acting:
            pair(obj, verbs, scene.pairs)
        for obj in beside:
            pair(obj, (), scene.idle_pairs)
        for verbs in alone:
            cell = self._free_cell(canvas, PERSON_HEIGHT, PERSON_WIDTH)
            if cell is not None:
                scene.persons.append((put(cell, self._person(verbs)), tuple(verbs)))
        for obj in idle:
            cell = self._free_cell(canvas, size := self._size(), size)
            if cell is not None:
                scene.things.append((put(cell, self._thing(obj, False, size)), obj, False))
        canvas += self.rng.normal(0.06, 0.05, canvas.shape).astype(np.float32)
        scene.image = (canvas.clip(0, 1) * 255).astype(np.uint8)
        return scene
