"""Files of the guide become bridges and features; its module returns what the published sampler returns."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from ezhoi_diffusion import DiffusionBridge, DiffusionBridgeHOI
from ezhoi_diffusion.builtin import mean_shift
from ezhoi_diffusion.cli import main
from ezhoi_diffusion.diffusion.bridge import BridgeError
from ezhoi_diffusion.errors import EzhoiDiffusionError
from ezhoi_diffusion.ezhoi.run import EzHoiRun, FingerprintError
from ezhoi_diffusion.features.fingerprint import Fingerprint
from ezhoi_diffusion.features.statistics import ModalityStatistics
from ezhoi_diffusion.features.store import FeatureStore, FeatureStoreError
from ezhoi_diffusion.guide.reading import GuideFileError, UnsafeFileError, read_untrusted
from helpers.guide_files import (
    N_SEL,
    D,
    chain,
    dump,
    first_version,
    mean_of,
    model_file,
    published_sampler,
    schedule,
    text,
    text_file,
    trainer_checkpoint,
    unet,
    visual,
    visual_file,
)
from helpers.miniature import rewrite

TEXT, VISUAL = text(), visual()
MEAN = mean_of(TEXT)


@pytest.fixture
def files(tmp_path):
    """One file of each kind, all of one run, by name."""
    folder = tmp_path / "guide"
    folder.mkdir()
    clip = {"embeddings": TEXT, "classnames": ["a"] * N_SEL, "clip_model": "ViT-B/16", "num_classes": 117}
    analysis = {"visual_before": VISUAL, "visual_after": None, "text_adapted": TEXT, "metadata": {}, "config": {}}
    checkpoint = {"iteration": 1, "epoch": 0, "model_state_dict": {"label_HO": torch.zeros(N_SEL, 117)}}
    torch.save(checkpoint, folder / "ckpt_00001_00.pt")
    return SimpleNamespace(
        folder=folder,
        model=model_file(folder / "model-7.pt"),
        mean=dump({"text_mean": MEAN}, folder / "mean.pkl"),
        raw=text_file(folder / "raw.pkl", TEXT),
        normalised=text_file(folder / "normalised.pkl", chain(TEXT, MEAN, 4.0), scale_factor=5.0),
        padded=text_file(folder / "padded.pkl", first_version(TEXT)),
        clip=dump(clip, folder / "clip.pkl"),
        visual=visual_file(folder / "visual.pkl", chain(VISUAL, MEAN, 4.0)),
        analysis=dump(analysis, folder / "embeddings_for_viz.pkl"),
        checkpoint=folder / "ckpt_00001_00.pt",
    )


def run(*words: object) -> int:
    return main(["import", *map(str, words)])


# The report


def test_without_out_import_describes_files_and_writes_nothing(files, capsys):
    before = sorted(p.name for p in files.folder.iterdir())
    assert run(*sorted(files.folder.iterdir())) == 0
    said = capsys.readouterr().out
    for line in (
        "text: adapted [12, 32], raw\n",
        "text: adapted [12, 32], normalised, norm 4\n",
        "text: adapted [12, 32], raw, padded to 600",
        "text: raw_clip [12, 32], raw",
        f"text mean: [32], norm {MEAN.norm():.4f}",
        "visual: [24, 32] of 3 images, norm 4, directions only",
        "it says: num_classes 117, zs_type unseen_verb, clip_model checkpoints/ViT-B-16.pt",
        "model: Unet1D D = 32, init_dim 8, dim_mults 1 2; pred_x0, T = 1000, step 500,000, weights ema and online",
        "EZ-HOI checkpoint: D = unknown; label_HO [12, 117]; nothing to import",
        "analysis: [24, 32] before a bridge; text adapted [12, 32], raw",
        "warning: it says scale_factor 5, and its rows have norm 4: the rows are right",
    ):
        assert line in said
    assert sorted(p.name for p in files.folder.iterdir()) == before


def test_import_refuses_code_and_writes_nothing(files, tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "canary"), "w")

    bad = dump({"text_mean": MEAN, "x": Evil()}, files.folder / "bad.pkl")
    assert run(files.model, bad, "--out", tmp_path / "out") == 2
    assert f"{bad} asks for" in capsys.readouterr().err
    assert not (tmp_path / "canary").exists()
    assert not (tmp_path / "out").exists()


# Bridges


@pytest.mark.parametrize("source", ["mean", "raw", "analysis"])
def test_model_and_mean_make_a_bridge(files, tmp_path, source, capsys):
    out = tmp_path / "out"
    assert run(files.model, getattr(files, source), "--out", out) == 0
    assert "the guide's 5 is assumed" in capsys.readouterr().out
    bridge = DiffusionBridge.from_pretrained(out)
    recipe = bridge.config.recipe
    assert (recipe.name, recipe.num_steps, recipe.start_timestep, recipe.scale_factor, recipe.output) == (
        "guide",
        600,
        600,
        5,
        "unit_norm",
    )
    assert torch.allclose(bridge.statistics.text_mean, MEAN, atol=1e-6)
    assert not bridge.statistics.visual_known
    averaged = unet(D, 8, (1, 2), seed=2).state_dict()
    assert all(torch.equal(v, averaged[k]) for k, v in bridge.denoiser.net.state_dict().items())
    facts = bridge.provenance
    assert facts["training"]["step"] == 500_000
    assert facts["imported"]["weights"] == "ema"
    assert next(f["file"] for f in facts["imported"]["files"]) == "model-7.pt"
    assert facts["fingerprint"]["dim"] == D


def test_online_weights_if_asked_for(files, tmp_path):
    assert run(files.model, files.mean, "--weights", "online", "--out", tmp_path / "out") == 0
    bridge = DiffusionBridge.from_pretrained(tmp_path / "out")
    online = unet(D, 8, (1, 2), seed=1).state_dict()
    assert all(torch.equal(v, online[k]) for k, v in bridge.denoiser.net.state_dict().items())


def test_scale_factor_comes_from_normalised_embeddings(files, tmp_path):
    run(files.model, files.mean, files.normalised, "--out", tmp_path / "a")
    assert DiffusionBridge.from_pretrained(tmp_path / "a").config.recipe.scale_factor == 4.0
    run(files.model, files.mean, files.visual, "--out", tmp_path / "b")
    bridge = DiffusionBridge.from_pretrained(tmp_path / "b")
    assert bridge.config.recipe.scale_factor == 4.0
    assert torch.allclose(bridge.statistics.visual_mean, mean_of(VISUAL), atol=1e-5)
    assert bridge.provenance["fingerprint"] == {
        "dim": D, "zs_type": "unseen_verb", "num_classes": 117, "backbone": "ViT-B-16"
    }  # fmt: skip
    run(files.model, files.mean, "--scale-factor", 3, "--out", tmp_path / "c")
    assert DiffusionBridge.from_pretrained(tmp_path / "c").config.recipe.scale_factor == 3.0


def test_means_of_the_first_version(files, tmp_path, capsys):
    """Its text gives the right mean. Its own mean is too short, but a network was trained with it, so it is used and noted."""
    run(files.model, files.padded, "--out", tmp_path / "a")
    assert "the first version" in capsys.readouterr().out
    assert torch.allclose(DiffusionBridge.from_pretrained(tmp_path / "a").statistics.text_mean, MEAN, atol=1e-6)
    shrunk = F.normalize(first_version(TEXT), dim=-1).mean(0)
    short = dump(shrunk, files.folder / "short.pkl")
    run(files.model, files.padded, short, "--out", tmp_path / "b")
    assert "first version's mean, 12/600 of the right one" in capsys.readouterr().out
    assert torch.allclose(DiffusionBridge.from_pretrained(tmp_path / "b").statistics.text_mean, shrunk, atol=1e-6)
    # visual rows are undone with what was subtracted, and the store knows the right mean
    rows = visual_file(files.folder / "old.pkl", chain(VISUAL, shrunk, 5.0))
    assert run(rows, files.padded, "--out", tmp_path / "c") == 2
    assert "mean that was used" in capsys.readouterr().err
    run(rows, files.padded, short, "--out", tmp_path / "c")
    store = FeatureStore(tmp_path / "c")
    assert torch.allclose(store.adapter_feat(), by_image(F.normalize(VISUAL)), atol=1e-5)
    assert torch.allclose(store.statistics().text_mean, MEAN, atol=1e-6)


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["mean"], "of text mean alone nothing can be made: add the trainer's model"),
        (["raw", "mean"], "of text, text mean alone nothing can be made"),
        (["checkpoint"], "of EZ-HOI checkpoint alone"),
        (["analysis"], "of analysis alone"),
        (["model"], "the text mean is missing: give"),
        (["visual"], "the text mean is missing: give"),
        (["model", "normalised"], "normalised: its own mean is no longer in it"),
        (["model", "clip"], "text of CLIP itself"),
        (["model", "mean", "clip"], "text of CLIP itself"),
        (["raw", "normalised", "model"], "are both a text file"),
        (["mean", "mean", "model"], "are both a text mean file"),
    ],
)
def test_import_says_which_files_are_missing(files, tmp_path, names, says, capsys):
    assert run(*(getattr(files, name) for name in names), "--out", tmp_path / "out") == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_forced_clip_text_is_noted_in_the_bridge(files, tmp_path):
    assert run(files.model, files.clip, "--force", "--out", tmp_path / "out") == 0
    notes = DiffusionBridge.from_pretrained(tmp_path / "out").provenance["imported"]["notes"]
    assert any(note.startswith("FORCED") and "CLIP itself" in note for note in notes)


def test_files_of_different_runs_are_refused(files, tmp_path, capsys):
    wide = dump(mean_of(text(64)), files.folder / "wide.pkl")
    assert run(files.model, wide, "--out", tmp_path / "out") == 2
    assert "model-7.pt has 32, wide.pkl has 64" in capsys.readouterr().err
    other = dump(mean_of(-TEXT), files.folder / "other.pkl")
    assert run(files.model, other, files.raw, "--out", tmp_path / "out") == 2
    assert "is not the mean of" in capsys.readouterr().err
    uneven = visual_file(files.folder / "uneven.pkl", VISUAL)
    assert run(uneven, files.mean, "--out", tmp_path / "out") == 2
    assert "did not normalise them" in capsys.readouterr().err


def test_weights_without_a_schedule_need_force(files, tmp_path, capsys):
    bare = files.folder / "bare.pt"
    torch.save(unet(D, 8, (1, 2), 1).state_dict(), bare)
    assert run(bare, files.mean, "--out", tmp_path / "out") == 2
    assert "what it predicts is unknown" in capsys.readouterr().err
    assert run(bare, files.mean, "--force", "--out", tmp_path / "out") == 0


def test_diverged_weights_are_refused(files, tmp_path, capsys):
    checkpoint = trainer_checkpoint()
    checkpoint["ema"]["ema_model.model.final_conv.bias"] = torch.tensor([torch.nan])
    torch.save(checkpoint, files.folder / "nan.pt")
    assert run(files.folder / "nan.pt", files.mean, "--out", tmp_path / "out") == 2
    assert "had diverged: take an earlier checkpoint; the other weights may be whole: --weights online" in (
        capsys.readouterr().err
    )
    assert run(files.folder / "nan.pt", files.mean, "--weights", "online", "--out", tmp_path / "out") == 0


def test_incomplete_and_oversized_networks_are_refused(files, tmp_path, capsys):
    checkpoint = trainer_checkpoint()
    del checkpoint["ema"]["ema_model.model.mid_block1.block1.norm.g"]
    torch.save(checkpoint, files.folder / "cut.pt")
    assert run(files.folder / "cut.pt", files.mean, "--out", tmp_path / "out") == 2
    assert "does not fit the guide's Unet1D" in capsys.readouterr().err
    big = trainer_checkpoint(init_dim=8, dim_mults=(1, 2))
    for part, prefix in (("model", ""), ("ema", "ema_model.")):
        big[part][f"{prefix}model.downs.1.3.weight"] = torch.zeros(8 * 200, 8, 3)
    torch.save(big, files.folder / "big.pt")
    assert run(files.folder / "big.pt", files.mean, "--out", tmp_path / "out") == 2
    assert "at most 1024 channels with init_dim = 8, not [1, 200]" in capsys.readouterr().err


def test_a_folder_in_use_is_not_touched(files, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    for made in (files.model, files.visual):
        assert run(made, files.mean, "--out", tmp_path / "mine") == 2
        assert "is in use" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_a_full_disk_leaves_no_folder(files, tmp_path, capsys, mocker):
    mocker.patch.object(os, "fsync", side_effect=OSError(28, "No space left on device"))
    for made in (files.model, files.visual):
        assert run(made, files.mean, "--out", tmp_path / "out") == 2
        assert f"{tmp_path / 'out'} could not be written ([Errno 28]" in capsys.readouterr().err
        assert sorted(path.name for path in tmp_path.iterdir()) == ["guide"]
        assert not (tmp_path / "out").exists()


WRONG = (
    None, "x", "\ud800\x1b[31m", -1, 10**400, float("nan"), float("inf"), [], [float("nan")] * 12, {}, torch.zeros(()),
    torch.zeros(0), torch.zeros(3), torch.tensor(float("nan")), torch.zeros(2, 2, 2), torch.zeros(2, dtype=torch.complex64),
)  # fmt: skip


@pytest.mark.parametrize(
    "kind",
    [
        "raw",
        "normalised",
        "clip",
        "visual",
        "analysis",
        "mean",
        "checkpoint",
        pytest.param("model", marks=pytest.mark.slow),
    ],
)
def test_wrong_values_in_any_field_import_or_raise_a_typed_error(files, tmp_path, kind, capsys):
    whole = read_untrusted(getattr(files, kind))
    if kind == "model":
        places = [(whole, key) for key in whole]
        places += [(whole["ema"], f"ema_model.{key}") for key in ("betas", "loss_weight", "model.init_conv.weight")]
        places += [(whole["ema"], f"ema_model.model.{key}.weight") for key in ("time_mlp.1", "downs.0.3", "downs.1.3")]
    else:
        places = [(whole, key) for key in whole]
        places += [(part, key) for part in whole.values() if isinstance(part, dict) for key in part]
        places += [(part[0], key) for part in whole.values() if isinstance(part, list) and isinstance(part[0], dict) for key in part[0]]  # fmt: skip
    for part, key in places:
        right = part[key]
        for value in WRONG:
            part[key] = value
            assert run(dump(whole, tmp_path / "f")) in (0, 2), (key, value)
            said = capsys.readouterr()
            assert "\x1b" not in said.out + said.err
            assert "\ud800" not in said.out + said.err
        part[key] = right


@pytest.mark.parametrize("kind", ["raw", "visual", "mean", "checkpoint"])
def test_cut_and_flipped_files_import_or_raise_a_typed_error(files, tmp_path, kind):
    data = getattr(files, kind).read_bytes()
    generator = torch.Generator().manual_seed(0)
    for place in torch.randint(len(data), (40,), generator=generator).tolist():
        flipped = bytearray(data)
        flipped[place] ^= 1 << place % 8
        for content, fine in ((data[:place], (2,)), (flipped, (0, 2))):
            (tmp_path / "f").write_bytes(content)
            assert run(tmp_path / "f") in fine, place


def test_errors_name_paths_that_are_too_long(files, tmp_path, capsys):
    assert run("x" * 300) == 2
    assert "x" * 300 in capsys.readouterr().err
    assert run(files.model, files.mean, "--out", tmp_path / ("y" * 300)) == 2
    assert "y" * 300 in capsys.readouterr().err


def test_module_refuses_steps_outside_the_schedule(files, tmp_path):
    run(files.model, files.mean, "--out", tmp_path / "out")
    for steps in (0, 2000):
        with pytest.raises(EzhoiDiffusionError, match=r"steps|levels"):
            DiffusionBridgeHOI(tmp_path / "out", inference_steps=steps)


# -- what an imported bridge does not know


def test_an_unknown_visual_mean_stays_unknown(files, tmp_path):
    run(files.model, files.mean, "--out", tmp_path / "out")
    with pytest.raises(BridgeError, match="import it together with the file of visual embeddings"):
        mean_shift.load(tmp_path / "out")
    statistics = ModalityStatistics.text_only(MEAN)
    assert statistics.gap != statistics.gap
    assert not ModalityStatistics.from_tensors(statistics.tensors()).visual_known
    path = tmp_path / "out" / "config.json"
    rewrite(path, recipe=json.loads(path.read_text())["recipe"] | {"input_mean": "visual", "name": "mine"})
    with pytest.raises(BridgeError, match="'mine' uses the visual mean, which is not known"):
        DiffusionBridge.from_pretrained(tmp_path / "out")
    run(files.model, files.mean, files.visual, "--out", tmp_path / "both")
    assert mean_shift.load(tmp_path / "both")(VISUAL).shape == VISUAL.shape


def test_a_run_refuses_an_imported_bridge_unless_forced(files, tmp_path, capsys):
    run(files.model, files.mean, "--out", tmp_path / "out")
    bridge = DiffusionBridge.from_pretrained(tmp_path / "out")
    own = Fingerprint("ViT-B-16", D, "hicodet", None, 117, 212, "HO", True, True, "aa", "bb", {})
    args = SimpleNamespace(restore_context=False, force=False)
    ezhoi_run = EzHoiRun(None, args, None, None, None)
    ezhoi_run.__dict__["fingerprint"] = own
    with pytest.raises(FingerprintError) as refused:
        ezhoi_run.check_fingerprint(bridge, "diffusion")
    assert "weights is 'aa' here, unknown there" in str(refused.value)
    assert "dim is" not in str(refused.value)
    args.force = True
    ezhoi_run.check_fingerprint(bridge, "diffusion")
    assert "unknown there" in ezhoi_run.forced[0]


# Features


def by_image(rows: torch.Tensor) -> torch.Tensor:
    """Order features as a store does: by image, and images by first appearance."""
    return torch.cat([rows[0:6], rows[12:18], rows[6:12], rows[18:24]])


@pytest.mark.parametrize("words", [["mean"], ["mean", "raw"], ["raw"], ["mean", "normalised"], ["mean", "analysis"]])
def test_visual_embeddings_become_a_store_of_directions(files, tmp_path, words):
    assert run(files.visual, *(getattr(files, word) for word in words), "--out", tmp_path / "out") == 0
    store = FeatureStore(tmp_path / "out")
    assert torch.allclose(store.adapter_feat(), by_image(F.normalize(VISUAL)), atol=1e-5)
    assert [(i["name"], i["rows"]) for i in store.images] == [
        ("HICO_train_7.jpg", 12), ("HICO_train_2.jpg", 6), ("HICO_train_9.jpg", 6)
    ]  # fmt: skip
    assert store.rows("objects").tolist() == by_image(torch.arange(24)).tolist()
    assert torch.allclose(store.statistics().text_mean, MEAN, atol=1e-5)
    assert torch.allclose(store.statistics().visual_mean, mean_of(VISUAL), atol=1e-5)
    assert len(store.text) == (0 if words == ["mean"] else N_SEL)
    assert (store.split, store.imported["norms"]) == ("train", False)
    assert next(f["file"] for f in store.imported["files"]) == "visual.pkl"
    with pytest.raises(FeatureStoreError, match="'labels' is not in its source files: capture"):
        store.rows("labels")
    with pytest.raises(FeatureStoreError, match="the norms of features"):
        store.require_captured("the norms of features")


def test_test_images_are_not_trained_on(files, tmp_path, capsys):
    metadata = [{"image_id": "HICO_test2015_00000001.jpg"}] * 24
    path = dump({"embeddings": chain(VISUAL, MEAN, 5.0), "metadata": metadata, "config": {}}, files.folder / "test.pkl")
    run(path, files.mean, "--out", tmp_path / "out")
    assert main(["train", str(tmp_path / "out"), "--recipe", "guide", "--out", str(tmp_path / "bridge")]) == 2
    assert "holds the test split" in capsys.readouterr().err


def test_many_features_fill_several_shards(files, tmp_path, monkeypatch):
    monkeypatch.setattr("ezhoi_diffusion.features.writer.ROWS_PER_SHARD", 10)
    run(files.visual, files.mean, "--out", tmp_path / "out")
    store = FeatureStore(tmp_path / "out")
    assert [shard["rows"] for shard in store.index["shards"]] == [12, 12]
    assert torch.allclose(store.adapter_feat(), by_image(F.normalize(VISUAL)), atol=1e-5)


def test_the_guides_recipe_trains_on_it(files, tmp_path, capsys):
    run(files.visual, files.mean, "--out", tmp_path / "features")
    small = [
        "--train-steps",
        "2",
        "--val-every",
        "2",
        "--batch-size",
        "4",
        "--denoiser-options",
        '{"width": 16, "depth": 1}',
    ]
    line = [
        "train",
        str(tmp_path / "features"),
        "--recipe",
        "guide",
        "--start-timestep",
        "5",
        "--num-steps",
        "5",
        *small,
    ]
    assert main([*line, "--out", str(tmp_path / "bridge")]) == 0
    bridge = DiffusionBridge.from_pretrained(tmp_path / "bridge")
    assert torch.equal(bridge.statistics.text_mean, FeatureStore(tmp_path / "features").statistics().text_mean)
    assert bridge(VISUAL).norm(dim=1).allclose(torch.ones(24))
    assert (
        main(["train", str(tmp_path / "features"), "--recipe", "paper", *small, "--out", str(tmp_path / "text")]) == 2
    )
    assert "too few text features" in capsys.readouterr().err


# The guide's module


def reference(x: torch.Tensor, checkpoint: dict, mean: torch.Tensor, steps: int, objective: str, scale: float, net):
    buffers = {name: checkpoint["ema"][f"ema_model.{name}"] for name in schedule()}
    return F.normalize(published_sampler(net, buffers, chain(x, mean, scale), steps, objective, scale), dim=-1)


@pytest.mark.parametrize("objective", ["pred_x0", "pred_noise", "pred_v"])
@pytest.mark.parametrize(("num_steps", "scale"), [(1, 5.0), (50, 5.0), (20, 3.0)])
def test_module_equals_the_published_sampler(tmp_path, objective, num_steps, scale):
    checkpoint = trainer_checkpoint(objective=objective)
    torch.save(checkpoint, tmp_path / "m.pt")
    mean = dump(MEAN, tmp_path / "mean.pkl")
    bridge = DiffusionBridgeHOI(tmp_path / "m.pt", mean, inference_steps=num_steps, scale_factor=scale)
    expected = reference(VISUAL[:6], checkpoint, MEAN, num_steps, objective, scale, unet(D, 8, (1, 2), seed=2))
    found = bridge(VISUAL[:6])
    assert torch.isfinite(expected).all()
    assert (found - expected).abs().max() <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("num_steps", [600, 1000])
def test_module_equals_the_published_sampler_with_the_guides_steps(tmp_path, num_steps):
    test_module_equals_the_published_sampler(tmp_path, "pred_x0", num_steps, 5.0)


@pytest.mark.slow
@pytest.mark.parametrize("dim", [512, 768])
@pytest.mark.parametrize("dim_mults", [(1, 2, 4, 8), (1, 2, 4)])
def test_module_equals_the_published_sampler_at_full_size(tmp_path, dim, dim_mults):
    checkpoint = trainer_checkpoint(dim, init_dim=32, dim_mults=dim_mults)
    torch.save(checkpoint, tmp_path / "m.pt")
    mean = mean_of(text(dim))
    dump({"text_mean": mean}, tmp_path / "mean.pkl")
    bridge = DiffusionBridgeHOI(tmp_path / "m.pt", tmp_path / "mean.pkl", inference_steps=20)
    x = visual(2, dim)
    expected = reference(x, checkpoint, mean, 20, "pred_x0", 5.0, unet(dim, 32, dim_mults, seed=2))
    assert (bridge(x) - expected).abs().max() <= 1e-5


def test_module_has_the_guides_signature_and_prints_what_it_loaded(files, capsys):
    names = ["self", "diffusion_path", "text_mean_path", "inference_steps", "scale_factor", "verbose"]
    assert list(inspect.signature(DiffusionBridgeHOI.__init__).parameters) == names
    bridge = DiffusionBridgeHOI(diffusion_path=str(files.model), text_mean_path=str(files.mean), verbose=True)
    said = capsys.readouterr().out
    for word in ("D = 32", "pred_x0", "ema weights of step 500000", "recipe guide", "600 evaluations", "output unit"):
        assert word in said
    recipe = bridge.bridge.config.recipe
    assert (recipe.num_steps, recipe.start_timestep, recipe.scale_factor) == (600, 600, 5.0)


def test_module_takes_folders_of_bridges(files, tmp_path):
    run(files.model, files.mean, "--out", tmp_path / "out")
    own = DiffusionBridge.from_pretrained(tmp_path / "out")
    assert DiffusionBridgeHOI(tmp_path / "out").bridge.config == own.config
    guide = DiffusionBridgeHOI(files.model, files.mean, inference_steps=30)
    overridden = DiffusionBridgeHOI(tmp_path / "out", inference_steps=30, scale_factor=5.0)
    assert torch.equal(overridden(VISUAL[:2]), guide(VISUAL[:2]))
    with pytest.raises(GuideFileError, match=r"scale_factor is 3, and the network in .* was trained with 5"):
        DiffusionBridgeHOI(tmp_path / "out", scale_factor=3.0)


def test_module_does_not_change_the_module_around_it(files):
    class Detector(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(2, 2)

    detector = Detector()
    saved = detector.state_dict()
    detector.diffusion_bridge = DiffusionBridgeHOI(files.model, files.mean, inference_steps=5)
    before = detector.diffusion_bridge(VISUAL)
    assert detector.state_dict().keys() == saved.keys()
    detector.load_state_dict(saved, strict=True)
    assert len(list(detector.parameters())) == 2
    detector.train().half()
    assert torch.equal(detector.diffusion_bridge(VISUAL), before)
    assert detector.diffusion_bridge(VISUAL.half()).dtype == torch.float16
    detector.to("meta")
    assert detector.diffusion_bridge.bridge.input_mean.device.type == "meta"


@pytest.mark.parametrize(
    ("model", "mean", "num_steps", "error", "says"),
    [
        ("model", None, 5, GuideFileError, "the text mean is missing"),
        ("mean", "mean", 5, GuideFileError, "both a text mean"),
        ("checkpoint", "mean", 5, GuideFileError, "there is no model among the files"),
        ("model", "mean", 1001, GuideFileError, "schedule has 1000 timesteps"),
        ("model", "mean", 0, EzhoiDiffusionError, "num_steps"),
        ("nowhere", "mean", 5, GuideFileError, "cannot be read"),
        ("folder", None, 5, BridgeError, "config.json"),
    ],
)
def test_module_refuses(files, model, mean, num_steps, error, says):
    path = getattr(files, model, files.folder / "nowhere")
    with pytest.raises(error, match=says):
        DiffusionBridgeHOI(path, mean and getattr(files, mean), inference_steps=num_steps)


def test_module_runs_no_code_from_a_file(files, tmp_path):
    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "canary"), "w")

    torch.save({**trainer_checkpoint(), "extra": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(UnsafeFileError, match=r"evil\.pt asks for .*open"):
        DiffusionBridgeHOI(tmp_path / "evil.pt", files.mean)
    assert not (tmp_path / "canary").exists()


def test_package_exports_the_module_without_importing_torch():
    code = "import sys, ezhoi_diffusion as e; assert 'DiffusionBridgeHOI' in e.__all__; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
    command = [sys.executable, "-m", "ezhoi_diffusion", "import", "--help"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "what are these?" in said
