"""README's first command."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from ezhoi_diffusion.demo.run_demo import STUDY
from ezhoi_diffusion.features.store import FeatureStore


@pytest.mark.slow
def test_the_demo_runs_to_the_end(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "ezhoi_diffusion", "demo"],
        cwd=tmp_path, env=os.environ, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    out = tmp_path / "ezhoi-diffusion-demo"
    results = out / "results"
    report = json.loads((results / "report" / "report.json").read_text())
    variants = {variant["name"]: variant for variant in report["variants"]}
    found = {name: variant["mean_ap"] for name, variant in variants.items()}
    tuned = f"tuned={results / 'tuned'}"
    assert list(found) == ["none", tuned, "identity", "mean_shift", "scale", "diffusion"]
    assert variants["identity"]["difference"]["full"] == 0
    bare = found["none"]
    assert 15 < bare["full"] < 60, "the miniature must have learned, and not everything"
    assert set(bare) == {"full", "unseen", "seen", "rare", "non-rare"}
    store = FeatureStore(results / "features")
    assert store.statistics().gap > 0.3, "the modality gap must be there"
    for name in (
        "report/report.html",
        "report/comparison.png",
        "test/diffusion_effect.png",
        "bridge/training.png",
    ):
        assert (results / name).stat().st_size > 10_000
    assert f"{bare['full']:.2f}" in done.stdout
    assert f"In this small world: {report['headline']}\n{STUDY}\n" in done.stdout
    again = subprocess.run(
        [sys.executable, "-m", "ezhoi_diffusion", "demo", "--out", str(out)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert again.returncode == 2
    assert "is in use" in again.stderr
