"""`ezhoi-diffusion compare FEATURES --bridges none,…`: EZ-HOI's own score on captured features."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ezhoi_diffusion.cli import arguments
from ezhoi_diffusion.cli.terminal import is_terminal, print_table
from ezhoi_diffusion.errors import EzhoiDiffusionError

if TYPE_CHECKING:
    import torch

    from ezhoi_diffusion.evaluation.comparison import Comparison
    from ezhoi_diffusion.evaluation.variants import Variant
    from ezhoi_diffusion.features.store import FeatureStore

DESCRIPTION = """\
Compare bridges on captured test features: the table of `run … --eval --compare`, without EZ-HOI, its weights or its images.
Intervals and p-values come from a paired bootstrap over images and seeds. `none` has EZ-HOI's own logits. With --out it writes
report.html, report.json and pictures."""
EPILOG = """\
how to read it:
  An interval that contains 0 does not show that there is no difference. It shows which differences are excluded: no loss
  larger than its lower end, no gain larger than its upper end. The report also states the smallest gain it could have found.
  The adjusted p-value covers all bridges of the table: of the sixty points of a sweep, some look good by chance. Only `tuned`
  needs no adjustment for its full mAP, because it was chosen before these images were seen.
  Baselines such as identity, mean_shift and scale exist to be beaten: a gain is a gain over none and over every baseline.
  scale weighs logits more against the detector's scores, which may gain by itself.
  A bridge with several seeds (train --seeds 5) is one bridge, their mean. Its interval covers images and seeds.
  Choose settings with `ezhoi-diffusion tune`, on training images. A sweep on the test split is for looking only.

examples:
  ezhoi-diffusion compare TEST_FEATURES --bridge BRIDGE --out REPORT
  ezhoi-diffusion compare TEST_FEATURES --bridges none,identity,diffusion=BRIDGE,diffusion=hf:USER/REPO
  ezhoi-diffusion compare TEST_FEATURES --bridge BRIDGE --bridges none,diffusion --sweep start_timestep=50,100 --sweep blend=0.5,1
  ezhoi-diffusion compare TEST_FEATURES --bridge BRIDGE --bridges none,diffusion --num-images 20 --out LOOK
  ezhoi-diffusion compare VCOCO_FEATURES --vcoco V-COCO_CHECKOUT --bridge BRIDGE
"""
BRIDGES = "none,identity,mean_shift,scale,diffusion"
MIN_REPLICATES = 100
NUM_TOP = 5  # best scored interactions of an image, in effect.json
EMBEDDINGS = ("tsne", "umap")


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    add_flags(parser, bridges=BRIDGES, num_images=None)


def add_flags(parser: argparse.ArgumentParser, *, bridges: str, num_images: int | None) -> None:
    """Declare the flags of `compare`, which are those of `test` with other defaults."""
    arguments.add_features(parser, "test")
    arguments.add_out(parser, "folder for the results", required=num_images is not None)
    group = parser.add_argument_group("what to compare")
    arguments.add_bridges(group, bridges)
    arguments.add_settings(group)
    arguments.add_sweep(group)
    group = parser.add_argument_group("a few images only")
    group.add_argument(
        "--num-images", "--num-test-images", type=int, default=num_images, metavar="N",
        help=f"draw N images that have pairs ({num_images or 'default: all'}); --out also gets diffusion_effect.png and "
        "effect.json about the first bridge that is no baseline, with each image's top 5",
    )  # fmt: skip
    group.add_argument("--seed", type=int, default=0, help="draws the images (0)")
    group.add_argument(
        "--embedding", choices=EMBEDDINGS, help="also draw a map of both modalities; umap needs umap-learn"
    )
    group = parser.add_argument_group("how to score")
    group.add_argument(
        "--setting", choices=("default", "known-object"), default="default",
        help="known-object: score a class only on images with its object, HICO-DET's second setting",
    )  # fmt: skip
    group.add_argument(
        "--ap", choices=("11P", "AUC"), default="11P",
        help="average precision at 11 points, as EZ-HOI prints it (default), or the area under the curve",
    )  # fmt: skip
    group.add_argument(
        "--replicates", type=int, metavar="N", help="resamplings of the bootstrap; 0 leaves intervals out"
    )
    group.add_argument(
        "--vcoco", type=Path, metavar="DIR",
        help="for a capture of V-COCO: role AP in both scenarios, with the annotations in this checkout or data folder",
    )  # fmt: skip
    group = parser.add_argument_group("how to run")
    arguments.add_device(group)
    arguments.add_jobs(group)
    arguments.add_force(group)
    arguments.add_no_plugin(group)


def run(args: argparse.Namespace) -> int:
    """Score, print, and write where asked."""
    from ezhoi_diffusion.device import pick_device
    from ezhoi_diffusion.evaluation.alignment import disagreements
    from ezhoi_diffusion.evaluation.drawing import draw_images
    from ezhoi_diffusion.evaluation.processes import check_jobs
    from ezhoi_diffusion.evaluation.variants import parse_settings, parse_sweep, resolve_variants
    from ezhoi_diffusion.features.store import FeatureStore
    from ezhoi_diffusion.files import check_writable
    from ezhoi_diffusion.plugins import PluginManager
    from ezhoi_diffusion.report.embedding import require_library
    from ezhoi_diffusion.report.headline import headline
    from ezhoi_diffusion.report.write import write_report

    _check(args)
    if args.embedding:
        require_library(args.embedding)
    store = FeatureStore(args.features)
    forced: list[str] = []
    device = pick_device(args.device)
    check_jobs(args.jobs, device)
    variants = resolve_variants(
        args.bridges,
        PluginManager(args.no_plugin),
        folder=args.bridge,
        check=arguments.fingerprint_check(store, args.force, forced),
        device=device,
        settings=parse_settings(args.set, args.inference_steps),
        sweep=parse_sweep(args.sweep),
    )
    if args.out:
        check_writable(args.out)
    chosen = None if args.num_images is None else draw_images(store.images, args.num_images, args.seed)
    comparison = _score(args, store, variants, chosen, device, forced)
    notes = disagreements(
        {name: v.alignment for name, v in comparison.variants.items() if v.alignment},
        {name: comparison.mean_ap(name, "full") for name in comparison.variants},
    )
    print()
    _print(comparison)
    print("\n".join([*notes, headline(comparison).text]), flush=True)
    if args.out:
        write_report(comparison, args.out, notes)
    if chosen is not None:
        _show_effect(args, store, variants, comparison, chosen, device)
    return 0


def _check(args: argparse.Namespace) -> None:
    """Raise EzhoiDiffusionError for flags that contradict each other, before any work."""
    if args.vcoco and (args.ap, args.setting) != ("11P", "default"):
        raise EzhoiDiffusionError("--ap and --setting are for HICO-DET: leave them out with --vcoco")
    if args.vcoco and args.num_images is not None:
        raise EzhoiDiffusionError("--num-images is for HICO-DET: leave it out with --vcoco")
    if args.num_images is not None and args.num_images < 1:
        raise EzhoiDiffusionError(f"--num-images must be at least 1, not {args.num_images}")
    if args.embedding and (args.num_images is None or args.out is None):
        raise EzhoiDiffusionError("--embedding draws a few images: add --num-images N and --out DIR")
    if args.replicates and args.replicates < MIN_REPLICATES:
        raise EzhoiDiffusionError(
            f"--replicates must be 0 or at least {MIN_REPLICATES}, not {args.replicates}: with fewer no p-value could be small"
        )


def _score(
    args: argparse.Namespace,
    store: FeatureStore,
    variants: Mapping[str, Variant],
    chosen: set[int] | None,
    device: torch.device,
    forced: list[str],
) -> Comparison:
    from ezhoi_diffusion.evaluation.bootstrap import REPLICATES
    from ezhoi_diffusion.evaluation.protocols import hicodet
    from ezhoi_diffusion.evaluation.replay import replay
    from ezhoi_diffusion.evaluation.vcoco import vcoco_protocol

    if args.vcoco:
        protocol = vcoco_protocol(store, args.vcoco)
    else:
        protocol = hicodet(store, algorithm=args.ap, setting=args.setting)
    replicates = REPLICATES if args.replicates is None else args.replicates
    comparison = replay(
        store,
        variants,
        protocol=protocol,
        chosen=chosen,
        replicates=replicates,
        measured=True,
        device=device,
        jobs=args.jobs,
    )
    comparison.forced += forced
    parts = (
        (
            chosen is not None,
            f"{len(chosen or ())} images were drawn from the {store.split} split, by --seed {args.seed}",
        ),
        (
            store.meta.get("max_images") is not None,
            f"The capture has the first {store.meta.get('max_images')} images only",
        ),
        (store.split != "test", f"These are images of the {store.split} split"),
    )
    comparison.caveats += [f"{what}: no result to report." for is_so, what in parts if is_so]
    if store.split == "test":
        comparison.caveats += comparison.sweep_caveat()
    return comparison


def _print(comparison: Comparison) -> None:
    """Print the results: as tables on a terminal, otherwise the plain text that a live run prints."""
    if not is_terminal():
        print(comparison.table(), flush=True)
        return
    from ezhoi_diffusion.evaluation.table import table_notes, table_rows

    (_, *titles), rows = table_rows(comparison)
    parts = ["mAP", "difference to none [interval]", "p"]
    head = ["\n".join(parts[: max(len(row[1]) for row in rows)]), *titles]
    print_table(head, [["\n".join(cell) for cell in row] for row in rows], numbers=range(1, len(head)))
    print("\n".join(table_notes(comparison)), flush=True)


def _show_effect(
    args: argparse.Namespace,
    store: FeatureStore,
    variants: Mapping[str, Variant],
    comparison: Comparison,
    chosen: set[int],
    device: torch.device,
) -> None:
    """Print what the first bridge does to single pairs of the drawn images, and write it where asked."""
    from ezhoi_diffusion.evaluation.effect import effect_of, verdict
    from ezhoi_diffusion.files import write_json
    from ezhoi_diffusion.report.embedding import embed
    from ezhoi_diffusion.report.plots import plot_effect, plot_embedding
    from ezhoi_diffusion.report.png import drawn
    from ezhoi_diffusion.report.write import report_folder

    variant = next((v for v in variants.values() if not v.bridge.baseline), next(iter(variants.values())))
    effect = effect_of(store, variant.apply, chosen, NUM_TOP, device)
    words = verdict(effect, comparison, variant.name)
    print(f"\n{variant.name}:\n{words}", flush=True)
    if args.out is None:
        return
    facts = {
        "bridge": variant.name,
        "folder": str(variant.source.folder) if variant.source and variant.source.folder else None,
        "features": str(store.folder),
        "split": store.split,
        "seed": args.seed,
        "forced": comparison.forced,
        "verdict": words.splitlines(),
        "mean_ap": {
            name: {group: comparison.mean_ap(name, group) for group in comparison.groups}
            for name in comparison.variants
        },
        **effect.to_dict(),
    }
    with report_folder(args.out, ["diffusion_effect.png", *(f"{name}.png" for name in EMBEDDINGS)]) as staged:
        write_json(staged / "effect.json", facts)
        has_pairs = drawn("the pairs", lambda: plot_effect(effect, staged / "diffusion_effect.png"))
        if args.embedding:
            points = embed([effect.before, effect.after, effect.text], args.embedding)
            drawn("the map", lambda: plot_embedding(points, args.embedding, staged / f"{args.embedding}.png"))
    pairs = f"pairs: {args.out / 'diffusion_effect.png'}; " if has_pairs else ""
    print(f"{pairs}top {NUM_TOP} of each image: {args.out / 'effect.json'}", flush=True)
