"""`ezhoi-diffusion tune FEATURES --out DIR`: choose bridges and settings by cross-validation on training images."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ezhoi_diffusion.cli import arguments
from ezhoi_diffusion.cli.terminal import print_table
from ezhoi_diffusion.errors import EzhoiDiffusionError

if TYPE_CHECKING:
    from pathlib import Path

    from ezhoi_diffusion.evaluation.search import Lead
    from ezhoi_diffusion.evaluation.tune import Tuning
    from ezhoi_diffusion.features.store import FeatureStore

DESCRIPTION = """\
Choose a chain of bridges and its settings by cross-validation on *training* images. Bridges that learn are made again without
each fold of images, and without the labels of each fold of verbs, which are then scored as unseen verbs are. A bridge wins only
if it gains over `none`, and over every baseline, beyond chance. Neither labels of unseen classes nor test images are read.
--out gets the choice, made from all training images, as a bridge named `tuned`."""
EPILOG = """\
how it chooses:
  The criterion is mean AP of seen classes on held-out images, and of hidden classes, weighed by the shares of seen and unseen
  classes in the split. Without --zs there are no hidden classes.
  The search is greedy. Every bridge is tried alone, as it is and with one setting changed. The best chain grows by one bridge at a
  time, to three, each with the settings that were best alone; its settings are then improved one after the other. Bridges on
  features come before bridges on scores.
  The simplest chain within one standard error of the best is chosen: the fewest bridges, then the smallest change of logits.
  Baselines are tried too. A bridge has to beat the best of them. Where none does, the best baseline is chosen if it gains over
  `none` beyond chance, else `none`.
  An outer loop repeats all of it without each fold, and scores that fold's choice on it: this is what choosing gains.
  Of a bridge with several seeds the mean over the seeds counts, and all seeds are written.

candidates:
  Without --bridges these are all bridges that installed plugins can make from FEATURES. NAME=DIR is made again as its files say.
  a+b is tried as such a chain, and longer chains are built on it.

examples:
  ezhoi-diffusion tune FEATURES --out CHOICE
  ezhoi-diffusion tune FEATURES --bridges identity,mean_shift,diffusion=PAIRED --sweep blend=0.1,0.3 --out CHOICE
  ezhoi-diffusion compare TEST_FEATURES --bridges none,scale,mean_shift,tuned=CHOICE --bridge BRIDGE --out REPORT
  ezhoi-diffusion run main_tip_finetune.py … --eval --resume CKPT --plugin tuned=CHOICE
"""
NUM_SHOWN = 10


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    from ezhoi_diffusion.evaluation.defaults import FOLDS, SEEDS

    parser.description, parser.epilog = DESCRIPTION, EPILOG
    arguments.add_features(parser, "train")
    arguments.add_out(parser, "folder for the choice", required=True)
    group = parser.add_argument_group("candidates beside none")
    arguments.add_bridges(group, "", "all that can be made from FEATURES")
    arguments.add_settings(group)
    arguments.add_sweep(group, "instead of each bridge's own values")
    group.add_argument(
        "--seeds", type=int, default=SEEDS, metavar="N", help=f"seeds of each fit that draws numbers ({SEEDS})"
    )
    group = parser.add_argument_group("how to run")
    group.add_argument("--folds", type=int, default=FOLDS, metavar="K", help=f"folds of images and of verbs ({FOLDS})")
    group.add_argument(
        "--num-images", type=int, metavar="N", help="choose on N images that have pairs, drawn at random (default: all)"
    )
    arguments.add_device(group)
    arguments.add_jobs(group)
    arguments.add_force(group)
    arguments.add_no_plugin(group)


def run(args: argparse.Namespace) -> int:
    """Search, choose, print, and write."""
    from ezhoi_diffusion.evaluation.defaults import MIN_FOLDS
    from ezhoi_diffusion.features.store import FeatureStore
    from ezhoi_diffusion.files import new_result

    least_of = (("--seeds", 1, args.seeds), ("--folds", MIN_FOLDS, args.folds), ("--num-images", 1, args.num_images))
    for flag, least, value in least_of:
        if value is not None and value < least:
            raise EzhoiDiffusionError(f"{flag} must be at least {least}, not {value}")
    store = FeatureStore(args.features)
    with new_result(args.out, EzhoiDiffusionError) as staged:
        _tune(args, store, staged)
    print(
        f"choice: {args.out}. Test it once:\n"
        f"  ezhoi-diffusion compare TEST_FEATURES --bridges none,scale,tuned={args.out}",
        flush=True,
    )
    return 0


def _tune(args: argparse.Namespace, store: FeatureStore, staged: Path) -> None:
    from ezhoi_diffusion.device import pick_device
    from ezhoi_diffusion.evaluation.choice import write_choice
    from ezhoi_diffusion.evaluation.processes import check_jobs
    from ezhoi_diffusion.evaluation.tune import candidates_of, tune
    from ezhoi_diffusion.evaluation.variants import parse_settings, parse_sweep
    from ezhoi_diffusion.plugins import PluginManager

    forced: list[str] = []
    plugins, device = PluginManager(args.no_plugin), pick_device(args.device)
    check_jobs(args.jobs, device)
    candidates = candidates_of(
        store,
        args.bridges,
        plugins,
        folder=args.bridge,
        check=arguments.fingerprint_check(store, args.force, forced),
        settings=parse_settings(args.set, args.inference_steps),
        sweep=parse_sweep(args.sweep) if args.sweep else None,
        seeds=args.seeds,
        device=device,
    )
    for reason in candidates.left_out:
        print(f"no candidate: {reason}")
    tuning = tune(
        store,
        candidates,
        plugins,
        folds=args.folds,
        num_images=args.num_images,
        device=device,
        jobs=args.jobs,
        forced=forced,
        say=lambda line: print(line, flush=True),
    )
    _print(tuning)
    write_choice(staged, tuning, candidates, store)


def _print(tuning: Tuning) -> None:
    choice, chosen = tuning.choice, tuning.choice.trial
    ranked = sorted(tuning.trials.values(), key=lambda trial: -trial.value[0])
    named = {choice.baseline.name, chosen.name, "none"}
    shown = [*ranked[:NUM_SHOWN], *(trial for trial in ranked[NUM_SHOWN:] if trial.name in named)]
    print(f"\n{len(ranked)} candidates on {tuning.images} held-out training images, best first. Mean AP in percent:")
    print_table(
        ("criterion", "seen", "hidden", "candidate", ""),
        [
            (
                f"{trial.value[0]:.2f}",
                f"{trial.seen[0]:.2f}",
                f"{trial.hidden[0]:.2f}" if tuning.folds.classes else "-",
                trial.name,
                "<- chosen" if trial is chosen else "baseline" if trial.baseline else "",
            )
            for trial in shown
        ],
        numbers=range(3),
    )
    if choice.leader is not None:
        for name, lead in choice.leads.items():
            print(
                f"best bridge, {choice.leader.name}, over {name}: {_lead(lead)}, p adjusted for all candidates {lead.p:.3f}"
            )
    print(choice.why)
    if not choice.helps:
        print(f"Recommended: {chosen.name}. Expect no gain from a bridge on the test split.")
    parts = "; ".join(f"{name} {_lead(lead)}" for name, lead in tuning.gain.items())
    print(f"What choosing gains over none, on folds that took no part in it: {parts}")
    for line in tuning.caveats():
        print(line)


def _lead(lead: Lead) -> str:
    return f"{lead.difference:+.2f} points, 95 % interval {lead.low:+.2f} to {lead.high:+.2f}"
