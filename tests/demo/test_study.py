"""The study of several runs: its intervals, its tables, and how it resumes."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ezhoi_diffusion.demo import study
from ezhoi_diffusion.demo.study_table import Run, Variant, estimate, markdown, summarize, t_interval
from ezhoi_diffusion.files import write_json


def test_the_interval_of_students_sleep_data():
    # Student 1908, ten differences: t.test(extra ~ group, paired = TRUE) in R prints 0.7001142 2.4598858
    values = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]
    assert t_interval(values) == pytest.approx((0.7001142, 2.4598858), abs=1e-6)
    assert t_interval(values[:1]) is None


def covered(rng: np.random.Generator, world: float, run: float, images: float, unit: str, count: int = 4000) -> float:
    """Share of simulated studies (5 worlds x 3 splits) whose interval has the true mean 1."""
    seeds = np.repeat(range(5), 3)
    hits = 0
    for _ in range(count):
        effect = 1 + world * rng.normal(size=5)[seeds] + run * rng.normal(size=15) + images * rng.normal(size=15)
        low, high = getattr(estimate(seeds.tolist(), effect.tolist()), unit)
        hits += low <= 1 <= high
    return hits / count


def test_intervals_cover_the_mean_as_often_as_they_say():
    rng = np.random.default_rng(0)
    near = pytest.approx(0.95, abs=0.015)  # four standard errors of 4000 studies
    assert covered(rng, world=0, run=0.5, images=0.5, unit="runs") == near
    assert covered(rng, world=0, run=0, images=1, unit="runs") == near, "images must not be counted twice"
    assert covered(rng, world=0, run=0.5, images=0.5, unit="worlds") == near
    assert covered(rng, world=1, run=0.5, images=0.5, unit="worlds") == near
    assert covered(rng, world=1, run=0.5, images=0.5, unit="runs") < 0.85, "which is why worlds have an interval too"


def run_with(seed: int, split: str, none: float, control: float, bridge: float) -> Run:
    def variant(value: float, control: bool) -> Variant:
        return Variant(dict.fromkeys(("full", "unseen", "seen"), value), {"full": (0.1, 0.2)}, control)

    return Run(
        seed, split, {"none": variant(none, False), "scale": variant(control, True), "b": variant(bridge, False)}
    )


def test_a_bridge_has_to_beat_the_best_control_of_each_run():
    runs = [run_with(0, "rare_first", 20, 21, 20.5), run_with(1, "rare_first", 20, 19, 20.5)]
    summary = summarize(runs)
    found = summary["bridges"]["b"]
    assert found["change"]["full"]["mean"] == pytest.approx(0.5)
    assert found["over_best_control"]["full"]["mean"] == pytest.approx((-0.5 + 0.5) / 2)
    assert found["over_best_control"]["full"]["positive"] == 1
    # a control is compared with the other controls
    assert summary["bridges"]["scale"]["over_best_control"]["full"]["mean"] == pytest.approx(0)
    text = markdown(summary)
    assert "| b | +0.50 [+0.50 +0.50]" in text
    assert "| 0 rare_first | 20.00 | +1.00* | +0.50* |" in text


def test_what_diffusion_adds_is_the_difference_within_each_run():
    runs = []
    for seed, scored in ((0, 21.0), (1, 24.0)):
        run = run_with(seed, "unseen_verb", 20 * seed, 0, 0)
        values = {"scored": 20 * seed + scored, "residual": 20 * seed + 20.0}
        variants = {
            name: Variant(dict.fromkeys(("full", "unseen", "seen"), v), {}, False) for name, v in values.items()
        }
        runs.append(Run(seed, "unseen_verb", {"none": run.variants["none"], **variants}))
    found = summarize(runs)
    one = found["contrasts"]["scored less residual"]["full"]
    assert one["mean"] == pytest.approx(2.5)
    assert one["runs"] == pytest.approx((2.5 - 12.7062 * 1.5, 2.5 + 12.7062 * 1.5), abs=1e-3)
    assert "| scored less residual | +2.50 " in markdown(found)
    assert not summarize([run_with(0, "rare_first", 20, 21, 20.5)])["contrasts"]


def test_a_choice_is_a_control_only_if_it_is_a_baseline_in_every_run():
    first, second = run_with(0, "unseen_verb", 10, 12, 13), run_with(0, "rare_first", 20, 20.5, 21)
    chose_a_baseline = {**first.variants, "b": replace(first.variants["b"], control=True)}
    runs = [replace(first, variants=chose_a_baseline), second]
    assert summarize(runs[:1])["bridges"]["b"]["control"]
    assert not summarize(runs)["bridges"]["b"]["control"]


@pytest.fixture
def commands(monkeypatch):
    """Steps that only leave a file, and what was asked of them."""
    asked: list[list[str]] = []

    def pretend(words, **_):
        words = words[1:]
        asked.append(words)
        if words[0] == "-c":
            out = Path(words[2])
        else:
            out = Path(words[1 + max(words.index(flag) for flag in ("--out", "--output-dir") if flag in words)])
        if "fail" in words:
            return subprocess.CompletedProcess(words, 1, "what went wrong")
        out.mkdir()
        (out / "ckpt_00001_01.pt").write_text(" ".join(words))
        if "compare" in words:
            names = words[words.index("--bridges") + 1].split(",")
            found = [dict.fromkeys(("full", "unseen", "seen"), float(i)) for i in range(len(names))]
            variants = [
                {"name": name, "baseline": name in study.CONTROLS, "bootstrap": None, "mean_ap": values, "difference": values}
                | {"seed_group": None, "provenance": None}
                for name, values in zip(names, found, strict=True)
            ]  # fmt: skip
            classes = {"full": [0, 1], "unseen": [0], "seen": [1]}
            rest = {
                "seed_groups": {},
                "bootstrap": None,
                "images": 1,
                "pairs": 1,
                "algorithm": "11P",
                "setting": "default",
            }
            notes = {"forced": [], "degraded": {}, "caveats": [], "primary": None}
            write_json(out / "report.json", {"variants": variants, "classes": classes, **rest, **notes})
        return subprocess.CompletedProcess(words, 0, "")

    monkeypatch.setattr(study.subprocess, "run", pretend)
    return asked


def test_a_finished_step_is_not_done_again(commands, tmp_path, monkeypatch, capsys):
    line = ["--out", str(tmp_path), "--seeds", "10,11", "--splits", "unseen_verb,rare_first", "--jobs", "3", "--quick"]
    assert study.main(line) == 0
    steps = 2 + 4 * (5 + len(study.BRIDGES))
    assert len(commands) == steps
    assert json.loads((tmp_path / "study.json").read_text())["bridges"].keys() == {
        *study.CONTROLS, *study.BRIDGES, "tuned",
    }  # fmt: skip
    commands.clear()
    assert study.main(line) == 0
    assert commands == []
    assert capsys.readouterr().out.count("done before") == steps

    # another way to make one bridge: it and the comparison are made again, the captures are not; `tune` reads the first bridge
    for name, again in (("paired", ["train", "compare"]), ("gentle", ["train", "tune", "compare"])):
        commands.clear()
        changed = {**study.BRIDGES, name: (("--recipe", name, "--seed", "1"), "diffusion")}
        monkeypatch.setattr(study, "BRIDGES", changed)
        assert study.main(line) == 0
        assert sorted(words[2] for words in commands) == sorted(again * 4)


def test_a_step_that_failed_ends_its_run_and_is_done_again(commands, tmp_path, monkeypatch, capsys):
    line = ["--out", str(tmp_path), "--seeds", "10", "--splits", "unseen_verb", "--bridges", "paper", "--quick"]
    monkeypatch.setattr(study, "BRIDGES", {"paper": (("fail",), "diffusion")})
    assert study.main(line) == 1
    assert "what went wrong" in capsys.readouterr().err
    assert not (tmp_path / "study.md").exists()
    commands.clear()
    monkeypatch.setattr(study, "BRIDGES", {"paper": ((), "diffusion")})
    assert study.main(line) == 0
    assert [words[2] for words in commands] == ["train", "tune", "compare"]


@pytest.mark.slow
def test_a_study_of_a_tiny_world(tmp_path):
    line = ["--out", str(tmp_path), "--seeds", "10", "--splits", "unseen_verb", "--bridges", "gentle", "--quick"]
    assert study.main(line) == 0
    summary = json.loads((tmp_path / "study.json").read_text())
    assert summary["bridges"]["identity"]["change"]["full"]["mean"] == 0
    assert summary["bridges"]["gentle"]["change"]["full"]["runs"] is None, "one run has no interval over runs"
    (run,) = summary["runs"]
    assert 1 < run["variants"]["none"]["mean_ap"]["full"] < 90
    low, high = run["variants"]["gentle"]["images"]["full"]
    assert low <= summary["bridges"]["gentle"]["change"]["full"]["mean"] <= high
