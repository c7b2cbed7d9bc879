"""`ezhoi-diffusion compare FEATURES --bridges none,…`: the host's own score, replayed on stored features."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ezhoi_diffusion.errors import EzhoiDiffusionError

if TYPE_CHECKING:
    from collections.abc import Callable

    from ezhoi_diffusion.bridge import Bridge
    from ezhoi_diffusion.features.store import FeatureStore

DESCRIPTION = """\
Compare bridges on captured features of the test split: the table that `run … --eval --compare` prints, without the host,
its weights or its images, with intervals and p-values of a paired bootstrap over images. `none` is scored with the host's
own logits; the published score is first checked against them."""
EPILOG = """\
reading it:
  an interval that holds 0 is no difference. The adjusted p-value is for all variants of the table together: of sixty points of
  a sweep some look good by chance. Both are about images; train with --seeds 3 to see what another seed does.
  what a sweep shows on the test split is for looking at: choose with `ezhoi-diffusion tune`, which uses training images.
  identity and mean_shift are the controls: a bridge counts against the best of them, not against none alone.

examples:
  ezhoi-diffusion run main_tip_finetune.py … --eval --resume CKPT --plugin capture --capture TEST_FEATURES
  ezhoi-diffusion compare TEST_FEATURES --bridge BRIDGE --bridges none,identity,mean_shift,diffusion --out REPORT
  ezhoi-diffusion compare TEST_FEATURES --bridge BRIDGE --bridges none,diffusion --sweep start_timestep=50,100,200 --sweep blend=0.25,0.5,1
  ezhoi-diffusion compare VCOCO_FEATURES --vcoco V-COCO_CHECKOUT --bridge BRIDGE
"""
LEAST_REPLICATES = 100
DEFAULT = "none,identity,mean_shift,diffusion"


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    from ezhoi_diffusion.evaluation.bootstrap import REPLICATES

    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.add_argument("features", type=Path, metavar="FEATURES", help="the folder of a capture of the test split")
    parser.add_argument("--bridges", default=DEFAULT, metavar="none,NAME[=DIR],…", help=f"what to compare ({DEFAULT})")
    parser.add_argument(
        "--bridge",
        default="",
        metavar="DIR",
        help="the folder of those that name none; any DIR may be hf:USER/NAME[@REVISION] of the Hugging Face Hub",
    )
    parser.add_argument(
        "--sweep", action="append", default=[], metavar="KEY=V,V,…",
        help="also take every bridge that has settings at each point of a grid: start_timestep, steps, strength, output",
    )  # fmt: skip
    parser.add_argument(
        "--setting", choices=("default", "known-object"), default="default",
        help="known-object: a class is scored on the images that hold its object alone, as HICO-DET's second setting has it",
    )  # fmt: skip
    parser.add_argument(
        "--ap", choices=("11P", "AUC"), default="11P",
        help="average precision: by 11 points, as EZ-HOI prints it (default), or the area under the curve",
    )  # fmt: skip
    parser.add_argument(
        "--replicates", type=int, default=REPLICATES, metavar="N",
        help=f"of the bootstrap over images; 0 for no intervals ({REPLICATES})",
    )  # fmt: skip
    parser.add_argument(
        "--vcoco", type=Path, metavar="DIR",
        help="for a capture of V-COCO: role AP in both scenarios, from V-COCO's own annotations in this checkout or data folder",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="DIR", help="write report.html, report.json and pictures there")
    declare_application(parser)
    parser.add_argument("--no-plugin", action="append", default=[], metavar="NAME", help="do not even import a plugin")


def run(args: argparse.Namespace) -> int:
    """EzHoiScore, print, and write where asked."""
    import torch

    from ezhoi_diffusion.evaluation.alignment import disagreements
    from ezhoi_diffusion.evaluation.replay import replay
    from ezhoi_diffusion.evaluation.variants import parse_settings, parse_sweep, resolve_variants
    from ezhoi_diffusion.evaluation.vcoco import replay_roles
    from ezhoi_diffusion.features.store import FeatureStore
    from ezhoi_diffusion.plugins import PluginManager
    from ezhoi_diffusion.report.headline import headline
    from ezhoi_diffusion.report.write import report_folder, write_report

    if args.vcoco and (args.ap, args.setting) != ("11P", "default"):
        raise EzhoiDiffusionError("--ap and --setting are for HICO-DET: leave them out with --vcoco")
    store = FeatureStore(args.features)
    forced: list[str] = []
    accept = acceptance(store, args, forced)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plugins = PluginManager(args.no_plugin)
    variants = resolve_variants(
        args.bridges,
        plugins,
        folder=args.bridge,
        check=accept,
        device=device,
        settings=parse_settings((), args.inference_steps),
        sweep=parse_sweep(args.sweep),
    )
    if args.out:
        with report_folder(args.out):
            pass  # refused now, not after the work
    if args.replicates and args.replicates < LEAST_REPLICATES:
        raise EzhoiDiffusionError(
            f"--replicates must be 0 or at least {LEAST_REPLICATES}, not {args.replicates}: with fewer no p-value could be small"
        )
    options: dict[str, Any] = {"replicates": args.replicates, "aligned": True, "device": device, "forced": forced}
    if args.vcoco:
        comparison = replay_roles(store, variants, args.vcoco, **options)
    else:
        comparison = replay(store, variants, algorithm=args.ap, setting=args.setting, **options)
    if store.meta.get("max_images") is not None:
        comparison.caveats.append(
            f"The first {store.meta['max_images']} images of the split, and the classes annotated there: no result to report."
        )
    if store.split != "test":
        comparison.caveats.append(f"These are images of the {store.split} split: no result to report.")
    notes = disagreements(comparison.alignment, {name: comparison.mean_ap(name, "full") for name in comparison.ap})
    print("\n".join(["", comparison.table(), *notes, headline(comparison).text]), flush=True)
    if args.out:
        write_report(comparison, args.out, notes)
    return 0


def declare_application(parser: argparse.ArgumentParser) -> None:
    """The flags that say how bridges are applied, and on which hosts."""
    declare_force(parser)
    parser.add_argument(
        "--inference-steps", type=int, metavar="N",
        help="apply diffusion bridges from level N with N evaluations, whatever their recipe says: the level is how strongly a "
        "feature is bridged, the evaluations are what that costs",
    )  # fmt: skip


def declare_force(parser: argparse.ArgumentParser) -> None:
    """The flag that `acceptance` reads."""
    parser.add_argument("--force", action="store_true", help="use a bridge made for another host; the results say so")


def acceptance(store: FeatureStore, args: argparse.Namespace, forced: list[str]) -> Callable[[Bridge, str], None]:
    """Holds a bridge against the host that the features came from, as the host itself does: see Host.accept."""
    from ezhoi_diffusion.bridge import fingerprint_mismatch

    def accept(bridge: Bridge, name: str) -> None:
        difference = fingerprint_mismatch(bridge, name, store.fingerprint)
        if difference is None:
            return
        if not args.force:
            raise EzhoiDiffusionError(
                f"{difference.message} (here: the host of {store.folder}). Capture both splits from one host, with the same "
                f"--seed, and train on its features; or add --force to use it all the same"
            )
        forced.append(difference.message)

    return accept
