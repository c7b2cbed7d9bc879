"""`ezhoi-diffusion test FEATURES --bridge BRIDGE`: what a bridge does to the pairs of a few images, as a picture."""

from __future__ import annotations

import argparse
from pathlib import Path

from ezhoi_diffusion.errors import EzhoiDiffusionError

DESCRIPTION = """\
Look at what a bridge does on a few test images: diffusion_effect.png (similarity to the texts, norms, pair by pair, top
class), effect.json with each image's top 5 before and after, and a verdict in words. All in the host's own space and score."""
EPILOG = """\
reading it:
  similarity may rise while detections get worse: the host's score is a plain dot product, trained with what all features
  share still in them. The verdict warns where similarity rose and mAP did not.
  accuracy counts annotated pairs alone (IoU of at least 0.5 with an annotation, as the host matches them).

example:
  ezhoi-diffusion run main_tip_finetune.py … --eval --resume CKPT --plugin capture --capture TEST_FEATURES
  ezhoi-diffusion test TEST_FEATURES --bridge BRIDGE --out RESULTS --num-test-images 20
"""
TOP = 5


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    from ezhoi_diffusion.cli.compare import declare_application

    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.add_argument("features", type=Path, metavar="FEATURES", help="the folder of a capture of the test split")
    parser.add_argument("--bridge", default="", metavar="DIR", help="the trained bridge, or hf:USER/NAME[@REVISION]")
    parser.add_argument(
        "--name", default="diffusion", metavar="NAME", help="bridge to test, if not diffusion (mean_shift, a plugin's)"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the results")
    parser.add_argument(
        "--num-test-images", type=int, default=20, metavar="N", help="how many images with pairs, drawn by --seed (20)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the choice of images (0)")
    parser.add_argument(
        "--embedding", choices=("tsne", "umap"), help="also draw a map of both modalities; umap needs umap-learn"
    )
    declare_application(parser)


def run(args: argparse.Namespace) -> int:
    """Choose images, bridge their pairs, score, draw."""
    import torch

    from ezhoi_diffusion.cli.compare import acceptance
    from ezhoi_diffusion.evaluation.effect import verdict
    from ezhoi_diffusion.evaluation.replay import effect_of, replay
    from ezhoi_diffusion.evaluation.variants import parse_settings, resolve_variants
    from ezhoi_diffusion.features.store import FeatureStore
    from ezhoi_diffusion.files import write_json
    from ezhoi_diffusion.plugins import PluginManager
    from ezhoi_diffusion.report.embedding import embed, require_library
    from ezhoi_diffusion.report.plots import plot_effect, plot_embedding
    from ezhoi_diffusion.report.write import report_folder

    if args.num_test_images < 1:
        raise EzhoiDiffusionError(f"--num-test-images must be at least 1, not {args.num_test_images}")
    store = FeatureStore(args.features)
    forced: list[str] = []
    if args.embedding:
        require_library(args.embedding)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    variants = resolve_variants(
        args.name,
        PluginManager(),
        folder=args.bridge,
        check=acceptance(store, args, forced),
        device=device,
        settings=parse_settings((), args.inference_steps),
    )
    (name, bridge), *_ = variants.items()
    chosen = choose_images(store.images, args.num_test_images, args.seed)
    with report_folder(args.out):
        effect = effect_of(store, bridge.apply, chosen, TOP, device)
        comparison = replay(store, variants, chosen=chosen, device=device, forced=forced)
        words = verdict(effect, comparison, name)
        facts = {
            "bridge": name,
            "folder": args.bridge,
            "features": str(store.folder),
            "split": store.split,
            "seed": args.seed,
            "forced": forced,
            "verdict": words.splitlines(),
            "mean_ap": comparison.to_dict()["mean_ap"],
            **effect.to_dict(),
        }
        write_json(args.out / "effect.json", facts)
        plot_effect(effect, args.out / "diffusion_effect.png")
        if args.embedding:
            points = embed([effect.before, effect.after, effect.text], args.embedding)
            plot_embedding(points, args.embedding, args.out / f"{args.embedding}.png")
    print(words)
    for message in forced:
        print(f"FORCED: {message}")
    print(f"look at {args.out / 'diffusion_effect.png'} and {args.out / 'effect.json'}", flush=True)
    return 0


def choose_images(images: list[dict[str, object]], count: int, seed: int) -> set[int]:
    """Positions of `count` images that have pairs, or of all there are, drawn by `seed`."""
    import torch

    usable = [position for position, image in enumerate(images) if image["rows"]]
    order = torch.randperm(len(usable), generator=torch.Generator().manual_seed(seed))
    return {usable[i] for i in order[:count].tolist()}
