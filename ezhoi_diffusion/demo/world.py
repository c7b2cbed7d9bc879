"""A small data set for the miniature EZ-HOI: handwritten digits as verbs and objects, in HICO-DET's layout.

A person is a framed box whose digit is the verb. An object is a digit without a frame, bright while it is in use and dim
otherwise. An interaction is a person next to an object in use. `make_world` writes annotations, images and the
pretrained weights; only tensors are pickled.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from ezhoi_diffusion.demo import towers

VERBS = ["carrying", "cutting", "feeding", "holding", "kicking", "licking", "pushing", "riding", "throwing", "washing"]
OBJECTS = ["person", "apple", "ball", "bench", "bottle", "cake", "cup", "dog", "horse", "kite", "umbrella"]
# (interaction, object, verb) as in HICO-DET, grouped by object: six of the ten verbs suit an object.
CORRESPONDENCE = [
    (i, obj, verb)
    for i, (obj, verb) in enumerate(
        (obj, verb) for obj in range(1, 11) for verb in range(10) if (obj - verb) % 10 in (0, 1, 3, 4, 6, 8)
    )
]
NUM_INTERACTIONS = len(CORRESPONDENCE)
# A long tail whose order has nothing to do with verb or object.
FREQUENCY = [1.0 / (12 + i * 37 % NUM_INTERACTIONS) for i in range(NUM_INTERACTIONS)]
UNSEEN = {
    "default": [],
    "rare_first": sorted(sorted(range(NUM_INTERACTIONS), key=FREQUENCY.__getitem__)[:12]),
    "unseen_verb": [i for i, _, verb in CORRESPONDENCE if verb in (2, 7)],
}
SENTENCES = [f"a photo of a person {VERBS[verb]} a {OBJECTS[obj]}" for _, obj, verb in CORRESPONDENCE]

HEIGHT, WIDTH, CLIP_SIZE = 60, 80, 64  # not square, so that swapped axes show
MEAN, STD = 0.15, 0.3
MARGIN, CELL = 3, 18
PARTITIONS = ("train2015", "test2015")


@dataclass
class Scene:
    """One image and its annotations; boxes are xyxy in pixels."""

    image: NDArray[np.uint8]  # [HEIGHT, WIDTH]
    persons: list[tuple[list[float], int]] = field(default_factory=list)  # box, verb
    things: list[tuple[list[float], int, bool]] = field(default_factory=list)  # box, object, in use
    pairs: list[tuple[int, int, int]] = field(default_factory=list)  # interaction, person, thing


class Painter:
    """Draw scenes from one pool of handwritten digits."""

    def __init__(self, images: Tensor, labels: Tensor, rng: np.random.Generator) -> None:
        self.rng = rng
        self.rows = [np.flatnonzero((labels == digit).numpy()) for digit in range(10)]
        self.sizes = {
            size: F.interpolate(images[:, None], size=(size, size), mode="bilinear")[:, 0].numpy()
            for size in range(10, 16)
        }

    def _digit(self, digit: int, size: int) -> NDArray[np.float32]:
        return np.asarray(self.sizes[size][self.rng.choice(self.rows[digit])])

    def _place(self, canvas: NDArray[np.float32], patch: NDArray[np.float32], cell: tuple[int, int]) -> list[float]:
        size = len(patch)
        y, x = (MARGIN + CELL * c + int(self.rng.integers(0, CELL - size + 1)) for c in cell)
        canvas[y : y + size, x : x + size] += patch
        return [float(v) for v in (x, y, x + size, y + size)]

    def scene(self, interactions: list[int], idle: list[int], alone: list[int], visible: bool = True) -> Scene:
        """Draw a scene. It has room for six pairs, or two single things in place of each.

        Args:
            interactions: Interaction class of each pair.
            idle: Classes of objects not in use.
            alone: Verbs of persons without an object.
            visible: False draws persons too faint for the detector: annotated pairs that it misses.
        """
        canvas = np.zeros((HEIGHT, WIDTH), dtype=np.float32)
        scene = Scene(np.zeros(0, dtype=np.uint8))
        slots = [(int(s) // 2, 2 * (int(s) % 2)) for s in self.rng.permutation(6)]

        def person(verb: int, cell: tuple[int, int]) -> None:
            size = int(self.rng.integers(15, CELL + 1))
            patch = np.full((size, size), 0.8, dtype=np.float32)
            patch[1:-1, 1:-1] = 0
            inner = min(size - 3, 15)
            patch[2 : 2 + inner, 2 : 2 + inner] = self._digit(verb, inner)
            scene.persons.append((self._place(canvas, patch * (1.0 if visible else 0.04), cell), verb))

        def thing(obj: int, cell: tuple[int, int], in_use: bool) -> None:
            patch = self._digit(obj - 1, int(self.rng.integers(11, 16))) * (1.0 if in_use else 0.55)
            scene.things.append((self._place(canvas, patch, cell), obj, in_use))

        for interaction in interactions:
            row, column = slots.pop()
            left = int(self.rng.integers(2))
            person(CORRESPONDENCE[interaction][2], (row, column + left))
            thing(CORRESPONDENCE[interaction][1], (row, column + 1 - left), True)
            scene.pairs.append((interaction, len(scene.persons) - 1, len(scene.things) - 1))
        cells = [(row, column + side) for row, column in slots for side in (0, 1)]
        self.rng.shuffle(cells)
        for obj in idle:
            thing(obj, cells.pop(), False)
        for verb in alone:
            person(verb, cells.pop())
        canvas += self.rng.normal(0.06, 0.06, canvas.shape).astype(np.float32)
        scene.image = (canvas.clip(0, 1) * 255).astype(np.uint8)
        return scene


def _split(painter: Painter, count: int) -> list[Scene]:
    """Draw `count` scenes. Every interaction occurs at least three times, the others by FREQUENCY."""
    rng = painter.rng
    sizes = rng.choice([0, 1, 2, 3], count, p=[0.05, 0.5, 0.3, 0.15])
    weight = np.asarray(FREQUENCY) / sum(FREQUENCY)
    draws = rng.choice(NUM_INTERACTIONS, int(sizes.sum()), p=weight)
    always = np.repeat(np.arange(NUM_INTERACTIONS), 3)[: len(draws)]
    draws[: len(always)] = always
    queue = rng.permutation(draws).tolist()
    scenes = []
    for size in sizes:
        idle = rng.integers(1, len(OBJECTS), int(rng.integers(0, 5))).tolist()
        bystanders = rng.integers(0, len(VERBS), int(rng.random() < 0.25)).tolist()
        pairs = [queue.pop() for _ in range(size)]
        scenes.append(painter.scene(pairs, idle, bystanders, bool(rng.random() > 0.04)))
    return scenes


def _annotations(scenes: list[Scene], partition: str) -> dict[str, Any]:
    """Make the content of HICO-DET's instances file."""
    annotation = []
    for scene in scenes:
        corr = [CORRESPONDENCE[i] for i, _, _ in scene.pairs]
        annotation.append(
            {
                "boxes_h": [scene.persons[p][0] for _, p, _ in scene.pairs],
                "boxes_o": [scene.things[t][0] for _, _, t in scene.pairs],
                "hoi": [c[0] for c in corr],
                "object": [c[1] for c in corr],
                "verb": [c[2] for c in corr],
            }
        )
    return {
        "annotation": annotation,
        "filenames": [f"HICO_{partition}_{i + 1:08d}.png" for i in range(len(scenes))],
        "size": [[WIDTH, HEIGHT]] * len(scenes),
        "empty": [i for i, scene in enumerate(scenes) if not scene.pairs],
        "correspondence": CORRESPONDENCE,
        "objects": OBJECTS,
        "verbs": VERBS,
    }


def as_input(images: Tensor) -> Tensor:
    """Normalize pixels [..., H, W] in 0..255 for the towers."""
    return (images.float() / 255 - MEAN) / STD


def resize(images: Tensor) -> Tensor:
    """Resize [B, 1, H, W] to [B, 1, CLIP_SIZE, CLIP_SIZE]."""
    return F.interpolate(images.float(), size=(CLIP_SIZE, CLIP_SIZE), mode="bilinear", align_corners=False)


def _corpus(painter: Painter, count: int) -> towers.Corpus:
    """Make the pretraining data: every word, but no interaction that any split holds out."""
    rng = painter.rng
    held_out = {i for ids in UNSEEN.values() for i in ids}
    known = [i for i in range(NUM_INTERACTIONS) if i not in held_out]
    sentences = [
        *SENTENCES,
        *(f"a photo of a {name}" for name in OBJECTS),
        *(f"a photo of a {name} in use" for name in OBJECTS),
        *(f"a photo of a person {verb}" for verb in VERBS),
    ]
    number = {sentence: i for i, sentence in enumerate(sentences)}
    scenes, most = [], 15
    regions = torch.zeros(count, most, 4)
    texts = torch.full((count, most), -1)
    classes = torch.full((count, most), -1)
    for s in range(count):
        # More crowded than the splits: each image teaches more.
        idle = rng.integers(1, len(OBJECTS), rng.integers(1, 4)).tolist()
        alone = rng.integers(0, len(VERBS), rng.integers(1, 4)).tolist()
        scene = painter.scene(rng.choice(known, 3).tolist(), idle, alone)
        found = [(box, f"a photo of a person {VERBS[verb]}", 0) for box, verb in scene.persons]
        found += [(box, f"a photo of a {OBJECTS[obj]}{' in use' * used}", obj) for box, obj, used in scene.things]
        for interaction, p, t in scene.pairs:
            box = np.asarray([scene.persons[p][0], scene.things[t][0]])
            union = [*box[:, :2].min(0).tolist(), *box[:, 2:].max(0).tolist()]
            found.append((union, SENTENCES[interaction], -1))
        for r, (box_, sentence, class_) in enumerate(found):
            regions[s, r] = torch.tensor(box_) / torch.tensor([WIDTH, HEIGHT, WIDTH, HEIGHT])
            texts[s, r], classes[s, r] = number[sentence], class_
        scenes.append(scene)
    images = torch.from_numpy(np.stack([scene.image for scene in scenes]))[:, None]
    return towers.Corpus(as_input(images), as_input(resize(images)), regions, texts, classes, sentences)


def words() -> list[str]:
    """The vocabulary of the text tower."""
    return sorted({"a", "photo", "of", "in", "use", *OBJECTS, *VERBS})


def new_detector() -> towers.Detector:
    """Make an untrained detector."""
    return towers.Detector(len(OBJECTS), HEIGHT, WIDTH)


def ezhoi_args(folder: Path, *, evaluate: bool, zs_type: str | None = "unseen_verb") -> list[str]:
    """Return the miniature's command line for the data in `folder`, without --resume and --output-dir."""
    partition = PARTITIONS[evaluate]
    return [
        "--data-root", str(folder / "data"),
        "--pretrained", str(folder / "weights" / "detr-r50-hicodet.pth"),
        "--clip_dir_vit", str(folder / "weights" / "ViT-B-16.pt"),
        "--clip_img_file", str(folder / "data" / f"clip_img_hicodet_{partition.removesuffix('2015')}"),
        "--num_classes", str(len(VERBS)), "--logits_type", "HO", "--img_align", "--txtcls_pt", "--img_clip_pt",
        *(["--zs", "--zs_type", zs_type] if zs_type else []),
        *(["--eval"] if evaluate else []),
    ]  # fmt: skip


def make_world(folder: Path, seed: int = 0, n_train: int = 480, n_test: int = 200) -> None:
    """Write `folder/data` and `folder/weights`; the same seed gives the same files.

    Train and test scenes are drawn with different handwritten digits; the weights see the train digits only.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = torch.from_numpy(digits.images).float() / 16
    labels = torch.from_numpy(digits.target)
    cut = 1200  # the last third was written by other people
    data, weights = folder / "data", folder / "weights"
    data.mkdir(parents=True, exist_ok=True)
    weights.mkdir(exist_ok=True)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the same roundings on any machine, and no waiting for cores that are shared
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            image, text, detector = towers.ImageEncoder(), towers.TextEncoder(words()), new_detector()
            corpus = _corpus(Painter(pixels[:cut], labels[:cut], np.random.default_rng([seed, 0])), 1200)
            towers.pretrain_towers(image, text, corpus)
            towers.pretrain_detector(detector, corpus)
    finally:
        torch.set_num_threads(threads)
    torch.save({"model_state_dict": detector.state_dict()}, weights / "detr-r50-hicodet.pth")
    torch.save({"visual": image.state_dict(), "text": text.state_dict()}, weights / "ViT-B-16.pt")

    pools = (slice(cut), slice(cut, None))
    for i, (partition, pool, count) in enumerate(zip(PARTITIONS, pools, (n_train, n_test), strict=True)):
        scenes = _split(Painter(pixels[pool], labels[pool], np.random.default_rng([seed, i + 1])), count)
        annotations = _annotations(scenes, partition)
        (data / f"instances_{partition}.json").write_text(json.dumps(annotations))
        images = torch.from_numpy(np.stack([scene.image for scene in scenes]))
        save_file(dict(zip(annotations["filenames"], images, strict=True)), data / f"{partition}.safetensors")
        with torch.no_grad():
            features = image(as_input(resize(images[:, None])))[0]
        clip = data / f"clip_img_hicodet_{partition.removesuffix('2015')}"
        clip.mkdir(exist_ok=True)
        for name, feature in zip(annotations["filenames"], features, strict=True):
            save_file({"feature": feature.contiguous()}, clip / f"{Path(name).stem}_clip.safetensors")
