"""Plugins of third parties, installed into an environment of their own: five that work, and one that is broken on purpose."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from ezhoi_diffusion.cli import main
from helpers import TESTS
from helpers.miniature import ezhoi_flags, launch, rows_of

pytestmark = pytest.mark.slow

ROOT = TESTS.parent
SOURCES = [*sorted((ROOT / "plugins").glob("ezhoi-bridge-*")), TESTS / "helpers" / "broken_plugin"]
NAMES = ["center", "flow", "procrustes", "softmax", "standardize"]
LATER = {"flow_matching", "torchdiffeq", "scipy", "sklearn"}  # what plugins import when they are used


class Environment:
    """A fresh virtual environment that sees the packages of this one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
        here = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
        (packages,) = (folder / "venv").glob("lib/python*/site-packages")
        lines = [f"import site; site.addsitedir({path!r})\n" for path in here]
        (packages / "zz_of_this_environment.pth").write_text("".join(lines))

    def python(self, *words: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Run its interpreter."""
        return subprocess.run(
            [self.folder / "venv" / "bin" / "python", *words],
            cwd=cwd or self.folder,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )

    def command(self, *words: str | Path) -> subprocess.CompletedProcess[str]:
        """Run `ezhoi-diffusion words…`."""
        return self.python("-m", "ezhoi_diffusion", *words)


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """With all plugins installed, from copies: setuptools builds where the sources are."""
    pytest.importorskip("pip")
    found = Environment(tmp_path_factory.mktemp("third_party"))
    copies = [shutil.copytree(path, found.folder / "sources" / path.name) for path in SOURCES]
    try:
        as_here = ["--no-build-isolation"] if int(version("setuptools").split(".")[0]) >= 77 else []
    except PackageNotFoundError:
        as_here = []
    installed = found.python("-m", "pip", "install", "--quiet", *as_here, *copies)
    assert installed.returncode == 0, installed.stderr
    return found


@pytest.fixture(scope="module")
def stores(small_world, tmp_path_factory):
    """Captures of both splits of one miniature EZ-HOI."""
    folder = tmp_path_factory.mktemp("stores")
    for split in ("train", "test"):
        flags = ezhoi_flags(small_world, evaluate=True)
        done = launch(*flags, "--plugin", "capture", "--capture", str(folder / split), "--capture-split", split)
        assert done.returncode == 0, done.stderr
    return folder


def test_all_are_listed_and_the_broken_one_with_its_reason(environment):
    done = environment.command("plugins", "--json")
    assert done.returncode == 0, done.stderr
    found = {plugin["name"]: plugin for plugin in json.loads(done.stdout)}
    for name in NAMES:
        assert (found[name]["status"], found[name]["source"]) == ("loaded", f"ezhoi-bridge-{name}")
        assert {"register_bridges", "register_fits", "post_adapter_feat"} <= set(found[name]["hooks"])
    assert (found["broken"]["status"], found["broken"]["source"]) == ("broken", "ezhoi-bridge-broken")
    assert found["broken"]["reason"] == "RuntimeError: broken on purpose"
    assert found["wrong_shape"]["status"] == "loaded", "what is wrong with it shows when it is used"


def test_being_found_costs_no_import_of_what_is_needed_later(environment):
    code = "import sys; from ezhoi_diffusion import PluginManager; PluginManager(); print(*sys.modules)"
    done = environment.python("-c", code)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert {f"ezhoi_bridge_{name}" for name in NAMES} <= loaded
    assert not LATER & loaded


def test_options_are_explained(environment):
    done = environment.command("train", "--bridge", "list")
    assert done.returncode == 0, done.stderr
    for said in (*NAMES, "[mode=diagonal]", "train_steps: Optimizer steps", "Schönemann"):
        assert said in done.stdout, said


def test_all_five_are_fitted_and_compared_in_one_run(environment, stores, tmp_path):
    assert (
        main(
            [
                "train",
                str(stores / "train"),
                "--out",
                str(tmp_path / "diffusion"),
                "--train-steps",
                "20",
                "--learning-rate",
                "0.01",
            ]
        )
        == 0
    )
    for name in NAMES:
        options = ["--set", "train_steps=100", "--set", "width=64"] if name == "flow" else []
        fitted = environment.command("train", stores / "train", "--bridge", name, "--out", tmp_path / name, *options)
        if name == "center":  # this world has as many texts as dimensions, and says so
            assert fitted.returncode == 2
            assert "cannot be centred" in fitted.stderr
            continue
        assert fitted.returncode == 0, fitted.stderr
        assert (tmp_path / name / "config.json").exists()
    given = {name: f"{name}={tmp_path / name}" for name in NAMES if name != "center"}
    names = ",".join(["none", "identity", "mean_shift", "diffusion", *given.values()])
    line = ["compare", stores / "test", "--bridge", tmp_path / "diffusion", "--bridges", names, "--replicates", "100"]
    done = environment.command(*line, "--sweep", "blend=0.5", "--out", tmp_path / "report")
    assert done.returncode == 0, done.stderr
    rows = rows_of(done.stdout)
    assert set(names.split(",")) <= set(rows)
    assert rows["identity"] == rows["none"]
    written = json.loads((tmp_path / "report" / "report.json").read_text())["variants"]
    # the untrained EZ-HOI of this world ranks by the detector's scores, so mAP alone cannot tell bridges apart
    measures = {variant["name"]: tuple(variant["alignment"].items()) for variant in written}
    for name, variant in given.items():
        assert measures[variant] != measures["none"], name
        assert (f"{variant}[blend=0.5]" in rows) == (name in ("flow", "procrustes"))
    assert len({measures[variant] for variant in given.values()}) == len(given)
    assert "FORCED" not in done.stdout, "all were made for this run"
    baselines = ["identity", "mean_shift", given["softmax"], given["standardize"]]
    assert sorted(variant["name"] for variant in written if variant["baseline"]) == sorted(baselines)
    assert done.stderr.count("could not be loaded: RuntimeError: broken on purpose; the run goes on without it") == 1


def test_a_bridge_of_the_wrong_shape_is_one_line_that_names_it(environment, stores):
    done = environment.command("compare", stores / "test", "--bridges", "none,wrong_shape")
    assert done.returncode == 2
    (error,) = (line for line in done.stderr.splitlines() if line.startswith("ezhoi-diffusion: error:"))
    assert "bridge 'wrong_shape' returned shape" in error
    assert "Traceback" not in done.stderr


def test_a_broken_plugin_that_is_named_is_an_error(environment, stores):
    done = environment.command("compare", stores / "test", "--bridges", "none,broken")
    assert done.returncode == 2
    assert "there is no bridge 'broken'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_the_plugins_own_tests_pass(environment, name):
    tests = environment.folder / "sources" / f"ezhoi-bridge-{name}" / "tests"
    done = environment.python("-m", "pytest", "-q", "-p", "no:cacheprovider", ".", cwd=tests)
    assert done.returncode == 0, done.stdout
