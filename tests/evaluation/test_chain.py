"""Chains of bridges: what they compute and say of themselves, on the command line and as a folder."""

from __future__ import annotations

import pytest
import torch

from ezhoi_diffusion import Artifact, Bridge, BridgeError, BridgePlugin, EzhoiDiffusionError
from ezhoi_diffusion.builtin import chain as chain_plugin
from ezhoi_diffusion.evaluation.chain import ChainBridge, Member, save_chain
from ezhoi_diffusion.evaluation.replay import replay
from ezhoi_diffusion.evaluation.variants import parse_bridges, parse_chain, parse_settings, resolve_variants
from ezhoi_diffusion.files import read_json
from ezhoi_diffusion.hub import build_upload
from ezhoi_diffusion.plugins import PluginManager
from ezhoi_diffusion.testing import synthetic_store
from helpers.miniature import rewrite

RUN = {"fingerprint": {"weights": "a"}}


class Add(Bridge):
    """x + by."""

    row_by_row = True
    settings = ("by", "step")

    def __init__(self, by=1.0, step=1.0, provenance=None):
        super().__init__()
        self.by, self.step, self.provenance = by, step, provenance

    def forward(self, adapter_feat, pairs=None):
        return adapter_feat + self.by * self.step


class Times(Add):
    """x times by; it asks for pairs."""

    row_by_row = False
    needs_pairs = True
    seeded = True
    settings = ("by",)

    def forward(self, adapter_feat, pairs=None):
        return adapter_feat * self.by


class Control(Add):
    """A baseline."""

    baseline = True


def stored(kind):
    def load(folder):
        if folder is None:
            return kind()
        artifact = Artifact.load(folder, kind.__name__.lower())
        return kind(**{k: float(v) for k, v in artifact.config.items()}, provenance=artifact.provenance)

    return load


@pytest.fixture
def plugins():
    manager = PluginManager()
    for kind in (Add, Times, Control):
        name = kind.__name__.lower()
        manager.register(BridgePlugin(name, stored(kind)), name)
    return manager


def resolved(spec, plugins, **options):
    return resolve_variants(spec, plugins, **{"check": lambda *_: None, "device": "cpu", **options})


X = torch.arange(6.0).view(2, 3)


def test_a_chain_has_the_protocol_of_its_most_transductive_member():
    inductive, mined, cached = Add(), Add(), Add()
    mined.protocol, cached.protocol = "train-transductive", "test-transductive"
    assert ChainBridge({}).protocol == ChainBridge({"a": inductive}).protocol == "inductive"
    assert ChainBridge({"a": mined, "b": inductive}).protocol == "train-transductive"
    chain = ChainBridge({"a": inductive, "b": cached, "c": mined})
    assert chain.protocol == chain.override(**{"b.by": 2.0}).protocol == "test-transductive"


def test_members_are_applied_in_order(plugins):
    one, other = resolved("add+times,times+add", plugins, settings={"times.by": 3}).values()
    assert torch.equal(one.bridge(X), 3 * (X + 1))
    assert torch.equal(other.bridge(X), 3 * X + 1)


def test_a_chain_is_what_its_members_are():
    chain = ChainBridge({"add": Add(), "times": Times(provenance=RUN)})
    assert (chain.row_by_row, chain.needs_pairs, chain.seeded, chain.baseline) == (False, True, True, False)
    assert chain.provenance == {"members": {"times": RUN}, **RUN}
    simple = ChainBridge({"add": Add(), "control": Control()})
    assert (simple.row_by_row, simple.needs_pairs, simple.seeded, simple.baseline) == (True, False, False, False)
    assert simple.provenance is None
    assert ChainBridge({"control": Control()}).baseline
    empty = ChainBridge({})
    assert empty.baseline
    assert torch.equal(empty(X), X)


def test_settings_are_called_by_key_where_one_member_has_it_and_by_name_always():
    chain = ChainBridge({"add": Add(provenance=RUN), "times": Times()})
    assert set(chain.settings) == {"step", "add.by", "add.step", "times.by"}
    other = chain.override(**{"step": 2.0, "times.by": 5.0})
    assert torch.equal(other(X), 5 * (X + 2))
    assert torch.equal(chain(X), X + 1), "the chain itself stays"
    assert other.provenance["overridden"] == {"step": 2.0, "times.by": 5.0}
    with pytest.raises(BridgeError, match="by cannot be set"):
        chain.override(by=2.0)


def test_settings_and_sweeps_of_the_command_line_reach_members(plugins):
    found = resolved("add+times,add", plugins, settings={"add.by": 2}, sweep={"times.by": [3, 4], "step": [1, 10]})
    assert list(found) == [
        "add+times", *(f"add+times[times.by={b},step={s}]" for b in (3, 4) for s in (1, 10)),
        "add", "add[step=1]", "add[step=10]",
    ]  # fmt: skip
    assert torch.equal(found["add+times[times.by=4,step=10]"].bridge(X), 4 * (X + 20))
    assert torch.equal(found["add[step=10]"].bridge(X), X + 20)
    with pytest.raises(EzhoiDiffusionError, match=r"has a setting times\.step"):
        resolved("add+times", plugins, settings={"times.step": 1})
    assert parse_settings(["my-bridge.num-steps=5"]) == {"my-bridge.num_steps": 5}


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ("add=a+times=b", [("add", "a"), ("times", "b")]),
        ("add+times", [("add", ""), ("times", "")]),
        ("add=runs/a+b/c+times", [("add", "runs/a+b/c"), ("times", "")]),
        ("add+typo", [("add", ""), ("typo", "")]),
    ],
)
def test_a_plus_joins_bridges_and_stays_in_the_names_of_folders(item, expected):
    assert [(one.name, one.folder) for one in parse_chain(item, ["add", "times"])] == expected


def test_a_comma_in_the_name_of_a_folder_that_exists_stays(tmp_path):
    odd, plain = tmp_path / "runs, old,2", tmp_path / "runs"
    odd.mkdir()
    plain.mkdir()
    spec = f"none,a,b={odd},c={plain},a+b={odd},d={tmp_path / 'gone'},e"
    found = parse_bridges(spec, ["a", "b", "c", "d", "e"])
    assert [[(one.name, one.folder) for one in chain] for chain in found.values()] == [
        [("a", "")],
        [("b", str(odd))],
        [("c", str(plain))],
        [("a", ""), ("b", str(odd))],
        [("d", str(tmp_path / "gone"))],
        [("e", "")],
    ]


def test_a_long_list_of_bridges_is_no_name_of_a_file():
    items = ["a=d", *(f"b{i}+c{i}" for i in range(60))]
    assert list(parse_bridges(",".join(items), ["a"])) == items


def test_a_chain_with_an_unknown_bridge_or_one_twice_is_refused(plugins):
    with pytest.raises(EzhoiDiffusionError, match="no bridge 'typo'"):
        resolved("add+typo", plugins)
    with pytest.raises(EzhoiDiffusionError, match="chains a bridge with itself"):
        resolved("add+times+add", plugins)


def test_the_fingerprint_of_every_member_is_checked(plugins, tmp_path):
    Artifact("add", provenance=RUN).save(tmp_path / "add")
    save_chain(tmp_path / "chain", [Member("add", Artifact.load(tmp_path / "add")), Member("times")])
    checked = []
    resolved(
        f"add={tmp_path / 'add'}+times,chain={tmp_path / 'chain'}",
        plugins,
        check=lambda bridge, name: checked.append((type(bridge), name.rpartition(": ")[2], bridge.provenance)),
    )
    assert checked == [(Add, "add", RUN), (Times, "times", None)] * 2


def test_seeds_of_a_member_are_seeds_of_the_chain(plugins, tmp_path):
    for seed in range(2):
        Artifact("times", {"by": seed + 2.0}).save(tmp_path / "times" / f"seed-{seed}")
    item = f"add+times={tmp_path / 'times'}"
    found = resolved(item, plugins)
    assert {name: variant.seed_group for name, variant in found.items()} == {f"{item}/seed-{k}": item for k in range(2)}
    assert torch.equal(found[f"{item}/seed-1"].bridge(X), 3 * (X + 1))


def chained(tmp_path):
    artifact = Artifact("add", {"by": 2.0}, {"t.safetensors": {"x": X}}, RUN)
    save_chain(tmp_path / "chain", [Member("add", artifact, {"step": 5.0}), Member("times", settings={"by": 3.0})])
    return tmp_path / "chain"


def test_a_stored_chain_computes_the_same_wherever_it_lies(plugins, tmp_path):
    folder = chained(tmp_path).rename(tmp_path / "moved")
    bridge = chain_plugin.load(folder, plugins)
    assert torch.equal(bridge(X), 3 * (X + 10))
    assert bridge.provenance["fingerprint"] == RUN["fingerprint"]
    store = synthetic_store(tmp_path / "features", images=8)
    (offline,) = resolved(f"chain={folder}", plugins, settings={"times.by": 2.0}).values()
    by_hand = resolved("add+times", plugins, settings={"add.by": 2.0, "step": 5.0, "times.by": 2.0})["add+times"]
    aps = [replay(store, {"c": one}).variants["c"].ap for one in (offline, by_hand)]
    assert torch.equal(*aps)


def test_a_pushed_chain_holds_the_files_of_its_members(tmp_path):
    files = build_upload(chained(tmp_path), "user/name", card="card")
    assert set(files) == {"config.json", "1-add/config.json", "1-add/t.safetensors", "README.md"}


@pytest.mark.parametrize(
    "members",
    [
        None, 5, [5], [{"bridge": "../add", "settings": {}, "has_files": True}],
        [{"bridge": "add", "settings": [], "has_files": False}], [{"bridge": "add"}],
        [{"bridge": "chain", "settings": {}, "has_files": False}],
        [{"bridge": "add", "settings": {"by": 1}, "has_files": False}] * 2,
    ],
)  # fmt: skip
def test_a_damaged_chain_is_refused(plugins, tmp_path, members):
    folder = chained(tmp_path)
    rewrite(folder / "config.json", members=members)
    assert read_json(folder / "config.json", dict, BridgeError, "")["bridge"] == "chain"
    with pytest.raises(BridgeError):
        chain_plugin.load(folder, plugins)


def test_an_unfinished_chain_is_refused(plugins, tmp_path):
    folder = chained(tmp_path)
    (folder / "1-add" / "config.json").unlink()
    with pytest.raises(BridgeError):
        chain_plugin.load(folder, plugins)
    with pytest.raises(EzhoiDiffusionError, match="needs its folder"):
        chain_plugin.load(None, plugins)


def test_seeds_of_a_default_folder_count_only_for_bridges_that_have_seeds(plugins, tmp_path):
    for seed in range(2):
        Artifact("add", {"by": seed}).save(tmp_path / "default" / f"seed-{seed}")
        Artifact("times", {"by": seed}).save(tmp_path / "seeds" / f"seed-{seed}")
    Artifact("times", {"by": 2}).save(tmp_path / "times")
    item = f"add+times={tmp_path / 'times'}"
    assert list(resolved(item, plugins, folder=str(tmp_path / "default"))) == [item]
    item = f"add+times={tmp_path / 'seeds'}"
    assert list(resolved(item, plugins)) == [f"{item}/seed-0", f"{item}/seed-1"]
