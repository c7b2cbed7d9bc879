"""Names, settings, sweeps and seeds of bridges as variants, on synthetic features with a known truth."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from ezhoi_diffusion import Artifact, Bridge, BridgeError, BridgePlugin, DiffusionBridge, EzhoiDiffusionError
from ezhoi_diffusion.bridge import FunctionBridge
from ezhoi_diffusion.cli import main
from ezhoi_diffusion.evaluation.average_precision import matches
from ezhoi_diffusion.evaluation.protocols import hicodet
from ezhoi_diffusion.evaluation.replay import replay
from ezhoi_diffusion.evaluation.variants import Variant, parse_settings, parse_sweep, resolve_variants, seed_folders
from ezhoi_diffusion.features.images import stored_images
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


ORACLE = variant(truth)


def test_seeds_do_not_go_where_a_bridge_is(stores, bridges, capsys):
    line = ["train", str(stores / "train"), "--out", str(bridges / "seed-0"), "--seeds", "2", *QUICK]
    assert main(line) == 2
    assert "cannot hold several seeds" in capsys.readouterr().err


def test_what_is_not_finite_is_not_stored(tmp_path):
    broken = Artifact("b", files={"t.safetensors": {"x": torch.tensor([1.0, torch.nan])}})
    with pytest.raises(EzhoiDiffusionError, match=r"x in t\.safetensors holds NaN"):
        broken.save(tmp_path / "b")
    assert not (tmp_path / "b").exists()


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
        torch.tensor(full, dtype=torch.float64).std().item()
    )
    weights = [DiffusionBridge.from_pretrained(bridges / f"seed-{k}").state_dict() for k in range(3)]
    assert not torch.equal(*(next(iter(w.values())) for w in weights[:2]))


@pytest.mark.parametrize("make", [Path.touch, os.mkfifo, lambda path: path.symlink_to(path)])
def test_what_is_no_folder_of_a_seed_is_named(make, tmp_path):
    (tmp_path / "seed-0").mkdir()
    make(tmp_path / "seed-1")
    with pytest.raises(EzhoiDiffusionError, match=r"seed-1 is not the folder of a seed"):
        seed_folders(str(tmp_path))


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
    with pytest.raises(EzhoiDiffusionError, match="bridge 'clamps' writes into adapter_feat"):
        replay(store, {"clamps": clamps, "oracle": ORACLE})


def test_a_bridge_that_changes_nothing_has_the_logits_of_ezhoi_to_the_last_bit(store, mocker):
    """Those of another processor differ from what is computed here, and a rank that changes by rounding is no effect."""
    mocker.patch.dict(store.ezhoi, logit_scale=store.ezhoi["logit_scale"] * (1 + 5e-5))
    found = replay(store, {"same": variant(torch.clone, "same")}, measured=True)
    assert found.variants["same"].alignment == found.variants["none"].alignment
    assert found.calibration["same"] == found.calibration["none"]


def test_candidates_are_those_that_match_annotations_of_their_class(store):
    protocol, seen = hicodet(store), 0
    for image in stored_images(store):
        row, _, classes, _, candidate, annotation = protocol.match(image)
        humans, others = image.pairs.boxes[image.pairs.pairing]
        expected = {}
        for hoi in image.gt_hoi.unique():
            found, annotated = (classes == hoi).nonzero().flatten(), (image.gt_hoi == hoi).nonzero().flatten()
            gt = image.gt_boxes[annotated]
            belongs, enough = matches((gt[:, 0], gt[:, 1]), (humans[row[found]], others[row[found]]))
            expected |= dict(zip(found[enough].tolist(), annotated[belongs[enough]].tolist(), strict=True))
        assert dict(zip(candidate.tolist(), annotation.tolist(), strict=True)) == expected
        seen += len(expected)
    assert seen > 0


@pytest.mark.parametrize("needs_pairs", [True, False])
def test_a_bridge_may_return_one_buffer_every_time(store, needs_pairs):
    class Buffered(FunctionBridge):
        def __init__(self):
            super().__init__(torch.neg)
            self.buffer, self.needs_pairs = torch.empty(4096, store.adapter_feat().shape[1]), needs_pairs

        def forward(self, adapter_feat, pairs=None):
            return torch.neg(adapter_feat, out=self.buffer[: len(adapter_feat)])

    found = replay(store, {"fresh": variant(torch.neg, "fresh"), "buffered": Variant("buffered", Buffered())}).variants
    assert torch.equal(found["fresh"].ap, found["buffered"].ap)


@pytest.mark.parametrize("part", ["adapter_feat", "pairs"])
def test_a_bridge_that_keeps_what_it_gets_and_writes_later_is_caught(store, part):
    class Late(FunctionBridge):
        row_by_row, needs_pairs = True, part == "pairs"
        kept = None

        def forward(self, adapter_feat, pairs=None):
            if self.kept is not None:
                self.kept.zero_()
            self.kept = pairs.boxes if part == "pairs" else adapter_feat
            return -adapter_feat

    with pytest.raises(EzhoiDiffusionError, match=rf"bridge 'late' writes into {part}"):
        replay(store, {"late": Variant("late", Late(None))})


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


def test_a_sweep_names_the_bridge_whose_settings_raise():
    class Odd(FunctionBridge):
        settings = ("blend",)

        def apply_settings(self, settings):
            raise ValueError("mine")

    manager = PluginManager(discover=False)
    manager.register(BridgePlugin("odd", lambda folder: Odd(lambda x: x)), "odd")
    with pytest.raises(BridgeError, match=r"bridge 'odd'.*ValueError: mine"):
        resolve_variants("odd", manager, check=lambda *_: None, device="cpu", sweep={"blend": [1]})


def test_a_bridge_that_cannot_be_loaded_is_named():
    manager = PluginManager(discover=False)
    manager.register(BridgePlugin("raises", lambda folder: 1 / 0), "raises")
    manager.register(BridgePlugin("nothing", lambda folder: None), "nothing")
    for name, words in (("raises", "ZeroDivisionError"), ("nothing", "is no bridge")):
        with pytest.raises(BridgeError, match=words):
            resolve_variants(name, manager, check=lambda *_: None, device="cpu")


def test_a_point_of_a_sweep_that_a_bridge_refuses_is_an_error(bridges):
    with pytest.raises(BridgeError, match="bridge 'diffusion'"):
        resolved("diffusion", bridges / "seed-0", sweep={"start_timestep": [5, 2000], "num_steps": [5, 9]})
