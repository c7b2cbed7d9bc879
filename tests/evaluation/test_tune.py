"""Sweeps, seeds, fits and the choice among them, on made-up features whose truth is known."""

from __future__ import annotations

import json
import types
from dataclasses import replace

import pytest
import torch

from ezhoi_diffusion import Artifact, BridgePlugin, DiffusionBridge, EzhoiDiffusionError, hookimpl
from ezhoi_diffusion.cli import main
from ezhoi_diffusion.evaluation.replay import replay
from ezhoi_diffusion.evaluation.tune import TuneError, seen_classes, tune
from ezhoi_diffusion.evaluation.variants import Variant, parse_sweep, resolve_variants
from ezhoi_diffusion.features.split import validation_mask
from ezhoi_diffusion.plugins import PluginManager
from ezhoi_diffusion.testing import Truth, synthetic_store

DIM = 32
QUICK = ["--train-steps", "15", "--denoiser-options", '{"width": 16, "depth": 1}', "--val-every", "5"]


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    folder = tmp_path_factory.mktemp("features")
    for split in ("train", "test"):
        synthetic_store(folder / split, split=split, images=40)
    return folder


@pytest.fixture(scope="module")
def bridges(stores):
    assert main(["train", str(stores / "train"), "--out", str(stores / "bridge"), "--seeds", "3", *QUICK]) == 0
    return stores / "bridge"


@pytest.fixture
def store(stores):
    from ezhoi_diffusion import FeatureStore

    return FeatureStore(stores / "train")


def truth(feature, pairs=None):
    """The best bridge there is."""
    return Truth.from_seed(dim=DIM).text_of(feature) * feature.norm(dim=1, keepdim=True)


ORACLE, NONSENSE = Variant(truth, truth), Variant(lambda x, pairs: -x, lambda x: -x)


# the choice


def test_the_best_candidate_on_held_out_training_images_is_chosen(store):
    comparison, candidates = tune(store, {"nonsense": NONSENSE, "oracle": ORACLE})
    assert [candidate.name for candidate in candidates] == ["oracle", "none", "nonsense"]
    assert "no result to report" in comparison.table()
    assert comparison.images == int(validation_mask(len(store.images)).sum())
    assert (
        comparison.mean_ap("oracle", "full")
        > comparison.mean_ap("none", "full")
        > comparison.mean_ap("nonsense", "full")
    )
    assert set(comparison.groups["full"].tolist()) <= set(seen_classes(store).tolist())
    assert comparison.significance.difference["oracle"]["full"].low > -100


def test_none_is_never_beaten_by_what_is_no_better(store):
    same = Variant(lambda x, pairs: x, lambda x: x)
    assert tune(store, {"same": same, "nonsense": NONSENSE})[1][0].name == "none"


def test_of_a_bridge_with_seeds_the_mean_counts_and_the_first_is_taken(store):
    lucky = {f"b/seed-{k}": replace(NONSENSE if k else ORACLE, seed_group="b") for k in range(4)}
    assert tune(store, lucky)[1][0].name == "none", "one seed of four was lucky"
    sound = {"b/seed-0": replace(ORACLE, seed_group="b"), "b/seed-1": replace(ORACLE, seed_group="b")}
    assert (found := tune(store, sound)[1][0]).variant == "b/seed-0"
    assert found.name == "b"


def test_annotations_of_hidden_classes_do_not_move_the_choice(store, tmp_path):
    unseen = store.ezhoi["classes/unseen"]

    def strip(batch):
        kept = ~torch.isin(batch.gt_hoi, unseen)
        return replace(batch, gt_hoi=batch.gt_hoi[kept], gt_boxes=batch.gt_boxes[:, kept])

    store = synthetic_store(
        tmp_path / "plain", images=40
    )  # made here, on as many threads: rounding is not the question
    stripped = synthetic_store(tmp_path / "stripped", images=40, alter=strip)
    assert len(stripped.rows("gt_hoi")) < len(store.rows("gt_hoi"))
    (one, _), (other, _) = (tune(s, {"oracle": ORACLE, "nonsense": NONSENSE}) for s in (store, stripped))
    for name in one.ap:
        index = one.groups["full"]
        assert torch.equal(one.ap[name][index], other.ap[name][index])
        assert one.significance.mean_ap[name] == other.significance.mean_ap[name]


def test_the_default_grid_asks_nothing_of_bridges_without_settings(stores, bridges, tmp_path):
    line = ["tune", str(stores / "train"), "--bridges", "mean_shift", "--bridge", str(bridges / "seed-0"), "--out"]
    assert main([*line, str(tmp_path / "a")]) == 0
    assert main([*line, str(tmp_path / "b"), "--sweep", "blend=1"]) == 2


def test_test_images_are_refused(stores):
    from ezhoi_diffusion import FeatureStore

    with pytest.raises(TuneError, match="what is chosen by test images cannot be tested on them"):
        tune(FeatureStore(stores / "test"), {"oracle": ORACLE})


def test_a_bridge_that_learned_from_the_held_out_images_is_refused(stores, tmp_path, capsys):
    line = ["train", str(stores / "train"), "--recipe", "paired", *QUICK, "--out"]
    assert main([*line, str(tmp_path / "leaks"), "--val-fraction", "0.05"]) == 0
    assert main([*line, str(tmp_path / "fair"), "--val-fraction", "0.2"]) == 0
    tuning = ["tune", str(stores / "train"), "--sweep", "blend=0.5", "--out"]
    assert main([*tuning, str(tmp_path / "a"), "--bridges", f"diffusion={tmp_path / 'leaks'}"]) == 2
    assert "trained on pairs with --val-fraction 0.05" in capsys.readouterr().err
    assert main([*tuning, str(tmp_path / "b"), "--bridges", f"diffusion={tmp_path / 'fair'}"]) == 0


def test_a_bridge_of_another_capture_of_the_host_may_have_seen_the_held_out_images(stores, tmp_path, capsys):
    fewer = synthetic_store(tmp_path / "fewer", images=30)
    line = ["train", str(fewer.folder), "--recipe", "paired", *QUICK, "--out", str(tmp_path / "b")]
    assert main(line) == 0
    tuning = ["tune", str(stores / "train"), "--bridges", f"diffusion={tmp_path / 'b'}", "--out", str(tmp_path / "c")]
    assert main(tuning) == 2
    assert "was made from a capture of 30 images" in capsys.readouterr().err


def test_what_was_forced_stays_so_in_the_choice(stores, bridges, tmp_path, capsys):
    other = DiffusionBridge.from_pretrained(bridges / "seed-0")
    other.provenance["fingerprint"]["weights"] = "0" * 64
    other.save_pretrained(tmp_path / "foreign")
    line = [
        "tune",
        str(stores / "train"),
        "--bridges",
        f"diffusion={tmp_path / 'foreign'}",
        "--out",
        str(tmp_path / "c"),
    ]
    assert main(line) == 2
    assert main([*line, "--force", "--sweep", "blend=0.9,1", "--sweep", "start_timestep=1000"]) == 0
    choice = Artifact.load(tmp_path / "c", "auto")
    assert len(choice.provenance["forced"]) == 1
    capsys.readouterr()
    if choice.config["chosen"]["bridge"] != "none":
        assert main(["compare", str(stores / "test"), "--bridges", f"auto={tmp_path / 'c'}"]) == 2
        assert "weights is" in capsys.readouterr().err


def test_a_choice_is_not_chosen_among(stores, tmp_path, capsys):
    assert main(["tune", str(stores / "train"), "--bridges", "auto=x", "--out", str(tmp_path / "c")]) == 2
    assert "auto is what tune makes" in capsys.readouterr().err


def test_seeds_do_not_go_where_a_bridge_is(stores, bridges, capsys):
    line = ["train", str(stores / "train"), "--out", str(bridges / "seed-0"), "--seeds", "2", *QUICK]
    assert main(line) == 2
    assert "cannot hold several seeds" in capsys.readouterr().err


def test_the_choice_is_a_bridge_of_its_own(stores, bridges, tmp_path, capsys):
    seed = bridges / "seed-1"
    out = tmp_path / "choice"
    line = ["tune", str(stores / "train"), "--bridges", f"mean_shift,diffusion={seed}", "--bridge", str(seed)]
    assert main([*line, "--sweep", "start_timestep=50,900", "--sweep", "blend=0.3,1", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    artifact = Artifact.load(out, "auto")
    chosen = artifact.config["chosen"]
    ap = artifact.config["evidence"]["mean_ap"]
    assert len(ap) == 2 + 1 + 4
    assert ap[chosen["variant"]] == max(ap.values()) >= ap["none"]
    assert chosen["variant"] in printed
    assert artifact.provenance["fingerprint"]["backbone"] == "synthetic"
    assert main(["push", str(out), "user/name"]) == 2
    assert f"push the bridge in {out / 'bridge'}" in capsys.readouterr().err

    # it does what it was chosen for, wherever its folder lies
    moved = out.rename(tmp_path / "elsewhere")
    names = f"none,mean_shift={seed},diffusion={seed},auto={moved}"
    report = tmp_path / "report"
    compare = ["compare", str(stores / "test"), "--bridges", names, "--replicates", "0"]
    sweep = [f"--sweep={key}={json.dumps(value)}" for key, value in chosen["settings"].items()]
    assert main([*compare, *sweep, "--out", str(report)]) == 0
    written = json.loads((report / "report.json").read_text())
    assert written["provenance"][f"auto={moved}"]["chosen"] == chosen, "the report says what was chosen"
    found = written["mean_ap"]
    twin = chosen["variant"].replace("mean_shift", f"mean_shift={seed}")
    assert found[f"auto={moved}"] == found[twin]
    assert not any(name.startswith("auto") and "[" in name for name in found), "what was chosen is not swept"


def test_a_lead_by_chance_is_called_one_and_few_replicates_are_refused(stores, bridges, tmp_path, capsys):
    line = ["tune", str(stores / "train"), "--bridges", "mean_shift,diffusion", "--bridge", str(bridges), "--out"]
    assert main([*line, str(tmp_path / "a")]) == 0
    out = capsys.readouterr().out
    assert "<- chosen" in out
    assert "cannot be told from chance" in out or "  none   <- chosen" in out
    assert main(["compare", str(stores / "test"), "--bridges", "identity", "--replicates", "10"]) == 2
    assert "0 or at least 100" in capsys.readouterr().err


def test_what_is_not_finite_is_not_stored(tmp_path):
    broken = Artifact("b", files={"t.safetensors": {"x": torch.tensor([1.0, torch.nan])}})
    with pytest.raises(EzhoiDiffusionError, match=r"x in t\.safetensors holds NaN"):
        broken.save(tmp_path / "b")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("settings", [None, {"blend": "much"}])
def test_a_choice_that_says_nothing_is_refused(tmp_path, bridges, settings):
    from ezhoi_diffusion.builtin.auto import load

    chosen = {} if settings is None else {"bridge": "diffusion", "settings": settings}
    Artifact("auto", {"chosen": chosen}).save(tmp_path)
    Artifact.load(bridges / "seed-0").save(tmp_path / "bridge")
    with pytest.raises(EzhoiDiffusionError, match=r"run `ezhoi-diffusion tune` again|cannot be applied"):
        load(tmp_path)
    with pytest.raises(EzhoiDiffusionError, match="auto needs --bridge DIR"):
        load(None)


# sweeps and seeds


def test_a_folder_of_seeds_is_one_bridge_with_a_variant_for_each(stores, bridges, tmp_path, capsys):
    line = [
        "compare",
        str(stores / "test"),
        "--bridges",
        "none,identity,mean_shift,diffusion",
        "--bridge",
        str(bridges),
    ]
    assert main([*line, "--sweep", "blend=1", "--replicates", "0", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    seeds = [f"diffusion/seed-{k}" for k in range(3)]
    swept = [f"{name}[blend=1]" for name in seeds]
    assert set(report["mean_ap"]) == {"none", "identity", "mean_shift", *seeds, *swept}
    assert {name: seed_group["variants"] for name, seed_group in report["families"].items()} == {
        "diffusion": seeds,
        "diffusion[blend=1]": swept,
    }
    full = [report["mean_ap"][name]["full"] for name in swept]
    seed_group = report["families"]["diffusion[blend=1]"]
    assert seed_group["mean_ap"]["full"]["mean"] == pytest.approx(sum(full) / 3)
    assert seed_group["mean_ap"]["full"]["standard_deviation"] == pytest.approx(
        torch.tensor(full).double().std().item()
    )
    weights = [DiffusionBridge.from_pretrained(bridges / f"seed-{k}").state_dict() for k in range(3)]
    assert not torch.equal(*(next(iter(w.values())) for w in weights[:2]))


def test_a_sweep_is_named_by_its_settings_and_needs_something_to_sweep(bridges):
    plugins, device = PluginManager(), torch.device("cpu")

    def accept(bridge, name):
        pass

    grid = parse_sweep(["start-timestep=5,50", "output=unit_norm,keep_norm"])
    assert grid == {"start_timestep": [5, 50], "output": ["unit_norm", "keep_norm"]}
    assert parse_sweep(["blend=.3,1e-1"]) == {"blend": [0.3, 0.1]}
    found = resolve_variants("none,diffusion", plugins, str(bridges / "seed-0"), accept, device, sweep=grid)
    assert list(found) == [
        "diffusion",
        "diffusion[start_timestep=5,output=unit_norm]",
        "diffusion[start_timestep=5,output=keep_norm]",
        "diffusion[start_timestep=50,output=unit_norm]",
        "diffusion[start_timestep=50,output=keep_norm]",
    ]
    with pytest.raises(
        EzhoiDiffusionError, match="none of identity has a setting output, start_timestep to sweep; they have none"
    ):
        resolve_variants("identity", plugins, "", accept, device, sweep=grid)
    with pytest.raises(
        EzhoiDiffusionError,
        match="none of diffusion has a setting scale to sweep; they have blend, output, start_timestep",
    ):
        resolve_variants("diffusion", plugins, str(bridges / "seed-0"), accept, device, sweep={"scale_factor": [1]})
    for wrong in ("start_timestep", "start_timestep=", "=5"):
        with pytest.raises(EzhoiDiffusionError, match="give each setting once"):
            parse_sweep([wrong])
    with pytest.raises(EzhoiDiffusionError, match="give each setting once"):
        parse_sweep(["num_steps=1", "num_steps=2"])


# what a bridge says of itself


def test_rows_of_many_images_are_bridged_at_once_and_as_if_they_were_not(store, monkeypatch):
    calls = []

    def rows(x):
        calls.append(len(x))
        return truth(x)

    together = replay(store, {"b": Variant(lambda x, pairs: rows(x), rows)})
    assert max(calls) == len(store), "all of this small store's rows in one call"
    single = replay(store, {"b": Variant(truth)})
    torch.testing.assert_close(together.ap["b"], single.ap["b"], rtol=0, atol=0)
    monkeypatch.setattr("ezhoi_diffusion.evaluation.replay.ROWS", 20)
    torch.testing.assert_close(replay(store, {"b": ORACLE}).ap["b"], single.ap["b"], rtol=0, atol=0)


def test_a_bridge_that_looks_at_other_rows_and_says_it_does_not_is_caught(store):
    def centred(x):
        return x - x.mean(0)

    replay(store, {"honest": Variant(lambda x, pairs: centred(x))})
    with pytest.raises(EzhoiDiffusionError, match="bridge 'liar' says row_by_row, and gave other rows for image"):
        replay(store, {"liar": Variant(lambda x, pairs: centred(x), centred)})


def test_a_bridge_that_writes_into_its_rows_is_caught_before_others_get_them(store):
    clamps = Variant(lambda x, pairs: x.clamp_(min=0), lambda x: x.clamp_(min=0))
    with pytest.raises(EzhoiDiffusionError, match="bridge 'clamps' writes into the rows that it is given"):
        replay(store, {"clamps": clamps, "oracle": ORACLE})


def test_images_without_a_class_that_counts_are_refused(store):
    with pytest.raises(EzhoiDiffusionError, match="has an annotation of a class that counts"):
        replay(store, {"oracle": ORACLE}, classes=torch.zeros(0, dtype=torch.long))


def test_a_third_partys_sweep_that_fails_is_named(bridges, mocker):
    class Odd:
        settings = ("blend",)

        def __init__(self, points):
            self.sweep = points

        def __call__(self, x):
            return x

    host = PluginManager(discover=False)
    host.register(BridgePlugin("raises", lambda folder: Odd(lambda points: 1 / 0)), "raises")
    host.register(BridgePlugin("short", lambda folder: Odd(lambda points: [])), "short")
    for name, words in (("raises", "ZeroDivisionError"), ("short", "ValueError")):
        with pytest.raises(EzhoiDiffusionError, match=f"bridge '{name}' cannot be swept: {words}"):
            resolve_variants(name, host, "", lambda *_: None, torch.device("cpu"), sweep={"blend": [1]})


def test_points_of_the_default_grid_that_a_bridge_refuses_are_left_out(bridges):
    grid, line = (
        {"start_timestep": [5, 2000], "num_steps": [5, 9]},
        ("diffusion", PluginManager(), str(bridges / "seed-0")),
    )
    device = torch.device("cpu")
    found = resolve_variants(*line, lambda *_: None, device, sweep=grid, asked=False)
    assert list(found) == ["diffusion", "diffusion[start_timestep=5,num_steps=5]"]
    with pytest.raises(EzhoiDiffusionError, match="bridge 'diffusion': this bridge cannot be applied with"):
        resolve_variants(*line, lambda *_: None, device, sweep=grid)


# fits of plugins


def scaled(features, factor: float = 2.0):
    """factor: what rows are multiplied by."""
    return Artifact("scaled", {"factor": factor}, {"tensors.safetensors": {"factor": torch.tensor(factor)}})


def load_scaled(folder):
    factor = Artifact.load(folder, "scaled").files["tensors.safetensors"]["factor"]
    return lambda x: x * factor


@pytest.fixture
def installed(mocker):
    host = PluginManager(discover=False)
    host.register(BridgePlugin("scaled", load_scaled, scaled), "scaled")
    other = types.SimpleNamespace(
        register_fits=hookimpl(
            lambda register: [
                register("raises", lambda features: 1 / 0),
                register("none", lambda features: None),
                register("misnamed", scaled),
            ]
        )
    )
    host.register(other, "other")
    mocker.patch("ezhoi_diffusion.plugins.PluginHost", return_value=host)


def test_a_fit_writes_what_it_returns_and_where_that_comes_from(installed, stores, tmp_path, capsys):
    line = ["fit", "scaled", str(stores / "train"), "--out", str(tmp_path / "b")]
    assert main([*line, "--option", "factor=3"]) == 0
    artifact = Artifact.load(tmp_path / "b", "scaled")
    assert artifact.provenance["fit"] == {"name": "scaled", "options": {"factor": 3}}
    assert artifact.provenance["fingerprint"]["backbone"] == "synthetic"
    assert list(artifact.context) == ["ctx.0"]
    assert torch.equal(load_scaled(tmp_path / "b")(torch.ones(2)), torch.full((2,), 3.0))
    (tmp_path / "file").write_text("somebody's")
    for used in ("b", "file"):
        assert main([*line[:-1], str(tmp_path / used)]) == 2
        assert f"{tmp_path / used} is in use: give a new folder with --out" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "somebody's"


@pytest.mark.parametrize(
    ("name", "split", "option", "message"),
    [
        ("scaled", "train", "fctor=3", "it has factor"),
        ("scaled", "train", "factor", "give each option of 'scaled' once"),
        ("scaled", "test", "factor=3", "holds the test split"),
        ("raises", "train", None, "fit 'raises' raised ZeroDivisionError"),
        ("none", "train", None, "returned 'NoneType' instead of an Artifact of bridge 'none'"),
        ("misnamed", "train", None, "returned 'scaled' instead of an Artifact of bridge 'misnamed'"),
        ("unheard", "train", None, "unknown fit 'unheard': known are misnamed, none, raises, scaled"),
    ],
)
def test_fits_that_cannot_work_are_one_line(installed, stores, tmp_path, capsys, name, split, option, message):
    options = ["--option", option] if option else []
    assert main(["fit", name, str(stores / split), "--out", str(tmp_path / "b"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_help_lists_what_can_be_fitted(installed, capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    out = capsys.readouterr().out
    assert "scaled [factor=2.0]" in out
    assert "factor: what rows are multiplied by." in out
