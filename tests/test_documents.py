"""Documents stay true: code runs, commands parse, links lead somewhere, and the reference lists everything."""

from __future__ import annotations

import argparse
import importlib
import inspect
import re
import shlex
import subprocess
import sys
import types
from dataclasses import dataclass, fields
from pathlib import Path
from unittest import mock

import pytest
import torch
import yaml

import ezhoi_diffusion
from ezhoi_diffusion import testing
from ezhoi_diffusion.artifact import Artifact
from ezhoi_diffusion.bridge import Bridge
from ezhoi_diffusion.builtin import scoring
from ezhoi_diffusion.builtin.bridge_plugin import BridgePlugin
from ezhoi_diffusion.cli import COMMANDS, build_parser, main
from ezhoi_diffusion.diffusion.bridge import SETTINGS, DiffusionBridge
from ezhoi_diffusion.diffusion.components import Components, components
from ezhoi_diffusion.diffusion.recipes import RECIPES
from ezhoi_diffusion.evaluation.comparison import Comparison, VariantResult
from ezhoi_diffusion.evaluation.variants import known_bridges, parse_chain
from ezhoi_diffusion.ezhoi import launch
from ezhoi_diffusion.ezhoi.attach import attach
from ezhoi_diffusion.features.batch import FeatureBatch, Pairs
from ezhoi_diffusion.features.store import FeatureStore
from ezhoi_diffusion.hookspecs import HOOKS
from ezhoi_diffusion.plugins import PluginManager
from ezhoi_diffusion.registry import Registry
from ezhoi_diffusion.report.hub_card import push_to_hub
from ezhoi_diffusion.testing import (
    BRIDGE_RULES,
    FIT_RULES,
    check_bridge,
    check_fit,
    synthetic_store,
    with_full_rank_texts,
)
from helpers import TESTS
from helpers.miniature import MINIATURE

ROOT = TESTS.parent
DOCUMENTS = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [
        *(ROOT / f"{name}.md" for name in ("README", "INTEGRATION", "CONTRIBUTING", "CHANGELOG")),
        *sorted(path for top in ("plugins", "patches", "ezhoi_diffusion") for path in (ROOT / top).rglob("README.md")),
    ]
}
README, REFERENCE, TUTORIAL = (DOCUMENTS[name] for name in ("README.md", "INTEGRATION.md", "plugins/README.md"))


@dataclass(frozen=True)
class Block:
    """A fenced or indented block of code."""

    document: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"


def blocks() -> list[Block]:
    found = []
    for name, text in DOCUMENTS.items():
        lines = text.splitlines()
        number = 0
        while number < len(lines):
            begin = number
            if fence := re.match(r" *```(\w*)$", lines[number]):
                number = next(i for i in range(begin + 1, len(lines)) if lines[i].strip() == "```")
                found.append(Block(name, begin + 1, fence[1], "\n".join(lines[begin + 1 : number])))
            elif lines[number].startswith("    ") and not (begin and lines[begin - 1].strip()):
                while number + 1 < len(lines) and (lines[number + 1].startswith("    ") or not lines[number + 1]):
                    number += 1
                found.append(Block(name, begin + 1, "", "\n".join(line[4:] for line in lines[begin : number + 1])))
            number += 1
    return found


def prose(text: str) -> str:
    """A document without its blocks of code."""
    return re.sub(r"^ *```.*?^ *```$|^    .*?$", "", text, flags=re.DOTALL | re.MULTILINE)


def section(text: str, heading: str) -> str:
    """What stands under a heading, up to the next one of its level or above."""
    found = re.search(rf"^(#+) {re.escape(heading)}\n(.*?)(?=^#{{1,6}} |\Z)", text, re.DOTALL | re.MULTILINE)
    assert found, f"there is no heading {heading!r}"
    level, begin = len(found[1]), found.start(2)
    end = re.compile(rf"^#{{1,{level}}} ", re.MULTILINE).search(text, begin)
    return text[begin : end.start() if end else None]


def first_column(text: str, head: str) -> list[str]:
    """The code in the first column of the table whose head starts like this."""
    rows = text.split(f"| {head} |")[1].split("\n\n")[0].splitlines()[2:]
    return [name for row in rows for name in re.findall(r"`(.+?)`", row.split(" | ")[0])]


BLOCKS = blocks()


def test_every_block_has_a_language_that_is_checked():
    known = {"bash", "python", "toml", "text", ""}
    assert [str(block) for block in BLOCKS if block.language not in known] == []
    own = re.compile(r"^\s*(ezhoi-diffusion|pip|python) ", re.MULTILINE)
    assert [str(block) for block in BLOCKS if block.language == "text" and own.search(block.text)] == []


# -- commands --------------------------------------------------------------------------------------------------------

OTHER_PROGRAMS = {".ci/run", "cd", "git", "mypy", "pre-commit", "ruff", "uv"}
PACKAGES = [path.name.removeprefix("ezhoi-bridge-") for path in (ROOT / "plugins").glob("ezhoi-bridge-*")]
EXAMPLES = ["my_bridge", "center_image", "shift"]


def commands(text: str) -> list[list[str]]:
    found = []
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        words: list[str] = []
        for word in [*shlex.split(line, comments=True), "&&"]:
            if word != "&&":
                words.append(word)
            elif words:
                found.append(words)
                words = []
    return found


def is_shell(block: Block) -> bool:
    first = block.text.split(maxsplit=1)[0] if block.text.strip() else ""
    return block.language == "bash" or (
        block.language == "" and first in {"ezhoi-diffusion", "pip", "pytest", "python", *OTHER_PROGRAMS}
    )


SHELL = [
    *(pytest.param(block.text, id=str(block)) for block in BLOCKS if is_shell(block)),
    *(
        pytest.param(code, id=f"{name}: {code}")
        for name, text in DOCUMENTS.items()
        for code in dict.fromkeys(re.findall(r"`(ezhoi-diffusion (?!COMMAND)[^`]+)`", prose(text)))
    ),
]


@pytest.fixture
def script_lines(monkeypatch):
    """What `run` and `capture` hand to the launcher, instead of running it."""
    lines: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(launch, "run_script", lambda script, flags: lines.append((str(script), list(flags))))
    return lines


def check_script_line(script: str, flags: list[str]) -> None:
    """EZ-HOI's script and flags, ours among them, as the script's own parser reads them."""
    assert script in ("main_tip_finetune.py", "inference.py", "SCRIPT")
    flags = [word for word in flags if word != "…"]
    if script == "inference.py":  # the miniature has no such script
        position = flags.index("--self_image_path")
        del flags[position : position + 2]
    args = launch.read_flags(MINIATURE / "main_tip_finetune.py", flags)
    check_names([*args.compare.split(","), *args.plugin])


def check_names(words: list[str]) -> None:
    plugins = PluginManager(discover=True)
    known = {*plugins.found, *PACKAGES, *EXAMPLES, "none"}
    named = {one.name for word in words if word for one in parse_chain(word, known)}
    assert named <= known, f"there is no bridge or plugin {', '.join(sorted(named - known))}"


def check_own(words: list[str], script_lines: list[tuple[str, list[str]]]) -> None:
    words = [word for word in words if word != "…"]
    if len(words) == 1 or "--help" in words:
        assert words[0] in {*COMMANDS, "--help"}
        return
    if words[:1] in (["run"], ["capture"]):
        assert main(words) == 0
        check_script_line(*script_lines.pop())
        return
    if words[:1] == ["doctor"] and "--" in words:
        mark = words.index("--")
        check_script_line(words[mark + 1], words[mark + 2 :])
        words = words[:mark]
    args = build_parser(words).parse_args(words)
    if words[:1] == ["pipeline"]:
        from ezhoi_diffusion.cli import pipeline
        from ezhoi_diffusion.cli.arguments import split_script_flags

        check_script_line(str(args.script), split_script_flags(args, pipeline._declare))
        assert args.out is not None
    check_names(getattr(args, "bridges", "").split(","))


@pytest.mark.parametrize("text", SHELL)
def test_commands_parse(text, script_lines):
    found = commands(text)
    assert found
    for program, *words in found:
        if program == "ezhoi-diffusion":
            check_own(words, script_lines)
        elif program in ("accelerate", "torchrun"):
            assert words[words.index("-m") + 1] == "ezhoi_diffusion"
            check_own(words[words.index("-m") + 2 :], script_lines)
        elif program == "python":
            check_script_line(words[0], words[1:])
        elif program in ("pip", "pytest"):
            for word in words:
                if "/" in word:
                    assert (ROOT / re.sub(r"\[.*\]", "", word)).exists(), word
        else:
            assert program in OTHER_PROGRAMS, program


def test_the_test_command_of_the_readme_is_what_ci_runs():
    script = (ROOT / ".ci" / "run").read_text()
    install, test = re.search(r'^(pip install -e "\.\[test\]") && (pytest .*)$', README, re.MULTILINE).groups()
    assert install.removeprefix("pip install") in script
    assert f'\n{test} "$@"' in script


# -- links -----------------------------------------------------------------------------------------------------------


def anchors(text: str) -> set[str]:
    found: dict[str, int] = {}
    for heading in re.findall(
        r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE
    ):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", plain).strip().replace(" ", "-")
        found[slug] = found.get(slug, -1) + 1
    return {slug if not number else f"{slug}-{number}" for slug, last in found.items() for number in range(last + 1)}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name):
    text = prose(DOCUMENTS[name])
    for target in [*re.findall(r"\]\(([^)\s]+)\)", text), *re.findall(r'(?:src|href)="([^"]+)"', text)]:
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), target


# -- language --------------------------------------------------------------------------------------------------------

ADVISED_AGAINST = re.compile(
    r"given again|held against|what became of|\banew\b|\bmend(s|ed)?\b|of one mind|such are|\bso is it\b|\bthe host\b",
    re.IGNORECASE,
)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_sentences_are_short_and_plain(name):
    text = re.sub(r"^(?:\||#|- \[).*$", "\n", prose(DOCUMENTS[name]), flags=re.MULTILINE)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    sentences = re.split(r"(?<=[.!?])\s+|\n\n|\n- ", text)
    assert [sentence for sentence in sentences if len(sentence.split()) > 35] == []
    assert [found[0] for found in ADVISED_AGAINST.finditer(prose(DOCUMENTS[name]))] == []


# -- code ------------------------------------------------------------------------------------------------------------


def python_blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A folder with what the examples name: FEATURES, TEST_FEATURES and BRIDGE."""
    folder = tmp_path_factory.mktemp("workspace")
    synthetic_store(folder / "FEATURES")
    synthetic_store(folder / "TEST_FEATURES", split="test")
    line = ["train", str(folder / "FEATURES"), "--out", str(folder / "BRIDGE"), "--denoiser", "gaussian"]
    assert main(line) == 0
    return folder


RUN_BY_OTHER_TESTS = ("plugins/README.md", "INTEGRATION.md")


@pytest.mark.parametrize(
    "block",
    [
        pytest.param(block, id=str(block))
        for block in BLOCKS
        if block.language == "python" and block.document not in RUN_BY_OTHER_TESTS
    ],
)
def test_examples_run(block, workspace, monkeypatch):
    monkeypatch.chdir(workspace)
    exec(block.text, {})


def test_the_example_for_forks_fits_the_functions(monkeypatch):
    (code,) = python_blocks(section(REFERENCE, "Join a fork"))
    called = mock.create_autospec(attach)
    monkeypatch.setattr("ezhoi_diffusion.ezhoi.attach.attach", called)
    names = {"parser": argparse.ArgumentParser(), "upt": object(), "args": object(), "engine": object()}
    exec(code, dict(names))
    called.assert_called_once_with(names["upt"], names["args"], names["engine"])
    assert "--plugin" in names["parser"].format_help()


def test_the_example_for_the_score_gives_the_logits(workspace, monkeypatch):
    monkeypatch.chdir(workspace)
    (code,) = python_blocks(section(REFERENCE, "Bridges that act on the score"))
    monkeypatch.setattr(
        "ezhoi_diffusion.features.store.FeatureStore", lambda folder: with_full_rank_texts(FeatureStore(folder))
    )
    names: dict = {}
    exec(code, names)
    logits = names["score"].logits
    torch.testing.assert_close(logits(names["moved"]), 2 * logits(names["x"]), rtol=0, atol=1e-4)


def test_bridges_that_act_on_the_score_are_listed():
    listed = first_column(REFERENCE, "bridge | moves the logits z to")
    assert sorted(listed) == sorted(
        plugin.name for plugin in vars(scoring).values() if isinstance(plugin, BridgePlugin)
    )


def test_the_example_for_the_hub_fits_the_class(monkeypatch):
    (code,) = python_blocks(section(REFERENCE, "Share a bridge"))
    double = mock.create_autospec(DiffusionBridge)
    double.from_pretrained.return_value = double.return_value
    monkeypatch.setattr("ezhoi_diffusion.diffusion.bridge.DiffusionBridge", double)
    pushed = mock.create_autospec(push_to_hub)
    monkeypatch.setattr("ezhoi_diffusion.report.hub_card.push_to_hub", pushed)
    exec(code, {})
    double.return_value.override.return_value.save_pretrained.assert_called_once_with("WEAKER")
    pushed.assert_called_once_with(Path("WEAKER"), "USER/OTHER", private=True)


# -- plugins/README.md -----------------------------------------------------------------------------------------------


def test_the_bridge_of_the_tutorial_keeps_all_rules(tmp_path, monkeypatch):
    small, source = python_blocks(section(TUTORIAL, "Write a bridge"))
    (tmp_path / "longer.py").write_text(small)
    (tmp_path / "my_bridge.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    built_in = known_bridges(PluginManager(discover=False)).names()
    for name in ("longer", "my_bridge"):
        assert name not in built_in
        plugins = PluginManager(discover=False)
        module = importlib.import_module(name)
        monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, name, module)
        plugins.register(module.plugin, name)
        assert plugins.collect("register_bridges", Registry("bridge", {})).names() == [name]
    assert plugins.collect("register_fits", Registry("fit", {})).names() == ["my_bridge"]
    tests = python_blocks(section(TUTORIAL, "Test it"))
    assert len(tests) == 2
    for number, code in enumerate(tests):
        found: dict[str, object] = {}
        exec(code, found)
        (run,) = (value for name, value in found.items() if name.startswith("test_"))
        folder = tmp_path / str(number)
        folder.mkdir()
        run(folder)


def test_the_bridge_of_the_tutorial_that_uses_pairs_keeps_all_rules():
    (code,) = python_blocks(section(TUTORIAL, "Use the pairs"))
    found: dict[str, object] = {}
    exec(code, found)
    check_bridge(found["plugin"].load, dim=8)
    context, features = pairs(), torch.ones(2, 3)
    bridged = found["plugin"].load(None)(features, context)
    assert torch.allclose(bridged[:, 0], torch.tensor([0.81, 0.16]))


def test_the_package_of_the_tutorial_names_the_plugin():
    tomllib = pytest.importorskip("tomllib")
    (block,) = (block for block in BLOCKS if block.language == "toml")
    project = tomllib.loads(block.text)["project"]
    assert project["entry-points"]["ezhoi_diffusion"] == {"my_bridge": "my_bridge:plugin"}
    assert project["dependencies"] == ["ezhoi-diffusion"]


def test_the_tutorial_lists_every_rule():
    assert first_column(TUTORIAL, "rule for a bridge | says") == list(BRIDGE_RULES)
    assert first_column(TUTORIAL, "rule for a fit | says") == list(FIT_RULES)


def test_the_tutorial_lists_every_attribute_of_a_bridge():
    declared = [name for name in Bridge.__annotations__ if not name.startswith("_")]
    assert first_column(TUTORIAL, "attribute | default | means") == declared


def test_the_tutorial_lists_every_field_of_pairs():
    names = {field.name for field in fields(Pairs)} | {"objects"}
    assert set(first_column(TUTORIAL, "`Pairs` | shape | is")) == names


def test_the_tutorial_lists_every_public_name():
    for package in (ezhoi_diffusion, testing):
        listed = first_column(TUTORIAL, f"`from {package.__name__} import …` | is")
        assert sorted(name.partition("(")[0] for name in listed) == sorted(package.__all__)


def test_the_tutorial_lists_every_package():
    listed = first_column(TUTORIAL, "package | bridge | does")
    links = re.findall(r"^\| \[ezhoi-bridge-(\w+)\]", TUTORIAL, re.MULTILINE)
    assert listed == []
    assert sorted(links) == sorted(PACKAGES)


# -- the reference ---------------------------------------------------------------------------------------------------


def test_the_reference_lists_every_flag_of_a_run():
    parser = argparse.ArgumentParser(add_help=False)
    with mock.patch.dict("os.environ", EZHOI_DIFFUSION_DISABLE="*"):
        ezhoi_diffusion.add_arguments(parser, [])
    flags = [action.option_strings[0] for action in parser._actions if action.help != argparse.SUPPRESS]
    listed = [name.split()[0] for name in first_column(section(REFERENCE, "Flags of a run"), "flag | does")]
    assert sorted(name for name in listed if name.startswith("--")) == sorted(flags)


def test_the_reference_lists_every_recipe():
    rows = re.findall(r"^\| `(\w+)`.*? \| (\d+), (\d+) \| ([\d.]+) \|", section(REFERENCE, "Recipes"), re.MULTILINE)
    stated = {name: (int(start), int(steps), float(blend)) for name, start, steps, blend in rows}
    assert stated == {name: (r.start_timestep, r.num_steps, r.blend) for name, r in RECIPES.items()}


def test_the_reference_lists_every_setting_of_a_diffusion_bridge():
    assert sorted(first_column(section(REFERENCE, "Recipes"), "setting | means")) == sorted(SETTINGS)


def test_the_reference_lists_every_denoiser():
    listed = first_column(section(REFERENCE, "Denoisers"), "`train --denoiser` | is | training")
    assert sorted(listed) == Components().denoisers.names()


# -- hooks -----------------------------------------------------------------------------------------------------------

HOOK_DOCUMENTS = section(REFERENCE, "Hooks")


def test_the_reference_lists_every_hook_and_nothing_else():
    assert re.findall(r"^### (\w+)$", HOOK_DOCUMENTS, re.MULTILINE) == list(HOOKS)


@pytest.mark.parametrize("hook", HOOKS)
def test_the_reference_has_the_signature_and_every_argument_of_a_hook(hook):
    entry = section(REFERENCE, hook)
    arguments = list(inspect.signature(HOOKS[hook]).parameters)
    assert entry.strip().startswith(f"`{hook}({', '.join(arguments)})`")
    assert re.findall(r"^- `(\w+)`: ", entry, re.MULTILINE) == arguments
    assert re.search(r"^Return ", entry, re.MULTILINE)


@pytest.fixture
def plugin(request):
    """The example of a hook, as the only plugin."""
    (code,) = python_blocks(section(REFERENCE, request.param))
    module = types.ModuleType("example")
    module.hookimpl = ezhoi_diffusion.hookimpl
    exec(code, vars(module))
    plugins = PluginManager(discover=False)
    plugins.register(module, "example")
    plugins.enable(["example"])
    assert plugins.found["example"].hooks == [request.param]
    return plugins


def pairs():
    boxes = torch.tensor([[0.0, 0, 5, 5], [5, 5, 9, 9], [1, 1, 4, 4]])
    pairing = torch.tensor([[0, 1], [0, 2]])
    return Pairs(
        "a.jpg", 0, torch.tensor([10, 10]), boxes, torch.tensor([0.9, 0.8, 0.2]), torch.tensor([0, 3, 4]), pairing
    )


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
    found = sample(lambda x, t: x * t, torch.ones(1, 2), schedule=None, timesteps=[4, -1], scale_factor=5.0)
    assert found.tolist() == [[4, 4]]


@pytest.mark.parametrize("plugin", ["locate_adapter_feat"], indirect=True)
def test_locate_adapter_feat(plugin):
    fork = types.SimpleNamespace(pair_adapter="module")
    assert plugin.first("locate_adapter_feat", lambda answer: None, model=fork) == ("pair_adapter", "module")
    assert plugin.first("locate_adapter_feat", lambda answer: None, model=types.SimpleNamespace()) is None


@pytest.mark.parametrize("plugin", ["on_attach"], indirect=True)
def test_on_attach(plugin, capsys):
    run = types.SimpleNamespace(
        fingerprint=types.SimpleNamespace(weights="0123456789"), args=argparse.Namespace(zs_type="unseen_verb")
    )
    plugin.notify("on_attach", run=run)
    assert capsys.readouterr().out == "weights 01234567 split unseen_verb\n"


@pytest.mark.parametrize("plugin", ["on_detach"], indirect=True)
def test_on_detach(plugin, capsys):
    plugin.notify_all("on_detach", run=types.SimpleNamespace(failed=True))
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
    results = {"none": torch.tensor([0.5, 0.25]), "diffusion": torch.tensor([0.5, 0.5])}
    variants = {name: VariantResult(name, ap) for name, ap in results.items()}
    result = Comparison(variants, {"full": torch.tensor([0, 1])}, 1, 2, torch.tensor([1, 1]), {})
    plugin.notify("on_comparison", comparison=result)
    assert capsys.readouterr().out == "none 37.5\ndiffusion 50.0\n"


# -- metadata --------------------------------------------------------------------------------------------------------


def test_citation_has_the_version_of_the_package():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)[1]
    assert citation["version"] == version


# -- help and imports ------------------------------------------------------------------------------------------------


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
    assert "typical workflow" in loaded
    assert "torch" not in loaded.rsplit("|", 1)[1].split()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command):
    parser = build_parser([command])
    with pytest.raises(SystemExit, match="0"):
        parser.parse_args([command, "--help"])


def test_training_flags_are_the_configuration():
    from ezhoi_diffusion.training.config import TrainConfig

    line = ["train", "F", "--out", "B", "--objective", "pred_v", "--denoiser-options", '{"width": 8}']
    args = build_parser(line).parse_args(line)
    assert {f.name for f in fields(TrainConfig)} <= vars(args).keys()
    assert (args.objective, args.denoiser_options, args.batch_size) == ("pred_v", {"width": 8}, None)
