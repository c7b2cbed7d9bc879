"""Fixtures around the miniature EZ-HOI, in this process and as a script."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from ezhoi_diffusion.demo import world
from ezhoi_diffusion.demo.vocabulary import CORRESPONDENCE, OBJECTS, VERBS
from ezhoi_diffusion.ezhoi.launch import read_flags
from ezhoi_diffusion.features.store import FeatureStore
from helpers.miniature import (
    MINIATURE,
    VCOCO_ACTIONS,
    dump,
    ezhoi_flags,
)


@pytest.fixture(autouse=True)
def _one_thread():
    """One thread is fastest for networks this small, and leaves cores to other processes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def small_world(tmp_path_factory):
    """Data and pretrained weights of the miniature, without a fine-tuned checkpoint."""
    folder = tmp_path_factory.mktemp("world")
    world.make_world(folder, n_train=36, n_test=30, steps=(100, 180))
    return folder


@pytest.fixture(scope="session")
def vcoco(small_world, tmp_path_factory):
    """The same scenes in V-COCO's format: actions instead of interactions, objects counted from 1."""
    folder = tmp_path_factory.mktemp("vcoco")
    shutil.copytree(small_world / "weights", folder / "weights")
    (folder / "data").mkdir()
    for hico, part, clip in (("train2015", "trainval", "train"), ("test2015", "test", "val")):
        anno = json.loads((small_world / "data" / f"instances_{hico}.json").read_text())
        names = [name.replace(f"HICO_{hico}", f"COCO_{clip}2014") for name in anno["filenames"]]
        images = load_file(small_world / "data" / f"{hico}.safetensors")
        renamed = {new: images[old] for old, new in zip(anno["filenames"], names, strict=True)}
        save_file(renamed, folder / "data" / f"vcoco_{part}.safetensors")
        annotations = [
            {
                "boxes_h": image["boxes_h"], "boxes_o": image["boxes_o"], "actions": image["verb"],
                "objects": [obj + 1 for obj in image["object"]], "file_name": name,
            }
            for image, name in zip(anno["annotation"], names, strict=True)
        ]  # fmt: skip
        found = {
            "annotations": annotations, "classes": VCOCO_ACTIONS, "objects": ["background", *OBJECTS],
            "images": list(range(len(names))),
            "action_to_object": [
                [obj + 1 for _, obj, v in CORRESPONDENCE if v == verb] for verb in range(len(VERBS))
            ],
        }  # fmt: skip
        (folder / "data" / f"instances_vcoco_{part}.json").write_text(json.dumps(found))
        features = small_world / "data" / f"clip_img_hicodet_{hico.removesuffix('2015')}"
        target = folder / "data" / f"clip_img_vcoco_{clip}"
        target.mkdir()
        for old, new in zip(anno["filenames"], names, strict=True):
            stem = f"{Path(new).stem}_clip.safetensors"
            shutil.copy(features / f"{Path(old).stem}_clip.safetensors", target / stem)
    return folder


@pytest.fixture(scope="session")
def ezhoi_modules():
    """The miniature's modules, importable by the names of EZ-HOI's."""
    sys.path.insert(0, str(MINIATURE))
    import upt_tip_cache_model_free_finetune_distillself as upt
    import utils_tip_cache_and_union_finetune as utils

    return SimpleNamespace(upt=upt, utils=utils)


@pytest.fixture
def make_ezhoi(small_world, ezhoi_modules):
    """Build a miniature detector in this process: make_ezhoi(*flags) -> model, args, images, targets, dataset."""

    def make(*flags: str, zs_type: str | None = "unseen_verb", drop: tuple[str, ...] = ()):
        line = [f for f in ezhoi_flags(small_world, evaluate=True, zs_type=zs_type) if f not in drop]
        args = read_flags(MINIATURE / "main_tip_finetune.py", [*line, *flags])
        args.clip_model_name, args.human_idx = "ViT-B/16", 0
        factory = ezhoi_modules.utils.DataFactory
        testset = factory("hicodet", "test2015", args.data_root, args.clip_model_name)
        torch.manual_seed(args.seed)
        model = ezhoi_modules.upt.build_detector(
            args, testset.dataset.object_to_verb, testset.dataset.object_n_verb_to_interaction, args.clip_dir_vit
        ).eval()
        # a fresh mem_adapter is the identity, which would hide mistakes
        if hasattr(model, "mem_adapter"):
            torch.nn.init.normal_(model.mem_adapter.up_proj_mem.weight, std=0.05)
        images, targets = map(list, zip(*(testset[i] for i in range(len(testset))), strict=True))
        return SimpleNamespace(model=model, args=args, images=images, targets=targets, dataset=testset)

    return make


@pytest.fixture(scope="session")
def captured(small_world, tmp_path_factory):
    """Captured features of the train split, and what EZ-HOI computed in that pass."""
    folder = tmp_path_factory.mktemp("captured")
    flags = [*ezhoi_flags(small_world, evaluate=False), "--plugin", "capture", "--capture", str(folder / "features")]
    done, tensors = dump(folder / "seen.safetensors", "launched", *flags)
    assert done.returncode == 0, done.stderr
    assert "Epoch" not in done.stdout, "the run must end without training"
    assert "mAP" not in done.stdout, "the run must end without evaluating"
    return FeatureStore(folder / "features"), tensors
