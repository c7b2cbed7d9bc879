"""`plugins new` writes a package that works, or refuses."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

import ezhoi_diffusion
from ezhoi_diffusion.cli import main
from ezhoi_diffusion.testing import synthetic_store

ROOT = Path(ezhoi_diffusion.__file__).parent.parent
WRITTEN = ["README.md", "my_shift.py", "pyproject.toml", "tests/test_my_shift.py"]


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("name", ["my-shift", "My_Shift", "my.shift"])
def test_a_package_is_written_under_its_normalised_name(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    assert main(["plugins", "new", name]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["my-shift"]
    assert files(tmp_path / "my-shift") == WRITTEN
    texts = [(tmp_path / "my-shift" / path).read_text() for path in WRITTEN]
    assert not any("$" in text for text in texts)
    assert 'name = "my-shift"' in texts[2]
    assert 'my_shift = "my_shift:plugin"' in texts[2]
    commands = capsys.readouterr().out.splitlines()[1:]
    assert commands == [
        "  pip install -e 'my-shift[test]'",
        "  pytest my-shift",
        "  ezhoi-diffusion train FEATURES --bridge my_shift --out BRIDGE",
    ]


def test_it_goes_where_it_is_asked_to(tmp_path, capsys):
    out = tmp_path / "with space" / "here"
    assert main(["plugins", "new", "my-shift", "--out", str(out)]) == 0
    assert files(out) == WRITTEN
    assert f"  pytest '{out}'" in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("", "give at most 40 letters"),
        ("-shift", None),
        ("a b", "give at most 40 letters"),
        ("../shift", "give at most 40 letters"),
        ("x" * 41, "give at most 40 letters"),
        ("Übergang", "give at most 40 letters"),
        ("3d", "cannot be called '3d' in Python"),
        ("lambda", "cannot be called 'lambda' in Python"),
        ("None", "'none' is EZ-HOI without a bridge"),
        ("identity", "an installed plugin is called"),
        ("Mean-Shift", "brings a bridge called 'mean_shift'"),
        ("statistics", "a module 'statistics' is there already"),
        ("torch", "a module 'torch' is there already"),
        ("scikit-learn", "a distribution 'scikit-learn'"),
    ],
)
def test_names_that_cannot_be_are_refused(tmp_path, monkeypatch, capsys, name, says):
    monkeypatch.chdir(tmp_path)
    if says is None:
        with pytest.raises(SystemExit):  # to argparse it is a flag
            main(["plugins", "new", name])
    else:
        assert main(["plugins", "new", name]) == 2
        assert re.search(re.escape(says), capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("there", ["folder", "file", "link"])
def test_what_exists_is_left_alone(tmp_path, capsys, there):
    target = tmp_path / "my-shift"
    if there == "folder":
        target.mkdir()
        (target / "thesis.tex").write_text("x")
    elif there == "file":
        target.write_text("x")
    else:
        target.symlink_to("nowhere")
    assert main(["plugins", "new", "my-shift", "--out", str(target)]) == 2
    assert str(target) in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["my-shift"]
    if there == "folder":
        assert files(target) == ["thesis.tex"]
    else:
        assert target.is_symlink() == (there == "link")


def test_an_installed_plugin_keeps_its_name(tmp_path, monkeypatch, capsys):
    """Also where its package could not be imported: its owner will repair it."""
    (tmp_path / "broken_one.py").write_text("raise ValueError\n")
    info = tmp_path / "something_else-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: something-else\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[ezhoi_diffusion]\nlower_gap = broken_one\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main(["plugins", "new", "lower-gap", "--out", str(tmp_path / "new")]) == 2
    assert "brings a bridge called 'lower_gap'" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_nothing_is_left_where_it_could_not_be_written(tmp_path, mocker, capsys):
    mocker.patch.object(Path, "write_text", side_effect=OSError(28, "No space left on device"))
    assert main(["plugins", "new", "my-shift", "--out", str(tmp_path / "new")]) == 2
    assert "free space and try again" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_list_is_still_the_list(capsys):
    assert main(["plugins", "--json"]) == 0
    assert {"capture", "diffusion", "identity", "mean_shift"} <= {
        entry["name"] for entry in json.loads(capsys.readouterr().out)
    }


# -- the package as its author has it ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A scratch environment that has what this one has: python(*command) runs there; and the new package, installed in it."""
    # not by importing it: setuptools replaces distutils, and refuses where that was imported already
    if not find_spec("setuptools") or int(version("setuptools").split(".")[0]) < 77:
        pytest.skip("needs setuptools 77 to build the package")
    folder = tmp_path_factory.mktemp("author")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "env"], check=True)
    interpreter = folder / "env" / "bin" / "python"
    where = [sys.executable, interpreter]
    ours, theirs = (
        subprocess.run(
            [one, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        for one in where
    )
    assert ours == sysconfig.get_path("purelib")
    (Path(theirs) / "ours.pth").write_text(f"import site; site.addsitedir({ours!r})\n")

    def python(*command):
        return subprocess.run(
            [interpreter, *map(str, command)],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )

    package = folder / "my-shift"
    assert main(["plugins", "new", "my-shift", "--out", str(package)]) == 0
    done = python("-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index", package)
    if "No module named pip" in done.stderr:
        pytest.skip("no pip in this environment")
    assert done.returncode == 0, done.stderr
    return package, python


def succeeds(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_its_own_tests_ruff_and_mypy_pass_at_once(environment):
    package, python = environment
    assert " passed" in succeeds(python("-m", "pytest", package))
    succeeds(python("-m", "ruff", "check", package))
    succeeds(python("-m", "ruff", "format", "--check", package))
    for config in ([], ["--config-file", package / "pyproject.toml"]):
        succeeds(python("-m", "mypy", "--strict", "--follow-imports=silent", *config, package / "my_shift.py"))


@pytest.mark.slow
def test_it_is_listed_fitted_compared_swept_and_refused_by_another_run(environment, tmp_path):
    _, python = environment
    listed = {
        entry["name"]: entry for entry in json.loads(succeeds(python("-m", "ezhoi_diffusion", "plugins", "--json")))
    }
    assert (listed["my_shift"]["status"], listed["my_shift"]["version"]) == ("loaded", "0.1.0")
    assert listed["my_shift"]["source"] == "my-shift"
    assert {"register_bridges", "register_fits", "post_adapter_feat"} <= set(listed["my_shift"]["hooks"])
    assert "my_shift [blend=1.0]" in succeeds(python("-m", "ezhoi_diffusion", "train", "--bridge", "list"))

    for split in ("train", "test"):
        synthetic_store(tmp_path / split, split=split, images=40)
    synthetic_store(tmp_path / "other", split="test", images=40, seed=1)
    fit = ["-m", "ezhoi_diffusion", "train", tmp_path / "train", "--bridge", "my_shift", "--set", "blend=0.5"]
    succeeds(python(*fit, "--out", tmp_path / "bridge"))
    compare = ["--bridges", f"none,identity,my_shift={tmp_path / 'bridge'}", "--replicates", "100"]
    table = succeeds(python("-m", "ezhoi_diffusion", "compare", tmp_path / "test", *compare, "--sweep", "blend=0,1"))
    full = {
        line.split()[0]: line.split()[1]
        for line in table.splitlines()
        if re.match(r"(none|identity|my_shift)\S* +\d", line)
    }
    name = f"my_shift={tmp_path / 'bridge'}"
    assert set(full) == {"none", "identity", name, f"{name}[blend=0]", f"{name}[blend=1]"}
    assert full["none"] == full["identity"] == full[f"{name}[blend=0]"] != full[name]

    refused = python("-m", "ezhoi_diffusion", "compare", tmp_path / "other", *compare)
    assert refused.returncode == 2
    assert "was made for another EZ-HOI run" in refused.stderr
