"""Discovery, checks and the three call modes."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import types
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint

import pytest
import torch
from torch import nn

from ezhoi_diffusion import hookimpl, hookspecs, plugins
from ezhoi_diffusion.artifact import Artifact
from ezhoi_diffusion.bridge import BridgeError, as_bridge, replacement_problem
from ezhoi_diffusion.errors import EzhoiDiffusionError
from ezhoi_diffusion.evaluation.variants import Variant
from ezhoi_diffusion.features.batch import Pairs
from ezhoi_diffusion.plugins import PluginError, PluginManager
from ezhoi_diffusion.testing import synthetic_store
from ezhoi_diffusion.training.fitted import fit_artifact


def accept(before, after):
    return None if isinstance(after, int) else f"returned {type(after).__name__}"


class Adds:
    def __init__(self, amount):
        self.amount = amount
        self.seen = []

    @hookimpl
    def post_adapter_feat(self, adapter_feat):
        self.seen.append(adapter_feat)
        return adapter_feat + self.amount

    @hookimpl
    def on_attach(self, run):
        self.seen.append(run)


class Fails:
    @hookimpl
    def post_adapter_feat(self, adapter_feat, pairs):
        raise RuntimeError("no luck")

    @hookimpl
    def on_detach(self, run):
        raise RuntimeError("cannot close")


@pytest.fixture
def manager():
    return PluginManager(discover=False)


def test_no_property_of_a_plugin_is_read_to_look_for_hooks(manager):
    class Lazy(Adds):
        @property
        def heavy(self):
            raise AssertionError("it would import torch")

    manager.register(Lazy(1), "lazy")
    assert manager.found["lazy"].hooks == ["on_attach", "post_adapter_feat"]


def test_fold_chains_in_the_order_of_enabling(manager):
    manager.register(Adds(1), "one")
    doubles = types.SimpleNamespace()
    doubles.post_adapter_feat = hookimpl(lambda adapter_feat: adapter_feat * 2)
    manager.register(doubles, "doubles")
    manager.enable(["one", "doubles"])
    assert manager.fold("post_adapter_feat", 3, accept, pairs=None) == 8
    manager.enable(["doubles", "one"])
    assert manager.fold("post_adapter_feat", 3, accept, pairs=None) == 7
    assert manager.fold("post_adapter_feat", 3, accept, pairs=None, only="one") == 4


def test_what_is_not_enabled_takes_no_part(manager):
    plugin = Adds(1)
    manager.register(plugin, "one")
    assert manager.fold("post_adapter_feat", 3, accept, pairs=None) == 3
    manager.notify("on_attach", run="this one")
    assert plugin.seen == []


def test_fold_leaves_the_value_where_a_plugin_returns_none(manager):
    manager.register(types.SimpleNamespace(post_adapter_feat=hookimpl(lambda: None)), "silent")
    manager.enable(["silent"])
    assert manager.fold("post_adapter_feat", 3, accept, pairs=None) == 3


def test_fold_names_the_plugin_that_raises_or_breaks_the_rules(manager):
    manager.register(Fails(), "fails")
    manager.enable(["fails"])
    with pytest.raises(PluginError, match=r"plugin 'fails'.*post_adapter_feat.*RuntimeError: no luck"):
        manager.fold("post_adapter_feat", 3, accept, pairs=None)
    manager.register(types.SimpleNamespace(post_adapter_feat=hookimpl(lambda: "text")), "wrong")
    manager.enable(["wrong"])
    with pytest.raises(PluginError, match=r"plugin 'wrong'.*returned str"):
        manager.fold("post_adapter_feat", 3, accept, pairs=None)


def test_disabling_errors_lets_the_value_through_once_logged_and_degraded(manager, caplog):
    manager.register(Fails(), "fails")
    manager.register(Adds(1), "one")
    manager.enable(["fails", "one"], raise_errors=False)
    assert [manager.fold("post_adapter_feat", 3, accept, pairs=None) for _ in range(3)] == [4, 4, 4]
    assert list(manager.degraded) == ["fails"]
    assert sum("DEGRADED" in record.message for record in caplog.records) == 1


def test_a_plugin_that_was_switched_off_is_still_detached(manager):
    plugin, detached = Fails(), []
    plugin.on_detach = hookimpl(lambda run: detached.append(run))
    manager.register(plugin, "fails")
    manager.enable(["fails"], raise_errors=False)
    manager.fold("post_adapter_feat", 3, accept, pairs=None)
    assert list(manager.degraded) == ["fails"]
    manager.notify_all("on_detach", run="this one")
    assert detached == ["this one"]


def test_notify_raises_but_notify_all_reaches_everyone_first(manager):
    late = Adds(0)
    late.on_detach = hookimpl(lambda run: late.seen.append("detached"))
    manager.register(Fails(), "fails")
    manager.register(late, "late")
    manager.enable(["fails", "late"])
    with pytest.raises(PluginError, match="cannot close"):
        manager.notify_all("on_detach", run=None)
    assert late.seen == ["detached"]


def test_first_takes_the_first_answer(manager):
    for name, answer in (("quiet", None), ("here", "found"), ("never", 1 / 3)):
        manager.register(types.SimpleNamespace(locate_adapter_feat=hookimpl(lambda model, answer=answer: answer)), name)
    assert manager.first("locate_adapter_feat", lambda answer: None, model=None) is None
    manager.enable(["never", "here"])
    assert manager.first("locate_adapter_feat", lambda answer: None, model=None) == 1 / 3
    manager.enable(["quiet", "here", "never"])
    assert manager.first("locate_adapter_feat", lambda answer: None, model=None) == "found"


@pytest.mark.parametrize(
    ("plugin", "message"),
    [
        (Adds, r"is the class Adds, not an instance: forgot the \(\)\?"),
        (
            types.SimpleNamespace(post_adaptor_feat=hookimpl(lambda: 0)),
            r"no hook post_adaptor_feat; did you mean post_adapter_feat\?",
        ),
        (types.SimpleNamespace(on_attach=hookimpl(lambda rum: 0)), "on_attach asks for rum; the hook offers run"),
        (types.SimpleNamespace(on_attach=lambda run: 0), "has a hook's name but no @hookimpl"),
        (types.SimpleNamespace(helper=1), "has no hook"),
        (types.SimpleNamespace(on_attach=hookimpl(tryfirst=True)(lambda run: 0)), "tryfirst, which is not supported"),
    ],
    ids=["class", "misspelt", "signature", "unmarked", "empty", "order"],
)
def test_a_wrong_plugin_is_a_clear_error(manager, plugin, message):
    with pytest.raises(PluginError, match=message):
        manager.register(plugin, "third")
    assert "third" not in manager.found
    assert manager.implementing("on_attach") == []


def test_unknown_and_taken_names(manager):
    manager.register(Adds(1), "centre")
    with pytest.raises(PluginError, match=r"no plugin 'center'; did you mean 'centre'\?"):
        manager.enable(["center"])
    with pytest.raises(PluginError, match="'centre' is taken"):
        manager.register(Adds(2), "centre")


# -- discovery ---------------------------------------------------------------------------------------------


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Three third-party distributions: one good, one that fails at import, one that is no plugin."""
    modules = {
        "good_bridge": "from ezhoi_diffusion import hookimpl\n@hookimpl\ndef on_attach(run): pass\n",
        "bad_bridge": "import sys; sys.modules['bad_was_imported'] = sys; raise ValueError('broken at import')\n",
        "odd_bridge": "from ezhoi_diffusion import hookimpl\n@hookimpl\ndef on_atach(run): pass\n",
    }
    for name, source in modules.items():
        (tmp_path / f"{name}.py").write_text(source)
        info = tmp_path / f"{name}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(f"[ezhoi_diffusion]\n{name.split('_')[0]} = {name}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in (*modules, "bad_was_imported"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def test_a_package_without_name_and_version_is_listed_and_stops_nobody(installed):
    nameless = installed / "nameless.dist-info"
    nameless.mkdir()
    (nameless / "METADATA").write_text("")
    (nameless / "entry_points.txt").write_text("[ezhoi_diffusion]\nnameless = other_bridge\n")
    (installed / "other_bridge.py").write_text((installed / "good_bridge.py").read_text())
    found = PluginManager().found
    assert found["nameless"].status == found["good"].status == "loaded"
    assert str(found["nameless"]) == "plugin 'nameless' - (other_bridge)"


def test_a_broken_plugin_is_reported_and_stops_nobody(installed, caplog):
    found = PluginManager().found
    assert (found["good"].status, found["good"].version, found["good"].source) == ("loaded", "1.2", "good_bridge")
    assert found["good"].hooks == ["on_attach"]
    assert found["bad"].status == "broken"
    assert "broken at import" in found["bad"].reason
    assert "did you mean on_attach?" in found["odd"].reason
    assert found["diffusion"].status == "loaded"
    assert any("plugin 'bad' 1.2 (bad_bridge)" in record.message for record in caplog.records)
    with pytest.raises(PluginError, match=r"plugin 'bad' 1\.2 \(bad_bridge\) cannot be enabled, it is broken"):
        PluginManager().enable(["bad"])


def test_blocked_means_never_imported(installed):
    found = PluginManager(["bad"]).found
    assert found["bad"].status == "blocked"
    assert "bad_was_imported" not in sys.modules
    PluginManager()
    assert "bad_was_imported" in sys.modules


def test_environment_variables(installed, monkeypatch):
    monkeypatch.setenv("EZHOI_DIFFUSION_DISABLE", "*")
    found = PluginManager().found
    assert {found[name].status for name in ("good", "bad", "odd")} == {"blocked"}
    assert found["diffusion"].status == "loaded"
    monkeypatch.setenv("EZHOI_DIFFUSION_DISABLE", "diffusion")
    monkeypatch.setenv("EZHOI_DIFFUSION_ALLOW", "good")
    found = PluginManager().found
    assert [found[n].status for n in ("good", "bad", "diffusion")] == ["loaded", "blocked", "blocked"]
    monkeypatch.delenv("EZHOI_DIFFUSION_ALLOW")
    monkeypatch.setenv("EZHOI_DIFFUSION_STRICT", "1")
    with pytest.raises(PluginError, match="'bad'"):
        PluginManager()


def test_two_distributions_with_one_name_are_distinguished(installed, mocker):
    taken = EntryPoint("diffusion", "good_bridge", "ezhoi_diffusion")
    mocker.patch.object(plugins, "entry_points", return_value=[taken])
    manager = PluginManager()
    assert manager.found["diffusion"].source == "built in"
    assert manager.found["diffusion"].status == "loaded"


def test_blocking_a_namesake_leaves_the_built_in_plugin(installed, monkeypatch, mocker):
    monkeypatch.setenv("EZHOI_DIFFUSION_DISABLE", "*")
    mocker.patch.object(
        plugins, "entry_points", return_value=[EntryPoint("diffusion", "good_bridge", "ezhoi_diffusion")]
    )
    PluginManager().enable(["diffusion"])


def test_the_command_lists_them(installed):
    out = subprocess.run(
        [sys.executable, "-m", "ezhoi_diffusion", "plugins", "--json"],
        env={"PYTHONPATH": str(installed), "PATH": ""}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    listed = {entry["name"]: entry for entry in json.loads(out.stdout)}
    assert listed["capture"]["hooks"] == ["register_options", "on_attach", "on_detach", "on_train_batch"]
    assert listed["bad"]["status"] == "broken"
    assert "the run goes on without it" in out.stderr


# -- documentation -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", hookspecs.HOOKS)
def test_every_hook_says_all_that_an_author_needs(name):
    hook = hookspecs.HOOKS[name]
    text = hook.__doc__
    for part in ("Since: ", "Mode: ", "When: ", "Return: ", "Errors: "):
        assert part in text, f"{name} does not say {part}"
    for argument in hook.__code__.co_varnames[: hook.__code__.co_argcount]:
        assert f"    {argument}: " in text, f"{name} does not document {argument}"


# -- what plugins raise and write --------------------------------------------------------------------------


class Own(BaseException):
    pass


class Mute(Exception):
    def __str__(self):
        raise ValueError("no words")


@pytest.mark.parametrize(
    "error", [GeneratorExit(), Own("hi"), Mute(), asyncio.CancelledError(), SystemExit(0)], ids=repr
)
def test_whatever_a_plugin_raises_is_an_error_of_that_plugin(manager, error):
    def fail(*_):
        raise error

    manager.register(types.SimpleNamespace(on_attach=hookimpl(lambda run: fail())), "fails")
    manager.enable(["fails"])
    with pytest.raises(PluginError, match=rf"plugin 'fails'.*on_attach: raised {type(error).__name__}"):
        manager.notify("on_attach", run=None)
    with pytest.raises(BridgeError, match=rf"bridge 'fails' raised {type(error).__name__}"):
        Variant("fails", as_bridge(fail)).apply(torch.ones(2, 3), None)


def test_ctrl_c_in_a_hook_is_no_error_of_its_plugin(manager):
    def interrupted(run):
        raise KeyboardInterrupt

    manager.register(types.SimpleNamespace(on_attach=hookimpl(interrupted)), "slow")
    manager.enable(["slow"])
    with pytest.raises(KeyboardInterrupt):
        manager.notify("on_attach", run=None)


@dataclass
class Run:
    model: nn.Module
    results: dict[str, list[torch.Tensor]] = field(default_factory=dict)


WRITES = {
    "run.results['none'][0]": lambda run: run.results["none"][0].zero_(),
    "run.model.0.weight": lambda run: run.model[0].weight.data.numpy().fill(0),
    "run.model.0.bias": lambda run: setattr(run.model[0], "bias", nn.Parameter(torch.zeros(2))),
    "run.model.1.running_mean": lambda run: run.model[1].running_mean.add_(1),
    "run.model.1.training": lambda run: run.model[1].eval(),
}


@pytest.mark.parametrize("part", WRITES)
def test_a_hook_that_writes_into_results_or_into_the_model_is_named(manager, part):
    run = Run(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), {"none": [torch.ones(2)]})
    manager.register(types.SimpleNamespace(on_attach=hookimpl(lambda run: [WRITES[part](run), None][1])), "writes")
    manager.enable(["writes"])
    with pytest.raises(PluginError, match=rf"plugin 'writes'.*on_attach: it writes into {re.escape(part)}"):
        manager.notify("on_attach", run=run)
    assert torch.equal(run.results["none"][0], torch.ones(2))


def test_a_hook_that_replaces_parts_of_what_is_frozen_is_named(manager):
    pairs = made_up_pairs()
    boxes = pairs.boxes

    def forge(pairs):
        object.__setattr__(pairs, "boxes", torch.zeros(3, 4))
        vars(pairs)["image"] = "another.jpg"

    manager.register(types.SimpleNamespace(post_adapter_feat=hookimpl(forge)), "forges")
    manager.enable(["forges"])
    with pytest.raises(PluginError, match=r"it writes into pairs\.image, pairs\.boxes"):
        manager.fold("post_adapter_feat", torch.ones(2, 3), accept, pairs=pairs)
    assert pairs.boxes is boxes
    assert pairs.image == "one.jpg"


def made_up_pairs():
    pairing = torch.tensor([[0, 0], [1, 2]])
    return Pairs("one.jpg", 0, torch.tensor([4, 5]), torch.ones(3, 4), torch.ones(3), torch.arange(3), pairing)


ANSWERS = {
    "sparse": lambda x: x.to_sparse(),
    "csr": lambda x: x.to_sparse_csr(),
    "nested": lambda x: torch.nested.nested_tensor([x], layout=torch.jagged),
    "parameter": nn.Parameter,
    "generator": lambda x: (x for _ in range(2)),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:The PyTorch API of nested")
@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
def test_a_replacement_is_a_plain_dense_tensor(answer):
    assert re.search(r"not a (plain tensor|dense one)", replacement_problem(torch.ones(2, 3), answer(torch.ones(2, 3))))


def test_a_fit_that_writes_into_the_tables_of_ezhoi_is_named(tmp_path):
    store = synthetic_store(tmp_path / "store", images=8)
    text = store.ezhoi["text"].clone()

    def fit(features):
        features.ezhoi["text"].zero_()
        return Artifact("careless", {})

    with pytest.raises(EzhoiDiffusionError, match=r"fit 'careless' writes into ezhoi\['text'\]"):
        fit_artifact("careless", fit, store, {})
    assert torch.equal(store.ezhoi["text"], text)
