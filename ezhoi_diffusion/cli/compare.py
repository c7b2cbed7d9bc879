"""`ezhoi-diffusion compare FEATURES --bridges none,…`: the host's own score, replayed on stored features."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ezhoi_diffusion.errors import EzhoiDiffusionError

if TYPE_CHECKING:
    from collections.abc import Callable

    from ezhoi_diffusion.features.store import FeatureStore

DESCRIPTION = """\
Compare bridges on captured features of the test split: the table that `run … --eval --compare` prints, without the host,
its weights or its images. `none` is scored with the host's own logits; the published score is first checked against them."""
EPILOG = """\
example:
  ezhoi-diffusion run main_tip_finetune.py … --eval --resume CKPT --plugin capture --capture TEST_FEATURES
  ezhoi-diffusion compare TEST_FEATURES --bridge BRIDGE --bridges none,identity,mean_shift,diffusion --report REPORT
"""
DEFAULT = "none,identity,mean_shift,diffusion"


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.add_argument("features", type=Path, metavar="FEATURES", help="the folder of a capture of the test split")
    parser.add_argument("--bridges", default=DEFAULT, metavar="none,NAME[=DIR],…", help=f"what to compare ({DEFAULT})")
    parser.add_argument("--bridge", default="", metavar="DIR", help="the folder of those that name none")
    parser.add_argument("--report", type=Path, metavar="DIR", help="write comparison.json and comparison.png there")
    declare_application(parser)
    parser.add_argument("--no-plugin", action="append", default=[], metavar="NAME", help="do not even import a plugin")


def run(args: argparse.Namespace) -> int:
    """Score, print, and write where asked."""
    import torch

    from ezhoi_diffusion.evaluation.report import report_folder, write_report
    from ezhoi_diffusion.features.store import FeatureStore
    from ezhoi_diffusion.host.replay import replay
    from ezhoi_diffusion.host.variants import resolve_variants
    from ezhoi_diffusion.plugins import PluginHost

    store = FeatureStore(args.features)
    forced: list[str] = []
    provenance: dict[str, Any] = {}
    accept = acceptance(store, args, forced, provenance)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    variants = resolve_variants(args.bridges, PluginHost(args.no_plugin), args.bridge, accept, device)
    if args.report:
        with report_folder(args.report):
            pass  # refused now, not after the work
    comparison = replay(store, variants, device=device, forced=forced, provenance=provenance)
    print(f"\n{comparison.table()}", flush=True)
    if store.meta.get("max_images") is not None:
        print(
            f"The first {store.meta['max_images']} images of the split, and the classes annotated there: no result to report.",
            flush=True,
        )
    if store.split != "test":
        print(f"These are images of the {store.split} split: no result to report.", flush=True)
    if args.report:
        write_report(comparison, args.report)
    return 0


def declare_application(parser: argparse.ArgumentParser) -> None:
    """The flags that `acceptance` reads."""
    parser.add_argument(
        "--inference-steps", type=int, metavar="N",
        help="apply diffusion bridges from level N with N evaluations, whatever their recipe says: the level is how strongly a "
        "feature is bridged, the evaluations are what that costs",
    )  # fmt: skip
    parser.add_argument(
        "--force-bridge", action="store_true", help="use a bridge made for another host; the results say so"
    )


def acceptance(
    store: FeatureStore, args: argparse.Namespace, forced: list[str], provenance: dict[str, Any]
) -> Callable[[object, str], None]:
    """Holds a bridge against the host that the features came from, as the host itself does: see Host.accept."""
    from ezhoi_diffusion.host.fingerprint import foreign
    from ezhoi_diffusion.host.variants import set_steps

    def accept(bridge: object, name: str) -> None:
        set_steps(bridge, args.inference_steps)
        if getattr(bridge, "provenance", None) is not None:
            provenance[name] = getattr(bridge, "provenance", None)
        difference = foreign(bridge, name, store.fingerprint)
        if difference is None:
            return
        if not args.force_bridge:
            raise EzhoiDiffusionError(
                f"{difference[1]} (here: the host of {store.folder}). Capture both splits from one host, with the same "
                f"--seed, and train on its features; or add --force-bridge to use it all the same"
            )
        forced.append(difference[1])

    return accept
