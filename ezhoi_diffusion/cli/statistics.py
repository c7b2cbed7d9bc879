"""`ezhoi-diffusion statistics FEATURES`: what was captured, in figures."""

from __future__ import annotations

import argparse
from pathlib import Path

DESCRIPTION = """\
Figures of captured features: counts, norms, the two means, the gap between them, and how much of a visual row is common
to all rows once a mean has been taken off. The text features are those that the host multiplied with in the same pass."""
EPILOG = """\
what to expect:
  pairs        at least 15 an image, so at least 570k on HICO-DET's 38k training images, most of them background: the host
               keeps at least three humans and three objects whatever their score (the guide's 50-100k are too few)
  mean's norm  the root of the mean pairwise cosine, about 0.7-0.9 for CLIP text (the guide's 0.01-0.05 cannot be)
  shared       small after the visual mean; where it is large after the text mean, subtracting that from visual rows (the
               guide's recipe) leaves a common vector in them, and such a bridge hurt wherever it was measured

example:
  ezhoi-diffusion statistics FEATURES --out STATISTICS
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.add_argument("features", type=Path, metavar="FEATURES", help="the folder of a capture")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write statistics.json and statistics.png there too")


def run(args: argparse.Namespace) -> int:
    """Print, and write where asked."""
    import torch

    from ezhoi_diffusion.features.store import FeatureStore
    from ezhoi_diffusion.features.summary import drawn_cosines, summarize
    from ezhoi_diffusion.files import write_json
    from ezhoi_diffusion.report.plots import plot_statistics
    from ezhoi_diffusion.report.write import report_folder

    store = FeatureStore(args.features)
    found = summarize(store)
    for label, value in (
        ("pairs", f"{found['rows']} of {found['images']} {found['split']} images, {found['images_without_pairs']} without"),
        ("pairs per image", f"median {found['pairs_per_image']['median']:.0f}, at most {found['pairs_per_image']['max']}"),
        ("texts", f"{found['text_rows']} rows of width {found['dim']}"),
        ("norm of a row", f"visual {_range(found['visual_norm'])}, text {_range(found['text_norm'])}"),
        ("norm of the mean", f"visual {found['visual_mean_norm']:.3f}, text {found['text_mean_norm']:.3f}"),
        ("gap", f"{found['gap']:.3f} between the two means"),
        ("shared by all rows", f"{found['shared']['after_visual_mean']:.3f} after the visual mean is taken off, "
                               f"{found['shared']['after_text_mean']:.3f} after the text mean"),
    ):  # fmt: skip
        print(f"{label:20}{value}")
    if args.out:
        with report_folder(args.out):
            write_json(args.out / "statistics.json", found)
            norms = torch.cat([shard["adapter_feat"].norm(dim=1) for shard in store.shards()])
            plot_statistics((norms, store.text.norm(dim=1)), drawn_cosines(store), args.out / "statistics.png")
        print(f"wrote {args.out / 'statistics.json'}, {args.out / 'statistics.png'}", flush=True)
    return 0


def _range(values: dict[str, float]) -> str:
    return f"{values['min']:.3g} … {values['median']:.3g} … {values['max']:.3g}"
