"""`ezhoi-diffusion train FEATURES --out DIR`: a bridge from captured features."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ezhoi_diffusion.cli import arguments
from ezhoi_diffusion.errors import EzhoiDiffusionError, Interrupted

if TYPE_CHECKING:
    from ezhoi_diffusion.training.config import TrainConfig

DESCRIPTION = """\
Make a bridge from captured training features: train a diffusion bridge (default), fit another bridge (--bridge NAME), or distil
a diffusion bridge into a student that needs one network evaluation (--student-of BRIDGE). Training a diffusion bridge has two
phases. The search holds a tenth of the texts or images out, and finds the step of the lowest validation loss. The refit starts
over and takes as many steps on all of them. The refit at most doubles the time."""
EPILOG = """\
recipes:
  gentle  (default) learns the text features; a visual feature starts at a low timestep and is blended with itself
  paper   learns the text features; starts at timestep 600, 5 evaluations (Diffusion Bridge, CVPR 2025)
  paired  learns from pairs of seen classes (a visual feature, the text of its class), with noise augmentation and --patience 5
  scored  learns through EZ-HOI's own training loss, from all pairs and the labels of seen classes, with --patience 5
  guide   learns visual features without the text mean; 600 evaluations, unit norm. It hurt wherever it was measured.

what the numbers mean:
  --inference-steps N sets two things: the timestep where a feature starts, which is how much it changes, and the number of
      network evaluations, which is the cost. More is a larger change, not better quality. In the small worlds measured, 5 and
      600 evaluations were 0.02 mAP apart.
  --scale-factor S is the norm of every network input. It sets how much noise a timestep means, so the bridge stores it.
  --train-steps counts optimizer steps. The guide's 500,000 (8-15 hours on a GPU) are for unet1d on visual features. The default
      network needs one or two thousand on texts. The default is 5000 on visual features and pairs, and 600 for scored, which
      also has its own --batch-size, --learning-rate and --ema-decay. In the guide's folders model-K.pt has K = step / 10000:
      step 500,000 is model-50.pt.
  The loss is weighted by the signal-to-noise ratio, save for paired and scored. Compare the validation loss with the isotropic
      estimate, which knows no data: a network above it learned nothing that generalises. A lower loss does not promise a higher
      mAP: use compare.
  The losses are those of the search. Its best step is that of the lowest validation loss; --patience N ends the search after N
      validations without a new lowest one. The bridge comes from the refit, which ends at the best step and has learned from
      everything, so no validation loss can be given for it. --seed is that of both phases, and --resume continues either.

examples:
  ezhoi-diffusion train FEATURES --out BRIDGE
  ezhoi-diffusion train FEATURES --out BRIDGE --resume
  ezhoi-diffusion train FEATURES --out BRIDGE --recipe paper --denoiser unet1d --train-steps 500000
  ezhoi-diffusion train --bridge list                    (the bridges that can be fitted, and their options)
  ezhoi-diffusion train FEATURES --out BRIDGE --bridge residual --set blend=0.5
  ezhoi-diffusion train FEATURES --out STUDENT --student-of BRIDGE --start-timestep 600 --num-steps 50

several processes, on GPUs or CPUs (they share the batch; the result is that of one process, to rounding):
  accelerate launch --multi_gpu --num_processes 4 -m ezhoi_diffusion train FEATURES --out BRIDGE
several seeds at once, on the cores of one machine (compare and tune take BRIDGE as one bridge, as after --seeds):
  for K in 0 1 2 3 4; do OMP_NUM_THREADS=1 ezhoi-diffusion train FEATURES --seed $K --out BRIDGE/seed-$K & done; wait
several machines (FEATURES on all of them; --out is used on the first only):
  accelerate launch --multi_gpu --num_machines 2 --num_processes 8 --machine_rank RANK --main_process_ip FIRST \\
    --main_process_port 29500 -m ezhoi_diffusion train FEATURES --out BRIDGE
"""
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
EVERYDAY = ("denoiser", "train_steps", "seed")  # fields of TrainConfig by group of flags
VALIDATION = ("val_fraction", "val_every", "patience", "checkpoint_every")
FOR_FIT = ("features", "data_path", "out", "bridge", "set", "no_plugin")
FOR_STUDENT = (
    "features", "data_path", "out", "student_of", "min_cosine", "set", "inference_steps", "start_timestep", "num_steps",
    "train_steps", "seed", "device", "no_plugin",
)  # fmt: skip
ONLY_FOR_STUDENT = ("min_cosine", "device")
LIST = "list"  # --bridge list


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the flags: fields of TrainConfig, and those of its recipe that change how the bridge is applied."""
    from importlib.metadata import entry_points

    from ezhoi_diffusion.plugins import ENTRY_POINT_GROUP

    installed = ", ".join(sorted(point.name for point in entry_points(group=ENTRY_POINT_GROUP))) or "none"
    parser.description, parser.epilog = DESCRIPTION, f"{EPILOG}\ninstalled plugins: {installed}"
    parser.usage = "%(prog)s FEATURES --out DIR [--recipe NAME | --bridge NAME | --student-of BRIDGE] [options]"
    arguments.add_features(parser, "train", nargs="?")
    arguments.add_out(parser, "folder for the bridge and its checkpoints (required)")
    group = parser.add_argument_group("instead of training a diffusion bridge")
    group.add_argument(
        "--bridge",
        metavar="NAME",
        help="fit this bridge, built in or of an installed plugin; --set gives its options. `train --bridge list` explains them",
    )
    group.add_argument("--student-of", metavar="BRIDGE", help="distil this bridge, a folder or hf:USER/REPO")
    group.add_argument(
        "--min-cosine", type=float, metavar="C",
        help="of a student: refuse it below this mean cosine to its teacher on held-out features (0.99)",
    )  # fmt: skip
    _add_everyday(parser)
    group = parser.add_argument_group("optimisation")
    _add_fields(group, leave_out=(*EVERYDAY, *VALIDATION))
    group = parser.add_argument_group("validation and checkpoints")
    _add_fields(group, only=VALIDATION)
    group.add_argument(
        "--log-with", type=lambda names: names.split(","), metavar="NAMES",
        help="experiment trackers by accelerate's names, for example tensorboard,wandb, or all (none)",
    )  # fmt: skip
    group = parser.add_argument_group(
        "names of the training guide", "they also work with underscores, as every flag does"
    )
    group.add_argument("--data-path", type=Path, metavar="FEATURES", help="FEATURES")
    group.add_argument(
        "--results-folder", type=Path, dest="out", default=argparse.SUPPRESS, metavar="DIR", help="--out DIR"
    )
    group.add_argument(
        "--use-amp", dest="mixed_precision", action="store_const", const="fp16", help="--mixed-precision fp16"
    )
    group.add_argument("--init-dim", type=int, metavar="N", help="--denoiser unet1d with this width")
    group.add_argument(
        "--dim-mults", type=int, nargs="+", metavar="N", help="--denoiser unet1d with these multiples of it"
    )
    flags: dict[str, str] = {}
    for action in parser._actions:
        if action.option_strings:
            flags.setdefault(action.dest, action.option_strings[0])  # the guide's names come later
    parser.set_defaults(flags=flags)


def _add_everyday(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("everyday options")
    add = group.add_argument
    add("--recipe", metavar="NAME", help="gentle (default), paper, paired, scored or guide; see below")
    _add_fields(group, only=EVERYDAY)
    add(
        "--seeds", type=int, metavar="N",
        help="train N bridges, with --seed and the N-1 after it, into DIR/seed-…; compare and tune take DIR as one bridge (1)",
    )  # fmt: skip
    add("--resume", action="store_true", help="continue from the newest complete checkpoint in --out")
    add(
        "--start-timestep",
        type=int,
        metavar="T",
        help="timestep at which a feature starts: how much it changes (recipe's)",
    )
    add("--num-steps", type=int, metavar="N", help="network evaluations for a feature at eval: the cost (recipe's)")
    add("--spacing", metavar="NAME", help="spacing of the evaluated timesteps: linear, quadratic or cubic (recipe's)")
    add("--sampler", metavar="NAME", help="ddim, cold, published, or one that a plugin registers (recipe's)")
    add("--blend", type=float, metavar="L", help="share of the bridged direction in the result, 0 to 1 (recipe's)")
    add("--output-mode", dest="output", metavar="NAME", help="keep_norm, free_norm or unit_norm (recipe's)")
    add("--scale-factor", type=float, metavar="S", help="norm of every network input (recipe's, 5)")
    add(
        "--noise-augmentation", type=float, metavar="S",
        help="recipe paired: noise added to visual features, as a share of their norm; scored: share of the noise (recipe's)",
    )  # fmt: skip
    arguments.add_settings(group)
    arguments.add_device(group)
    arguments.add_no_plugin(group)


def _add_fields(group: arguments.Container, only: tuple[str, ...] = (), leave_out: tuple[str, ...] = ()) -> None:
    """Flags of fields of TrainConfig."""
    from dataclasses import MISSING, fields
    from typing import Literal, get_args, get_origin, get_type_hints

    from ezhoi_diffusion.training.config import TrainConfig

    types = get_type_hints(TrainConfig)
    for entry in fields(TrainConfig):
        if entry.name == "recipe" or entry.name in leave_out or (only and entry.name not in only):
            continue
        kind, default = types[entry.name], "" if entry.default is MISSING else f" ({entry.default})"
        names = [f"--{entry.name.replace('_', '-')}", *(["--timesteps"] if entry.name == "num_timesteps" else [])]
        group.add_argument(
            *names,
            type={int: int, float: float, str: str}.get(kind, str if get_origin(kind) is Literal else json.loads),
            choices=get_args(kind) if get_origin(kind) is Literal else None,
            metavar=None if get_origin(kind) is Literal else {int: "N", float: "X", str: "NAME"}.get(kind, "JSON"),
            help=entry.metadata["help"] + default,
        )


def run(args: argparse.Namespace) -> int:
    """Train, fit or distil."""
    if args.bridge == LIST:
        print(f"bridges that can be fitted, and their options:\n{_describe_fits()}")
        return 0
    if args.features and args.data_path:
        raise EzhoiDiffusionError(
            f"FEATURES ({args.features}) and --data-path ({args.data_path}) mean the same folder: give one of the two"
        )
    args.features = args.features or args.data_path
    if args.features is None or args.out is None:
        raise EzhoiDiffusionError(
            "FEATURES and --out DIR are required: name the captured features and a folder for the bridge"
        )
    if args.features.is_file():
        raise EzhoiDiffusionError(
            f"{args.features} is a file, perhaps of the training guide: convert it with `ezhoi-diffusion import FILE… --out FEATURES`"
        )
    if args.bridge and args.student_of:
        raise EzhoiDiffusionError(
            "--bridge fits a plugin's bridge and --student-of distils one: use one of the two flags"
        )
    if args.bridge:
        _refuse_others(args, FOR_FIT, "--bridge")
        return _fit(args)
    if args.student_of:
        _refuse_others(args, FOR_STUDENT, "--student-of")
        return _distil(args)
    for name in ONLY_FOR_STUDENT:
        if getattr(args, name) is not None:
            raise EzhoiDiffusionError(f"{args.flags[name]} is for --student-of: leave it out")
    return _train(args)


def _refuse_others(args: argparse.Namespace, known: tuple[str, ...], mode: str) -> None:
    """Raise EzhoiDiffusionError for a flag that this way of making a bridge would ignore."""
    for name, flag in args.flags.items():
        value = getattr(args, name, None)
        if name not in known and value is not None and value is not False and value != []:
            raise EzhoiDiffusionError(f"{flag} has no effect with {mode}: leave it out")


def recipe_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Settings from --set, --inference-steps and the flags named like settings, each at most once."""
    from ezhoi_diffusion.evaluation.variants import parse_settings

    settings = parse_settings(args.set, args.inference_steps)
    flags = {name: getattr(args, name) for name in RECIPE_FLAGS if getattr(args, name) is not None}
    if twice := sorted(settings.keys() & flags.keys()):
        raise EzhoiDiffusionError(
            f"{', '.join(twice)} is given twice, by its own flag and by --set or --inference-steps: use one of them"
        )
    return {**settings, **flags}


def train_config(args: argparse.Namespace) -> TrainConfig:
    """The configuration that the flags give. Raises EzhoiDiffusionError for values out of range and for unknown names."""
    from dataclasses import fields

    from ezhoi_diffusion.diffusion.components import components
    from ezhoi_diffusion.plugins import PluginManager
    from ezhoi_diffusion.training.config import TrainConfig
    from ezhoi_diffusion.training.defaults import choose_config, choose_recipe

    names = [field.name for field in fields(TrainConfig) if field.name != "recipe"]
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    unet = {name: getattr(args, name) for name in ("init_dim", "dim_mults") if getattr(args, name) is not None}
    if unet:
        given = {"denoiser": "unet1d", **given, "denoiser_options": {**unet, **given.get("denoiser_options", {})}}
    recipe = choose_recipe(args.recipe, recipe_settings(args))
    parts = components(PluginManager(args.no_plugin))
    _ = parts.samplers[recipe.sampler]
    config = choose_config(recipe, given)
    _ = parts.denoisers[config.denoiser]
    return config


def _train(args: argparse.Namespace) -> int:
    from dataclasses import replace

    from ezhoi_diffusion.artifact import CONFIG
    from ezhoi_diffusion.diffusion.bridge import build_denoiser
    from ezhoi_diffusion.diffusion.components import components
    from ezhoi_diffusion.diffusion.denoiser import FittedDenoiser
    from ezhoi_diffusion.evaluation.variants import SEED_PREFIX
    from ezhoi_diffusion.features.store import FeatureStore
    from ezhoi_diffusion.files import current
    from ezhoi_diffusion.plugins import PluginManager
    from ezhoi_diffusion.training.data import TrainingData
    from ezhoi_diffusion.training.processes import exit_distributed
    from ezhoi_diffusion.training.trainer import train

    config = train_config(args)
    seeds = 1 if args.seeds is None else args.seeds
    if seeds < 1:
        raise EzhoiDiffusionError(f"--seeds must be at least 1, not {seeds}")
    if seeds > 1 and current(args.out, CONFIG).exists():
        raise EzhoiDiffusionError(f"{args.out} holds one bridge, so it cannot hold several seeds: give another folder")
    data = TrainingData.from_store(FeatureStore(args.features), config.recipe.trained_on)
    parts = components(PluginManager(args.no_plugin))
    denoiser = build_denoiser(config.bridge_config(data.statistics.dim), parts)
    if seeds > 1 and isinstance(denoiser, FittedDenoiser) and config.recipe.trained_on == "text":
        raise EzhoiDiffusionError(
            f"{config.denoiser} is fitted to all texts, so several seeds give the same bridge: leave --seeds out"
        )
    for seed in range(config.seed, config.seed + seeds):
        folder = args.out if seeds == 1 else args.out / f"{SEED_PREFIX}{seed}"
        try:
            out = train(
                data,
                replace(config, seed=seed),
                folder,
                registry=parts,
                resume=args.resume,
                log_with=args.log_with or [],
            )
        except Interrupted as stopped:
            exit_distributed(stopped.status, f"ezhoi-diffusion: {stopped}\n")
            raise
        if int(os.environ.get("RANK", "0")) == 0:
            _report_training(out, memorizes=isinstance(denoiser, FittedDenoiser) and denoiser.memorizes)
    exit_distributed()
    return 0


def _report_training(out: Path, *, memorizes: bool) -> None:
    """Draw the curve, and print what it shows."""
    from ezhoi_diffusion.report.plots import plot_training
    from ezhoi_diffusion.report.png import drawn
    from ezhoi_diffusion.training.curve import notes
    from ezhoi_diffusion.training.facts import read_facts

    facts = read_facts(out)
    if not facts["history"]:
        compared = (
            "which says nothing: it only knows the texts it was fitted to"
            if memorizes
            else f"the isotropic estimate's {facts['isotropic_val_loss']:.4f}"
        )
        print(
            f"{facts['stopped']}. Loss on held-out features {facts['val_loss']:.4f}, {compared}\nbridge: {out}",
            flush=True,
        )
        return
    has_curve = drawn("the curve of the training", lambda: plot_training(facts, out / "training.png"))
    for note in notes(facts):
        print(f"note: {note}")
    curve = f"; curve: {out / 'training.png'}" if has_curve else ""
    print(f"bridge: {out}, trained on everything for {facts['best_step']} steps{curve}", flush=True)


def _fit(args: argparse.Namespace) -> int:
    from ezhoi_diffusion.evaluation.variants import parse_settings
    from ezhoi_diffusion.features.store import FeatureStore
    from ezhoi_diffusion.files import new_result
    from ezhoi_diffusion.plugins import PluginManager
    from ezhoi_diffusion.training.fitted import fit_artifact, known_fits

    fit = known_fits(PluginManager(args.no_plugin))[args.bridge]
    options = parse_settings(args.set)
    with new_result(args.out, EzhoiDiffusionError) as staged:
        fit_artifact(args.bridge, fit, FeatureStore(args.features), options).save(staged)
    print(f"bridge: {args.out}; compare it with --bridges none,identity,{args.bridge}={args.out}", flush=True)
    return 0


def _describe_fits() -> str:
    """Every registered fit with its options and its docstring."""
    import inspect

    from ezhoi_diffusion.plugins import PluginManager
    from ezhoi_diffusion.training.fitted import fit_options, known_fits

    fits = known_fits(PluginManager())
    described = []
    for name in fits.names():
        options = " ".join(f"[{option}={default}]" for option, default in fit_options(fits[name]).items())
        text = (inspect.getdoc(fits[name]) or "").replace("\n", "\n      ")
        described.append(f"  {f'{name} {options}'.rstrip()}\n      {text}")
    return "\n\n".join(described) or "  none: install a plugin first"


def _distil(args: argparse.Namespace) -> int:
    from ezhoi_diffusion.cli.student import distil

    return distil(args, recipe_settings(args))
