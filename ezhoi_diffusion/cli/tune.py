"""`ezhoi-diffusion tune FEATURES --bridges …`: choose bridge and settings on held-out training images."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ezhoi_diffusion.cli import arguments
from ezhoi_diffusion.cli.terminal import print_table
from ezhoi_diffusion.errors import EzhoiDiffusionError

if TYPE_CHECKING:
    from ezhoi_diffusion.bridge import Bridge
    from ezhoi_diffusion.evaluation.comparison import Comparison
    from ezhoi_diffusion.evaluation.tune import Candidate

DESCRIPTION = """\
Choose a bridge and its settings by mAP on held-out *training* images: the tenth that no training takes a step on, seen classes
only. Neither labels of unseen classes nor test images are read. `none` is a candidate and wins ties. --out gets the choice as
a bridge named `tuned`, and a report of the comparison in report/."""
EPILOG = """\
how to read it:
  The best of many candidates looks better than it is. The interval and the adjusted p-value show how much of its lead is
  chance. Test the choice once on the test split, next to the baselines, and report that.
  Of a bridge trained with several seeds (train --seeds 3), the mean over the seeds counts, and the first seed is taken.

example:
  ezhoi-diffusion tune FEATURES --bridges mean_shift,diffusion,diffusion=PAIRED --bridge BRIDGE --out CHOICE
  ezhoi-diffusion compare TEST_FEATURES --bridges none,identity,mean_shift,tuned=CHOICE --bridge BRIDGE --out REPORT
  ezhoi-diffusion run main_tip_finetune.py … --eval --resume CKPT --plugin tuned=CHOICE
"""
NUM_SHOWN = 10


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    arguments.add_features(parser, "train")
    arguments.add_out(parser, "folder for the choice", required=True)
    group = parser.add_argument_group("candidates beside none")
    arguments.add_bridges(group, "mean_shift,diffusion")
    arguments.add_settings(group)
    arguments.add_sweep(group, "default: a grid of start_timestep, num_steps, blend and output")
    group = parser.add_argument_group("how to run")
    arguments.add_device(group)
    arguments.add_force(group)
    arguments.add_no_plugin(group)


def run(args: argparse.Namespace) -> int:
    """Score the candidates, choose, and write."""
    from ezhoi_diffusion.device import pick_device
    from ezhoi_diffusion.evaluation.tune import DEFAULT_SWEEP, TUNED, require_labels_unseen, tune, write_choice
    from ezhoi_diffusion.evaluation.variants import parse_settings, parse_sweep, resolve_variants
    from ezhoi_diffusion.features.store import FeatureStore
    from ezhoi_diffusion.files import check_writable, require_unused
    from ezhoi_diffusion.plugins import PluginManager
    from ezhoi_diffusion.report.write import write_report

    if TUNED in [part.partition("=")[0].strip() for part in args.bridges.split(",")]:
        raise EzhoiDiffusionError(f"--bridges: {TUNED} is what tune makes; name the bridges themselves")
    store = FeatureStore(args.features)
    require_unused(args.out, EzhoiDiffusionError)
    check_writable(args.out)
    forced: list[str] = []
    fits_the_run = arguments.fingerprint_check(store, args.force, forced)

    def check(bridge: Bridge, name: str) -> None:
        fits_the_run(bridge, name)
        require_labels_unseen(bridge, name, store)

    device = pick_device(args.device)
    variants = resolve_variants(
        args.bridges,
        PluginManager(args.no_plugin),
        folder=args.bridge,
        check=check,
        device=device,
        settings=parse_settings(args.set, args.inference_steps),
        sweep=parse_sweep(args.sweep) if args.sweep else DEFAULT_SWEEP,
        skip_refused=not args.sweep,
    )
    comparison, candidates = tune(store, variants, device, forced)
    _print(comparison, candidates, len(variants))
    write_choice(args.out, comparison, candidates, variants, store)
    write_report(comparison, args.out / "report")
    print(
        f"choice: {args.out}. Test it once:\n"
        f"  ezhoi-diffusion compare TEST_FEATURES --bridges none,identity,tuned={args.out}",
        flush=True,
    )
    return 0


def _print(comparison: Comparison, candidates: Sequence[Candidate], num_variants: int) -> None:
    from ezhoi_diffusion.evaluation.comparison import REFERENCE

    best, shown = candidates[0], candidates[:NUM_SHOWN]
    shown = [*shown, *(one for one in candidates[NUM_SHOWN:] if one.name == REFERENCE)]
    print(
        f"\n{len(candidates)} candidates on {comparison.images} held-out training images. mAP of seen classes, best first:"
    )
    print_table(
        ("mAP", "candidate", ""),
        [(f"{one.mean_ap:.2f}", one.name, "<- chosen" if one is best else "") for one in shown],
        numbers=[0],
    )
    bootstrap = comparison.variants[best.variant].bootstrap
    if best.variant == REFERENCE or bootstrap is None:
        return
    lead = bootstrap.difference["full"]
    print(
        f"{best.variant}: {comparison.difference(best.variant, 'full'):+.2f} points over none, 95 % interval {lead.low:+.2f} to "
        f"{lead.high:+.2f}, p {lead.p:.3f}, adjusted for {num_variants} variants {lead.p_adjusted:.3f}"
    )
    if not comparison.is_significant(best.variant, "full"):
        print("Chance may explain that lead: expect no gain on the test split.")
