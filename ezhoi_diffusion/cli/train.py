"""`ezhoi-diffusion train FEATURES --out DIR`: a bridge from captured features."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ezhoi_diffusion.errors import EzhoiDiffusionError, Interrupted

if TYPE_CHECKING:
    from ezhoi_diffusion.diffusion.recipes import Recipe
    from ezhoi_diffusion.features.store import FeatureStore
    from ezhoi_diffusion.training.config import TrainConfig
    from ezhoi_diffusion.training.data import TrainingData

RECIPE_FLAGS = (
    "start_timestep",
    "num_steps",
    "spacing",
    "sampler",
    "blend",
    "output",
    "scale_factor",
    "noise_augmentation",
)
# Where the defaults, which fit few texts and the mlp, do not: rows by the ten thousand, and the reference's rate for its UNet
ON_VISUAL_ROWS = {"train_steps": 5000, "val_every": 500, "checkpoint_every": 1000, "learning_rate": 8e-5}
ON_PAIRS = {**ON_VISUAL_ROWS, "patience": 5}
OF_UNET = {"learning_rate": 8e-5}
EPILOG = """\
recipes:
  gentle   (default) learns the text features; at eval a visual row is bridged from a low level and blended with itself
  paper   learns the text features; starts at level 600, 5 evaluations (Diffusion Bridge, CVPR 2025)
  paired  learns from pairs (an annotated visual row, the text of its class) of seen classes, with noise augmentation, and
          stops early (--patience 5)
  guide   learns visual features less the text mean; 600 evaluations, unit output. It hurt wherever it was measured.

what the numbers mean:
  --inference-steps N is two things in one: a feature starts at level N of the noise schedule, which is how strongly it is
      changed, and takes N network evaluations, which is what it costs. More is not better quality: it is a stronger change.
      --start-timestep and --num-steps set the two apart; in the small worlds measured, 5 and 600 evaluations were .02 mAP apart.
  --scale-factor S is the norm of every row that the network sees, after its mean is taken off. It sets how much noise a level
      is, so training and eval need the same one: it is stored in the bridge, and eval has no flag for it.
  --train-steps counts optimizer steps. The 500,000 of the guide (8-15 hours on a GPU) are for the unet1d and visual rows; the
      default network has enough after one or two thousand on texts; on visual rows and pairs, which are many, the default is
      5000 at a learning rate of 8e-5, the reference's, as it is for unet1d. In the guide's folders model-K.pt is
      K = step // 10000: the model of step 500,000 is model-50.pt, and model-500.pt would be five million.
  the loss is weighted by the signal-to-noise ratio, so its size says nothing by itself. Compare the validation loss with the
      isotropic estimate, which knows no data: a network above it has learned nothing that generalises. training.json and the
      curve have both for five ranges of levels. A lower loss does not promise a higher mAP: compare on the host.
  the bridge is that of the step with the lowest validation loss (best/ has it while the training runs): from there on a network
      mostly learns its rows by heart. --patience N stops when N validations in a row brought no new lowest loss. Resumed, a stopped
      training stays stopped; a larger --patience takes it further, as larger --train-steps do unless --lr-schedule follows them.

flags may be written with underscores, as in the guide. --use_amp is --mixed-precision fp16 (or bf16).

examples:
  ezhoi-diffusion train FEATURES --out BRIDGE
  ezhoi-diffusion train FEATURES --out BRIDGE --recipe paper --denoiser unet1d --train-steps 500000
  ezhoi-diffusion train FEATURES --out BRIDGE --train-steps 5000 --patience 5 --lr-schedule cosine --warmup-steps 200 --log-with tensorboard
  ezhoi-diffusion train FEATURES --out BRIDGE --resume

several processes, on GPUs or, as written, on CPUs (the batch is divided among them; the result is that of one process, to rounding):
  accelerate launch --multi_gpu --num_processes 4 -m ezhoi_diffusion train FEATURES --out BRIDGE
several machines, on each with its own RANK; FEATURES on all of them, --out is used on the first only:
  accelerate launch --multi_gpu --num_machines 2 --num_processes 8 --machine_rank RANK --main_process_ip FIRST \\
    --main_process_port 29500 -m ezhoi_diffusion train FEATURES --out BRIDGE
"""
# flags of the guide whose counterpart has another name or shape
ELSEWHERE = {
    "--data-path": "the first argument, FEATURES: the folder of a capture",
    "--results-folder": "--out DIR",
    "--use-amp": "--mixed-precision fp16, or bf16",
    "--init-dim": """--denoiser unet1d --denoiser-options '{"init_dim": 32}'""",
    "--dim-mults": """--denoiser unet1d --denoiser-options '{"dim_mults": [1, 2, 4, 8]}'""",
}


class _Elsewhere(argparse.Action):
    """Ends the command with the name that a flag of the guide has here."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: object, values: object, option_string: str | None = None
    ) -> None:
        parser.exit(2, f"ezhoi-diffusion: error: {option_string} of the guide is {self.const} here\n")


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
    parser.add_argument(
        "--seeds", type=int, default=1, metavar="N",
        help="train N bridges, with --seed and the N-1 after it, into DIR/seed-…; compare and tune take DIR as one bridge with "
        "a mean and a spread (1)",
    )  # fmt: skip
    parser.add_argument("--recipe", metavar="NAME", help="gentle (default), paper, paired or guide; see below")
    parser.add_argument(
        "--start-timestep", type=int, help="t0, the level at which a feature enters: strength (recipe's)"
    )
    parser.add_argument("--num-steps", type=int, help="S, network evaluations a feature costs at eval (recipe's)")
    parser.add_argument(
        "--inference-steps",
        type=int,
        metavar="N",
        help="the guide's: --start-timestep N --num-steps N, strength and cost in one",
    )
    parser.add_argument(
        "--spacing",
        help="spacing of the evaluations' levels: linear, or quadratic or cubic, denser near the end (recipe's)",
    )
    parser.add_argument(
        "--sampler", metavar="NAME", help="registered sampler: ddim, published, or a plugin's (recipe's)"
    )
    parser.add_argument("--blend", type=float, help="share of the bridged direction in the result, 0..1 (recipe's)")
    parser.add_argument(
        "--output-mode", dest="output", help="keep_norm (keeps each row's norm) or unit_norm (recipe's)"
    )
    parser.add_argument(
        "--noise-augmentation",
        type=float,
        help="noise added to visual rows of pairs, as a share of their norm (recipe's)",
    )
    parser.add_argument(
        "--scale-factor", dest="scale_factor", type=float, help="norm of every network input (recipe's, 5)"
    )
    parser.add_argument(
        "--log-with",
        type=lambda names: names.split(","),
        default=[],
        metavar="NAMES",
        help="experiment trackers by accelerate's names, e.g. tensorboard,wandb, or all (none)",
    )
    types = get_type_hints(TrainConfig)
    for entry in fields(TrainConfig):
        if entry.name == "recipe":
            continue
        kind, default = types[entry.name], "" if entry.default is MISSING else f" ({entry.default})"
        names = [f"--{entry.name.replace('_', '-')}"]
        parser.add_argument(
            *names + (["--timesteps"] if entry.name == "num_timesteps" else []),
            type={int: int, float: float, str: str}.get(kind, str if get_origin(kind) is Literal else json.loads),
            choices=get_args(kind) if get_origin(kind) is Literal else None,
            help=entry.metadata["help"] + default,
        )
    for flag, ours in ELSEWHERE.items():
        parser.add_argument(flag, nargs="*", action=_Elsewhere, const=ours, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    """Train, and draw the curve."""
    from dataclasses import replace

    from ezhoi_diffusion.artifact import CONFIG
    from ezhoi_diffusion.diffusion.bridge import build_denoiser
    from ezhoi_diffusion.diffusion.components import components
    from ezhoi_diffusion.diffusion.denoiser import FittedDenoiser
    from ezhoi_diffusion.evaluation.variants import SEED_PREFIX
    from ezhoi_diffusion.features.store import FeatureStore
    from ezhoi_diffusion.files import current
    from ezhoi_diffusion.plugins import PluginManager
    from ezhoi_diffusion.report.plots import plot_training
    from ezhoi_diffusion.training.curve import notes
    from ezhoi_diffusion.training.processes import exit_distributed
    from ezhoi_diffusion.training.trainer import train

    config = train_config(args)
    if args.seeds < 1:
        raise EzhoiDiffusionError(f"--seeds must be at least 1, not {args.seeds}")
    if args.seeds > 1 and current(args.out, CONFIG).exists():
        raise EzhoiDiffusionError(
            f"{args.out} holds a trained bridge, so it cannot hold several seeds: give another folder"
        )
    data = training_data(FeatureStore(args.features), config.recipe.trained_on)
    denoiser = build_denoiser(config.bridge_config(data.statistics.dim), components(PluginManager()))
    if args.seeds > 1 and isinstance(denoiser, FittedDenoiser) and config.recipe.trained_on == "text":
        raise EzhoiDiffusionError(
            f"{config.denoiser} is fitted to all texts, whatever the seed: several seeds would be the same bridge. Leave --seeds out"
        )
    for number in range(args.seeds):
        seeded = replace(config, seed=config.seed + number)
        folder = args.out if args.seeds == 1 else args.out / f"{SEED_PREFIX}{seeded.seed}"
        try:
            out = train(
                data, seeded, folder, registry=components(PluginManager()), resume=args.resume, log_with=args.log_with
            )
        except Interrupted as stopped:
            exit_distributed(stopped.status, f"ezhoi-diffusion: {stopped}\n")
            raise
        if int(os.environ.get("RANK", "0")) == 0:
            facts = json.loads((out / "training.json").read_text())
            if not facts["history"]:
                of_it = (
                    "which says nothing: it cannot give back a text that it does not hold"
                    if isinstance(denoiser, FittedDenoiser) and denoiser.memorizes
                    else f"of the isotropic estimate {facts['isotropic_val_loss']:.4f}"
                )
                print(
                    f"{facts['stopped']}; without the held-out rows its loss on those is {facts['val_loss']:.4f}, {of_it}\nbridge: {out}",
                    flush=True,
                )
                continue
            plot_training(facts, out / "training.png")
            for note in notes(facts):
                print(f"note: {note}", flush=True)
            print(f"bridge: {out}, of step {facts['best_step']}; curve: {out / 'training.png'}", flush=True)
    exit_distributed()
    return 0


def train_config(args: argparse.Namespace) -> TrainConfig:
    """What the flags say. Raises EzhoiDiffusionError for values that cannot be meant, names that nobody knows."""
    from dataclasses import fields

    from ezhoi_diffusion.diffusion.components import components
    from ezhoi_diffusion.plugins import PluginManager
    from ezhoi_diffusion.training.config import TrainConfig

    given = _given(args, [f.name for f in fields(TrainConfig) if f.name != "recipe"])
    recipe = chosen_recipe(args)
    own: dict[str, Any] = {"text": {}, "visual": ON_VISUAL_ROWS, "pairs": ON_PAIRS}[recipe.trained_on]
    unet = OF_UNET if given.get("denoiser") == "unet1d" else {}
    config = TrainConfig(**{"recipe": recipe, **own, **unet, **given})
    _ = components(PluginManager()).denoisers[config.denoiser]
    return config


def chosen_recipe(args: argparse.Namespace) -> Recipe:
    """The named recipe with what the flags change of it. Raises EzhoiDiffusionError for flags that contradict."""
    from dataclasses import replace

    from ezhoi_diffusion.diffusion.recipes import DEFAULT_RECIPE, RECIPES

    if args.recipe is not None and args.recipe not in RECIPES:
        raise EzhoiDiffusionError(f"there is no recipe '{args.recipe}'; recipes are {', '.join(RECIPES)}")
    recipe = RECIPES[args.recipe] if args.recipe else DEFAULT_RECIPE
    if args.inference_steps is not None:
        if args.start_timestep is not None or args.num_steps is not None:
            raise EzhoiDiffusionError("--inference-steps sets --start-timestep and --num-steps both: give it, or them")
        args.start_timestep = args.num_steps = args.inference_steps
    return replace(recipe, **_given(args, RECIPE_FLAGS))


def training_data(store: FeatureStore, side: str) -> TrainingData:
    """What may be learned from; visual rows are read only where `side` is "visual" or "pairs".

    Raises EzhoiDiffusionError for a capture of test images.
    """
    import torch

    from ezhoi_diffusion.features.labels import seen_pairs
    from ezhoi_diffusion.training.data import TrainingData

    store.require_training_images("a bridge is trained on")
    provenance = {"fingerprint": store.fingerprint, "features": {"rows": len(store), "images": len(store.images)}}
    visual, image, own_text = store.text[:0], torch.zeros(0, dtype=torch.long), None
    if side == "visual":
        visual, image = store.adapter_feat(), store.image_index()
    elif side == "pairs":
        pairs = seen_pairs(store, held_out=None)
        visual, image, own_text = pairs.visual, pairs.image, pairs.text
    return TrainingData(
        visual, image, store.text, store.statistics(), provenance, store.context, own_text, len(store.images)
    )


def _given(args: argparse.Namespace, names: Any) -> dict[str, Any]:
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}
