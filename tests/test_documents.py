"""The documents keep their word: every hook has an entry whose example works, every command is what README says."""

from __future__ import annotations

import argparse
import importlib
import re
import subprocess
import sys
import types

import pytest
import torch

import ezhoi_diffusion
from ezhoi_diffusion import testing
from ezhoi_diffusion.artifact import Artifact
from ezhoi_diffusion.cli import COMMANDS
from ezhoi_diffusion.diffusion.components import components
from ezhoi_diffusion.evaluation.comparison import Comparison
from ezhoi_diffusion.features.batch import FeatureBatch, Pairs
from ezhoi_diffusion.features.store import FeatureStore
from ezhoi_diffusion.hookspecs import HOOKS
from ezhoi_diffusion.plugins import PluginManager
from ezhoi_diffusion.registry import Registry
from ezhoi_diffusion.testing import BRIDGE_RULES, FIT_RULES, check_fit
from ezhoi_diffusion.testing.bridges import ATTRIBUTES
from helpers import TESTS

ROOT = TESTS.parent
GUIDE = (ROOT / "INTEGRATION.md").read_text()


def example(hook: str) -> str:
    found = re.search(rf"^### {hook}\n(.*?)```python\n(.*?)```", GUIDE, re.DOTALL | re.MULTILINE)
    assert found, f"INTEGRATION.md has no entry with an example for {hook}"
    return found[2]


@pytest.fixture
def plugin(request):
    module = types.ModuleType("example")
    exec(example(request.param), vars(module))
    host = PluginManager(discover=False)
    host.register(module, "example")
    host.enable(["example"])
    assert host.found["example"].hooks == [request.param]
    return host


def pairs():
    boxes = torch.tensor([[0.0, 0, 5, 5], [5, 5, 9, 9], [1, 1, 4, 4]])
    pairing = torch.tensor([[0, 0], [1, 2]])
    return Pairs(
        "a.jpg", 0, torch.tensor([10, 10]), boxes, torch.tensor([0.9, 0.8, 0.2]), torch.tensor([0, 3, 4]), pairing
    )


def test_every_hook_is_in_the_guide_and_nothing_else_is():
    assert re.findall(r"^### (\w+)$", GUIDE, re.MULTILINE) == list(HOOKS)


@pytest.mark.parametrize("plugin", ["register_options"], indirect=True)
def test_register_options(plugin):
    parser = argparse.ArgumentParser()
    plugin.add_options("example", parser.add_argument_group())
    assert parser.parse_args(["--temperature", "2"]).temperature == 2


@pytest.mark.parametrize("plugin", ["register_bridges"], indirect=True)
def test_register_bridges(plugin):
    bridge = plugin.collect("register_bridges", Registry("bridge", {}))["center_image"](None)
    assert torch.allclose(bridge(torch.randn(5, 3)).mean(0), torch.zeros(3), atol=1e-6)


@pytest.mark.parametrize("plugin", ["register_fits"], indirect=True)
def test_register_fits(plugin, tmp_path):
    fit = plugin.collect("register_fits", Registry("fit", {}))["shift"]
    folder = check_fit("shift", fit, tmp_path, dim=8)
    means, artifact = FeatureStore(tmp_path / "features").statistics(), Artifact.load(folder, "shift")
    assert torch.equal(artifact.files["shift.safetensors"]["shift"], means.text_mean - means.visual_mean)


@pytest.mark.parametrize("plugin", ["register_denoisers"], indirect=True)
def test_register_denoisers(plugin):
    from ezhoi_diffusion.diffusion.bridge import BridgeConfig, build_denoiser
    from ezhoi_diffusion.diffusion.recipes import DEFAULT_RECIPE

    network = build_denoiser(BridgeConfig(8, DEFAULT_RECIPE, "linear"), components(plugin))
    assert network(torch.randn(4, 8), torch.zeros(4, dtype=torch.long)).shape == (4, 8)


@pytest.mark.parametrize("plugin", ["register_samplers"], indirect=True)
def test_register_samplers(plugin):
    sample = components(plugin).samplers["one_step"]
    assert sample(
        lambda x, t: x * t, torch.ones(1, 2), schedule=None, timesteps=[4, -1], scale_factor=5.0
    ).tolist() == [[4, 4]]


@pytest.mark.parametrize("plugin", ["locate_adapter_feat"], indirect=True)
def test_locate_adapter_feat(plugin):
    fork = types.SimpleNamespace(pair_adapter="module")
    assert plugin.first("locate_adapter_feat", model=fork) == ("pair_adapter", "module")
    assert plugin.first("locate_adapter_feat", model=types.SimpleNamespace()) is None


@pytest.mark.parametrize("plugin", ["on_attach"], indirect=True)
def test_on_attach(plugin, capsys):
    run = types.SimpleNamespace(
        fingerprint=types.SimpleNamespace(weights="0123456789"), args=argparse.Namespace(zs_type="unseen_verb")
    )
    plugin.notify("on_attach", host=run)
    assert capsys.readouterr().out == "weights 01234567 split unseen_verb\n"


@pytest.mark.parametrize("plugin", ["on_detach"], indirect=True)
def test_on_detach(plugin, capsys):
    plugin.notify_all("on_detach", host=types.SimpleNamespace(failed=True))
    assert capsys.readouterr().out == "failed\n"


@pytest.mark.parametrize("plugin", ["on_train_batch"], indirect=True)
def test_on_train_batch(plugin, capsys):
    labels = torch.tensor([[True, False], [False, False]])
    batch = FeatureBatch(
        0, pairs(), torch.randn(2, 4), None, torch.zeros(2, 3), labels, torch.zeros(2, 1, 4), torch.tensor([1])
    )
    plugin.notify("on_train_batch", batch=batch)
    assert capsys.readouterr().out == "a.jpg 1 of 2 pairs are annotated\n"


@pytest.mark.parametrize("plugin", ["post_adapter_feat"], indirect=True)
def test_post_adapter_feat(plugin):
    from ezhoi_diffusion.bridge import replacement_problem

    replaced = plugin.fold("post_adapter_feat", torch.ones(2, 3), replacement_problem, pairs=pairs())
    assert replaced.tolist() == [[1, 1, 1], [0, 0, 0]]


@pytest.mark.parametrize("plugin", ["on_comparison"], indirect=True)
def test_on_comparison(plugin, capsys):
    ap = {"none": torch.tensor([0.5, 0.25]), "diffusion": torch.tensor([0.5, 0.5])}
    result = Comparison(ap, {"full": torch.tensor([0, 1])}, 1, 2, 1.0, {"diffusion": 0.1}, {})
    plugin.notify("on_comparison", comparison=result)
    assert capsys.readouterr().out == "none 37.5\ndiffusion 50.0\n"


# -- "Writing a plugin" ----------------------------------------------------------------------------------------

SECTION = GUIDE.split("## Writing a plugin\n")[1].split("\n## Hooks\n")[0]


def first_column(head: str) -> list[str]:
    """What stands in code in the first column of the table with this head."""
    rows = SECTION.split(f"| {head} |")[1].split("\n\n")[0].splitlines()[2:]
    return [name for row in rows for name in re.findall(r"`(.+?)`", row.split(" | ")[0])]


def test_the_bridge_of_the_guide_is_a_plugin_that_keeps_all_rules(tmp_path, monkeypatch):
    source, *tests = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)
    (tmp_path / "my_bridge.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    host = PluginManager(discover=False)
    host.register(importlib.import_module("my_bridge").plugin, "my_bridge")
    assert host.collect("register_fits", Registry("fit", {})).names() == ["my_bridge"]
    assert host.collect("register_bridges", Registry("bridge", {})).names() == ["my_bridge"]
    for number, test in enumerate(tests):
        found = {}
        exec(test, found)
        (run,) = (value for name, value in found.items() if name.startswith("test_"))
        folder = tmp_path / str(number)
        folder.mkdir()
        run(folder)
    assert len(tests) == 2
    monkeypatch.delitem(sys.modules, "my_bridge")


def test_the_guide_lists_every_rule():
    assert first_column("a bridge | keeps this") == list(BRIDGE_RULES)
    assert first_column("a fit | keeps this") == list(FIT_RULES)


def test_the_guide_lists_every_name_for_plugins():
    listed = {name.split("(")[0].split(".")[0] for name in first_column("`from ezhoi_diffusion import …` |")}
    for_hosts = {"DiffusionBridge", "DiffusionBridgeHOI", "Tap", "add_arguments", "attach"}
    returned = {"ModalityStatistics", "SeenPairs"}  # named where they are returned
    assert listed == set(ezhoi_diffusion.__all__) - for_hosts - returned
    assert all(f"`{name}`" in SECTION for name in returned)
    tested = {name.split("(")[0].split(".")[0] for name in first_column("`from ezhoi_diffusion.testing import …` |")}
    assert tested == set(testing.__all__)


def test_the_guide_lists_what_a_bridge_may_say_of_itself():
    named = [re.match(r"\w+", name)[0] for name in first_column("attribute | says")]
    assert set(named) == set(ATTRIBUTES)


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_importing_the_package_stays_light():
    loaded = python("import sys, ezhoi_diffusion; print(*sys.modules)").split()
    assert not {"torch", "torchvision", "accelerate", "matplotlib", "sklearn", "huggingface_hub"} & set(loaded)


def test_the_public_names_exist_and_are_light():
    loaded = python(
        "import sys, ezhoi_diffusion as e\nfor n in e.__all__: getattr(e, n)\nassert set(e.__all__) <= set(dir(e))\nprint(*sys.modules)"
    ).split()
    assert not {"torchvision", "accelerate", "matplotlib", "sklearn", "huggingface_hub"} & set(loaded)


def test_help_needs_no_heavy_import():
    loaded = python(
        "import sys\nfrom ezhoi_diffusion.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\nprint('|', *sys.modules)"
    )
    assert "typical workflow, in an EZ-HOI folder" in loaded
    assert "torch" not in loaded.rsplit("|", 1)[1].split()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command):
    out = subprocess.run(
        [sys.executable, "-m", "ezhoi_diffusion", command, "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert len(out.splitlines()) > 6


def test_training_flags_are_the_configuration():
    from dataclasses import fields

    from ezhoi_diffusion.cli import build_parser
    from ezhoi_diffusion.training.config import TrainConfig

    line = ["train", "F", "--out", "B", "--objective", "pred_v", "--denoiser-options", '{"width": 8}']
    args = build_parser(line).parse_args(line)
    assert {f.name for f in fields(TrainConfig)} <= vars(args).keys()
    assert (args.objective, args.denoiser_options, args.batch_size) == ("pred_v", {"width": 8}, None)
