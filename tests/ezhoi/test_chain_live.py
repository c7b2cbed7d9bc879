"""A chain of bridges gives the same in a run of EZ-HOI and on captured features."""

from __future__ import annotations

import json

from ezhoi_diffusion.artifact import Artifact
from ezhoi_diffusion.cli import main
from ezhoi_diffusion.evaluation.chain import Member, save_chain
from helpers.miniature import ezhoi_flags, launch, printed_by_ezhoi, rows_of, same_figures


def test_a_chain_live_equals_a_chain_on_captured_features(small_world, captured, tmp_path):
    train, bridge, chain, test = captured[0].folder, tmp_path / "bridge", tmp_path / "chain", tmp_path / "test"
    assert main(["train", str(train), "--out", str(bridge), "--train-steps", "20"]) == 0
    save_chain(
        chain,
        [
            Member("diffusion", Artifact.load(bridge), {"blend": 1.0, "output": "unit_norm"}),
            Member("scale", None, {"factor": 0.2}),
        ],
    )
    flags = ezhoi_flags(small_world, evaluate=True)
    done = launch(*flags, "--plugin", "capture", "--capture", str(test))
    assert done.returncode == 0, done.stderr
    named, stored = f"diffusion={bridge}+scale", f"chain={chain}"
    # the world's EZ-HOI is untrained, and only a change of norms moves its mAP
    words = ["--set", "diffusion.blend=1", "--set", "diffusion.output=unit_norm", "--set", "scale.factor=0.2"]
    live = launch(*flags, "--compare", f"none,{named},{stored}", *words)
    assert live.returncode == 0, live.stderr
    rows = rows_of(live.stdout)
    assert rows[named] == rows[stored] != rows["none"]
    line = ["compare", str(test), "--bridges", f"none,{named},{stored}", *words, "--replicates", "0"]
    assert main([*line, "--out", str(tmp_path / "report")]) == 0
    found = json.loads((tmp_path / "report" / "report.json").read_text())["variants"]
    for variant in found:
        assert rows[variant["name"]] == {group: f"{value:.2f}" for group, value in variant["mean_ap"].items()}
    for flag in (named, stored):
        injected = launch(*flags, "--plugin", flag, *(words if flag == named else ()))
        assert injected.returncode == 0, injected.stderr
        assert same_figures(rows[named], printed_by_ezhoi(injected.stdout))
