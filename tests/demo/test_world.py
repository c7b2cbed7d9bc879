"""The miniature's world: what it promises, and that a seed decides it."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from ezhoi_diffusion.demo import world
from ezhoi_diffusion.demo.scenes import Painter, Scene, new_shapes
from ezhoi_diffusion.demo.vocabulary import (
    CORRESPONDENCE,
    INTERACTION,
    NO_INTERACTION,
    NUM_INTERACTIONS,
    OBJECTS,
    SENTENCES,
    UNSEEN,
    VERBS,
    action_of,
    go_together,
    manner_of,
)

SEED = 10


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    """A training split of the demo's size."""
    shapes = new_shapes(np.random.default_rng([SEED, 3]))
    return world._split(Painter(shapes, np.random.default_rng([SEED, 1]), world.MISSED), 600)


@pytest.fixture(scope="module")
def counts(scenes) -> np.ndarray:
    """Training annotations of each interaction."""
    found = Counter(hoi for image in world._annotations(scenes, "train2015")["annotation"] for hoi in image["hoi"])
    return np.asarray([found[i] for i in range(NUM_INTERACTIONS)])


def test_verbs_and_objects_are_made_of_parts_and_fill_a_quarter_of_their_table():
    assert (len(VERBS), len(OBJECTS) - 1) == (31, 16)
    assert all(len(name.split()) == 2 for name in [*VERBS[:-1], *OBJECTS[1:]])
    assert 0.24 < NUM_INTERACTIONS / (len(VERBS) * 16) < 0.27
    assert {obj for _, obj, verb in CORRESPONDENCE if verb == NO_INTERACTION} == set(range(1, 17))
    assert len(set(SENTENCES)) == len(INTERACTION) == NUM_INTERACTIONS


@pytest.mark.parametrize("split", ["unseen_verb", "rare_first", "non_rare_first", "unseen_object"])
def test_a_split_hides_about_a_fifth_and_every_part_stays_seen(split):
    hidden = set(UNSEEN[split])
    assert 0.14 < len(hidden) / NUM_INTERACTIONS < 0.21
    seen = [(obj, verb) for i, obj, verb in CORRESPONDENCE if i not in hidden]
    verbs, objects = {verb for _, verb in seen} - {NO_INTERACTION}, {obj for obj, _ in seen}
    assert len(verbs) == 30 - 6 * (split == "unseen_verb")
    assert len(objects) == 16 - 3 * (split == "unseen_object")
    assert {manner_of(v) for v in verbs} == set(range(5))
    assert {action_of(v) for v in verbs} == set(range(6))
    words = " ".join(SENTENCES[i] for i in range(NUM_INTERACTIONS) if i not in hidden).split()
    assert {*" ".join(SENTENCES[i] for i in hidden).split()} <= {*words}


def test_rare_first_hides_what_has_few_annotations(counts):
    assert counts[UNSEEN["rare_first"]].mean() < counts.mean() / 1.5
    assert counts[UNSEEN["non_rare_first"]].mean() > counts.mean() * 1.5


def test_pairs_have_one_to_three_verbs_that_go_together(scenes):
    verbs = [scene.persons[person][1] for scene in scenes for person, _ in scene.pairs]
    numbers = Counter(map(len, verbs))
    assert set(numbers) == {1, 2, 3}
    assert 1.3 < np.mean([len(own) for own in verbs]) < 1.5
    assert all(go_together(a, b) for own in verbs for a in own for b in own if a != b)
    assert len({frozenset(own) for own in verbs if len(own) > 1}) > 50, "and not the same few again"


def test_most_pairs_are_background_near_ones_too(scenes):
    total = labelled = near = 0
    for scene in scenes:
        annotated = {*scene.pairs, *scene.idle_pairs}
        for p, (person, _) in enumerate(scene.persons):
            for t, (thing, _, _) in enumerate(scene.things):
                total += 1
                labelled += (p, t) in annotated
                gap = max(person[0] - thing[2], thing[0] - person[2], person[1] - thing[3], thing[1] - person[3])
                near += (p, t) not in annotated and gap <= 3
                assert gap <= 3 or (p, t) not in annotated, "who acts is near"
    assert 0.8 < 1 - labelled / total < 0.9
    assert near > labelled / 3


def test_a_long_tail_with_rare_classes(counts):
    assert counts.min() >= 1
    assert 0.3 < (counts < 10).mean() < 0.7
    assert np.sort(counts)[-13:].sum() > 0.25 * counts.sum(), "a tenth of the classes has a quarter of the annotations"
    assert all(counts[INTERACTION[obj, NO_INTERACTION]] > 0 for obj in range(1, 17))


def test_some_annotated_persons_cannot_be_seen(scenes):
    shown = [
        scene.image[int(box[1]) : int(box[3]), int(box[0]) : int(box[2])].max()
        for scene in scenes
        for person, _ in scene.pairs
        for box, _ in [scene.persons[person]]
    ]
    assert 0.02 < np.mean(np.asarray(shown) < 128) < 0.09


def test_a_seed_decides_the_world_and_test_drawings_are_new():
    def drawn(seed: int, part: int) -> np.ndarray:
        shapes = new_shapes(np.random.default_rng([seed, 3]))
        return np.stack(
            [scene.image for scene in world._split(Painter(shapes, np.random.default_rng([seed, part])), 4)]
        )

    assert np.array_equal(drawn(10, 1), drawn(10, 1))
    assert not np.array_equal(drawn(10, 1), drawn(10, 2))
    assert not np.array_equal(drawn(10, 1), drawn(11, 1))
