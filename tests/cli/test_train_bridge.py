"""`train --bridge NAME`: the fits that plugins register."""

from __future__ import annotations

import types

import pytest
import torch

from ezhoi_diffusion import Artifact, BridgePlugin, hookimpl
from ezhoi_diffusion.cli import main
from ezhoi_diffusion.plugins import PluginManager
from ezhoi_diffusion.testing import synthetic_store


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    folder = tmp_path_factory.mktemp("features")
    for split in ("train", "test"):
        synthetic_store(folder / split, split=split, images=40)
    return folder


def scaled(features, factor: float = 2.0):
    """factor: what features are multiplied by."""
    return Artifact("scaled", {"factor": factor}, {"tensors.safetensors": {"factor": torch.tensor(factor)}})


def load_scaled(folder):
    factor = Artifact.load(folder, "scaled").files["tensors.safetensors"]["factor"]
    return lambda x: x * factor


@pytest.fixture
def installed(mocker):
    manager = PluginManager(discover=False)
    manager.register(BridgePlugin("scaled", load_scaled, scaled), "scaled")
    other = types.SimpleNamespace(
        register_fits=hookimpl(
            lambda register: [
                register("raises", lambda features: 1 / 0),
                register("none", lambda features: None),
                register("misnamed", scaled),
            ]
        )
    )
    manager.register(other, "other")
    mocker.patch("ezhoi_diffusion.plugins.PluginManager", return_value=manager)


def test_a_fit_writes_what_it_returns_and_where_that_comes_from(installed, stores, tmp_path, capsys):
    line = ["train", str(stores / "train"), "--bridge", "scaled", "--out", str(tmp_path / "b")]
    assert main([*line, "--set", "factor=3"]) == 0
    artifact = Artifact.load(tmp_path / "b", "scaled")
    assert artifact.provenance["fit"] == {"name": "scaled", "options": {"factor": 3}}
    assert artifact.provenance["fingerprint"]["backbone"] == "synthetic"
    assert list(artifact.context) == ["ctx.0"]
    assert torch.equal(load_scaled(tmp_path / "b")(torch.ones(2)), torch.full((2,), 3.0))
    (tmp_path / "file").write_text("somebody's")
    for used in ("b", "file"):
        assert main([*line[:-1], str(tmp_path / used)]) == 2
        assert str(tmp_path / used) in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "somebody's"


@pytest.mark.parametrize(
    ("name", "split", "option", "message"),
    [
        ("scaled", "train", "fctor=3", "factor"),
        ("scaled", "train", "factor", "--set factor"),
        ("scaled", "test", "factor=3", "holds the test split"),
        ("raises", "train", None, "ZeroDivisionError"),
        ("none", "train", None, "NoneType"),
        ("misnamed", "train", None, "'misnamed'"),
        ("unheard", "train", None, "misnamed, none, raises, scaled"),
    ],
)
def test_a_fit_that_cannot_work_is_one_line(installed, stores, tmp_path, capsys, name, split, option, message):
    options = ["--set", option] if option else []
    assert main(["train", str(stores / split), "--bridge", name, "--out", str(tmp_path / "b"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_the_list_explains_what_can_be_fitted(installed, capsys):
    assert main(["train", "--bridge", "list"]) == 0
    out = capsys.readouterr().out
    assert "scaled [factor=2.0]" in out
    assert "factor: what features are multiplied by." in out
