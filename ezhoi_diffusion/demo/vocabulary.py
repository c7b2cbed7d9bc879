"""Verbs, objects and interactions of the miniature's world, and its zero-shot splits, under HICO-DET's names.

A verb is a manner and an action, an object a material and a kind: "gently lifting a wooden cup". So the text of an unseen
verb is made of words that seen verbs use too. As in HICO-DET, every object has the verb `no_interaction`.
"""

from __future__ import annotations

from itertools import product

MANNERS = ["gently", "firmly", "quickly", "slowly", "proudly"]
ACTIONS = ["lifting", "holding", "washing", "pushing", "riding", "painting"]
MATERIALS = ["wooden", "metal", "plastic", "woollen"]
KINDS = ["bench", "cup", "horse", "umbrella"]

VERBS = [*(f"{manner} {action}" for action, manner in product(ACTIONS, MANNERS)), "no_interaction"]
OBJECTS = ["person", *(f"{material} {kind}" for material, kind in product(MATERIALS, KINDS))]
NO_INTERACTION = len(VERBS) - 1


def action_of(verb: int) -> int:
    """The action of a verb with one."""
    return verb // len(MANNERS)


def manner_of(verb: int) -> int:
    """The manner of a verb with one."""
    return verb % len(MANNERS)


def go_together(first: int, second: int) -> bool:
    """Whether one person can do both: two different actions of the first three, or two of the last three."""
    a, b = action_of(first), action_of(second)
    return a != b and a // 3 == b // 3


def _verbs_of(obj: int) -> list[int]:
    """Seven of the thirty verbs suit an object, spread evenly, and `no_interaction`."""
    return [*sorted((7 * obj + step) % NO_INTERACTION for step in (0, 4, 8, 13, 16, 21, 27)), NO_INTERACTION]


# (interaction, object, verb) as in HICO-DET, grouped by object.
CORRESPONDENCE = [
    (i, obj, verb)
    for i, (obj, verb) in enumerate((obj, verb) for obj in range(1, len(OBJECTS)) for verb in _verbs_of(obj))
]
NUM_INTERACTIONS = len(CORRESPONDENCE)
INTERACTION = {(obj, verb): i for i, obj, verb in CORRESPONDENCE}
# A long tail whose order has nothing to do with verb or object. `no_interaction` is as frequent as its object.
FREQUENCY = [0.0 if verb == NO_INTERACTION else 1.0 / (3 + i * 37 % NUM_INTERACTIONS) for i, _, verb in CORRESPONDENCE]
SENTENCES = [
    f"a photo of a person {'and' if verb == NO_INTERACTION else VERBS[verb]} a {OBJECTS[obj]}"
    for _, obj, verb in CORRESPONDENCE
]


def _first(order: list[int], count: int = 24) -> list[int]:
    """The first `count` interactions of `order` that leave every verb and every object a seen one."""
    hidden: set[int] = set()
    for i in order:
        seen = [CORRESPONDENCE[k] for k in range(NUM_INTERACTIONS) if k not in hidden and k != i]
        if len(hidden) < count and all(
            any(other[column] == CORRESPONDENCE[i][column] for other in seen) for column in (1, 2)
        ):
            hidden.add(i)
    return sorted(hidden)


_BY_FREQUENCY = sorted((i for i in range(NUM_INTERACTIONS) if FREQUENCY[i]), key=FREQUENCY.__getitem__)
UNSEEN = {
    "default": [],
    "rare_first": _first(_BY_FREQUENCY),
    "non_rare_first": _first(_BY_FREQUENCY[::-1]),
    # One verb of every action, and no manner more than twice: each part has seen verbs.
    "unseen_verb": [i for i, _, verb in CORRESPONDENCE if verb in (1, 8, 10, 17, 24, 26)],
    "unseen_object": [i for i, obj, _ in CORRESPONDENCE if obj in (2, 8, 13)],
}
