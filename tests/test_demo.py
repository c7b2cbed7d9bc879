"""README's first command, and the verdict's honesty."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from ezhoi_diffusion.demo.walk import verdict
from ezhoi_diffusion.features.store import FeatureStore


@pytest.mark.slow
def test_the_demo_walks_all_the_way(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "ezhoi_diffusion", "demo"],
        cwd=tmp_path, env=os.environ, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    out = tmp_path / "ezhoi-diffusion-demo"
    results = out / "results"
    report = json.loads((results / "report" / "report.json").read_text())
    assert list(report["mean_ap"]) == ["none", "identity", "mean_shift", "diffusion"]
    assert report["difference"]["identity"]["full"] == 0
    bare = report["mean_ap"]["none"]
    assert 30 < bare["full"] < 90, "the miniature must have learned, and not everything"
    assert set(bare) == {"full", "unseen", "seen", "rare", "non-rare"}
    store = FeatureStore(results / "features")
    assert store.statistics().gap > 0.3, "the modality gap must be there"
    for name in (
        "report/report.html",
        "report/comparison.png",
        "test/diffusion_effect.png",
        "statistics/statistics.png",
        "bridge/training.png",
    ):
        assert (results / name).stat().st_size > 10_000
    assert f"{bare['full']:.2f}" in done.stdout
    assert "One seed of a toy says nothing about HICO-DET" in done.stdout
    again = subprocess.run(
        [sys.executable, "-m", "ezhoi_diffusion", "demo", "--out", str(out)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert again.returncode == 2
    assert "is not empty" in again.stderr


@pytest.mark.parametrize(
    ("change", "controls", "words"),
    [
        (
            1.5,
            {"identity": 0.0, "mean_shift": -3.0},
            "raised full mAP by 1.50 points, more than the best control (identity",
        ),
        (
            1.5,
            {"identity": 0.0, "mean_shift": 2.0},
            "raised full mAP by 1.50 points, no more than the best control (mean_shift",
        ),
        (0.1, {"identity": 0.0}, "left full mAP where it was (+0.10 points, which may be chance)"),
        (-4.0, {"identity": 0.0}, "lowered full mAP by 4.00 points, no more than"),
    ],
)
def test_the_verdict_says_gain_or_loss(tmp_path, change, controls, words):
    difference = {name: {"full": value} for name, value in {**controls, "diffusion": change}.items()}
    (tmp_path / "c.json").write_text(json.dumps({"difference": difference}))
    assert words in verdict(tmp_path / "c.json")
