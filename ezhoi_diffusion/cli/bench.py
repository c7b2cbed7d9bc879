"""`ezhoi-diffusion bench`: what a bridge costs on this machine, and what few evaluations lose."""

from __future__ import annotations

import argparse

from ezhoi_diffusion.cli import arguments
from ezhoi_diffusion.errors import EzhoiDiffusionError

DESCRIPTION = """\
Measure side by side on this machine: the guide's system (a 1-D UNet, 600 evaluations) and a bridge with few evaluations, in ms
for an image of 16, 64 and 256 pairs; what few evaluations lose against all of the same network's; training steps a second,
next to Trainer1D of denoising-diffusion-pytorch; time until a training beats the closed-form Gaussian; peak memory.
Without FEATURES the features are synthetic, with CLIP's geometry. Without --bridge the default bridge is trained first."""
EPILOG = """\
how to read it:
  What is compared takes turns, so other work on the machine slows all of it. Figures are medians with quartiles. Trust ratios
  more than times, and neither on a busy machine: the command warns of that.
  The guide's 600 evaluations take minutes, so two are timed, and the result says so.
  cosine and top-1 (is the nearest text the same?) compare few evaluations with one at every timestep, of the same network. They
  say nothing about mAP: use compare.
  Synthetic features are easier than captured ones. Give FEATURES to see what is lost on yours.

It takes minutes, --quick a fraction. It measures a GPU where there is one; set CUDA_VISIBLE_DEVICES= to measure the CPU.

--part scale measures commands instead: it makes captures in HICO-DET's shape, at a hundredth, a tenth and all of its size (3 GB),
and runs each command on them in one thread. It shows CPU seconds, peak memory, and how both grow. All of it takes an hour;
--sizes 0.01 takes minutes. With --out, captures are kept and used again.

examples:
  ezhoi-diffusion bench
  ezhoi-diffusion bench FEATURES --bridge BRIDGE --out BENCH
  ezhoi-diffusion bench --part scale --sizes 0.01,0.1 --only compare,statistics --out SCALE
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    arguments.add_features(parser, "train or test", nargs="?")
    parser.add_argument("--bridge", metavar="DIR", help="diffusion bridge to measure, a folder or hf:USER/REPO")
    arguments.add_out(parser, "write bench.json and bench.png there")
    parser.add_argument(
        "--quick", action="store_true", help="fewer sizes, features and repetitions; training at batch 16"
    )
    arguments.add_device(parser)
    arguments.add_force(parser)
    group = parser.add_argument_group("commands at HICO-DET's size")
    group.add_argument("--part", choices=("bridge", "scale"), default="bridge", help="what to measure (bridge)")
    group.add_argument("--sizes", metavar="X,X", help="of --part scale: shares of HICO-DET's images (0.01,0.1,1)")
    group.add_argument("--only", metavar="NAME,NAME", help="of --part scale: these commands (all but tune)")


def run(args: argparse.Namespace) -> int:
    """Measure, print, and write where asked."""
    from ezhoi_diffusion.bench.data import captured, require_fit, synthetic
    from ezhoi_diffusion.bench.suite import QUICK, BenchConfig, measure
    from ezhoi_diffusion.bench.table import plot_bench, summary, tables
    from ezhoi_diffusion.cli.terminal import print_table
    from ezhoi_diffusion.device import pick_device
    from ezhoi_diffusion.diffusion.bridge import DiffusionBridge
    from ezhoi_diffusion.diffusion.components import components
    from ezhoi_diffusion.features.store import FeatureStore
    from ezhoi_diffusion.files import check_writable, write_json
    from ezhoi_diffusion.hub import resolve_path
    from ezhoi_diffusion.plugins import PluginManager
    from ezhoi_diffusion.report.png import drawn

    if args.part == "scale":
        return _scale(args)
    if args.sizes or args.only:
        raise EzhoiDiffusionError("--sizes and --only are for --part scale: leave them out")
    if args.bridge and not args.features:
        raise EzhoiDiffusionError(
            "--bridge needs FEATURES: a bridge is measured on features of the run that it was made for, not on synthetic ones"
        )
    registry = components(PluginManager())
    store = FeatureStore(args.features) if args.features else None
    data = captured(store) if store else synthetic()
    bridge, forced = None, list[str]()
    if args.bridge and store:
        bridge = DiffusionBridge.from_pretrained(resolve_path(args.bridge), registry=registry)
        require_fit(bridge, args.bridge, data)
        arguments.fingerprint_check(store, args.force, forced)(bridge, args.bridge)
    if args.out:
        check_writable(args.out)
    result = measure(data, bridge, QUICK if args.quick else BenchConfig(), registry, pick_device(args.device))
    result["warnings"] += forced
    print("\n" + summary(result))
    for caption, head, rows in tables(result):
        print(f"\n{caption}\n")
        print_table(head, rows, numbers=range(1, len(head)))
    if args.out:
        write_json(args.out / "bench.json", result)
        has_picture = drawn("the cost", lambda: plot_bench(result, args.out / "bench.png"))
        print(f"wrote {args.out / 'bench.json'}{f', {args.out}/bench.png' if has_picture else ''}", flush=True)
    return 0


def _scale(args: argparse.Namespace) -> int:
    """Measure commands, print, and write where asked."""
    from ezhoi_diffusion.bench.scale import SIZES, measure_scale, scale_table
    from ezhoi_diffusion.cli.terminal import print_table
    from ezhoi_diffusion.files import check_writable, write_json
    from ezhoi_diffusion.plugins import PluginManager

    for flag, value in (("FEATURES", args.features), ("--bridge", args.bridge), ("--quick", args.quick)):
        if value:
            raise EzhoiDiffusionError(f"{flag} is not for --part scale, which makes its own captures: leave it out")
    try:
        sizes = [float(word) for word in args.sizes.split(",")] if args.sizes else list(SIZES)
    except ValueError as error:
        raise EzhoiDiffusionError(f"--sizes {args.sizes}: write numbers, for example 0.01,0.1") from error
    if args.out:
        check_writable(args.out)
    names = [word.strip() for word in args.only.split(",")] if args.only else []
    result = measure_scale(sizes, names, PluginManager(), args.out)
    caption, head, rows = scale_table(result)
    print("\n".join(["", *(f"warning: {warning}" for warning in result["warnings"]), caption, ""]))
    print_table(head, rows, numbers=range(1, len(head)))
    if args.out:
        write_json(args.out / "scale.json", result)
        print(f"wrote {args.out / 'scale.json'}", flush=True)
    return 0
