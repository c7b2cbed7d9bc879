"""The nine kinds of files are recognised, checked and described. guide_files.py writes them from their description."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ezhoi_diffusion.guide.formats import read_guide_file
from ezhoi_diffusion.guide.kinds import (
    AnalysisFile,
    EzHoiCheckpoint,
    ModelFile,
    TextFile,
    TextMeanFile,
    VisualFile,
)
from ezhoi_diffusion.guide.reading import GuideFileError
from helpers.guide_files import (
    HOI,
    D,
    chain,
    dump,
    first_version,
    mean_of,
    model_file,
    text,
    text_file,
    trainer_checkpoint,
    visual,
    visual_file,
)

TEXT, VISUAL = text(), visual()
MEAN = mean_of(TEXT)


# 1-4: text


def test_raw_text(tmp_path):
    found = read_guide_file(text_file(tmp_path / "anything", TEXT))
    assert isinstance(found, TextFile)
    assert torch.equal(found.embeddings, TEXT)
    assert (found.source, found.scale, found.padded) == ("adapted", None, False)
    assert found.facts["num_classes"] == 117
    assert found.warnings == ()


@pytest.mark.parametrize("scale", [5.0, 3.0])
def test_normalised_text_has_the_scale_of_its_rows(tmp_path, scale):
    found = read_guide_file(text_file(tmp_path / "f", chain(TEXT, MEAN, scale), scale_factor=5.0))
    assert isinstance(found, TextFile)
    assert found.scale == pytest.approx(scale)
    assert any("says scale_factor 5" in warning for warning in found.warnings) == (scale != 5.0)


@pytest.mark.parametrize("index", [True, False])
def test_zero_rows_of_the_first_version_are_dropped(tmp_path, index):
    changes = {} if index else {"select_HOI_index": None}
    found = read_guide_file(text_file(tmp_path / "f", first_version(TEXT), **changes))
    assert isinstance(found, TextFile)
    assert torch.equal(found.embeddings, TEXT)
    assert found.padded
    assert "588 of 600 rows stand for no selected class" in found.warnings[0]
    assert "is 0.020 of the right one" in found.warnings[0]


def test_identical_rows_of_the_first_version_are_dropped(tmp_path):
    padded = first_version(TEXT)
    shrunk = torch.nn.functional.normalize(padded, dim=-1).mean(0)
    found = read_guide_file(text_file(tmp_path / "f", chain(padded, shrunk, 5.0), scale_factor=5.0))
    assert isinstance(found, TextFile)
    assert found.padded
    assert found.scale == pytest.approx(5.0)
    assert torch.allclose(found.embeddings, chain(TEXT, shrunk, 5.0), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_raw_clip_text_is_marked(tmp_path, dtype):
    names = [f"a photo of a person {n}" for n in range(117)]
    value = {"embeddings": text(rows=117).to(dtype), "classnames": names, "clip_model": "ViT-B/16", "num_classes": 117}
    found = read_guide_file(dump(value, tmp_path / "f"))
    assert isinstance(found, TextFile)
    assert (found.source, found.embeddings.dtype, found.scale) == ("raw_clip", torch.float32, None)
    assert "not adapted" in found.warnings[0]


@pytest.mark.parametrize(
    ("rows", "changes", "says"),
    [
        (TEXT, {"select_HOI_index": HOI[:-1]}, "12 text rows and names 11 classes"),
        (TEXT, {"select_HOI_index": [*HOI[:-1], 600]}, "no HICO-DET interaction"),
        (torch.full((12, D), torch.nan), {}, "12 of the 12 rows of 'embeddings' hold NaN"),
        (torch.zeros(12, D), {}, "all rows of 'embeddings' are zero"),
        (torch.zeros(D), {}, "not a matrix"),
        ("a word", {}, "not a matrix"),
    ],
)
def test_broken_text_is_refused(tmp_path, rows, changes, says):
    with pytest.raises(GuideFileError, match=says):
        read_guide_file(text_file(tmp_path / "f", rows, **changes))


# 5: means


@pytest.mark.parametrize(
    "value",
    [
        MEAN,
        MEAN[None],
        MEAN.clone().requires_grad_(),
        torch.nn.Parameter(MEAN),
        MEAN.numpy(),
        MEAN[None].numpy(),
        MEAN.tolist(),
        {"text_mean": MEAN, "clip_model": "unseen"},
        {"text_mean": MEAN.tolist()},
        {"text_mean": MEAN[None].numpy()},
        {"mean": MEAN, "num_classes": 117},
        {"mean": MEAN.double()},
    ],
    ids=str.__call__,
)
@pytest.mark.parametrize("how", ["pickle", "torch", "torch-old"])
def test_every_form_of_a_mean(tmp_path, value, how):
    if how == "pickle":
        dump(value, tmp_path / "f")
    else:
        torch.save(value, tmp_path / "f", _use_new_zipfile_serialization=how == "torch")
    found = read_guide_file(tmp_path / "f")
    assert isinstance(found, TextMeanFile)
    assert torch.allclose(found.mean, MEAN)
    assert (found.mean.dtype, found.mean.shape, found.mean.requires_grad) == (torch.float32, (D,), False)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (10 * MEAN, "normalise every embedding first"),
        (0 * MEAN, "norm 0.0000"),
        (MEAN * torch.nan, "norm nan"),
        ({"text_mean": torch.ones(3, 4)}, r"\[3, 4\], not \[D\]"),
        ({"mean": "0.5"}, "not numbers"),
        (torch.ones(3, 4), "a Tensor of shape"),
        ({"surprise": 1}, "'surprise', which no script of the guide writes"),
        ({}, "holds nothing"),
        ("text", "holds a str"),
        (None, "holds a NoneType"),
    ],
)
def test_broken_means_and_other_things_are_refused(tmp_path, value, says):
    with pytest.raises(GuideFileError, match=says):
        read_guide_file(dump(value, tmp_path / "f"))


def test_an_empty_file_says_that_its_writer_crashed(tmp_path):
    (tmp_path / "mean.pkl").touch()
    with pytest.raises(GuideFileError, match=r"mean\.pkl is empty .0 bytes.: the program that wrote it crashed"):
        read_guide_file(tmp_path / "mean.pkl")


# 6-7: visual embeddings, and the file for pictures


def test_visual_embeddings(tmp_path):
    found = read_guide_file(visual_file(tmp_path / "f", chain(VISUAL, MEAN, 3.0)))
    assert isinstance(found, VisualFile)
    assert torch.equal(found.embeddings, chain(VISUAL, MEAN, 3.0))
    assert found.scale == pytest.approx(3.0)
    assert (found.images[0], len(found.images), len(set(found.images))) == ("HICO_train_7.jpg", 24, 3)
    assert found.objects.tolist() == list(range(24))
    assert (found.facts["zs_type"], found.facts["num_classes"]) == ("unseen_verb", 117)
    assert "says scale_factor 5" in found.warnings[0]
    assert "directions only" in found.contents


def test_zero_embeddings_are_dropped_with_their_metadata(tmp_path):
    rows = chain(VISUAL, MEAN, 5.0)
    rows[3] = 0
    found = read_guide_file(visual_file(tmp_path / "f", rows))
    assert isinstance(found, VisualFile)
    assert found.objects.tolist() == [0, 1, 2, *range(4, 24)]
    assert "1 rows are zero" in found.warnings[0]


def test_embeddings_of_different_norms_are_noticed(tmp_path):
    found = read_guide_file(visual_file(tmp_path / "f", VISUAL))
    assert isinstance(found, VisualFile)
    assert found.uneven


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"metadata": [{"image_id": "a"}] * 23}, "24 rows and metadata of 23"),
        ({"metadata": {}}, "no list"),
        ({"metadata": [{}] * 24}, "row 0 have no image_id"),
        ({"embeddings": np.full((24, D), np.inf)}, "24 of the 24 rows"),
        ({"embeddings": np.zeros((24, D))}, "all rows of 'embeddings' are zero"),
    ],
)
def test_broken_visual_files_are_refused(tmp_path, change, says):
    value = {"embeddings": chain(VISUAL, MEAN, 5.0).numpy(), "metadata": [{"image_id": "a"}] * 24, "config": {}}
    with pytest.raises(GuideFileError, match=says):
        read_guide_file(dump({**value, **change}, tmp_path / "f"))


@pytest.mark.parametrize("after", [True, False])
def test_analysis_files_have_text(tmp_path, after):
    keys = ("image_id", "batch_idx", "pair_idx", "gt_hoi", "gt_verb")
    value = {
        "visual_before": VISUAL,
        "visual_after": torch.nn.functional.normalize(VISUAL) if after else None,
        "text_adapted": TEXT,
        "metadata": {key: list(range(len(VISUAL))) for key in keys},
        "config": {"num_classes": 117},
    }
    found = read_guide_file(dump(value, tmp_path / "f"))
    assert isinstance(found, AnalysisFile)
    assert torch.equal(found.text.embeddings, TEXT)
    assert (found.facts, "and after" in found.contents) == ({"num_classes": 117}, after)
    with pytest.raises(GuideFileError, match="visual_after is"):
        read_guide_file(dump({**value, "visual_after": VISUAL[:3]}, tmp_path / "f"))


# 8: the trainer's checkpoint


@pytest.mark.parametrize("objective", ["pred_x0", "pred_noise", "pred_v"])
def test_trainer_checkpoint(tmp_path, objective):
    path = model_file(tmp_path / "model-7.pt", objective=objective)
    found = read_guide_file(path)
    assert isinstance(found, ModelFile)
    assert (found.dim, found.init_dim, found.dim_mults) == (D, 8, (1, 2))
    assert (found.objective, found.num_timesteps, found.step) == (objective, 1000, 500_000)
    assert set(found.weights) == {"ema", "online"}
    saved = torch.load(path, weights_only=True)
    name = "downs.0.0.block1.proj.weight"
    assert torch.equal(found.weights["ema"][name], saved["ema"][f"ema_model.model.{name}"])
    assert torch.equal(found.weights["online"][name], saved["model"][f"model.{name}"])
    assert not torch.equal(found.weights["ema"][name], found.weights["online"][name])


@pytest.mark.parametrize("timesteps", [100, 1000])
def test_timesteps_are_counted(tmp_path, timesteps):
    assert read_guide_file(model_file(tmp_path / "f", timesteps=timesteps)).num_timesteps == timesteps


def test_the_guides_network_is_read_whole(tmp_path):
    checkpoint = trainer_checkpoint(512, init_dim=32, dim_mults=(1, 2, 4, 8))
    assert len(checkpoint["model"]) == 251
    torch.save(checkpoint, tmp_path / "model-50.pt")
    found = read_guide_file(tmp_path / "model-50.pt")
    assert isinstance(found, ModelFile)
    assert (found.dim, found.init_dim, found.dim_mults) == (512, 32, (1, 2, 4, 8))
    assert len(found.weights["ema"]) == len(found.weights["online"]) + 0 >= 238


BARE = {
    "diffusion": (lambda c: c["model"], "online"),
    "network": (
        lambda c: {k.removeprefix("model."): v for k, v in c["model"].items() if k.startswith("model.")},
        "online",
    ),
    "average": (lambda c: c["ema"], "ema"),
    "parallel": (lambda c: {f"module.{k}": v for k, v in c["model"].items()}, "online"),
    "parallel inside": (lambda c: {**c, "model": {f"module.{k}": v for k, v in c["model"].items()}}, "ema"),
    "parallel average": (
        lambda c: {**c, "ema": {k.replace("ema_model.", "ema_model.module."): v for k, v in c["ema"].items()}},
        "ema",
    ),
    "without average": (lambda c: {**c, "ema": None}, "online"),
    "average never updated": (lambda c: {**c, "ema": {**c["ema"], "initted": torch.tensor(False)}}, "online"),
}


@pytest.mark.parametrize("form", BARE)
def test_other_forms_of_the_checkpoint(tmp_path, form):
    change, first = BARE[form]
    torch.save(change(trainer_checkpoint()), tmp_path / "f")
    found = read_guide_file(tmp_path / "f")
    assert isinstance(found, ModelFile)
    assert next(iter(found.weights)) == first
    assert found.weights[first].keys() >= {"init_conv.weight", "final_conv.bias", "downs.1.3.weight"}
    assert (found.objective is None) == (form == "network")
    assert any("no averaged" in warning for warning in found.warnings) == (first == "online")


def test_another_schedule_is_refused_by_name(tmp_path):
    with pytest.raises(GuideFileError, match="linear noise schedule"):
        read_guide_file(model_file(tmp_path / "f", kind="linear"))
    checkpoint = trainer_checkpoint()
    for part, prefix in (("model", ""), ("ema", "ema_model.")):
        checkpoint[part][f"{prefix}loss_weight"] = torch.linspace(1, 2, 1000)
    torch.save(checkpoint, tmp_path / "f")
    with pytest.raises(GuideFileError, match="loss_weight fits no objective"):
        read_guide_file(tmp_path / "f")


def test_another_network_is_refused_with_both_values(tmp_path):
    checkpoint = trainer_checkpoint()
    for part, prefix in (("model", ""), ("ema", "ema_model.")):
        checkpoint[part][f"{prefix}model.init_conv.weight"] = torch.zeros(8, 3, 7)
    torch.save(checkpoint, tmp_path / "f")
    with pytest.raises(GuideFileError, match=r"3 input channels \(1 expected\)"):
        read_guide_file(tmp_path / "f")


# 9: EZ-HOI's own


@pytest.mark.parametrize(("fuse", "dim"), [([512, 1024], 512), ([1536, 2304], 768)])
@pytest.mark.parametrize("adapter", [True, False])
def test_ezhoi_checkpoint(tmp_path, fuse, dim, adapter):
    state = {"label_HO": torch.zeros(212, 117), "vis_fuse.0.weight": torch.zeros(fuse)}
    if adapter:
        state["mem_adapter.down_proj_mem.weight"] = torch.zeros(64, dim)
    extra = {"optim_state_dict": {"state": {}}, "scheduler_state_dict": {"_step_count": 1}, "scaler_state_dict": {}}
    torch.save({"iteration": 7, "epoch": 1, "model_state_dict": state, **extra}, tmp_path / "ckpt_00007_01.pt")
    found = read_guide_file(tmp_path / "ckpt_00007_01.pt")
    assert isinstance(found, EzHoiCheckpoint)
    assert (found.dim, found.facts) == (dim, {"iteration": 7, "epoch": 1})
    assert "label_HO [212, 117]" in found.contents
    assert "--resume" in found.contents
