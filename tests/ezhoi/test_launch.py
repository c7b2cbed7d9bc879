"""An unmodified script through the launcher: capture, training, injection, comparison, two processes."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch

from ezhoi_diffusion.cli import main
from ezhoi_diffusion.ezhoi.launch import EzHoiScript, LaunchError
from ezhoi_diffusion.features.store import FeatureStore
from helpers.miniature import (
    MINIATURE,
    dump,
    ezhoi_flags,
    launch,
    printed_by_ezhoi,
    rows_of,
    run_in_miniature,
    same,
    same_figures,
)


@pytest.fixture(scope="session")
def evaluated(small_world, tmp_path_factory):
    """Output and tensors of the script without this package."""
    done, tensors = dump(
        tmp_path_factory.mktemp("bare") / "bare.safetensors", "bare", *ezhoi_flags(small_world, evaluate=True)
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, tensors


@pytest.fixture(scope="session")
def bridge(captured, tmp_path_factory):
    out = tmp_path_factory.mktemp("bridge") / "bridge"
    assert main(["train", str(captured[0].folder), "--out", str(out), "--train-steps", "60"]) == 0
    return out


# -- attached, and nothing enabled -----------------------------------------------------------------------------


def test_launched_run_equals_bare_run(small_world, evaluated, tmp_path):
    printed, bare = evaluated
    done, tensors = dump(tmp_path / "x.safetensors", "launched", *ezhoi_flags(small_world, evaluate=True))
    assert done.returncode == 0, done.stderr
    assert same(bare, tensors), "logits, detections and context vectors must be bit-identical"
    assert printed_by_ezhoi(done.stdout) == printed_by_ezhoi(printed)
    assert any(key.startswith("context.") for key in bare)


def test_help_lists_our_flags():
    done = launch("--help")
    assert done.returncode == 0, done.stderr
    for flag in ("--img_align", "--plugin", "--compare", "--capture DIR", "plugin capture"):
        assert flag in done.stdout


def test_training_runs_with_file_names_in_targets(small_world, tmp_path):
    flags = [*ezhoi_flags(small_world, evaluate=False), "--epochs", "1", "--output-dir", str(tmp_path)]
    bare = run_in_miniature("main_tip_finetune.py", *flags)
    assert "Unsupported type of data" in bare.stderr
    done = launch(*flags)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("ckpt_*.pt"))) == 1


# -- capture ---------------------------------------------------------------------------------------------------


def test_captured_features_equal_those_of_ezhoi(captured):
    store, seen = captured
    feats = [seen[f"{i}.feat"] for i in range(sum(key.endswith(".feat") for key in seen))]
    assert torch.equal(store.adapter_feat(), torch.cat(feats))
    assert len(store) == sum(len(feat) for feat in feats)
    logits = [seen[f"{i}.logits"] for i in range(len(feats))]
    x, ezhoi = store.adapter_feat(), store.ezhoi
    rebuilt = (x @ ezhoi["text"].T) @ ezhoi["label"] / ezhoi["sample_lens"] / 2 * ezhoi["logit_scale"]
    assert torch.allclose(rebuilt, torch.cat(logits), atol=1e-5)
    assert any(image["rows"] == 0 for image in store.images), "the world must have images without pairs"


def test_capture_covers_the_train_split_without_unseen_labels(captured, small_world):
    store, _ = captured
    annotated = json.loads((small_world / "data" / "instances_train2015.json").read_text())
    assert store.split == "train"
    assert {image["name"] for image in store.images} <= set(annotated["filenames"])
    unseen = set(store.ezhoi["classes/unseen"].tolist())
    assert unseen
    assert not unseen & set(store.rows("gt_hoi").tolist()), "labels of unseen classes must not be stored for training"
    assert store.rows("labels").any()
    assert store.fingerprint["zs_type"] == "unseen_verb"
    assert len(store.context) > 0


def test_capture_is_repeatable_and_resumable(small_world, captured, tmp_path):
    flags = [*ezhoi_flags(small_world, evaluate=True), "--capture-split", "train", "--plugin", "capture"]
    done = launch(*flags, "--capture", str(tmp_path / "again"))
    assert done.returncode == 0, done.stderr
    again = FeatureStore(tmp_path / "again")
    assert torch.equal(again.adapter_feat(), captured[0].adapter_feat())
    assert again.fingerprint == captured[0].fingerprint
    listed = {path.name for path in again.folder.iterdir()}
    for left in (
        ".lock-000",
        "ezhoi.json",
        "shard-000-00000.json",
        ".index.json.7.tmp",
    ):  # killed after the index was written
        (again.folder / left).touch()
    done = launch(*flags, "--capture", str(tmp_path / "again"))
    assert done.returncode == 0, done.stderr
    assert "already holds this capture, finished" in done.stdout
    assert {path.name for path in again.folder.iterdir()} == listed
    refused = launch(*flags, "--capture", str(tmp_path / "again"), "--max-images", "3")
    assert refused.returncode == 2
    assert "holds a finished capture" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_max_images_of_the_test_split(small_world, tmp_path):
    flags = ["--plugin", "capture", "--capture", str(tmp_path / "f"), "--max-images", "5"]
    done = launch(*ezhoi_flags(small_world, evaluate=True), *flags)
    assert done.returncode == 0, done.stderr
    store = FeatureStore(tmp_path / "f")
    assert (store.split, len(store.images)) == ("test", 5)
    assert "test2015" in store.images[0]["name"]
    assert main(["train", str(store.folder), "--out", str(tmp_path / "b")]) == 2


@pytest.mark.slow
def test_two_processes_capture_the_same_as_one(small_world, captured, tmp_path):
    flags = [*ezhoi_flags(small_world, evaluate=False), "--plugin", "capture", "--capture", str(tmp_path / "f")]
    done = launch(*flags, "--world-size", "2")
    assert done.returncode == 0, done.stderr
    store = FeatureStore(tmp_path / "f")
    assert {shard["file"][:9] for shard in store.index["shards"]} == {"shard-000", "shard-001"}
    assert [image["name"] for image in store.images] == [image["name"] for image in captured[0].images]
    assert torch.allclose(store.adapter_feat(), captured[0].adapter_feat(), atol=1e-5)
    assert store.fingerprint == captured[0].fingerprint
    out = tmp_path / "bridge"
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "ezhoi_diffusion", "train"]
    trained = run_in_miniature(*torchrun, str(store.folder), "--out", str(out), "--train-steps", "20")
    assert trained.returncode == 0, trained.stderr
    compared = launch(
        *ezhoi_flags(small_world, evaluate=True),
        "--bridge",
        str(out),
        "--compare",
        "none,diffusion",
        "--world-size",
        "2",
    )
    assert compared.returncode == 0, compared.stderr
    assert compared.stdout.count("diffusion - none") == 1, "rank 0 alone reports"


def test_clip_features_of_another_split_are_refused(small_world, tmp_path):
    flags = ezhoi_flags(small_world, evaluate=False)
    flags[flags.index("--clip_img_file") + 1] = str(tmp_path)
    done = launch(*flags, "--plugin", "capture", "--capture", str(tmp_path / "f"))
    assert done.returncode == 2
    assert "no folder has the CLIP image features of all train images" in done.stderr


# -- injection and comparison ----------------------------------------------------------------------------------


def test_compare_scores_all_variants_on_the_same_pairs(small_world, evaluated, bridge, tmp_path):
    printed, bare = evaluated
    flags = ["--bridge", str(bridge), "--compare", "none,identity,mean_shift,diffusion", "--out", str(tmp_path)]
    done, tensors = dump(tmp_path / "x.safetensors", "launched", *ezhoi_flags(small_world, evaluate=True), *flags)
    assert done.returncode == 0, done.stderr
    rows = rows_of(done.stdout)
    assert same_figures(rows["none"], printed_by_ezhoi(printed))
    assert rows["identity"] == rows["none"]
    assert printed_by_ezhoi(done.stdout) == printed_by_ezhoi(printed), "EZ-HOI prints what it would print alone"
    report = json.loads((tmp_path / "report.json").read_text())
    assert {v["name"]: v for v in report["variants"]}["identity"]["difference"]["full"] == 0
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert "<!doctype html>" in (tmp_path / "report.html").read_text()
    # every fourth scoring is the bare one, and the identity's follows it
    images = sum(key.endswith(".scores") for key in bare)
    for i in range(images):
        assert torch.equal(tensors[f"{4 * i}.logits"], bare[f"{i}.logits"])
        assert torch.equal(tensors[f"{4 * i + 1}.logits"], bare[f"{i}.logits"])
        assert not torch.equal(tensors[f"{4 * i + 3}.logits"], bare[f"{i}.logits"])


def test_injected_run_agrees_with_comparison(small_world, evaluated, bridge, tmp_path):
    table = launch(*ezhoi_flags(small_world, evaluate=True), "--bridge", str(bridge), "--compare", "diffusion").stdout
    done, tensors = dump(
        tmp_path / "x.safetensors", "launched", *ezhoi_flags(small_world, evaluate=True), "--plugin", "diffusion", "--bridge", str(bridge)
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not same(evaluated[1], tensors)
    assert same_figures(rows_of(table)["diffusion"], printed_by_ezhoi(done.stdout))


def test_bridge_of_another_run_needs_force(small_world, bridge):
    flags = [*ezhoi_flags(small_world, evaluate=True), "--bridge", str(bridge), "--compare", "diffusion"]
    other = launch(*flags, "--zs_type", "rare_first")
    assert other.returncode == 2
    assert "zs_type is 'rare_first' here, 'unseen_verb' there" in other.stderr
    forced = launch(*flags, "--zs_type", "rare_first", "--force")
    assert forced.returncode == 0, forced.stderr
    assert "FORCED: bridge 'diffusion' was made for another EZ-HOI run" in forced.stdout


def test_restore_context(small_world, evaluated, bridge):
    # the checkpoint makes the weights equal, as in a real run; the seed then changes the context vectors alone
    flags = [*ezhoi_flags(small_world, evaluate=True), "--bridge", str(bridge), "--compare", "identity,diffusion"]
    refused = launch(*flags, "--seed", "1")
    assert refused.returncode == 2
    assert "context is" in refused.stderr
    restored = launch(*flags, "--seed", "1", "--restore-context", "--force")
    assert restored.returncode == 0, restored.stderr
    assert "context is" not in restored.stdout


def test_script_without_engine_is_attached_to_at_its_first_image(small_world, bridge, tmp_path):
    script = tmp_path / "inference.py"
    script.write_text(
        "import runpy, sys\n"
        f"sys.path.insert(0, {str(MINIATURE)!r})\n"
        "from main_tip_finetune import command_line\n"
        "from upt_tip_cache_model_free_finetune_distillself import build_detector as build\n"
        "from utils_tip_cache_and_union_finetune import DataFactory\n"
        "import torch\n"
        "if __name__ == '__main__':\n"
        "    args = command_line().parse_args()\n"
        "    args.human_idx = 0\n"
        "    data = DataFactory('hicodet', 'test2015', args.data_root, 'ViT-B/16')\n"
        "    torch.manual_seed(args.seed)\n"
        "    upt = build(args, data.dataset.object_to_verb, data.dataset.object_n_verb_to_interaction, args.clip_dir_vit)\n"
        "    upt.eval()\n"
        "    with torch.no_grad():\n"
        "        for i in range(8):\n"
        "            found = upt([data[i][0]], [data[i][1]])\n"
        "    print('tapped while running:', 'compute_roi_embeddings' in vars(upt))\n"
    )
    environment = {"PYTHONPATH": os.pathsep.join([str(MINIATURE), os.environ.get("PYTHONPATH", "")])}
    run = ["-m", "ezhoi_diffusion", "run", str(script), *ezhoi_flags(small_world, evaluate=True)]
    bare = run_in_miniature(*run, **environment)
    assert bare.returncode == 0, bare.stderr
    assert "tapped while running: False" in bare.stdout
    injected = run_in_miniature(
        *run, "--plugin", "diffusion", "--bridge", str(bridge), "--restore-context", "--force", **environment
    )
    assert injected.returncode == 0, injected.stderr
    assert "tapped while running: True" in injected.stdout
    refused = run_in_miniature(*run, "--compare", "none,identity", **environment)
    assert refused.returncode == 2
    assert "need EZ-HOI's data sets: run main_tip_finetune.py" in refused.stderr


def test_fork_that_calls_attach(small_world, bridge, tmp_path):
    fork = tmp_path / "fork"
    shutil.copytree(MINIATURE, fork, ignore=shutil.ignore_patterns("__pycache__"))
    script = fork / "main_tip_finetune.py"
    lines = script.read_text()
    for old, new in (
        ("import argparse\n", "import argparse\nfrom ezhoi_diffusion import add_arguments, attach\n"),
        ("    return parser\n", "    add_arguments(parser)\n    return parser\n"),
        (
            "    if args.eval:\n        upt.eval()\n",
            "    attach(upt, args, engine)\n    if args.eval:\n        upt.eval()\n",
        ),
    ):
        assert lines.count(old) == 1
        lines = lines.replace(old, new)
    script.write_text(lines)
    flags = [*ezhoi_flags(small_world, evaluate=True), "--bridge", str(bridge)]
    injected = run_in_miniature(str(script), *flags, "--plugin", "diffusion")
    assert injected.returncode == 0, injected.stderr
    compared = run_in_miniature(str(script), *flags, "--compare", "none,diffusion")
    assert compared.returncode == 0, compared.stderr
    rows = rows_of(compared.stdout)
    assert same_figures(rows["diffusion"], printed_by_ezhoi(injected.stdout))
    assert same_figures(rows["none"], printed_by_ezhoi(compared.stdout))
    launched = run_in_miniature("-m", "ezhoi_diffusion", "run", str(script), *flags, "--plugin", "diffusion")
    assert launched.returncode == 0, launched.stderr
    assert printed_by_ezhoi(launched.stdout) == printed_by_ezhoi(injected.stdout)


# -- errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--plugin", "difusion"], "no plugin 'difusion'; did you mean 'diffusion'?"),
        (["--plugin", "capture"], "needs --capture DIR"),
        (["--capture", "x"], "--capture belongs to plugin 'capture', which is not enabled: add --plugin capture"),
        (["--bridge", "x"], "nothing uses --bridge: add --plugin diffusion"),
        (["--plugin", "diffusion"], "the diffusion bridge needs its folder"),
        (["--compare", "none"], "only `none` is named"),
        (["--compare", "none,unheard"], "there is no bridge 'unheard'"),
        (["--max-images", "3"], "no enabled plugin makes one"),
        (
            ["--plugin", "mean_shift"],
            "mean_shift takes its means from a trained bridge: give mean_shift=DIR, or --bridge DIR",
        ),
        (["--force"], "this run uses none: add --bridge DIR"),
        (["--compare", "identity", "--plugin", "diffusion"], "scores only what it names: add 'diffusion' there"),
        (["--compare", "identity", "--out", "/proc/nowhere"], "cannot hold results"),
        (["--world-size", "2", "--plugin", "diffusion"], "the diffusion bridge needs its folder"),
        (["--out", "x"], "--out is for a comparison: add --compare"),
        (["--plugin", "capture", "--capture", "x", "--resume", "gone.pt"], "--resume gone.pt: there is no such file"),
        (["--compare", "identity", "--resume", "gone.pt"], "silently start from random weights"),
        (["--plugin", "diffusion", "--bridge", "nowhere"], "nowhere"),
    ],
)
def test_wrong_flags_print_one_line(small_world, flags, message):
    done = launch(*ezhoi_flags(small_world, evaluate=True), *flags)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("line", "joins"),
    [
        ("from ezhoi_diffusion import add_arguments, attach as join", True),
        ("import ezhoi_diffusion as ours\nours.attach", True),
        ("from ezhoi_diffusion.ezhoi.attach import attach", True),
        ("from ezhoi_diffusion import DiffusionBridgeHOI\nclip.attach", False),
        ("from elsewhere import attach", False),
        ("import ezhoi_diffusion", False),
    ],
)
def test_scripts_that_call_attach_are_recognized(tmp_path, line, joins):
    script = tmp_path / "fork.py"
    script.write_text(f"from factory import build_detector\n{line}\n")
    assert EzHoiScript.read(script).attaches == joins


@pytest.mark.parametrize(
    "head",
    [b"\xef\xbb\xbf", b"# -*- coding: latin-1 -*-\n# \xe9\n", b"#!/usr/bin/env python\n# coding: cp1252\n# \x80\n"],
)
def test_a_script_with_a_byte_order_mark_or_an_encoding_is_read_as_python_reads_it(tmp_path, head):
    script = tmp_path / "main.py"
    script.write_bytes(head + b"from upt import build_detector\nfrom utils import CustomisedDLE\nCustomisedDLE()\n")
    found = EzHoiScript.read(script)
    assert (found.factory, found.engine) == ("upt", "utils")


def test_clash_with_a_flag_of_the_script(tmp_path):
    (tmp_path / "factory.py").write_text("def build_detector(): pass\n")
    script = tmp_path / "fork.py"
    script.write_text(
        "import argparse\nfrom factory import build_detector\n"
        "parser = argparse.ArgumentParser()\nparser.add_argument('--plugin')\nparser.parse_args()\n"
    )
    done = run_in_miniature("-m", "ezhoi_diffusion", "run", str(script))
    assert done.returncode == 2
    assert "conflicting option string: --plugin): rename it in the script" in done.stderr


def test_bare_run_accepts_a_missing_checkpoint(small_world):
    done = launch(*ezhoi_flags(small_world, evaluate=True), "--resume", "gone.pt")
    assert done.returncode == 0, done.stderr


def test_injection_in_a_training_is_refused(small_world, bridge):
    done = launch(*ezhoi_flags(small_world, evaluate=False), "--plugin", "diffusion", "--bridge", str(bridge))
    assert done.returncode == 2
    assert "this run would train: add --eval" in done.stderr


def test_other_scripts_are_refused(tmp_path):
    (tmp_path / "other.py").write_text("print(1)\n")
    (tmp_path / "broken.py").write_text("def (\n")
    (tmp_path / "elsewhere.py").write_text("from nowhere_at_all import build_detector\n")
    for name, message in (
        ("other.py", "does not import build_detector"),
        ("broken.py", "is no Python script"),
        ("missing.py", "run this from the EZ-HOI folder"),
    ):
        with pytest.raises(LaunchError, match=message):
            EzHoiScript.read(tmp_path / name)
    done = run_in_miniature("-m", "ezhoi_diffusion", "run", str(tmp_path / "elsewhere.py"))
    assert done.returncode == 2
    assert "imports nowhere_at_all, and that failed" in done.stderr
    script = EzHoiScript.read(MINIATURE / "main_tip_finetune.py")
    assert script.factory
    assert script.engine == script.dataset
    assert not script.attaches


def test_debugger_ends_the_run(tmp_path):
    (tmp_path / "factory.py").write_text("def build_detector(): pass\n")
    script = tmp_path / "stops.py"
    script.write_text("from factory import build_detector\nimport pdb\npdb.set_trace()\nprint('went', 'on')\n")
    done = run_in_miniature("-m", "ezhoi_diffusion", "run", str(script), timeout=60)
    assert done.returncode == 2
    assert "stopped in its debugger" in done.stderr
    assert "stops.py:" in done.stderr
    assert "went on" not in done.stdout
