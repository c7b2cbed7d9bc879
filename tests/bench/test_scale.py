"""Commands at HICO-DET's size: what is measured, and what its table says."""

from __future__ import annotations

import pytest

from ezhoi_diffusion.bench import scale
from ezhoi_diffusion.bench.measure import BenchError
from ezhoi_diffusion.cli import main
from ezhoi_diffusion.files import read_json
from ezhoi_diffusion.plugins import PluginManager


def test_a_command_is_measured_in_a_process_of_its_own_and_a_failure_shows_its_words(tmp_path):
    used = scale._run("train --bridge list", tmp_path / "log")
    assert 0 < used["cpu_seconds"] < 60
    assert 10e6 < used["peak_bytes"] < 2e9
    assert "residual" in (tmp_path / "log").read_text()
    with pytest.raises(BenchError, match=r"(?s)`ezhoi-diffusion train` failed.*FEATURES and --out DIR are required"):
        scale._run("train", tmp_path / "log")


@pytest.fixture
def ran(monkeypatch):
    """Commands that were run, instead of running them: time grows as pairs do, memory is that of the base and a tenth of it."""
    lines = []

    def run(words, log):
        lines.append(words)
        share = 10 if "-0.02" in words else 1
        return {"cpu_seconds": 2.0 * share, "seconds": 3.0, "peak_bytes": 100_000_000 + share * 10_000_000}

    monkeypatch.setattr(scale, "_run", run)
    return lines


def test_growth_is_from_size_to_size_and_captures_are_kept(ran, tmp_path, capsys):
    words = [
        "bench",
        "--part",
        "scale",
        "--sizes",
        "0.002,0.02",
        "--only",
        "compare,statistics",
        "--out",
        str(tmp_path),
    ]
    assert main(words) == 0
    result = read_json(tmp_path / "scale.json", dict, BenchError, "")
    compare, statistics = result["commands"]
    assert [run["size"] for run in compare["runs"]] == [0.002, 0.02]
    assert compare["runs"][1]["pairs"] > 5 * compare["runs"][0]["pairs"]
    assert compare["memory_factors"] == [pytest.approx(200 / 110)]
    assert 0.9 < statistics["exponents"][0] < 1.2
    first, second = (run["floor_seconds"] / run["pairs"] for run in compare["runs"])
    assert first == pytest.approx(second)
    assert first * result["flops_per_second"] > 5 * 2 * 512**2
    assert statistics["runs"][0]["floor_seconds"] is None
    shown = capsys.readouterr().out
    assert "statistics" in shown
    assert "1.82" in shown
    made = (tmp_path / "features" / "train-0.02" / "index.json").stat().st_mtime_ns
    assert main(words) == 0
    assert (tmp_path / "features" / "train-0.02" / "index.json").stat().st_mtime_ns == made


def test_a_fit_gets_the_split_that_it_learns_from():
    commands = scale.commands(PluginManager())
    words = {name: commands[f"fit {name}"] for name in ("eszsl", "test_time_cache")}
    assert (words["eszsl"].split, words["test_time_cache"].split) == ("train", "test")
    assert words["test_time_cache"].words == "train {test} --bridge test_time_cache --out {out}"


def test_every_command_can_be_named_and_no_other(tmp_path):
    with pytest.raises(BenchError, match="there is no command nothing; known are compare, sweep, tune"):
        scale.measure_scale([0.01], ["nothing"], PluginManager(), tmp_path)
    with pytest.raises(BenchError, match="above 0, not -1"):
        scale.measure_scale([-1], [], PluginManager(), tmp_path)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--sizes", "0.1"], "are for --part scale"),
        (["--part", "scale", "--quick"], "--quick is not for --part scale"),
        (["--part", "scale", "--sizes", "big"], "write numbers"),
    ],
)
def test_flags_of_the_other_part_are_refused(words, says, capsys):
    assert main(["bench", *words]) == 2
    assert says in capsys.readouterr().err
