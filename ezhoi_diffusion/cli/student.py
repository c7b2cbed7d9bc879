"""`ezhoi-diffusion train FEATURES --student-of BRIDGE`: a bridge that needs one network evaluation."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ezhoi_diffusion.cli import arguments
from ezhoi_diffusion.errors import EzhoiDiffusionError

if TYPE_CHECKING:
    from ezhoi_diffusion.features.rows import StoredRows
    from ezhoi_diffusion.features.store import FeatureStore

STUDENT_STEPS = 2000


def distil(args: argparse.Namespace, settings: Mapping[str, Any]) -> int:
    """Train and write a student. settings: how its teacher is applied."""
    from ezhoi_diffusion.device import pick_device
    from ezhoi_diffusion.diffusion.bridge import DiffusionBridge
    from ezhoi_diffusion.diffusion.components import components
    from ezhoi_diffusion.features.store import FeatureStore
    from ezhoi_diffusion.files import new_result
    from ezhoi_diffusion.hub import resolve_path
    from ezhoi_diffusion.plugins import PluginManager
    from ezhoi_diffusion.training.distillation import MIN_COSINE, distill

    train_steps = STUDENT_STEPS if args.train_steps is None else args.train_steps
    min_cosine = MIN_COSINE if args.min_cosine is None else args.min_cosine
    if train_steps < 1:
        raise EzhoiDiffusionError(f"--train-steps must be at least 1, not {train_steps}")
    store = FeatureStore(args.features)
    store.require_training_images("a student learns from")
    with new_result(args.out, EzhoiDiffusionError) as staged:
        registry = components(PluginManager(args.no_plugin))
        teacher = DiffusionBridge.from_pretrained(resolve_path(args.student_of), registry=registry)
        arguments.fingerprint_check(store, False, [])(teacher, args.student_of)
        teacher = teacher.override(**settings)
        training, held_out = _split(store)
        student, reached = distill(
            teacher, training, held_out, store.text,
            train_steps=train_steps, seed=args.seed or 0, device=pick_device(args.device),
        )  # fmt: skip
        recipe = teacher.config.recipe
        baselines: dict[str, float] = student.provenance["distilled"]["baselines"]
        print(
            f"one evaluation instead of {recipe.num_steps} from timestep {recipe.start_timestep}: {reached}. Without a student: cosine "
            f"{baselines['identity']:.4f} for the features as they are, {baselines['single_evaluation']:.4f} for one evaluation of the "
            f"teacher",
            flush=True,
        )
        if not reached.cosine >= min_cosine:
            raise EzhoiDiffusionError(
                f"the student's mean cosine to its teacher on held-out features is {reached.cosine:.4f}, below {min_cosine}, so it was "
                f"not written: use more --train-steps, features of more images, or a lower --start-timestep; or lower --min-cosine"
            )
        unbeaten = [
            f"{name.replace('_', ' ')} {cosine:.4f}"
            for name, cosine in baselines.items()
            if not reached.cosine > cosine
        ]
        if unbeaten:
            raise EzhoiDiffusionError(
                f"the student's mean cosine to its teacher on held-out features is {reached.cosine:.4f}, no better than what costs no "
                f"training ({', '.join(unbeaten)}), so it was not written: use more --train-steps, or the teacher with --set num_steps=1"
            )
        student.save_pretrained(staged)
    print(
        f"student: {args.out}; compare it with --bridges none,diffusion={args.student_of},diffusion={args.out}",
        flush=True,
    )
    return 0


def _split(store: FeatureStore) -> tuple[StoredRows, StoredRows]:
    """Features of training images, and of those that are held out: on disk, because a student learns from a sample."""
    from ezhoi_diffusion.features.rows import StoredRows
    from ezhoi_diffusion.features.split import validation_mask

    try:
        held_out = validation_mask(len(store.images))[store.image_index()]
    except ValueError as error:
        raise EzhoiDiffusionError(f"{store.folder} has too few images: {error}") from error
    training, validation = ((held_out == part).nonzero().squeeze(1) for part in (False, True))
    return StoredRows(store, training), StoredRows(store, validation)
