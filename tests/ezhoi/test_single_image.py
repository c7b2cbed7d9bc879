"""A script for one image, such as upstream's inference.py, runs unmodified and scores as the evaluation."""

from __future__ import annotations

import os
from argparse import ArgumentParser, Namespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from ezhoi_diffusion import EzhoiDiffusionError, add_arguments
from ezhoi_diffusion.cli import main
from ezhoi_diffusion.ezhoi.launch import EzHoiScript
from ezhoi_diffusion.ezhoi.single_image import SingleImageError, check_flags, single_images
from helpers.miniature import DUMP_SCRIPT, MINIATURE, ezhoi_flags, launch, run_in_miniature

# seeds nothing, passes no targets, loads strictly, imports an engine and makes none
INFERENCE = """\
import torch
from main_tip_finetune import command_line
from upt_tip_cache_model_free_finetune_distillself import build_detector
from utils_tip_cache_and_union_finetune import CustomisedDLE, DataFactory, custom_collate


@torch.no_grad()
def main(args):
    args.human_idx = 0
    dataset = DataFactory("hicodet", "test2015", args.data_root, "ViT-B/16")
    lookup = dataset.dataset.object_n_verb_to_interaction
    upt = build_detector(args, dataset.dataset.object_to_verb, lookup, args.clip_dir_vit)
    upt.eval()
    upt.load_state_dict(torch.load(args.resume, weights_only=True)["model_state_dict"])
    for index in range(len(dataset)):
        image, target = dataset[index]
        output = upt([image])
        if output is not None:
            print(target["filename"], len(output[0]["scores"]))


if __name__ == "__main__":
    main(command_line().parse_args())
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("script") / "inference.py"
    path.write_text(INFERENCE)
    return path


@pytest.fixture
def checkpoint(make_ezhoi, tmp_path):
    """Weights that differ from those of a fresh model."""
    path = tmp_path / "ckpt.pt"
    torch.save({"model_state_dict": make_ezhoi().model.state_dict()}, path)
    return path


def infer(script, *flags: str):
    return run_in_miniature("-m", "ezhoi_diffusion", "run", str(script), *flags, PYTHONPATH=environment())


def environment() -> str:
    return os.pathsep.join([str(MINIATURE), os.environ.get("PYTHONPATH", "")])


def test_single_image_scores_equal_the_evaluation(script, small_world, checkpoint, tmp_path):
    flags = [*ezhoi_flags(small_world, evaluate=True), "--resume", str(checkpoint)]
    captured = launch(*flags, "--capture-split", "train", "--plugin", "capture", "--capture", str(tmp_path / "f"))
    assert captured.returncode == 0, captured.stderr
    assert main(["train", str(tmp_path / "f"), "--out", str(tmp_path / "b"), "--train-steps", "20"]) == 0
    bridged = [*flags, "--plugin", "diffusion", "--bridge", str(tmp_path / "b")]

    bare = run_in_miniature(str(script), *flags, PYTHONPATH=environment())
    assert "TypeError: 'NoneType' object is not iterable" in bare.stderr, "the quirk is there"
    refused = infer(script, *bridged)
    assert refused.returncode == 2
    assert "whatever its --seed: add --restore-context" in refused.stderr

    outputs = {}
    for name, more in (("main_tip_finetune.py", []), (str(script), ["--restore-context"])):
        out = tmp_path / f"{len(outputs)}.safetensors"
        done = run_in_miniature(str(DUMP_SCRIPT), str(out), "launched", name, *bridged, *more, PYTHONPATH=environment())
        assert done.returncode == 0, done.stderr
        outputs[name] = load_file(out)
    evaluated, alone = outputs.values()
    assert sum(key.endswith(".scores") for key in evaluated) >= 3
    assert alone.keys() == evaluated.keys()
    assert all(torch.equal(alone[key], evaluated[key]) for key in alone if not key.startswith("context."))


def test_wrong_checkpoint_and_missing_feature_file_are_explained(script, small_world, checkpoint, tmp_path):
    flags = [*ezhoi_flags(small_world, evaluate=True), "--resume", str(checkpoint)]
    other = infer(script, *[flag for flag in flags if flag != "--img_clip_pt"])
    assert other.returncode == 2
    assert "the checkpoint does not fit the model that these flags build" in other.stderr
    assert "img_clip_pt_adapter.weight" in other.stderr
    missing = infer(script, *flags, "--clip_img_file", str(tmp_path))
    assert missing.returncode == 2
    assert "a file of CLIP image features is missing" in missing.stderr
    assert "Traceback" not in other.stderr + missing.stderr


# -- the help, in parts ------------------------------------------------------------------------------------------


class Data:
    """A data set of two images."""

    def __getitem__(self, index):
        image = torch.full((3, 2, 2), float(index))
        return (image, image + 1), {"filename": f"{index}.jpg"}


class Model(nn.Module):
    """Handles its arguments as EZ-HOI does."""

    img_clip_pt, self_image_path = True, None

    def forward(self, images, targets=None):
        return [target["filename"] for target in targets]


def test_target_is_that_of_the_last_data_set_item():
    model, getitem = Model(), Data.__getitem__
    with single_images(Data) as help_model:
        help_model(model)
        data = Data()
        (first, _), (second, _) = data[0], data[1]
        assert model([second]) == ["1.jpg"]
        assert model([first], [{"filename": "given"}]) == ["given"], "a script that names its image is left alone"
        with pytest.raises(SingleImageError, match="not the last one of its data set"):
            model([first])
    assert Data.__getitem__ is getitem
    with pytest.raises(TypeError):
        model([second])


def test_no_help_without_img_clip_pt():
    model = Model()
    model.img_clip_pt = False
    with single_images(Data) as help_model:
        help_model(model)
        image, _ = Data()[0]
        with pytest.raises(TypeError, match="not iterable"):
            model([image])


def test_image_without_pairs_is_named():
    class Nothing(Model):
        def forward(self, images, targets=None):
            return None

    def upstream():
        with single_images(Data) as help_model:
            model, data = Nothing(), Data()
            help_model(model)
            image, _ = data[1]
            return model([image])[0]

    with pytest.raises(SingleImageError, match=r"no human-object pair was found in the image 1\.jpg"):
        upstream()


class PromptAdapter(nn.Module):
    """Cross-attention of prompts [n_ctx, B, C] to CLIP features [B, n, D], as EZ-HOI's adapter."""

    def __init__(self):
        super().__init__()
        self.down, self.attention = nn.Linear(6, 4), nn.MultiheadAttention(4, 2)

    def forward(self, x, prior=None):
        features, mask = prior
        context = self.down(features).transpose(0, 1)
        return x + self.attention(x, context, context, key_padding_mask=mask)[0]


def test_self_image_path_gets_features_as_in_training():
    model = Model()
    model.self_image_path = "own.jpg"
    model.clip_head = nn.Module()
    model.clip_head.prompt_learner = nn.Module()
    adapter = model.clip_head.prompt_learner.img_clip_pt_adapter = PromptAdapter()
    tokens, prompts = torch.randn(1, 5, 6), torch.randn(2, 1, 4)
    # a file has the patch tokens of one image, without the class token, and its rows are divided by their norm
    stored = tokens.squeeze(0)[1:].clone()
    stored /= stored.norm(dim=-1, keepdim=True)
    as_evaluated = adapter(prompts, (torch.stack([stored]), None))
    as_upstream = tokens.squeeze(0).unsqueeze(0).unsqueeze(0)
    with pytest.raises((AssertionError, RuntimeError)):
        adapter(prompts, (as_upstream, None))
    with single_images(None) as help_model:
        help_model(model)
        assert torch.equal(adapter(prompts, (as_upstream, None)), as_evaluated)
        assert torch.equal(adapter(prompts, (torch.stack([stored]), None)), as_evaluated), "a fork that gets it right"
    with pytest.raises((AssertionError, RuntimeError)):
        adapter(prompts, (as_upstream, None))


# -- what cannot run ---------------------------------------------------------------------------------------------


def test_flags_that_hang_or_fail_are_refused(tmp_path):
    one = Namespace(world_size=1, self_image_path=None, img_clip_pt=True)
    check_flags(one, has_engine=False)
    check_flags(Namespace(world_size=2), has_engine=True)
    with pytest.raises(SingleImageError, match="would wait forever for the others"):
        check_flags(Namespace(world_size=2), has_engine=False)
    one.self_image_path = str(tmp_path / "no.jpg")
    with pytest.raises(SingleImageError, match="there is no file"):
        check_flags(one, has_engine=False)
    with pytest.raises(SingleImageError, match=r"run inference\.py for one image"):
        check_flags(one, has_engine=True)


def test_unused_engine_import_is_ignored(script, tmp_path):
    assert EzHoiScript.read(script).engine is None
    assert EzHoiScript.read(MINIATURE / "main_tip_finetune.py").engine
    own = tmp_path / "own.py"
    own.write_text("from m import build_detector, CustomisedDLE as E\nclass Mine(E): pass\n")
    assert EzHoiScript.read(own).engine == "m"


@pytest.mark.parametrize("flag", ["--diffusion_bridge", "--diffusion_text_mean=x", "--diffusion-steps"])
def test_flags_of_the_guide_are_refused_with_ours(flag):
    with pytest.raises(EzhoiDiffusionError, match="--plugin diffusion=DIR"):
        add_arguments(ArgumentParser(), ["--eval", flag, "y"])
    fork = ArgumentParser()
    fork.add_argument(flag.partition("=")[0])
    add_arguments(fork, [flag, "y"])
