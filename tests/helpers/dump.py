"""Run an EZ-HOI script and save what it computed, with hooks of its own that share no code with the package.

    python dump.py OUT.safetensors bare|launched SCRIPT FLAGS…

Keys: `{image}.logits|scores|boxes|pairing|labels`, `{image}.feat` (output of mem_adapter or vis_fuse), `context.{i}`.
"""

import runpy
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

MODULE = "upt_tip_cache_model_free_finetune_distillself"


def main() -> None:
    out, how, *rest = sys.argv[1:]
    sys.path.insert(0, str(Path.cwd()))
    sys.argv = rest
    detector = __import__(MODULE).UPT
    kept: dict[str, torch.Tensor] = {}
    feats: list[torch.Tensor] = []
    scored = 0

    def keep_feature(module, args, output):
        if not module.training:
            feats.append(output.reshape(len(output), -1).clone())

    init, post = detector.__init__, detector.postprocessing

    def __init__(self, *args, **kwargs):
        init(self, *args, **kwargs)
        (getattr(self, "mem_adapter", None) or self.vis_fuse).register_forward_hook(keep_feature)
        for i, vector in enumerate(self.clip_head.prompt_learner.txtcls_ctx_pt):
            kept[f"context.{i}"] = vector.detach().clone()

    def postprocessing(self, boxes, bh, bo, logits, *args, **kwargs):
        nonlocal scored
        found = post(self, boxes, bh, bo, logits, *args, **kwargs)
        for one, feat, image in zip((f for f, h in zip(found, bh, strict=True) if len(h)), feats, logits, strict=True):
            for name in ("scores", "boxes", "pairing", "labels"):
                kept[f"{scored}.{name}"] = one[name].detach().clone()
            kept[f"{scored}.logits"], kept[f"{scored}.feat"] = image.detach().clone(), feat
            scored += 1
        feats.clear()
        return found

    detector.__init__, detector.postprocessing = __init__, postprocessing
    try:
        if how == "bare":
            runpy.run_path(rest[0], run_name="__main__")
        else:
            from ezhoi_diffusion.cli import main as launch

            raise SystemExit(launch(["run", *rest]))
    finally:
        save_file({name: tensor.contiguous() for name, tensor in kept.items()}, out)


if __name__ == "__main__":
    main()
