"""Sweeps, seeds, fits and the choice among them, on synthetic features with a known truth."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch

from ezhoi_diffusion import (
    Artifact,
    Bridge,
    BridgeError,
    BridgePlugin,
    DiffusionBridge,
    EzhoiDiffusionError,
)
from ezhoi_diffusion.bridge import FunctionBridge
from ezhoi_diffusion.cli import main
from ezhoi_diffusion.evaluation.protocols import hicodet
from ezhoi_diffusion.evaluation.replay import replay
from ezhoi_diffusion.evaluation.tune import TuneError, seen_classes, tune
from ezhoi_diffusion.evaluation.variants import Variant, parse_settings, parse_sweep, resolve_variants
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


def truth(feature):
    """The best bridge there is."""
    return Truth.from_seed(dim=DIM).text_of(feature) * feature.norm(dim=1, keepdim=True)


class Applied(FunctionBridge):
    """A function of each pair's features alone."""

    row_by_row = True


def variant(function, name="oracle", seed_group=None):
    return Variant(name, Applied(function), seed_group)


ORACLE, NONSENSE = variant(truth), variant(lambda x: -x, "nonsense")


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
    assert comparison.variants["oracle"].bootstrap.difference["full"].low > -100


def test_none_is_never_beaten_by_what_is_no_better(store):
    same = variant(lambda x: x, "same")
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
    index = one.groups["full"]
    for a, b in zip(one.variants.values(), other.variants.values(), strict=True):
        assert torch.equal(a.ap[index], b.ap[index])
        assert a.bootstrap.mean_ap == b.bootstrap.mean_ap


def test_the_default_sweep_leaves_bridges_without_settings_alone(stores, bridges, tmp_path):
    line = ["tune", str(stores / "train"), "--bridges", "mean_shift", "--bridge", str(bridges / "seed-0"), "--out"]
    assert main([*line, str(tmp_path / "a")]) == 0
    assert main([*line, str(tmp_path / "b"), "--sweep", "blend=1"]) == 2


def test_test_images_are_refused(stores):
    from ezhoi_diffusion import FeatureStore

    with pytest.raises(TuneError, match="cannot be tested on them"):
        tune(FeatureStore(stores / "test"), {"oracle": ORACLE})


def test_a_bridge_that_learned_from_the_held_out_images_is_refused(stores, tmp_path, capsys):
    line = ["train", str(stores / "train"), "--recipe", "paired", *QUICK, "--out"]
    assert main([*line, str(tmp_path / "leaks"), "--val-fraction", "0.05"]) == 0
    assert main([*line, str(tmp_path / "fair"), "--val-fraction", "0.2"]) == 0
    tuning = ["tune", str(stores / "train"), "--sweep", "blend=0.5", "--out"]
    assert main([*tuning, str(tmp_path / "a"), "--bridges", f"diffusion={tmp_path / 'leaks'}"]) == 2
    assert "trained on pairs with --val-fraction 0.05" in capsys.readouterr().err
    assert main([*tuning, str(tmp_path / "b"), "--bridges", f"diffusion={tmp_path / 'fair'}"]) == 0


def test_a_bridge_of_another_capture_of_the_run_may_have_seen_the_held_out_images(stores, tmp_path, capsys):
    fewer = synthetic_store(tmp_path / "fewer", images=30)
    line = ["train", str(fewer.folder), "--recipe", "paired", *QUICK, "--out", str(tmp_path / "b")]
    assert main(line) == 0
    tuning = ["tune", str(stores / "train"), "--bridges", f"diffusion={tmp_path / 'b'}", "--out", str(tmp_path / "c")]
    assert main(tuning) == 2
    assert "was made from a capture of 30 images" in capsys.readouterr().err


def test_what_was_forced_stays_so_in_the_choice(stores, bridges, tmp_path, capsys):
    other = DiffusionBridge.from_pretrained(bridges / "seed-0")
    other.provenance["fingerprint"]["weights"] = "0" * 64
    other.save_pretrained(tmp_path / "other")
    line = [
        "tune",
        str(stores / "train"),
        "--bridges",
        f"diffusion={tmp_path / 'other'}",
        "--out",
        str(tmp_path / "c"),
    ]
    assert main(line) == 2
    assert main([*line, "--force", "--sweep", "blend=0.9,1", "--sweep", "start_timestep=1000"]) == 0
    choice = Artifact.load(tmp_path / "c", "tuned")
    assert len(choice.provenance["forced"]) == 1
    capsys.readouterr()
    if choice.config["chosen"]["bridge"] != "none":
        assert main(["compare", str(stores / "test"), "--bridges", f"tuned={tmp_path / 'c'}"]) == 2
        assert "weights is" in capsys.readouterr().err


def test_a_choice_is_not_chosen_among(stores, tmp_path, capsys):
    assert main(["tune", str(stores / "train"), "--bridges", "tuned=x", "--out", str(tmp_path / "c")]) == 2
    assert "tuned is what tune makes" in capsys.readouterr().err


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
    artifact = Artifact.load(out, "tuned")
    chosen = artifact.config["chosen"]
    ap = artifact.config["evidence"]["mean_ap"]
    assert len(ap) == 2 + 1 + 4
    assert ap[chosen["variant"]] == max(ap.values()) >= ap["none"]
    assert chosen["variant"] in printed
    assert artifact.provenance["fingerprint"]["backbone"] == "synthetic"
    assert main(["push", str(out), "user/name"]) == 2
    assert f"push the bridge in {out / 'bridge'}" in capsys.readouterr().err

    # it does what it was chosen for, wherever its folder lies
    moved = out.rename(tmp_path / "moved")
    names = f"none,mean_shift={seed},diffusion={seed},tuned={moved}"
    report = tmp_path / "report"
    compare = ["compare", str(stores / "test"), "--bridges", names, "--replicates", "0"]
    sweep = [f"--sweep={key}={json.dumps(value)}" for key, value in chosen["settings"].items()]
    assert main([*compare, *sweep, "--out", str(report)]) == 0
    written = json.loads((report / "report.json").read_text())
    variants = {variant["name"]: variant for variant in written["variants"]}
    assert variants[f"tuned={moved}"]["provenance"]["chosen"] == chosen, "the report says what was chosen"
    found = {name: variant["mean_ap"] for name, variant in variants.items()}
    twin = chosen["variant"].replace("mean_shift", f"mean_shift={seed}")
    assert found[f"tuned={moved}"] == found[twin]
    assert not any(name.startswith("tuned") and "[" in name for name in found), "what was chosen is not swept"


def test_a_lead_by_chance_is_called_one_and_few_replicates_are_refused(stores, bridges, tmp_path, capsys):
    line = ["tune", str(stores / "train"), "--bridges", "mean_shift,diffusion", "--bridge", str(bridges), "--out"]
    assert main([*line, str(tmp_path / "a")]) == 0
    out = capsys.readouterr().out
    assert "<- chosen" in out
    assert "Chance may explain that lead" in out or re.search("none +<- chosen", out)
    assert main(["compare", str(stores / "test"), "--bridges", "identity", "--replicates", "10"]) == 2
    assert "0 or at least 100" in capsys.readouterr().err


def test_what_is_not_finite_is_not_stored(tmp_path):
    broken = Artifact("b", files={"t.safetensors": {"x": torch.tensor([1.0, torch.nan])}})
    with pytest.raises(EzhoiDiffusionError, match=r"x in t\.safetensors holds NaN"):
        broken.save(tmp_path / "b")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("settings", [None, {"blend": "much"}])
def test_a_choice_that_says_nothing_is_refused(tmp_path, bridges, settings):
    from ezhoi_diffusion.builtin.tuned import load

    chosen = {} if settings is None else {"bridge": "diffusion", "settings": settings}
    Artifact("tuned", {"chosen": chosen}).save(tmp_path)
    Artifact.load(bridges / "seed-0").save(tmp_path / "bridge")
    with pytest.raises(EzhoiDiffusionError, match=r"run `ezhoi-diffusion tune` again|cannot be applied"):
        load(tmp_path)
    with pytest.raises(EzhoiDiffusionError, match="tune"):
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
    found = {variant["name"]: variant["mean_ap"] for variant in report["variants"]}
    assert set(found) == {"none", "identity", "mean_shift", *seeds, *swept}
    assert {name: seed_group["variants"] for name, seed_group in report["seed_groups"].items()} == {
        "diffusion": seeds,
        "diffusion[blend=1]": swept,
    }
    full = [found[name]["full"] for name in swept]
    seed_group = report["seed_groups"]["diffusion[blend=1]"]
    assert seed_group["mean_ap"]["full"]["mean"] == pytest.approx(sum(full) / 3)
    assert seed_group["mean_ap"]["full"]["standard_deviation"] == pytest.approx(
        torch.tensor(full).double().std().item()
    )
    weights = [DiffusionBridge.from_pretrained(bridges / f"seed-{k}").state_dict() for k in range(3)]
    assert not torch.equal(*(next(iter(w.values())) for w in weights[:2]))


def resolved(spec, folder="", **options):
    check, cpu = (lambda bridge, name: None), torch.device("cpu")
    return resolve_variants(spec, PluginManager(), folder=str(folder), check=check, device=cpu, **options)


def test_sweep_words_become_lists_of_values():
    words = ["start-timestep=5,50", "output=unit_norm,keep_norm"]
    assert parse_sweep(words) == {"start_timestep": [5, 50], "output": ["unit_norm", "keep_norm"]}
    assert parse_sweep(["blend=.3,1e-1"]) == {"blend": [0.3, 0.1]}
    for wrong in (["start_timestep"], ["start_timestep="], ["=5"], ["num_steps=1", "num_steps=2"]):
        with pytest.raises(EzhoiDiffusionError, match="--sweep"):
            parse_sweep(wrong)


def test_setting_words_become_values():
    assert parse_settings(["blend=0.3", "output=unit_norm"]) == {"blend": 0.3, "output": "unit_norm"}
    assert parse_settings([], inference_steps=50) == {"start_timestep": 50, "num_steps": 50}
    for wrong in (["blend"], ["blend="], ["blend=1", "blend=2"]):
        with pytest.raises(EzhoiDiffusionError, match="--set"):
            parse_settings(wrong)
    with pytest.raises(EzhoiDiffusionError, match="num_steps is set twice"):
        parse_settings(["num_steps=5"], inference_steps=50)


def test_a_point_of_a_sweep_is_named_by_its_settings(bridges):
    sweep = {"start_timestep": [5, 50], "output": ["unit_norm", "keep_norm"]}
    assert list(resolved("none,diffusion", bridges / "seed-0", sweep=sweep)) == [
        "diffusion",
        "diffusion[start_timestep=5,output=unit_norm]",
        "diffusion[start_timestep=5,output=keep_norm]",
        "diffusion[start_timestep=50,output=unit_norm]",
        "diffusion[start_timestep=50,output=keep_norm]",
    ]


def test_a_setting_applies_to_every_bridge_that_has_it(bridges):
    found = resolved("identity,diffusion", bridges / "seed-0", settings={"blend": 0.9}, sweep={"num_steps": [2]})
    assert list(found) == ["identity", "diffusion", "diffusion[num_steps=2]"]
    assert found["diffusion"].bridge.config.recipe.blend == 0.9
    assert found["diffusion[num_steps=2]"].source.settings == {"blend": 0.9, "num_steps": 2}
    assert found["diffusion[num_steps=2]"].bridge.provenance["overridden"] == {"blend": 0.9, "num_steps": 2}


def test_a_setting_that_no_bridge_has_is_refused(bridges):
    for options in ({"sweep": {"blend": [1]}}, {"settings": {"blend": 1}}):
        with pytest.raises(EzhoiDiffusionError, match="none of identity has a setting blend; they have none"):
            resolved("identity", **options)
    with pytest.raises(EzhoiDiffusionError, match="none of diffusion has a setting scale_factor; they have blend"):
        resolved("diffusion", bridges / "seed-0", sweep={"scale_factor": [1]})
    with pytest.raises(EzhoiDiffusionError, match="'identity' is named twice"):
        resolved("identity,identity")
    with pytest.raises(EzhoiDiffusionError, match="no bridge 'nobody'"):
        resolved("nobody")


# what a bridge says of itself


def test_features_of_many_images_come_in_one_call_with_the_same_result(store, monkeypatch):
    calls = []

    def counted(x):
        calls.append(len(x))
        return truth(x)

    together = replay(store, {"b": variant(counted)})
    assert max(calls) == len(store), "all features of this small store in one call"
    single = replay(store, {"b": Variant("b", FunctionBridge(truth))})
    torch.testing.assert_close(together.variants["b"].ap, single.variants["b"].ap, rtol=0, atol=0)
    monkeypatch.setattr("ezhoi_diffusion.evaluation.replay.MAX_PAIRS", 20)
    torch.testing.assert_close(replay(store, {"b": ORACLE}).variants["b"].ap, single.variants["b"].ap, rtol=0, atol=0)


def test_a_bridge_gets_the_pairs_of_its_image(store):
    seen = []

    class Asks(Bridge):
        needs_pairs = True
        row_by_row = True

        def forward(self, adapter_feat, pairs=None):
            seen.append((len(adapter_feat), pairs.image, len(pairs), pairs.objects.tolist()))
            return adapter_feat

    replay(store, {"asks": Variant("asks", Asks())})
    objects = store.rows("objects").split([image["rows"] for image in store.images])
    expected = [(len(o), i["name"], len(o), o.tolist()) for i, o in zip(store.images, objects, strict=True) if len(o)]
    assert seen == expected


def test_a_bridge_that_uses_other_features_but_says_row_by_row_is_refused(store):
    def centred(x):
        return x - x.mean(0)

    replay(store, {"honest": Variant("honest", FunctionBridge(centred))})
    with pytest.raises(EzhoiDiffusionError, match=r"bridge 'liar'.*row_by_row"):
        replay(store, {"liar": variant(centred, "liar")})


def test_a_bridge_that_writes_into_its_input_is_caught_before_others_get_it(store):
    clamps = variant(lambda x: x.clamp_(min=0), "clamps")
    with pytest.raises(EzhoiDiffusionError, match="bridge 'clamps' changes its input"):
        replay(store, {"clamps": clamps, "oracle": ORACLE})


def test_images_without_a_class_that_counts_are_refused(store):
    with pytest.raises(EzhoiDiffusionError, match="has an annotation of a class that counts"):
        replay(store, {"oracle": ORACLE}, protocol=hicodet(store, classes=torch.zeros(0, dtype=torch.long)))


def test_a_third_partys_sweep_that_fails_is_named():
    class Odd(FunctionBridge):
        settings = ("blend",)

        def __init__(self, sweep):
            super().__init__(lambda x: x)
            self._sweep = sweep

        def sweep(self, points):
            return self._sweep(points)

    manager = PluginManager(discover=False)
    manager.register(BridgePlugin("raises", lambda folder: Odd(lambda points: 1 / 0)), "raises")
    manager.register(BridgePlugin("short", lambda folder: Odd(lambda points: [])), "short")
    for name, words in (("raises", "ZeroDivisionError"), ("short", "ValueError")):
        with pytest.raises(BridgeError, match=f"bridge '{name}'.*{words}"):
            resolve_variants(name, manager, check=lambda *_: None, device="cpu", sweep={"blend": [1]})


def test_a_default_sweep_names_the_bridge_whose_settings_raise():
    class Odd(FunctionBridge):
        settings = ("blend",)

        def apply_settings(self, settings):
            raise ValueError("mine")

    manager = PluginManager(discover=False)
    manager.register(BridgePlugin("odd", lambda folder: Odd(lambda x: x)), "odd")
    for skip_refused in (False, True):
        with pytest.raises(BridgeError, match=r"bridge 'odd'.*ValueError: mine"):
            resolve_variants(
                "odd", manager, check=lambda *_: None, device="cpu", sweep={"blend": [1]}, skip_refused=skip_refused
            )


def test_a_setting_that_no_bridge_has_is_an_error_with_a_default_sweep_too():
    for skip_refused in (False, True):
        with pytest.raises(EzhoiDiffusionError, match="none of identity has a setting typo"):
            resolved(
                "identity",
                settings={"typo": 1},
                sweep={"blend": [1]} if skip_refused else {},
                skip_refused=skip_refused,
            )


def test_a_bridge_that_cannot_be_loaded_is_named():
    manager = PluginManager(discover=False)
    manager.register(BridgePlugin("raises", lambda folder: 1 / 0), "raises")
    manager.register(BridgePlugin("nothing", lambda folder: None), "nothing")
    for name, words in (("raises", "ZeroDivisionError"), ("nothing", "is no bridge")):
        with pytest.raises(BridgeError, match=words):
            resolve_variants(name, manager, check=lambda *_: None, device="cpu")


def test_points_of_a_default_sweep_that_a_bridge_refuses_are_left_out(bridges):
    sweep = {"start_timestep": [5, 2000], "num_steps": [5, 9]}
    found = resolved("diffusion", bridges / "seed-0", sweep=sweep, skip_refused=True)
    assert list(found) == ["diffusion", "diffusion[start_timestep=5,num_steps=5]"]
    with pytest.raises(BridgeError, match="bridge 'diffusion'"):
        resolved("diffusion", bridges / "seed-0", sweep=sweep)
