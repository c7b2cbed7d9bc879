"""`ezhoi-diffusion distill BRIDGE FEATURES --out DIR`: a student that takes one network evaluation."""

from __future__ import annotations

import argparse
from pathlib import Path

from ezhoi_diffusion.errors import EzhoiDiffusionError

DESCRIPTION = """\
Train a student: a network that gives in one evaluation what a diffusion bridge gives in many, on rows like those of FEATURES. It
is a bridge as any other, for --bridge and --bridges none,diffusion=DIR; strength and output may still be swept, start step and
steps are its teacher's. How near it comes is measured on the tenth of the images that nothing learns from, printed, and stored."""
EPILOG = """\
reading it:
  cosine is that of the student's result to the teacher's, before it is blended with the row and gets mean and norm back: the
  whole bridge differs by less. A student below --min-cosine is not written.
  The default bridge takes 5 evaluations, which cost little: distil what takes many, e.g. recipe paper with --num-steps 50.

example:
  ezhoi-diffusion distill BRIDGE FEATURES --out STUDENT --start-timestep 600 --num-steps 50
  ezhoi-diffusion compare TEST_FEATURES --bridges none,diffusion=BRIDGE,diffusion=STUDENT
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    from ezhoi_diffusion.training.distillation import MIN_COSINE

    parser.description, parser.epilog = DESCRIPTION, EPILOG
    add = parser.add_argument
    add("bridge", metavar="BRIDGE", help="the teacher: a folder made by `ezhoi-diffusion train`, or hf:USER/NAME")
    add("features", type=Path, metavar="FEATURES", help="the folder of a capture of the train split")
    add("--out", type=Path, required=True, metavar="DIR", help="folder for the student")
    add("--start-timestep", type=int, metavar="N", help="level at which rows enter the teacher (its own)")
    add("--num-steps", type=int, metavar="N", help="evaluations of the teacher (its own)")
    add("--train-steps", type=int, default=2000, metavar="N", help="optimizer steps (2000)")
    add("--seed", type=int, default=0, help="of rows, mixtures and order (0)")
    add(
        "--min-cosine", type=float, default=MIN_COSINE, metavar="C",
        help=f"refuse a student whose mean cosine to the teacher on held-out rows is lower ({MIN_COSINE})",
    )  # fmt: skip
    parser.set_defaults(force=False)  # on rows of another host there is nothing to learn of a bridge


def run(args: argparse.Namespace) -> int:
    """Distil, judge, write."""
    import torch

    from ezhoi_diffusion.cli.compare import acceptance
    from ezhoi_diffusion.diffusion.bridge import DiffusionBridge
    from ezhoi_diffusion.diffusion.components import components
    from ezhoi_diffusion.features.split import validation_mask
    from ezhoi_diffusion.features.store import FeatureStore
    from ezhoi_diffusion.files import require_unused
    from ezhoi_diffusion.hub import local
    from ezhoi_diffusion.plugins import PluginManager
    from ezhoi_diffusion.report.write import report_folder
    from ezhoi_diffusion.training.distillation import distill

    if args.train_steps < 1:
        raise EzhoiDiffusionError(f"--train-steps must be at least 1, not {args.train_steps}")
    store = FeatureStore(args.features)
    store.require_training_images("a student learns from")
    require_unused(args.out, EzhoiDiffusionError)
    with report_folder(args.out):
        pass  # refused now, not after the work
    teacher = DiffusionBridge.from_pretrained(local(args.bridge), registry=components(PluginManager()))
    acceptance(store, args, [])(teacher, args.bridge)
    changes = {name: getattr(args, name) for name in ("start_timestep", "num_steps") if getattr(args, name) is not None}
    teacher = teacher.override(**changes) if changes else teacher
    try:
        apart = validation_mask(len(store.images))[store.image_index()]
    except ValueError as error:
        raise EzhoiDiffusionError(f"{store.folder} has too few images: {error}") from error
    rows = store.adapter_feat()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    student, reached = distill(
        teacher, rows[~apart], rows[apart], store.text, train_steps=args.train_steps, seed=args.seed, device=device
    )
    recipe = teacher.config.recipe
    print(
        f"one evaluation against the teacher's {recipe.num_steps} from level {recipe.start_timestep}: {reached}",
        flush=True,
    )
    if not reached.cosine >= args.min_cosine:
        raise EzhoiDiffusionError(
            f"the student's mean cosine to its teacher is {reached.cosine:.4f} on held-out rows, below {args.min_cosine}, so it is not "
            f"written: give more --train-steps, features of more images, or a teacher of a lower --start-timestep; or --min-cosine"
        )
    student.save_pretrained(args.out)
    print(
        f"student: {args.out}; compare it with --bridges none,diffusion={args.bridge},diffusion={args.out}", flush=True
    )
    return 0
