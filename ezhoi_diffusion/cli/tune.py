"""`ezhoi-diffusion tune FEATURES --bridges …`: chooses bridge and settings by mAP on held-out training images."""

from __future__ import annotations

import argparse
from pathlib import Path

from ezhoi_diffusion.errors import EzhoiDiffusionError

DESCRIPTION = """\
Choose a bridge, its start step, steps, strength and output mode by mAP on a validation split of the *training* images: the
tenth of them that no training and no fit takes a step on (paired stops early by it), seen classes only. Labels of unseen classes are not read, and the test
split is not touched. `none` is among the candidates, so the choice is never worse than no bridge on these images. The choice
and what speaks for it are written as a bridge of its own, `tuned`."""
EPILOG = """\
reading it:
  the best of many candidates looks better than it is. The interval and the adjusted p-value say how much of its lead is
  chance; evaluate it once on the test split, beside the controls, and report that.
  of a bridge that was trained with several seeds (train --seeds 3) the mean over the seeds counts, and the first is taken.

example:
  ezhoi-diffusion tune FEATURES --bridges mean_shift,diffusion,diffusion=PAIRED --bridge BRIDGE --out CHOICE
  ezhoi-diffusion compare TEST_FEATURES --bridges none,identity,mean_shift,diffusion,tuned=CHOICE --bridge BRIDGE --report R
  ezhoi-diffusion run main_tip_finetune.py … --eval --resume CKPT --plugin tuned --bridge CHOICE
"""
SHOWN = 10


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    from ezhoi_diffusion.cli.compare import declare_force
    from ezhoi_diffusion.evaluation.tune import DEFAULT_SWEEP

    parser.description, parser.epilog = DESCRIPTION, EPILOG
    grid = " ".join(f"{key}={','.join(str(value) for value in values)}" for key, values in DEFAULT_SWEEP.items())
    parser.add_argument("features", type=Path, metavar="FEATURES", help="the folder of a capture of the train split")
    parser.add_argument(
        "--bridges", default="mean_shift,diffusion", metavar="NAME[=DIR],…",
        help="candidates beside none (mean_shift,diffusion)",
    )  # fmt: skip
    parser.add_argument("--bridge", default="", metavar="DIR", help="the folder of those that name none")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the choice")
    parser.add_argument(
        "--sweep", action="append", default=[], metavar="KEY=V,V,…",
        help=f"settings to try of every bridge that has them; given once or more, it replaces the default grid ({grid})",
    )  # fmt: skip
    parser.add_argument("--report", type=Path, metavar="DIR", help="also write the whole comparison there, as a report")
    declare_force(parser)
    parser.add_argument("--no-plugin", action="append", default=[], metavar="NAME", help="do not even import a plugin")


def run(args: argparse.Namespace) -> int:
    """Score the candidates, choose, and write."""
    import torch

    from ezhoi_diffusion.bridge import Bridge
    from ezhoi_diffusion.cli.compare import acceptance
    from ezhoi_diffusion.evaluation.comparison import REFERENCE
    from ezhoi_diffusion.evaluation.tune import DEFAULT_SWEEP, TUNED, require_labels_unseen, tune, write_choice
    from ezhoi_diffusion.evaluation.variants import parse_sweep, resolve_variants
    from ezhoi_diffusion.features.store import FeatureStore
    from ezhoi_diffusion.files import require_unused
    from ezhoi_diffusion.plugins import PluginManager
    from ezhoi_diffusion.report.write import report_folder, write_report

    store = FeatureStore(args.features)
    require_unused(args.out, EzhoiDiffusionError)
    if args.report:
        with report_folder(args.report):
            pass  # refused now, not after the work
    if TUNED in [part.partition("=")[0].strip() for part in args.bridges.split(",")]:
        raise EzhoiDiffusionError("--bridges: tuned is what tune makes; name the bridges themselves")
    with report_folder(args.out):
        pass
    forced: list[str] = []
    accepted = acceptance(store, args, forced)

    def accept(bridge: Bridge, name: str) -> None:
        accepted(bridge, name)
        require_labels_unseen(bridge, name, store)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    variants = resolve_variants(
        args.bridges,
        PluginManager(args.no_plugin),
        folder=args.bridge,
        check=accept,
        device=device,
        sweep=parse_sweep(args.sweep) if args.sweep else DEFAULT_SWEEP,
        skip_refused=not args.sweep,
    )
    comparison, candidates = tune(store, variants, device, forced)
    best, host = candidates[0], comparison.mean_ap(REFERENCE, "full")
    print(
        f"\n{len(candidates)} candidates by mAP of seen classes on {comparison.images} held-out training images (of a bridge with "
        f"several seeds the mean); the best {min(SHOWN, len(candidates))}:"
    )
    for candidate in candidates[:SHOWN]:
        print(f"  {candidate.mean_ap:6.2f}  {candidate.name}{'   <- chosen' if candidate is best else ''}")
    if REFERENCE not in [candidate.name for candidate in candidates[:SHOWN]]:
        print(f"  {host:6.2f}  {REFERENCE}")
    if best.variant != REFERENCE and comparison.significance is not None:
        lead = comparison.significance.difference[best.variant]["full"]
        print(
            f"{best.variant}: {comparison.difference(best.variant, 'full'):+.2f} points over none, 95 % interval {lead.low:+.2f} "
            f"to {lead.high:+.2f}, p {lead.p:.3f}, adjusted for {len(variants)} variants {lead.p_adjusted:.3f}"
        )
        if not comparison.is_significant(best.variant, "full"):
            print("That lead cannot be told from chance: expect no gain on the test split.")
    if args.report:
        write_report(comparison, args.report)
    write_choice(args.out, comparison, candidates, variants, store)
    print(
        f"choice: {args.out}; now score it once on the test split: ezhoi-diffusion compare TEST_FEATURES --bridges none,identity,tuned={args.out}"
    )
    return 0
