"""A small data set for the miniature EZ-HOI, in HICO-DET's layout, and the weights that arrive pretrained.

It is like HICO-DET where that matters to a bridge: verbs and objects made of parts that their texts name, one to three verbs
a pair, a long tail, `no_interaction` for every object, four of five pairs or more without any annotation, and persons that
the detector misses. `make_world` writes annotations, images and weights; only tensors are pickled.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from ezhoi_diffusion.demo import towers
from ezhoi_diffusion.demo.scenes import HEIGHT, WIDTH, Painter, Scene, new_shapes
from ezhoi_diffusion.demo.vocabulary import (
    CORRESPONDENCE,
    FREQUENCY,
    INTERACTION,
    NO_INTERACTION,
    NUM_INTERACTIONS,
    OBJECTS,
    SENTENCES,
    UNSEEN,
    VERBS,
    go_together,
)

CLIP_SIZE = 72
MEAN, STD = 0.15, 0.3
PARTITIONS = ("train2015", "test2015")
JOINED = 0.55  # how readily a verb joins another that goes with it
MISSED = 0.05  # persons that are annotated, and too faint for the detector
NOTED = 0.6  # idle pairs that somebody annotated; the others are background like any


def _verbs_with(interaction: int, rng: np.random.Generator) -> list[int]:
    """The verb of an interaction and up to two that join it; frequent ones join rare ones more often than the reverse."""
    _, obj, verb = CORRESPONDENCE[interaction]
    verbs = [verb]
    for _, other, candidate in rng.permutation([c for c in CORRESPONDENCE if c[1] == obj]).tolist():
        often, own = FREQUENCY[INTERACTION[other, candidate]], FREQUENCY[interaction]
        fits = candidate != NO_INTERACTION and all(go_together(candidate, v) for v in verbs)
        if fits and rng.random() < JOINED * often / (often + own):
            verbs.append(candidate)
    return verbs


def _split(painter: Painter, count: int) -> list[Scene]:
    """Draw `count` scenes. Every interaction occurs at least twice if there is room, the others by FREQUENCY."""
    rng = painter.rng
    sizes = rng.choice([0, 1, 2, 3], count, p=[0.1, 0.5, 0.3, 0.1])
    weight = np.asarray(FREQUENCY) / sum(FREQUENCY)
    draws = rng.choice(NUM_INTERACTIONS, int(sizes.sum()), p=weight)
    always = np.repeat(np.flatnonzero(weight), 2)[: len(draws)]
    draws[: len(always)] = always
    queue = rng.permutation(draws).tolist()
    scenes = []
    for size in sizes:
        drawn = [queue.pop() for _ in range(size)]
        beside = rng.integers(1, len(OBJECTS), int(rng.random() < 0.5)).tolist()
        idle = rng.integers(1, len(OBJECTS), int(rng.integers(1, 5))).tolist()
        alone = [[verb] for verb in rng.integers(0, NO_INTERACTION, int(rng.random() < 0.15))]
        acting = [(CORRESPONDENCE[i][1], _verbs_with(i, rng)) for i in drawn]
        scene = painter.scene(acting, beside, idle, alone)
        scene.idle_pairs = [pair for pair in scene.idle_pairs if rng.random() < NOTED]
        scenes.append(scene)
    return scenes


def _annotations(scenes: list[Scene], partition: str) -> dict[str, Any]:
    """Make the content of HICO-DET's instances file: one annotation for each verb of a pair."""
    annotation = []
    for scene in scenes:
        rows = [(p, t, verb) for p, t in scene.pairs for verb in scene.persons[p][1]]
        rows += [(p, t, NO_INTERACTION) for p, t in scene.idle_pairs]
        objects = [scene.things[t][1] for _, t, _ in rows]
        annotation.append(
            {
                "boxes_h": [scene.persons[p][0] for p, _, _ in rows],
                "boxes_o": [scene.things[t][0] for _, t, _ in rows],
                "hoi": [INTERACTION[obj, verb] for obj, (_, _, verb) in zip(objects, rows, strict=True)],
                "object": objects,
                "verb": [verb for _, _, verb in rows],
            }
        )
    return {
        "annotation": annotation,
        "filenames": [f"HICO_{partition}_{i + 1:08d}.png" for i in range(len(scenes))],
        "size": [[WIDTH, HEIGHT]] * len(scenes),
        "empty": [i for i, image in enumerate(annotation) if not image["hoi"]],
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
    """Make the pretraining data: every word, but no unseen verb, and no held-out interaction save `no_interaction`."""
    rng = painter.rng
    held_out = {i for ids in UNSEEN.values() for i in ids}
    known = [i for i in range(NUM_INTERACTIONS) if i not in held_out and FREQUENCY[i]]
    verbs = sorted({CORRESPONDENCE[i][2] for i in range(NUM_INTERACTIONS) if i not in UNSEEN["unseen_verb"]})
    verbs.remove(NO_INTERACTION)
    sentences = [
        *SENTENCES,
        *(f"a photo of a {name}" for name in OBJECTS),
        *(f"a photo of a {name} in use" for name in OBJECTS),
        *(f"a photo of a person {verb}" for verb in VERBS[:NO_INTERACTION]),
    ]
    number = {sentence: i for i, sentence in enumerate(sentences)}
    scenes, most = [], 15
    regions = torch.zeros(count, most, 4)
    texts = torch.full((count, most), -1)
    classes = torch.full((count, most), -1)
    for s in range(count):
        # More crowded than the splits: each image teaches more.
        acting = [(CORRESPONDENCE[i][1], [CORRESPONDENCE[i][2]]) for i in rng.choice(known, 2).tolist()]
        alone = [rng.choice(verbs, int(rng.choice([1, 1, 2, 3])), replace=False).tolist() for _ in range(2)]
        beside, idle = (rng.integers(1, len(OBJECTS), n).tolist() for n in (1, 3))
        scene = painter.scene(acting, beside, idle, alone)
        found = [
            (box, f"a photo of a person {VERBS[verbs_[0]]}" if verbs_ else "a photo of a person", 0)
            for box, verbs_ in scene.persons
        ]
        found += [(box, f"a photo of a {OBJECTS[obj]}{' in use' * used}", obj) for box, obj, used in scene.things]
        for p, t in scene.pairs + scene.idle_pairs:
            box = np.asarray([scene.persons[p][0], scene.things[t][0]])
            union = [*box[:, :2].min(0).tolist(), *box[:, 2:].max(0).tolist()]
            verb = (*scene.persons[p][1], NO_INTERACTION)[0]
            found.append((union, SENTENCES[INTERACTION[scene.things[t][1], verb]], -1))
        for r, (box_, sentence, class_) in enumerate(found[:most]):
            regions[s, r] = torch.tensor(box_) / torch.tensor([WIDTH, HEIGHT, WIDTH, HEIGHT])
            texts[s, r], classes[s, r] = number[sentence], class_
        scenes.append(scene)
    images = torch.from_numpy(np.stack([scene.image for scene in scenes]))[:, None]
    return towers.Corpus(as_input(images), as_input(resize(images)), regions, texts, classes, sentences)


def words() -> list[str]:
    """The vocabulary of the text tower."""
    known = " ".join(["a photo of and in use", *OBJECTS, *VERBS[:NO_INTERACTION]])
    return sorted(set(known.split()))


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


def make_world(
    folder: Path, seed: int = 0, n_train: int = 600, n_test: int = 300, steps: tuple[int, int] = (220, 260)
) -> None:
    """Write `folder/data` and `folder/weights`; the same seed gives the same files.

    Verbs, objects and table are those of every world, as every run on HICO-DET has the same. The seed draws how the parts
    look, all images, and the first weights.

    Args:
        folder: Where everything goes.
        seed: Of all that is drawn.
        n_train: Images of the training split.
        n_test: Images of the test split.
        steps: Pretraining steps of the towers and of the detector.
    """
    data, weights = folder / "data", folder / "weights"
    data.mkdir(parents=True, exist_ok=True)
    weights.mkdir(exist_ok=True)
    shapes = new_shapes(np.random.default_rng([seed, 3]))

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the same roundings on any machine, and no waiting for cores that are shared
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            image, text, detector = towers.ImageEncoder(), towers.TextEncoder(words()), new_detector()
            corpus = _corpus(Painter(shapes, np.random.default_rng([seed, 0])), 1000)
            towers.pretrain_towers(image, text, corpus, steps[0])
            towers.pretrain_detector(detector, corpus, steps[1])
    finally:
        torch.set_num_threads(threads)
    torch.save({"model_state_dict": detector.state_dict()}, weights / "detr-r50-hicodet.pth")
    torch.save({"visual": image.state_dict(), "text": text.state_dict()}, weights / "ViT-B-16.pt")

    for i, (partition, count) in enumerate(zip(PARTITIONS, (n_train, n_test), strict=True)):
        scenes = _split(Painter(shapes, np.random.default_rng([seed, i + 1]), MISSED), count)
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
