"""Other flags, V-COCO, odd numbers of images and processes, and flags that upstream cannot run."""

from __future__ import annotations

import json
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch

from ezhoi_diffusion import attach, hookimpl
from ezhoi_diffusion.bridge import fingerprint_differences
from ezhoi_diffusion.cli import main
from ezhoi_diffusion.demo import towers
from ezhoi_diffusion.ezhoi.feature_tap import FeatureTapError
from ezhoi_diffusion.ezhoi.fingerprint import fingerprint
from ezhoi_diffusion.ezhoi.limits import UnsupportedError, cannot_run, refuse_unsupported
from ezhoi_diffusion.features.score import targets_of
from ezhoi_diffusion.features.store import FeatureStore
from helpers.miniature import (
    dump,
    ezhoi_flags,
    launch,
    printed_by_ezhoi,
    rows_of,
    run_in_miniature,
    same_figures,
    vcoco_flags,
)


def rebuilt(store: FeatureStore) -> torch.Tensor:
    """Logits of all captured pairs, computed from the store alone."""
    ezhoi = store.ezhoi
    return (store.adapter_feat() @ ezhoi["text"].T) @ ezhoi["label"] / ezhoi["sample_lens"] / 2 * ezhoi["logit_scale"]


def logits_in(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensors[f"{i}.logits"] for i in range(sum(key.endswith(".logits") for key in tensors))])


# -- other flags -------------------------------------------------------------------------------------------------

VARIANTS = {  # flags added, flags left out, split, groups of classes; two kinds in one run where they do not meet
    "rare_first, no img_align": ([], ("--img_align",), "rare_first", {"unseen", "seen"}),
    "nothing hidden, act_descriptor": (["--act_descriptor", "--txt_align"], (), None, set()),
    "without_unseen_name": (["--without_unseen_name"], (), "unseen_verb", {"unseen", "seen"}),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Weights with which no adapter is the identity, as a fresh one is."""
    path = tmp_path_factory.mktemp("checkpoint") / "ckpt.pt"
    generator = torch.Generator().manual_seed(0)
    dim = towers.EMBED_DIM
    weights = {
        "mem_adapter.up_proj_mem.weight": (dim, 64),
        "txtmem_adapter.up_proj_mem.weight": (dim, 64),
        "act_descriptor_attn.up_proj_mem.weight": (dim, dim),
    }
    state = {name: torch.randn(shape, generator=generator) * 0.05 for name, shape in weights.items()}
    torch.save({"model_state_dict": state}, path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_captured_features_rebuild_logits_and_identity_changes_nothing(small_world, checkpoint, name, tmp_path):
    extra, left_out, split, groups = VARIANTS[name]
    flags = [f for f in ezhoi_flags(small_world, evaluate=True, zs_type=split) if f not in left_out]
    flags += [*extra, "--resume", str(checkpoint)]
    capture = ["--plugin", "capture", "--capture", str(tmp_path / "f"), "--capture-split", "train"]
    done, seen = dump(tmp_path / "c.safetensors", "launched", *flags, *capture, "--max-images", "6")
    assert done.returncode == 0, done.stderr
    store = FeatureStore(tmp_path / "f")
    assert torch.allclose(rebuilt(store), logits_in(seen), atol=1e-5)
    assert torch.equal(targets_of(store)[store.ezhoi["text_interaction"]], store.ezhoi["label"].argmax(1))
    assert {key.removeprefix("classes/") for key in store.ezhoi if key.startswith("classes/")} == groups | {
        "full",
        "rare",
    }
    bare, _ = dump(tmp_path / "b.safetensors", "bare", *flags)
    compared = launch(*flags, "--compare", "none,identity")
    assert compared.returncode == 0, compared.stderr
    rows = rows_of(compared.stdout)
    printed = printed_by_ezhoi(bare.stdout + ("nan nan nan" if split is None else ""))
    assert same_figures(rows["none"], printed)
    assert rows["identity"] == rows["none"]


def test_fingerprint_has_flags_that_weights_do_not_show(ezhoi):
    own = fingerprint(ezhoi.model, ezhoi.args)
    for name, value in (("act_descriptor", True), ("without_unseen_name", True), ("vlmtxt", "fix")):
        other = fingerprint(ezhoi.model, Namespace(**{**vars(ezhoi.args), name: value}))
        assert fingerprint_differences(own.to_dict(), other.to_dict()) == {
            name: (getattr(ezhoi.args, name, None), value)
        }
    # without --zs too, the split chooses whose prompts the unseen classes borrow
    here, there = (
        fingerprint(ezhoi.model, Namespace(**{**vars(ezhoi.args), "zs": False, "unseen_pt_inj": True, "zs_type": kind}))
        for kind in ("rare_first", "unseen_verb")
    )
    assert fingerprint_differences(here.to_dict(), there.to_dict()) == {"unseen_pt_inj": ("rare_first", "unseen_verb")}
    older = {key: value for key, value in own.to_dict().items() if key != "options"}
    assert "act_descriptor" in fingerprint_differences(own.to_dict(), older), "what does not say is not taken for equal"


# -- V-COCO ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_vcoco_capture_train_and_inject_with_cache(vcoco, tmp_path):
    # the flags of --cache name the folder of the test images, V-COCO's `_val`
    flags = [*vcoco_flags(vcoco, tmp_path / "o", cache=True), "--plugin", "capture", "--capture-split", "train"]
    done, seen = dump(tmp_path / "c.safetensors", "launched", *flags, "--capture", str(tmp_path / "f"))
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "o" / "cache.json").exists(), "the pass is the run"
    store = FeatureStore(tmp_path / "f")
    assert torch.allclose(rebuilt(store), logits_in(seen), atol=1e-5)
    assert store.images[0]["name"].startswith("COCO_train2014")
    assert {name for name in store.ezhoi if name.startswith("classes/")} == {"classes/full"}
    lookup, allowed = store.ezhoi["object_n_verb_to_interaction"], store.ezhoi["object_to_target"]
    assert lookup.shape == allowed.shape
    assert torch.equal(lookup >= 0, allowed), "both count objects as the detector does"
    assert store.rows("labels").any()
    bridge = tmp_path / "bridge"
    assert main(["train", str(store.folder), "--out", str(bridge), "--train-steps", "20"]) == 0

    run = {}
    for name, ours in (("bare", None), ("off", []), ("on", ["--plugin", "diffusion", "--bridge", str(bridge)])):
        out = tmp_path / name
        command = ["main_tip_finetune.py", *vcoco_flags(vcoco, out, cache=True)]
        done = run_in_miniature(*command) if ours is None else launch(*command[1:], *ours)
        assert done.returncode == 0, done.stderr
        run[name] = json.loads((out / "cache.json").read_text())
    assert run["off"] == run["bare"]
    assert len(run["on"]) == len(run["bare"])
    assert run["on"] != run["bare"]


def test_caching_detaches(ezhoi, use):
    """A run that only caches never calls test_hico. A tap without hits is an error at its end."""
    use(adds=SimpleNamespace(post_adapter_feat=hookimpl(lambda adapter_feat: adapter_feat + 1)))
    ezhoi.args.plugin, ezhoi.args.eval, ezhoi.args.cache = ["adds"], False, True
    ezhoi.args.img_clip_pt = False  # cache_hico would have no file names

    class Engine:
        def cache_vcoco(self, images):
            with torch.no_grad():
                return [ezhoi.model([image], [ezhoi.targets[0]]) for image in images]

    engine = Engine()
    before = engine.cache_vcoco(ezhoi.images[:3])
    attach(ezhoi.model, ezhoi.args, engine)
    changed = engine.cache_vcoco(ezhoi.images[:3])
    after = engine.cache_vcoco(ezhoi.images[:3])
    for bare, added, again in zip(before, changed, after, strict=True):
        for was, shifted, now in zip(bare or [], added or [], again or [], strict=True):
            assert torch.equal(was["scores"], now["scores"])
            assert not torch.equal(was["scores"], shifted["scores"])
    assert vars(engine) == {}
    attach(ezhoi.model, ezhoi.args, engine)
    with pytest.raises(FeatureTapError, match="never ran in eval mode"):
        engine.cache_vcoco([])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--cache", "--compare", "none,identity"], "run --cache twice, with and without --plugin diffusion"),
        (["--eval", "--plugin", "diffusion", "--bridge", "x"], "run --cache in place of --eval"),
    ],
)
def test_unsupported_vcoco_runs_are_refused(vcoco, tmp_path, flags, message):
    done = launch(*vcoco_flags(vcoco, tmp_path, cache=False), *flags)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert "start from a randomly initialised model" not in done.stdout, "refused before the model is built"


def test_capture_with_training_augmentation_is_refused(small_world, tmp_path):
    flags = [*ezhoi_flags(small_world, evaluate=False), "--plugin", "capture", "--capture", str(tmp_path / "f")]
    done = launch(*flags, "--partitions", "train2015", "train2015")
    assert done.returncode == 2
    assert "--partitions train2015 train2015: EZ-HOI loads whatever starts with `train`" in done.stderr


# -- odd numbers of images and processes ---------------------------------------------------------------------------


@pytest.mark.slow
def test_processes_capture_each_image_once(small_world, tmp_path):
    """DistributedSampler would show some images twice if they do not divide evenly."""
    stores = {}
    for processes in (1, 2, 3):
        capture = ["--plugin", "capture", "--capture", str(tmp_path / str(processes)), "--max-images", "5"]
        done = launch(*ezhoi_flags(small_world, evaluate=False), *capture, "--world-size", str(processes))
        assert done.returncode == 0, done.stderr
        stores[processes] = FeatureStore(tmp_path / str(processes))
    one = stores.pop(1)
    for store in stores.values():
        assert [image["index"] for image in store.images] == list(range(5))
        assert [image["name"] for image in store.images] == [image["name"] for image in one.images]
        assert torch.allclose(store.adapter_feat(), one.adapter_feat(), atol=1e-5)
        for name in ("labels", "pairing", "gt_hoi"):
            assert torch.equal(store.rows(name), one.rows(name))
        assert store.fingerprint == one.fingerprint


# -- what upstream cannot run --------------------------------------------------------------------------------------

USUAL = {
    "dataset": "hicodet", "num_classes": 117, "logits_type": "HO", "txtcls_pt": True, "img_align": True, "eval": True,
    "cache": False, "zs": True, "zs_type": "unseen_verb", "unseen_pt_inj": True, "img_clip_pt": True, "vis_tor": 1.0,
    "vlmtxt": "llava", "fill_zs_verb_type": 0, "use_insadapter": True, "without_unseen_name": False, "plugin": [],
    "compare": "",
}  # fmt: skip


@pytest.mark.parametrize(
    "flags",
    [
        {},
        *({"zs_type": kind} for kind in ("rare_first", "non_rare_first", "unseen_object", "default")),
        {"zs": False},
        {"img_align": False},
        {"logits_type": "HO+U"},
        {"txt_align": True},
        {"act_descriptor": True},
        {"without_unseen_name": True},
        {"eval": False, "plugin": ["capture"], "capture": "F"},
        {"dataset": "vcoco", "num_classes": 24, "eval": False, "cache": True, "plugin": ["diffusion"]},
        {"eval": False, "vis_tor": 2.0},
        {"use_gt_boxes": True, "compare": "none,identity"},
        {"eval": False, "without_unseen_name": True},
        {"zs_type": "uc0", "unseen_pt_inj": False},
    ],
)
def test_supported_flags_are_accepted(flags):
    assert cannot_run(Namespace(**{**USUAL, **flags})) == {}
    assert cannot_run(Namespace(**flags)) == {}, "a script without a flag does not have its problem"


@pytest.mark.parametrize(
    ("flags", "named", "reason"),
    [
        ({"dataset": "swig"}, "--dataset swig", "build_dataset"),
        ({"num_classes": 600}, "--num_classes 600", "0/0"),
        ({"dataset": "vcoco", "eval": False}, "--dataset vcoco --num_classes 117", "24"),
        ({"logits_type": "HO+U+T"}, "--logits_type HO+U+T", "use --logits_type HO"),
        ({"txtcls_pt": False}, "(no --txtcls_pt)", "add --txtcls_pt"),
        *(
            ({flag: True}, f"--{flag}", "leave it out")
            for flag in (
                "fix_txt_pt", "clip_test", "seperate_pre_pt", "init_txtcls_pt", "txtcls_descrip", "img_descrip_prompt",
                "use_consistloss", "multi_cross", "pseudo_label", "tpt", "sanity",
            )
        ),
        ({"d_detr": True}, "--d_detr true", "leave it out"),
        ({"vlmtxt": "llava2"}, "--vlmtxt llava2", "19 of 600"),
        ({"zs_type": "uc3"}, "--zs_type uc3", "no uc3_diff.txt"),
        ({"zs_type": "default", "without_unseen_name": True}, "--zs_type default --without_unseen_name", "seen_diff"),
        ({"fill_zs_verb_type": 1}, "--fill_zs_verb_type 1", "refresh_unseen_verb_cache_mem"),
        ({"vis_tor": 2.0}, "--vis_tor 2.0", "logit_scale_U"),
        ({"cache": True}, "--cache --img_clip_pt", "use --eval"),
        ({"use_gt_boxes": True}, "--use_gt_boxes", "CPU"),
        ({"dataset": "vcoco", "num_classes": 24}, "--dataset vcoco --eval", "--cache"),
        ({"eval": False, "without_unseen_name": True, "plugin": ["capture"]}, "--without_unseen_name", "--eval flags"),
    ],
)  # fmt: skip
def test_unsupported_flags_are_named_with_reason(flags, named, reason):
    args = Namespace(**{**USUAL, **flags})
    found = cannot_run(args)
    assert list(found) == [named]
    assert reason in found[named]
    if not args.plugin:
        refuse_unsupported(args)  # a bare run is left alone
        args.plugin = ["diffusion"]
    with pytest.raises(UnsupportedError) as refused:
        refuse_unsupported(args)
    assert f"{named}: {found[named]}" in str(refused.value)


def test_attach_refuses_unsupported_flags(ezhoi):
    ezhoi.args.plugin, ezhoi.args.fix_txt_pt = ["diffusion"], True
    with pytest.raises(UnsupportedError, match=r"--fix_txt_pt: forward\(\) uses origin_ctx"):
        attach(ezhoi.model, ezhoi.args)
    ezhoi.args.plugin = []
    attach(ezhoi.model, ezhoi.args).detach()
