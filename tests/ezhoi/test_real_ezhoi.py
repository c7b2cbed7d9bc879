"""The central promises on the real EZ-HOI; skipped without a checkout and data.

    EZHOI_ROOT=…/EZ-HOI EZHOI_EVAL_FLAGS="… --eval --resume CKPT" EZHOI_TRAIN_FLAGS="… --resume CKPT" pytest -m real_ezhoi

Use the flags of EZ-HOI's own scripts; a few images are enough. Python is the one that runs the tests.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ezhoi_diffusion.cli import main
from ezhoi_diffusion.features.store import FeatureStore
from helpers.miniature import DUMP_SCRIPT, printed_by_ezhoi, rows_of, same, same_figures

ROOT, EVAL, TRAIN = (os.environ.get(name) for name in ("EZHOI_ROOT", "EZHOI_EVAL_FLAGS", "EZHOI_TRAIN_FLAGS"))
pytestmark = [
    pytest.mark.real_ezhoi,
    pytest.mark.skipif(
        not (ROOT and EVAL and TRAIN), reason="EZHOI_ROOT, EZHOI_EVAL_FLAGS, EZHOI_TRAIN_FLAGS are not set"
    ),
]


def dump(out: Path, how: str, flags: str | None, *ours: str, script: str = "main_tip_finetune.py"):
    done = subprocess.run(
        [sys.executable, str(DUMP_SCRIPT), str(out), how, script, *shlex.split(flags or ""), *ours],
        cwd=ROOT, env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, load_file(out)


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    return dump(tmp_path_factory.mktemp("bare") / "x.safetensors", "bare", EVAL)


@pytest.fixture(scope="module")
def captured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("captured")
    features = folder / "features"
    _, seen = dump(folder / "x.safetensors", "launched", TRAIN, "--plugin", "capture", "--capture", str(features))
    return FeatureStore(features), seen


def test_launched_run_equals_bare_run(bare, tmp_path):
    _, launched = dump(tmp_path / "x.safetensors", "launched", EVAL)
    assert same(bare[1], launched)


def test_captured_features_equal_those_of_ezhoi(captured):
    store, seen = captured
    feats = [seen[f"{i}.feat"] for i in range(sum(key.endswith(".feat") for key in seen))]
    assert torch.equal(store.adapter_feat(), torch.cat(feats))
    assert not set(store.ezhoi.get("classes/unseen", torch.zeros(0)).tolist()) & set(store.rows("gt_hoi").tolist())


def test_train_inject_and_compare_leave_the_checkout_clean(bare, captured, tmp_path):
    before = subprocess.run(
        ["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout
    bridge = tmp_path / "bridge"
    assert main(["train", str(captured[0].folder), "--out", str(bridge), "--train-steps", "50"]) == 0
    table, compared = dump(
        tmp_path / "c.safetensors", "launched", EVAL, "--bridge", str(bridge), "--compare", "none,identity,diffusion"
    )
    rows = rows_of(table)
    assert same_figures(rows["none"], printed_by_ezhoi(bare[0]))
    assert rows["identity"] == rows["none"]
    printed, injected = dump(
        tmp_path / "i.safetensors", "launched", EVAL, "--plugin", "diffusion", "--bridge", str(bridge)
    )
    assert same_figures(rows["diffusion"], printed_by_ezhoi(printed))
    for i in range(sum(key.endswith(".scores") for key in bare[1])):
        assert torch.equal(compared[f"{3 * i}.logits"], bare[1][f"{i}.logits"])
        assert torch.equal(compared[f"{3 * i + 1}.logits"], bare[1][f"{i}.logits"])
        assert torch.equal(compared[f"{3 * i + 2}.logits"], injected[f"{i}.logits"])
    after = subprocess.run(
        ["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout
    assert after == before


def test_patched_run_is_unchanged_and_revert_restores_the_script(bare, tmp_path):
    script = tmp_path / "main_tip_finetune.py"
    script.write_bytes((Path(ROOT or "") / script.name).read_bytes())
    before = script.read_bytes()
    assert main(["patch", str(tmp_path)]) == 0
    _, patched = dump(tmp_path / "x.safetensors", "bare", EVAL, script=str(script))
    assert same(bare[1], patched)
    assert main(["patch", str(tmp_path), "--revert"]) == 0
    assert script.read_bytes() == before


def test_single_image_scores_equal_the_evaluation(captured, tmp_path):
    """Runs inference.py over the test split, up to the first image without pairs."""
    bridge, ours = tmp_path / "bridge", ["--plugin", "diffusion", "--bridge", str(tmp_path / "bridge")]
    assert main(["train", str(captured[0].folder), "--out", str(bridge), "--train-steps", "20"]) == 0
    _, evaluated = dump(tmp_path / "e.safetensors", "launched", EVAL, *ours)
    # nothing scores above 2, so that the script draws no picture
    flags = [*shlex.split(EVAL or ""), "--action-score-thresh", "2", *ours, "--restore-context"]
    subprocess.run(
        [sys.executable, str(DUMP_SCRIPT), str(tmp_path / "i.safetensors"), "launched", "inference.py", *flags],
        cwd=ROOT, env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}, check=False,
    )  # fmt: skip
    alone = load_file(tmp_path / "i.safetensors")
    assert "0.logits" in alone
    for key in (key for key in alone if not key.startswith("context.")):
        assert torch.allclose(alone[key].float(), evaluated[key].float(), rtol=1e-5, atol=1e-6), key
