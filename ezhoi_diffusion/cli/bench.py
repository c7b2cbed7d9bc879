"""`ezhoi-diffusion bench`: what a bridge costs on this machine, and how near few evaluations come to many."""

from __future__ import annotations

import argparse
from pathlib import Path

from ezhoi_diffusion.errors import EzhoiDiffusionError

DESCRIPTION = """\
Measure, side by side in one run on this machine: the guide's system (a 1-D UNet, 600 evaluations) against a bridge with few
evaluations, in ms an image of 16, 64 and 256 pairs; how near few evaluations come to all of the same network's; steps a
second of training against Trainer1D of denoising-diffusion-pytorch with the same network and with the guide's; how long
training takes to get below the closed-form Gaussian's loss; peak memory.
Without FEATURES the rows are made up, in CLIP's geometry; without --bridge the default one is trained on the texts first."""
EPILOG = """\
reading it:
  whatever is compared takes turns, so that other work on the machine falls on all of it. Figures are medians with quartiles;
  ratios are to be trusted more than times, and neither where the machine is busy: the command warns of that.
  the guide's 600 evaluations take minutes, so two are timed and the result says so.
  cosine and top-1 (is the nearest text the same?) hold what the sampler makes of a row against what the same network makes of
  it with an evaluation at every level. They say what is lost by fewer evaluations, nothing of mAP: for that, use compare.
  made-up rows are kinder than real ones, and the closed-form Gaussian (wiener) is nearly all there is to know of them: what is
  lost on your rows, FEATURES tell.

It takes minutes, of which a bar says how many are left; --quick takes a fraction. On a machine with a GPU it measures that; for
the CPU of such a machine set CUDA_VISIBLE_DEVICES= before.

examples:
  ezhoi-diffusion bench
  ezhoi-diffusion bench FEATURES --bridge BRIDGE --out BENCH
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    from ezhoi_diffusion.cli.compare import declare_force

    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.add_argument(
        "features",
        type=Path,
        nargs="?",
        metavar="FEATURES",
        help="the folder of a capture, of either split (rows made up)",
    )
    parser.add_argument(
        "--bridge", metavar="DIR",
        help="the diffusion bridge to measure, a folder or hf:USER/NAME (one is trained)",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="DIR", help="write bench.json and bench.png there too")
    parser.add_argument("--quick", action="store_true", help="fewer sizes, rows and repetitions; training at batch 16")
    declare_force(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, print, and write where asked."""
    import torch

    from ezhoi_diffusion.bench.data import captured, made_up, require_fit
    from ezhoi_diffusion.bench.plot import plot_bench
    from ezhoi_diffusion.bench.suite import QUICK, BenchConfig, measure
    from ezhoi_diffusion.bench.table import table
    from ezhoi_diffusion.cli.compare import acceptance
    from ezhoi_diffusion.diffusion.bridge import DiffusionBridge
    from ezhoi_diffusion.diffusion.components import components
    from ezhoi_diffusion.features.store import FeatureStore
    from ezhoi_diffusion.files import write_json
    from ezhoi_diffusion.hub import local
    from ezhoi_diffusion.plugins import PluginManager
    from ezhoi_diffusion.report.write import report_folder

    if args.bridge and not args.features:
        raise EzhoiDiffusionError(
            "--bridge needs FEATURES: a bridge is measured on rows of the host that it was made for, not on made-up ones"
        )
    registry = components(PluginManager())
    store = FeatureStore(args.features) if args.features else None
    subject = captured(store) if store else made_up()
    bridge, forced = None, list[str]()
    if args.bridge and store:
        bridge = DiffusionBridge.from_pretrained(local(args.bridge), registry=registry)
        require_fit(bridge, args.bridge, subject)
        acceptance(store, args, forced)(bridge, args.bridge)
    if args.out:
        with report_folder(args.out):
            pass  # refused now, not after the work
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result = measure(subject, bridge, QUICK if args.quick else BenchConfig(), registry, device)
    result["warnings"] += forced
    print("\n" + table(result), flush=True)
    if args.out:
        with report_folder(args.out):
            write_json(args.out / "bench.json", result)
            plot_bench(result, args.out / "bench.png")
        print(f"wrote {args.out / 'bench.json'}, {args.out / 'bench.png'}", flush=True)
    return 0
