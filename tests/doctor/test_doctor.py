"""Every finding of the doctor, good and bad, and no traceback for any input."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
import shutil
import signal
import sys
from collections import defaultdict
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

import ezhoi_diffusion
from ezhoi_diffusion.cli import main
from ezhoi_diffusion.demo.vocabulary import VERBS
from ezhoi_diffusion.diffusion.bridge import BridgeConfig, DiffusionBridge, build_denoiser
from ezhoi_diffusion.diffusion.recipes import RECIPES
from ezhoi_diffusion.doctor import bridge as bridges
from ezhoi_diffusion.doctor import environment, ezhoi
from ezhoi_diffusion.doctor.checks import run_checks
from ezhoi_diffusion.doctor.finding import Finding
from ezhoi_diffusion.errors import EzhoiDiffusionError
from ezhoi_diffusion.ezhoi.launch import LaunchError, read_flags
from ezhoi_diffusion.features.batch import FeatureBatch, Pairs
from ezhoi_diffusion.features.fingerprint import Fingerprint
from ezhoi_diffusion.features.writer import FeatureWriter, finish_store, write_ezhoi_tensors
from ezhoi_diffusion.files import read_json, write_json
from ezhoi_diffusion.training.trainer import TrainConfig, train
from helpers.miniature import MINIATURE, ezhoi_flags, run_in_miniature

D, PAIRS, IMAGES = 32, 16, 12
FINGERPRINT = asdict(
    Fingerprint(
        "ViT-B-16",
        D,
        "hicodet",
        "unseen_verb",
        6,
        24,
        "HO",
        True,
        False,
        weights="w" * 64,
        context="c" * 64,
        options={"vlmtxt": "b"},
    )
)
META = {"split": "train", "max_images": None, "clip_img_file": "clip_img_hicodet_train", "fingerprint": FINGERPRINT}
ROOT = Path(ezhoi_diffusion.__file__).parent.parent
SCRIPT = str(MINIATURE / "main_tip_finetune.py")


def cone(rows: int, seed: int, share: float = 0.8) -> torch.Tensor:
    """Normalised features whose mean has about the norm `share`, as CLIP's have."""
    generator = torch.Generator().manual_seed(seed)
    axis = normalize(torch.randn(1, D, generator=generator))
    return share * axis + (1 - share**2) ** 0.5 * normalize(torch.randn(rows, D, generator=generator))


def write_features(folder, rows=None, text=None, hoi=(0, 1), labels=None, pairs=PAIRS, **meta):
    """Write a sound store of 12 images, with these changes."""
    rows = 3 * cone(IMAGES * pairs, 0) if rows is None else rows
    writer = FeatureWriter(folder, {**META, **meta}, rows_per_shard=5 * pairs)
    boxes = torch.tensor([[0.0, 0.0, 9.0, 9.0]]).repeat(pairs + 1, 1)
    pairing = torch.stack([torch.zeros(pairs, dtype=torch.long), torch.arange(1, pairs + 1)])
    batches = []
    for i, feat in enumerate(rows.split(pairs)):
        seen = Pairs(f"{i}.jpg", 0, torch.tensor([9, 9]), boxes, boxes[:, 0], torch.arange(pairs + 1), pairing)
        marks = torch.zeros(len(feat), 6, dtype=torch.bool) if labels is None else labels
        batches.append(
            FeatureBatch(
                i, seen, feat, None, torch.zeros(len(feat), 6), marks, torch.zeros(2, len(hoi), 4), torch.tensor(hoi)
            )
        )
    with pytest.MonkeyPatch.context() as patch:  # the writer refuses what is not finite
        patch.setattr("ezhoi_diffusion.features.shard._problem", lambda batch: None)
        for batch in batches:
            writer.add(batch)
        writer.flush()
    groups = {"full": torch.arange(6), "unseen": torch.tensor([4, 5]), "seen": torch.arange(4)}
    classes = {f"classes/{name}": index for name, index in groups.items()}
    text = cone(24, 1) if text is None else text
    write_ezhoi_tensors(folder, {"text": text, "context/ctx.0": torch.ones(2), **classes})
    return finish_store(folder)


def write_bridge(
    folder, recipe="gentle", fingerprint=FINGERPRINT, dim=D, weight=None, network="mlp", training=(), **changes
):
    """Write a bridge with fresh weights, or with `weight` in all of them."""
    chosen = replace(RECIPES[recipe], **changes)
    facts = {"step": 5000, "val_loss": 0.1, "isotropic_val_loss": 0.2, "data_sha256": "0", **dict(training)}
    provenance = {"fingerprint": fingerprint, "training": facts} if fingerprint else {}
    options = {"width": 16, "depth": 1} if network == "mlp" else {}
    config = BridgeConfig(dim, chosen, network, options)
    denoiser = build_denoiser(config)
    if weight is not None:
        for parameter in denoiser.parameters():
            torch.nn.init.constant_(parameter, weight)
    visual, text = cone(64, 0).mean(0), cone(24, 1).mean(0)
    if dim != D:
        visual, text = torch.full((dim,), 0.01), torch.full((dim,), 0.01)
    statistics = SimpleNamespace(visual_mean=visual, text_mean=text, gap=1.0, visual_known=True)
    statistics.tensors = lambda: {"visual_mean": visual, "text_mean": text, "rows": torch.tensor([64, 24])}
    DiffusionBridge(config, denoiser, statistics, provenance=provenance).save_pretrained(folder)
    return folder


@pytest.fixture
def look(monkeypatch):
    """Return look(*folders, line=…, out=…) -> findings by name, without the environment, which has its own tests."""
    monkeypatch.setattr(environment, "packages", lambda ezhoi: iter(()))

    def run(*folders, line=(), out=None):
        found = defaultdict(list)
        for finding in run_checks([Path(f) for f in folders], line, out):
            assert finding.level in ("ok", "note", "warning", "problem")
            assert finding.found
            assert (finding.fix == "") == (finding.level == "ok"), finding
            found[finding.name].append(finding)
        return found

    return run


def one(found, name, level, *words):
    """Return the finding of that name and level, after a check that it says all the words."""
    matching = [f for f in found[name] if f.level == level]
    assert matching, f"no {level} {name} in {dict(found)}"
    said = " ".join(f"{f.found} -> {f.fix}" for f in matching)
    for word in words:
        assert word in said, said
    return matching[0]


def worst(found):
    return {f.name for lines in found.values() for f in lines if f.level in ("warning", "problem")}


# -- environment -----------------------------------------------------------------------------------------------


def package(folder: Path, name: str, source: str = "") -> None:
    path = folder.joinpath(*name.split("."))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".py").write_text(source)


@pytest.mark.slow
def test_broken_packages_are_found_and_do_not_end_the_doctor(tmp_path, monkeypatch):
    package(tmp_path, "torchvision.__init__", "raise RuntimeError('operator torchvision::nms does not exist')")
    package(tmp_path, "pocket.__init__", "import os; os._exit(139)")
    package(tmp_path, "clip.__init__", "")
    package(tmp_path, "accelerate", "raise ImportError('no accelerate here')")
    package(tmp_path, "denoising_diffusion_pytorch.__init__", "")
    package(tmp_path, "denoising_diffusion_pytorch.denoising_diffusion_pytorch_1d", "")
    package(tmp_path, "pkg_resources", "raise ModuleNotFoundError('pkg_resources')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", raising=False)
    found = defaultdict(list)
    for finding in environment.packages(ezhoi=False):
        found[finding.name].append(finding)
    one(found, "environment.torch", "ok", torch.__version__)
    one(
        found,
        "environment.torchvision",
        "problem",
        "nms does not exist",
        "does not match torch",
        "pip install --upgrade torch",
    )
    one(found, "environment.unet1d", "problem", "Unet1D", "pip install denoising-diffusion-pytorch")
    one(found, "environment.accelerate", "problem", "no accelerate here", "pip install")
    one(found, "environment.pocket", "warning", "status 139", "git clone")
    one(found, "environment.clip", "warning", "not CLIP", "pip uninstall clip")
    one(found, "environment.pkg_resources", "warning", "setuptools<81")
    refused = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 6)
    if refused:
        one(found, "environment.torch_load", "warning", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1")


@pytest.mark.slow
def test_a_sound_environment(tmp_path, monkeypatch):
    (tmp_path / "main_tip_finetune.py").touch()
    package(tmp_path, "CLIP.clip.__init__")
    package(tmp_path, "CLIP.clip.clip")
    for name in ("pocket", "pkg_resources"):
        package(tmp_path, name)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{tmp_path / 'CLIP'}", prepend=":")
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    found = defaultdict(list)
    for finding in environment.packages(ezhoi=True):
        found[finding.name].append(finding)
    assert worst(found) <= {"environment.cuda"}
    one(found, "environment.clip", "ok", str(tmp_path / "CLIP"))


def test_refused_torchscript_is_a_problem_for_ezhoi_only(monkeypatch):
    answers = defaultdict(lambda: {"version": "1", "path": "/x/__init__.py"})
    answers |= {environment.TORCHSCRIPT: {"error": "RuntimeError: no"}, environment.CUDA: {"error": "x"}}
    monkeypatch.setattr(environment, "probe", lambda names: answers)
    levels = {f.name: f.level for f in environment.packages(ezhoi=True)}
    assert levels["environment.torch_load"] == "problem"
    assert levels["environment.cuda"] == "problem"


def test_a_broken_torch(tmp_path, trained):
    package(tmp_path, "torch.__init__", "raise OSError('libcudart.so.12: cannot open shared object file')")
    done = run_in_miniature("-m", "ezhoi_diffusion", "doctor", str(trained[0]), PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr + done.stdout
    assert re.search("problem +environment.torch .*libcudart.* -> .*pip install --upgrade torch", done.stdout)
    assert re.search("problem +input .*not examined.* -> fix environment.torch first", done.stdout)


def test_flags_are_not_read_where_torchvision_is_broken(look, trained, monkeypatch):
    broken = Finding("environment.torchvision", "problem", "nms does not exist", "install both")
    monkeypatch.setattr(environment, "packages", lambda ezhoi: iter([broken]))
    found = look(*trained, line=[SCRIPT])
    one(found, "ezhoi.flags", "problem", "not read", "fix environment.torchvision")
    one(found, "bridge.recipe", "ok")


def test_an_import_that_never_ends(tmp_path, monkeypatch):
    package(tmp_path, "first")
    package(tmp_path, "sleeper", "import time; time.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(environment, "PROBE_SECONDS", 3)
    found = environment.probe(["first", "sleeper"])
    assert "error" not in found["first"]
    assert "did not end" in found["sleeper"]["error"]


@pytest.mark.parametrize(
    ("facts", "level", "word"),
    [
        ({"error": "no kernel image is available"}, "problem", "pytorch.org"),
        ({"built": None, "devices": []}, "warning", "CUDA build"),
        ({"built": "12.4", "devices": []}, "warning", "CUDA_VISIBLE_DEVICES"),
        ({"built": "12.4", "devices": [["GPU", 40 * 2**30]]}, "ok", "12.4"),
        ({"built": "12.4", "devices": [["GPU", 40 * 2**30], ["other", 2**30]]}, "warning", "other: 1.0 GiB"),
    ],
)
def test_devices(facts, level, word):
    finding = environment.check_cuda(facts)
    assert finding.level == level
    assert word in finding.found + finding.fix


def test_disk_and_memory(monkeypatch, tmp_path):
    for free, level in ((2**20, "problem"), (2**31, "warning"), (2**40, "ok")):
        monkeypatch.setattr(shutil, "disk_usage", lambda folder, free=free: SimpleNamespace(free=free))
        assert next(environment.space(tmp_path)).level == level
    for memory, level in ((2**31, "warning"), (2**40, "ok")):
        monkeypatch.setattr("psutil.virtual_memory", lambda memory=memory: SimpleNamespace(available=memory))
        assert list(environment.space(tmp_path))[1].level == level


def test_broken_and_disabled_plugins(look, monkeypatch):
    one(look(), "environment.plugins", "ok", "capture, chain, diffusion")

    def load():
        raise ImportError("half a package")

    point = SimpleNamespace(name="half", value="half:plugin", dist=None, load=load)
    monkeypatch.setattr("ezhoi_diffusion.plugins.entry_points", lambda group: [point])
    monkeypatch.setenv("EZHOI_DIFFUSION_DISABLE", "identity")
    found = look()
    one(found, "environment.plugins", "warning", "half a package", "EZHOI_DIFFUSION_DISABLE=half")
    one(found, "environment.plugins", "note", "'identity'", "unset")
    monkeypatch.setenv("EZHOI_DIFFUSION_STRICT", "1")
    one(look(), "environment.plugins", "problem", "half a package", "ezhoi-diffusion plugins")


# -- features --------------------------------------------------------------------------------------------------


def test_sound_features(look, tmp_path):
    store = write_features(tmp_path / "f")
    found = look(store.folder)
    assert not worst(found)
    rows = normalize(store.adapter_feat())
    own = normalize(rows - rows.mean(0)).mean(0).norm()
    off_text = normalize(rows - normalize(store.text).mean(0)).mean(0).norm()
    assert off_text > 0.5 > own
    one(found, "features.centring", "note", f"{own:.2f} after their own", f"{off_text:.2f} after the text", "gentle")
    one(found, "features.text_mean", "ok", f"{normalize(store.text).mean(0).norm():.4f}", "0.01-0.05 is impossible")
    one(found, "features.pairs", "ok", "16.0 pairs")
    one(found, "features.norms", "ok", f"median {store.adapter_feat().norm(dim=1).median():.4g}")
    files = one(found, "features.files", "ok", f"{len(store.index['shards'])} shards")
    for line in (
        "192 of 12 train images, 0 without",
        "median 16, max 16",
        f"{store.statistics().gap:.3f} between the two means",
    ):
        assert line in files.details
    one(found, "features.labels", "ok", "none of 2 unseen")
    for name in ("split", "images", "clip", "fingerprint", "duplicates", "text", "visual_mean"):
        one(found, f"features.{name}", "ok")


def altered(**changes):
    rows = 3 * cone(IMAGES * PAIRS, 0)
    for index, value in changes.items():
        rows[: int(index[1:])] = value
    return rows


FAR = torch.eye(D)[0] * 1e4
BAD_FEATURES = [
    ({"rows": altered(n1=0.0)}, "features.norms", "warning", "trained checkpoint"),
    ({"rows": altered(n999=0.0)}, "features.norms", "problem", "trained checkpoint"),
    ({"rows": altered(n2=FAR)}, "features.norms", "warning", "explode"),
    ({"rows": altered(n20=1.0)}, "features.duplicates", "warning", "captured twice"),
    ({"rows": altered(n150=1.0)}, "features.duplicates", "problem", "captured twice"),
    ({"rows": altered(n999=1.0)}, "features.visual_mean", "problem", "all visual features point the same way"),
    ({"rows": torch.randn(192, D, generator=torch.Generator().manual_seed(0))}, "features.visual_mean", "warning", "centred"),
    ({"rows": torch.cat([cone(186, 0, 0.99999), -cone(6, 0, 0.9)])}, "features.centring", "warning", "features.norms"),
    ({"pairs": 3}, "features.pairs", "warning", "--pretrained"),
    ({"split": "test"}, "features.split", "warning", "--capture-split train"),
    ({"max_images": 12}, "features.images", "note", "without --max-images"),
    ({"clip_img_file": "clip_img_hicodet_test"}, "features.clip", "problem", "--clip_img_file"),
    ({"clip_img_file": None}, "features.clip", "ok", "--img_clip_pt is off"),
    ({"fingerprint": {**FINGERPRINT, "weights": ""}}, "features.fingerprint", "problem", "lacks weights"),
    ({"fingerprint": {}}, "features.fingerprint", "problem", "capture again"),
    ({"imported": {"source": "raw_clip"}}, "features.imported", "warning", "adapted text features"),
    ({"imported": {"source": "adapted"}}, "features.imported", "note", "capture of your own"),
    ({"hoi": (0, 5)}, "features.labels", "problem", "--zs_type"),
    ({"labels": torch.eye(6, dtype=torch.bool)[[4] * PAIRS]}, "features.labels", "problem", "e.g. 4"),
    ({"text": torch.zeros(24, D)}, "features.text", "problem", "24 are zero"),
    ({"text": torch.ones(24, D)}, "features.text", "problem", "are equal"),
    ({"text": torch.ones(24, D)}, "features.text_mean", "problem", "same way"),
    ({"text": cone(12, 1).repeat(2, 1)}, "features.text", "warning", "12 distinct"),
    ({"text": torch.outer(torch.arange(1.0, 25), torch.eye(D)[0]) + torch.eye(D)[1]}, "features.text", "warning", "near-equal prompts"),
    ({"text": cone(24, 1) - cone(24, 1).mean(0)}, "features.text_mean", "warning", "centred already"),
    ({"text": cone(24, 1, 0.97)}, "features.text_mean", "note", "0.7-0.9"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "name", "level", "word"), BAD_FEATURES)
def test_unsound_features(look, tmp_path, changes, name, level, word):
    one(look(write_features(tmp_path / "f", **changes).folder), name, level, word)


def test_centring_is_fine_where_both_means_work(look, tmp_path):
    text = cone(24, 0, 0.8)  # around the same axis as the rows
    one(look(write_features(tmp_path / "f", text=text).folder), "features.centring", "ok")


def test_statistics_are_written(look, tmp_path):
    store = write_features(tmp_path / "f")
    found = look(store.folder, out=tmp_path / "s")
    assert "statistics.png" in one(found, "features.files", "ok").details
    written = read_json(tmp_path / "s" / "statistics.json", dict, EzhoiDiffusionError, "")
    assert (written["pairs"], written["images"], written["images_without_pairs"]) == (192, 12, 0)
    assert written["pairs_per_image"] == {"median": 16.0, "max": 16}
    features, text = store.adapter_feat(), store.text
    assert written["visual_norm"]["max"] == pytest.approx(float(features.norm(dim=1).max()))
    means = normalize(features).mean(0), normalize(text).mean(0)
    assert written["visual_mean_norm"] == pytest.approx(float(means[0].norm()), rel=1e-5)
    assert written["gap"] == pytest.approx(float((means[0] - means[1]).norm()), rel=1e-5)
    assert (tmp_path / "s" / "statistics.png").read_bytes().startswith(b"\x89PNG")


def test_unfinished_and_damaged_features(look, tmp_path):
    store = write_features(tmp_path / "f")
    shard = store.folder / store.index["shards"][1]["file"]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    one(look(store.folder), "features.files", "problem", "was changed after it was written", "capture again")
    (store.folder / "index.json").unlink()
    one(look(store.folder), "features.open", "problem", "unfinished", "run the capture command again")


# -- bridge ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """Train a bridge for a few steps with the command; returns the folders of its features and of the bridge."""
    folder = tmp_path_factory.mktemp("trained")
    store = write_features(folder / "f")
    options = ["--denoiser-options", '{"width": 16, "depth": 1}', "--train-steps", "60", "--val-every", "20"]
    assert main(["train", str(store.folder), "--out", str(folder / "b"), *options, "--learning-rate", "0.003"]) == 0
    return folder / "f", folder / "b"


def test_a_sound_bridge(look, trained):
    features, bridge = trained
    found = look(bridge, features)  # in any order
    assert not worst(found)
    for name in ("recipe", "cost", "training", "fingerprint", "data", "effect"):
        one(found, f"bridge.{name}", "ok")
    alone = look(bridge)
    one(alone, "bridge.recipe", "ok")
    assert "bridge.effect" not in alone


def test_features_of_a_visual_recipe_are_recognised(look, tmp_path, trained):
    features, _ = trained
    from ezhoi_diffusion.features.store import FeatureStore
    from ezhoi_diffusion.training.data import TrainingData

    for recipe in ("guide", "paper"):
        config = TrainConfig(
            recipe=replace(RECIPES[recipe], num_steps=2), denoiser_options={"width": 8, "depth": 1}, train_steps=2
        )
        out = train(
            TrainingData.from_store(FeatureStore(features), config.recipe.trained_on), config, tmp_path / recipe
        )
        one(look(features, out), "bridge.data", "ok", "these features")


BAD_BRIDGES = [
    ({"recipe": "guide"}, "bridge.recipe", "warning", "text mean leaves a vector"),
    ({"output": "unit_norm"}, "bridge.recipe", "warning", "rescales every score"),
    ({"recipe": "guide"}, "bridge.cost", "note", "lower --num-steps"),
    ({"recipe": "guide"}, "bridge.effect", "warning", "keep_norm"),
    ({"recipe": "paper"}, "bridge.recipe", "note", "lost their identity"),
    ({"restored_mean": "text"}, "bridge.recipe", "warning", "dot product"),
    ({"fingerprint": None}, "bridge.training", "note", "nothing is known"),
    ({"fingerprint": None}, "bridge.fingerprint", "problem", "ezhoi-diffusion train"),
    ({"training": {"val_loss": 0.5}}, "bridge.training", "warning", "under-trained"),
    ({"training": {"val_loss": float("nan")}}, "bridge.training", "problem", "--learning-rate"),
    ({"training": {"val_loss": "low"}}, "bridge.training", "problem", "`$.val_loss`"),
    ({"fingerprint": {**FINGERPRINT, "zs_type": "rare_first"}}, "bridge.fingerprint", "problem", "'rare_first' there"),
    (
        {"fingerprint": {**FINGERPRINT, "options": {"vlmtxt": "a"}}},
        "bridge.fingerprint",
        "problem",
        "vlmtxt is 'b' here, 'a' there",
    ),
    ({"fingerprint": {**FINGERPRINT, "context": "other"}}, "bridge.fingerprint", "warning", "--restore-context"),
    ({}, "bridge.data", "warning", "other features"),
    ({"dim": 40}, "bridge.effect", "problem", "D = 40"),
    ({"weight": 1e30}, "bridge.open", "problem", "has values from"),
    ({"recipe": "paper", "weight": 0.5}, "bridge.effect", "warning", "--start-timestep"),
]


@pytest.mark.parametrize(("changes", "name", "level", "word"), BAD_BRIDGES)
def test_unsound_bridges(look, tmp_path, trained, changes, name, level, word):
    one(look(trained[0], write_bridge(tmp_path / "b", **changes)), name, level, word)


def write_training(folder, *history, **changes):
    """Write training.json with these records."""
    losses = {"isotropic_val_loss": 0.2, "val_loss_by_range": [0.1], "isotropic_val_loss_by_range": [0.2]}
    facts = {"config": {}, "step": 5000, "ranges": [[0, 100]], **losses, "history": [*history], **changes}
    write_json(folder / "training.json", facts)


CURVES = [
    ([(1.0, 0.4), (0.5, 0.2), (0.4, 0.1)], "bridge.curve", "note", "--resume"),
    ([(1.0, 0.05), (0.5, 0.08), (0.4, 0.1)], "bridge.training", "warning", "not the bridge of that step"),
    ([(1.0, 0.1), (1.0, 0.1), (1.0, 0.1), (0.99, 0.1)], "bridge.curve", "warning", "--learning-rate"),
]


@pytest.mark.parametrize(("curve", "name", "level", "word"), CURVES)
def test_curves(look, tmp_path, curve, name, level, word):
    folder = write_bridge(tmp_path / "b")
    write_training(folder, *({"step": i, "loss": loss, "val_loss": val} for i, (loss, val) in enumerate(curve)))
    one(look(folder), name, level, word)


def test_a_network_that_memorised_its_features(look, tmp_path):
    folder = write_bridge(tmp_path / "b", training={"val_loss": 0.3})
    write_training(folder, *({"step": step, "loss": 1.0, "val_loss": loss} for step, loss in ((1, 0.3), (2, 0.4))))
    one(look(folder), "bridge.training", "warning", "memorised", "--denoiser gaussian")


@pytest.mark.parametrize(
    "damage",
    [
        lambda f: (f / "training.json").write_text(""),
        lambda f: (f / "training.json").write_text("[]"),
        lambda f: (f / "training.json").write_text('{"history": []}'),  # no checksum
        lambda f: write_training(f, {"step": 1}),
        lambda f: write_training(f, {"step": 1, "loss": "x"}),
        lambda f: write_training(f, history=5),
    ],
)
def test_a_damaged_record_of_the_training_is_named(look, tmp_path, damage):
    folder = write_bridge(tmp_path / "b")
    damage(folder)
    one(look(folder), "bridge.history", "warning", "training.json", "nothing is said of the training's curve")


def test_a_pipe_in_place_of_the_training_record_does_not_hold_the_doctor(look, tmp_path):
    folder = tmp_path / "bridge"
    write_bridge(folder)
    os.mkfifo(folder / "training.json")
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.alarm(60)
    try:
        one(look(folder), "bridge.history", "warning", "training.json", "not a regular file")
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_a_bridge_that_costs_too_much_is_not_tried(look, tmp_path, trained, monkeypatch):
    monkeypatch.setattr(bridges, "MAX_SECONDS", 0.0)
    one(look(*trained), "bridge.effect", "note", "not tried", "fewer --num-steps")


def test_a_bridge_that_does_not_open(look, tmp_path):
    folder = write_bridge(tmp_path / "b")
    config = read_json(folder / "config.json", dict, EzhoiDiffusionError, "")
    config["denoiser_options"]["width"] = 24
    write_json(folder / "config.json", config)
    one(look(folder), "bridge.open", "problem", "model.safetensors: enter.weight is", "restore it")
    (folder / "model.safetensors").write_bytes(b"")
    one(look(folder), "bridge.open", "problem", "model.safetensors", "restore it")
    (folder / "config.json").unlink()
    (folder / "checkpoints").mkdir()
    one(look(folder), "bridge.open", "problem", "config.json", "--resume")


# -- EZ-HOI's flags ----------------------------------------------------------------------------------------------


@pytest.fixture
def line(small_world):
    """The miniature's script and its flags for evaluation."""
    return [SCRIPT, *ezhoi_flags(small_world, evaluate=True)]


def checkpoint(path: Path, **changes) -> Path:
    """Write a checkpoint of the tensors that the doctor looks at; None removes one."""
    state = {
        "label_HO": torch.zeros(24, len(VERBS)),
        "mem_adapter.down_proj_mem.weight": torch.zeros(64, D),
        "vis_fuse.0.weight": torch.zeros(D, 2 * D),
    }
    state.update(changes)
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = {name: tensor for name, tensor in state.items() if tensor is not None}
    torch.save({"epoch": 3, "model_state_dict": kept}, path)
    return path


def test_sound_flags(look, line, tmp_path):
    before = sys.argv, list(sys.path), sys.stdin, argparse.ArgumentParser.parse_args
    found = look(line=[*line, "--resume", str(checkpoint(tmp_path / "c.pt"))])
    assert (sys.argv, sys.path, sys.stdin, argparse.ArgumentParser.parse_args) == before
    assert not worst(found)
    for name in ("options", "paths", "data", "clip", "checkpoint"):
        one(found, f"ezhoi.{name}", "ok")
    assert len(found["ezhoi.data"]) == 2


def without(line, flag, values=1):
    at = line.index(flag)
    return line[:at] + line[at + 1 + values :]


def test_a_script_for_one_image(small_world):
    args = argparse.Namespace(
        dataset="hicodet", data_root=str(small_world / "data"), partition="test2015", img_clip_pt=True,
        clip_img_file=str(small_world / "data" / "clip_img_hicodet_train"), self_image_path="a.jpg",
    )  # fmt: skip
    assert [(f.name, f.level) for f in ezhoi.check_data(args)] == [("ezhoi.data", "ok")]
    args.self_image_path = None
    assert [(f.name, f.level) for f in ezhoi.check_data(args)][1] == ("ezhoi.clip", "problem")


def test_flags_that_cannot_work(look, line, tmp_path, small_world):
    clip = line[line.index("--clip_img_file") + 1]
    other = clip.removesuffix("test") + "train"
    capture = ["--plugin", "capture", "--capture", "x"]
    cases = [
        (["no_such_script.py"], "ezhoi.flags", "problem", "EZ-HOI folder"),
        ([__file__], "ezhoi.flags", "problem", "no EZ-HOI script"),
        ([*line, "--no-such-flag"], "ezhoi.flags", "problem", "--no-such-flag"),
        ([*line, "--diffusion_bridge", "x"], "ezhoi.flags", "problem", "--plugin diffusion=DIR"),
        ([*line, "--help"], "ezhoi.flags", "problem", "--help"),
        (without(line, "--txtcls_pt", 0), "ezhoi.options", "problem", "--txtcls_pt"),
        ([*line, "--num-workers", "2"], "ezhoi.workers", "note", "--num-workers 0"),
        (line, "ezhoi.paths", "warning", "add --resume"),
        ([*line, "--resume", "nowhere.pt"], "ezhoi.paths", "problem", "random weights"),
        ([*line, "--pretrained", "nowhere.pth"], "ezhoi.paths", "problem", "--pretrained nowhere.pth"),
        ([*line, "--clip_dir_vit", "nowhere.pt"], "ezhoi.paths", "problem", "relative"),
        ([*line, "--data-root", str(tmp_path)], "ezhoi.data", "problem", "Readme"),
        ([*line, "--data-root", str(tmp_path / "no")], "ezhoi.paths", "problem", "--data-root"),
        ([*line, "--clip_img_file", str(tmp_path)], "ezhoi.clip", "problem", "CLIP_hicodet_extract.py"),
        ([*line, "--clip_img_file", other], "ezhoi.clip", "problem", f"--clip_img_file {clip}"),
        ([*line, "--clip_img_file", other, *capture], "ezhoi.clip", "note", "a capture reads"),
    ]
    for flags, name, level, word in cases:
        one(look(line=flags), name, level, word)


CLIP_FEATURES = {  # what a file holds, and what is said of it; None: nothing
    "patches": (torch.ones(196, 512), None),
    "an array of patches": (np.ones((196, 512), np.float32), None),
    "one feature": (torch.ones(512), "has shape [512] instead of [patches, 512]"),
    "of another CLIP": (torch.ones(196, 768), "has shape [196, 768]"),
    "a batch": (torch.ones(1, 196, 512), "has shape [1, 196, 512]"),
    "not finite": (torch.full((196, 512), torch.nan), "NaN"),
    "something else": ({"feature": 1}, "holds no tensor"),
    "a program": (Path("x"), "pathlib"),
}


@pytest.mark.parametrize("what", CLIP_FEATURES)
def test_clip_features_are_of_patches(small_world, tmp_path, what):
    content, problem = CLIP_FEATURES[what]
    folder = tmp_path / "clip_test"
    folder.mkdir()
    names = json.loads((small_world / "data" / "instances_test2015.json").read_text())["filenames"]
    for name in names:
        (folder / f"{Path(name).stem}_clip.pkl").write_bytes(pickle.dumps(content))
    args = argparse.Namespace(
        dataset="hicodet", data_root=str(small_world / "data"), partition="test2015", img_clip_pt=True,
        clip_img_file=str(folder), clip_dir_vit="checkpoints/ViT-B-16.pt",
    )  # fmt: skip
    found = [f for f in ezhoi.check_data(args) if f.name == "ezhoi.clip"]
    assert [f.level for f in found] == ["ok" if problem is None else "problem"]
    if problem is not None:
        assert problem in found[0].found
        assert "CLIP_hicodet_extract.py" in found[0].fix


def test_images_of_the_real_layout(look, line, small_world, tmp_path):
    root = tmp_path / "data"
    for partition in ("train2015", "test2015"):
        folder = root / ezhoi.IMAGES / partition
        folder.mkdir(parents=True)
        annotations = small_world / "data" / f"instances_{partition}.json"
        shutil.copy(annotations, root)
        for name in json.loads(annotations.read_text())["filenames"]:
            (folder / name).touch()
    found = look(line=[*line, "--data-root", str(root)])
    assert [f.level for f in found["ezhoi.data"]] == ["ok", "ok"]
    content = json.loads((root / "instances_test2015.json").read_text())
    name = next(n for i, n in enumerate(content["filenames"]) if i not in content["empty"])
    (root / ezhoi.IMAGES / "test2015" / name).unlink()
    one(look(line=[*line, "--data-root", str(root)]), "ezhoi.data", "problem", "lacks 1 of", name, "unpack")


BAD_CHECKPOINTS = [
    ({"label_HO": None}, "no label_HO"),
    ({"label_HO": torch.zeros(24, 117)}, "117 classes"),
    ({"mem_adapter.down_proj_mem.weight": None}, "without --img_align"),
    ({"mem_adapter.down_proj_mem.weight": torch.zeros(32, D)}, "--emb_dim"),
    ({"vis_fuse.0.weight": torch.zeros(2 * D, 3 * D)}, "--logits_type HO+U"),
    ({"vis_fuse.0.weight": torch.zeros(40, 80)}, "40 wide"),
    ({"mem_adapter.down_proj_mem.weight": torch.zeros(64, 768), "vis_fuse.0.weight": torch.zeros(768, 1536)}, "D = 768"),
    ({"vis_fuse.0.weight": torch.full((D, 2 * D), float("nan"))}, "NaN"),
]  # fmt: skip


def test_checkpoints_that_do_not_fit(look, line, tmp_path, trained):
    for changes, word in BAD_CHECKPOINTS:
        path = checkpoint(tmp_path / "c.pt", **changes)
        one(look(line=[*line, "--resume", str(path)]), "ezhoi.checkpoint", "problem", word, "flags that it was trained")
    path = checkpoint(tmp_path / "c.pt", label_HO=torch.zeros(30, len(VERBS)))
    features = look(trained[0], line=[*line, "--resume", str(path)])
    one(features, "ezhoi.checkpoint", "problem", "30 text features, and features or bridge were made for 24")
    wide = {"mem_adapter.down_proj_mem.weight": torch.zeros(64, 40), "vis_fuse.0.weight": torch.zeros(40, 80)}
    path = checkpoint(tmp_path / "c.pt", **wide)
    one(look(trained[0], line=[*line, "--resume", str(path)]), "ezhoi.checkpoint", "problem", "were made for D = 32")


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


def test_a_checkpoint_that_would_run_code_is_not_executed(look, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model_state_dict": Evil()}, "evil.pt")
    torch.save({"model_state_dict": Evil()}, "old.pt", _use_new_zipfile_serialization=False)
    Path("garbage.pt").write_bytes(b"garbage")
    torch.save([1, 2], "list.pt")
    for name, word in (("evil.pt", "pickle"), ("old.pt", "pickle"), ("garbage.pt", "again"), ("list.pt", "ckpt_")):
        one(look(line=[*line, "--resume", name]), "ezhoi.checkpoint", "problem", word)
    assert not Path("executed").exists()
    torch.save(torch.load(checkpoint(Path("c.pt"))), "before_zip.pt", _use_new_zipfile_serialization=False)
    one(look(line=[*line, "--resume", "before_zip.pt"]), "ezhoi.checkpoint", "ok", "epoch 3")


def test_the_name_of_a_checkpoint_and_args_txt_beside_it(look, line, tmp_path):
    path = checkpoint(tmp_path / "hico_non_rare_first" / "c.pt")
    found = look(line=[*line, "--resume", str(path)])
    one(found, "ezhoi.zs_type", "warning", "says non_rare_first", "unseen_verb")
    path = checkpoint(tmp_path / "hico_unseen_verb" / "c.pt")
    arguments = path.with_name("args.txt")
    arguments.write_text(json.dumps({"zs": True, "zs_type": "unseen_verb", "num_classes": 31, "seed": 66}))
    found = look(line=[*line, "--resume", str(path)])
    assert "ezhoi.zs_type" not in found
    one(found, "ezhoi.args_txt", "ok")
    arguments.write_text(json.dumps({"zs": True, "zs_type": "rare_first", "seed": 1}))
    found = look(line=[*line, "--resume", str(path)])
    one(found, "ezhoi.args_txt", "warning", "zs_type rare_first (now unseen_verb)", "seed 1 (now 66)", "training")
    for garbage in ("[]", "{", "3"):
        arguments.write_text(garbage)
        look(line=[*line, "--resume", str(path)])


def test_fingerprints_are_compared_with_the_flags(look, line, tmp_path):
    args = read_flags(Path(line[0]), line[1:])
    mine = {**FINGERPRINT, "num_classes": args.num_classes}
    features = write_features(tmp_path / "f", fingerprint=mine).folder
    found = look(features, write_bridge(tmp_path / "b", fingerprint=mine), line=line)
    one(found, "ezhoi.features", "ok")
    one(found, "ezhoi.bridge", "ok")
    other = write_bridge(tmp_path / "other", fingerprint={**mine, "zs_type": "rare_first", "logits_type": "HO+U"})
    found = look(features, other, line=line)
    one(found, "ezhoi.features", "ok")
    one(
        found,
        "ezhoi.bridge",
        "problem",
        "zs_type is 'unseen_verb' here, 'rare_first' there",
        "logits_type",
        "capture and train",
    )


def test_read_flags_uses_the_script_s_own_parser(line, tmp_path, capsys):
    args = read_flags(Path(line[0]), [*line[1:], "--plugin", "capture", "--capture", "x"])
    assert (args.zs_type, args.eval, args.plugin, args.capture) == ("unseen_verb", True, ["capture"], "x")
    assert capsys.readouterr().out == ""
    script = tmp_path / "script.py"
    head = "from upt import build_detector\n"
    for body, word in (
        ("", "without reading its flags"),
        ("raise ZeroDivisionError('x')", "ZeroDivisionError"),
        ("import sys; sys.exit(3)", "status 3"),
        ("input()", "EOFError"),
    ):
        (tmp_path / "upt.py").write_text("def build_detector(): ...")
        script.write_text(head + body)
        with pytest.raises(LaunchError, match=word):
            read_flags(script, [])


def test_a_script_whose_imports_fail_says_what_to_install(look, tmp_path):
    script = tmp_path / "main_tip_finetune.py"
    for module, word in (("pocket_", "pip install pocket_"), ("pocket.ops", "fredzzhang/pocket"), ("clip", "-e CLIP")):
        script.write_text(f"import {module}\nfrom x import build_detector\n")
        one(look(line=[str(script)]), "ezhoi.flags", "problem", word)
    script.write_text("raise RuntimeError('operator torchvision::nms does not exist')\nfrom x import build_detector\n")
    one(look(line=[str(script)]), "ezhoi.flags", "problem", "environment.torchvision")


# -- other folders, damage --------------------------------------------------------------------------------------


def test_folders_that_are_neither(look, tmp_path):
    (tmp_path / "file.pkl").touch()
    (tmp_path / "empty").mkdir()
    one(look(tmp_path / "file.pkl"), "input", "problem", "is a file", "ezhoi-diffusion import")
    one(look(tmp_path / "empty"), "input", "problem", "neither", "ezhoi-diffusion capture", "ezhoi-diffusion train")
    one(look(tmp_path / "none"), "input", "problem", "does not exist")
    one(look("a\0b"), "input", "problem", "a\0b")
    twice = [write_bridge(tmp_path / name) for name in ("a", "b")]
    one(look(*twice), "bridge", "problem", "one of each kind")


def mutations(value):
    """Yield `value` with one leaf changed or removed, for every leaf."""
    yield from (None, "x", -1, 10**30, [], {})
    if isinstance(value, dict):
        for key in value:
            yield {k: v for k, v in value.items() if k != key}
            for changed in mutations(value[key]):
                yield {**value, key: changed}
    if isinstance(value, list) and value:
        for changed in mutations(value[0]):
            yield [changed, *value[1:]]


def test_damage_of_any_kind_gives_findings_and_no_exception(look, tmp_path, trained, monkeypatch):
    monkeypatch.setattr(bridges, "NUM_EFFECT", 8)
    features, bridge = (Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in trained)
    shutil.rmtree(bridge / "checkpoints")
    count = 0
    for folder, kind in ((features, "features"), (bridge, "bridge")):
        for path in sorted(p for p in folder.iterdir() if p.suffix in (".json", ".safetensors")):
            data = path.read_bytes()
            whole = path.name != "training.json" and not (path.name.startswith("shard") and path.suffix == ".json")
            for broken in (b"", data[: len(data) // 2], b"\0" * len(data), b"[]", b"{", data + b"x"):
                path.write_bytes(broken)
                found = look(folder)
                assert not whole or any(f.level == "problem" for n, fs in found.items() if kind in n for f in fs), path
                count += 1
            if path.suffix == ".json":
                content = json.loads(data)
                for number, changed in enumerate(mutations(content)):
                    if number % 7 == 0:  # a sample, spread over all fields
                        path.write_text(json.dumps(changed))
                        look(folder)
                        count += 1
            path.write_bytes(data)
    assert count > 150


# -- the command -----------------------------------------------------------------------------------------------


def test_the_command_prints_lines_or_json_and_sets_the_exit_status(look, trained, line, capsys):
    features, bridge = map(str, trained)
    assert main(["doctor", features, bridge]) == 0
    printed = capsys.readouterr().out
    assert "features.norms" in printed
    assert " -> " in printed
    assert "0 problems, 0 warnings" in printed
    status = main(["doctor", bridge, "--json", "--", *line, "--resume", "nowhere"])
    found = json.loads(capsys.readouterr().out)
    assert status == 1
    assert {f["name"]: f["level"] for f in found}["ezhoi.paths"] == "problem"
    assert set(found[0]) == {"name", "level", "found", "fix", "details"}


@pytest.mark.slow
def test_the_command_in_a_process_of_its_own(trained, line, tmp_path):
    done = run_in_miniature("-m", "ezhoi_diffusion", "doctor", str(tmp_path), *map(str, trained), "--", *line)
    assert done.returncode == 1
    assert "holds neither" in done.stdout
    assert "environment.torchvision" in done.stdout
    assert "Traceback" not in done.stderr + done.stdout
