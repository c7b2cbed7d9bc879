"""`ezhoi-diffusion train FEATURES --out DIR`: a bridge from captured features."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ezhoi_diffusion.errors import EzhoiDiffusionError

if TYPE_CHECKING:
    from ezhoi_diffusion.features.store import FeatureStore
    from ezhoi_diffusion.training.data import TrainingData

RECIPE_FLAGS = ("start_step", "steps", "strength", "output", "scale")
EPILOG = """\
recipes:
  blend   (default) learns the text features; at eval a visual row is bridged from a low level and blended with itself
  paper   learns the text features; starts at level 600, 5 evaluations (Diffusion Bridge, CVPR 2025)
  guide   learns visual features less the text mean; 600 evaluations, unit output. It hurt wherever it was measured.

steps are two things: --start-step is how strongly a feature is bridged, --steps is how many network evaluations that takes.

examples:
  ezhoi-diffusion train FEATURES --out BRIDGE
  ezhoi-diffusion train FEATURES --out BRIDGE --recipe paper --denoiser unet1d --train-steps 500000
  ezhoi-diffusion train FEATURES --out BRIDGE --resume
  accelerate launch --num_processes 4 -m ezhoi_diffusion train FEATURES --out BRIDGE
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the flags: the fields of TrainConfig, and those of its recipe that change how it is applied."""
    from dataclasses import MISSING, fields
    from typing import Literal, get_args, get_origin, get_type_hints

    from ezhoi_diffusion.training.config import TrainConfig

    parser.description = (
        "Train a diffusion bridge on features that `run … --plugin capture` captured from training images."
    )
    parser.epilog = EPILOG
    parser.add_argument("features", type=Path, metavar="FEATURES", help="the folder of a capture of the train split")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for bridge and checkpoints")
    parser.add_argument("--resume", action="store_true", help="go on from the newest whole checkpoint in --out")
    parser.add_argument("--recipe", metavar="NAME", help="blend (default), paper or guide; see below")
    parser.add_argument("--start-step", type=int, help="t0, the level at which a feature enters: strength (recipe's)")
    parser.add_argument("--steps", type=int, help="S, network evaluations a feature costs at eval (recipe's)")
    parser.add_argument("--strength", type=float, help="share of the bridged direction in the result, 0..1 (recipe's)")
    parser.add_argument("--output-mode", dest="output", help="calibrated (keeps each row's norm) or unit (recipe's)")
    parser.add_argument("--scale-factor", dest="scale", type=float, help="norm of every network input (recipe's, 5)")
    types = get_type_hints(TrainConfig)
    for entry in fields(TrainConfig):
        if entry.name == "recipe":
            continue
        kind, default = types[entry.name], "" if entry.default is MISSING else f" ({entry.default})"
        parser.add_argument(
            f"--{entry.name.replace('_', '-')}",
            type={int: int, float: float, str: str}.get(kind, str if get_origin(kind) is Literal else json.loads),
            choices=get_args(kind) if get_origin(kind) is Literal else None,
            help=entry.metadata["help"] + default,
        )


def run(args: argparse.Namespace) -> int:
    """Train, and draw the curve."""
    from dataclasses import fields, replace

    from ezhoi_diffusion.builtin.diffusion import components
    from ezhoi_diffusion.diffusion.recipes import DEFAULT_RECIPE, RECIPES
    from ezhoi_diffusion.evaluation.plots import plot_training
    from ezhoi_diffusion.features.store import FeatureStore
    from ezhoi_diffusion.plugins import PluginHost
    from ezhoi_diffusion.training.trainer import TrainConfig, train

    if args.recipe is not None and args.recipe not in RECIPES:
        raise EzhoiDiffusionError(f"there is no recipe '{args.recipe}'; recipes are {', '.join(RECIPES)}")
    recipe = RECIPES[args.recipe] if args.recipe else DEFAULT_RECIPE
    recipe = replace(recipe, **_given(args, RECIPE_FLAGS))
    config = TrainConfig(
        **{"recipe": recipe, **_given(args, [f.name for f in fields(TrainConfig) if f.name != "recipe"])}
    )

    store = FeatureStore(args.features)
    out = train(
        training_data(store, config.recipe.trained_on),
        config,
        args.out,
        registry=components(PluginHost()),
        resume=args.resume,
    )
    if int(os.environ.get("RANK", "0")) == 0:
        facts = json.loads((out / "training.json").read_text())
        plot_training(facts["history"], facts["isotropic_val_loss"], out / "training.png")
        last, bar = facts["history"][-1]["val_loss"], facts["isotropic_val_loss"]
        if last > bar:
            print(
                f"note: the validation loss {last:.4f} is above that of the closed-form isotropic estimate, {bar:.4f}: the "
                f"network has learned its {config.recipe.trained_on} rows by heart. {out / 'best'} generalises better",
                flush=True,
            )
        print(f"bridge: {out} (lowest validation loss: {out / 'best'}); curve: {out / 'training.png'}", flush=True)
    return 0


def training_data(store: FeatureStore, side: str) -> TrainingData:
    """What may be learned from; visual rows are read only where `side` is "visual".

    Raises EzhoiDiffusionError for a capture of test images.
    """
    import torch

    from ezhoi_diffusion.training.data import TrainingData

    if store.split != "train":
        raise EzhoiDiffusionError(
            f"{store.folder} holds the {store.split} split: a bridge is trained on training images only; capture those with "
            f"--capture-split train"
        )
    provenance = {"fingerprint": store.fingerprint, "features": {"rows": len(store), "images": len(store.images)}}
    return TrainingData(
        visual=store.adapter_feat() if side == "visual" else store.text[:0],
        image=store.image_index() if side == "visual" else torch.zeros(0, dtype=torch.long),
        text=store.text,
        statistics=store.statistics(),
        provenance=provenance,
        context=store.context,
    )


def _given(args: argparse.Namespace, names: Any) -> dict[str, Any]:
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}
