"""`ezhoi-diffusion import FILE… --out DIR`: the guide's files, turned into ours."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ezhoi_diffusion.guide.formats import GuideFile


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.description = """\
Say what files of the training guide are (.pkl, .pt; told from their content, not from their name), and with --out turn them
into a bridge or into features. Nothing in them is executed: a file that would run code is refused and named."""
    parser.epilog = """\
what makes what:
  model-k.pt + text mean               a bridge: recipe guide, 600 evaluations from level 600, unit output, EMA weights
  model-k.pt + raw text embeddings     the same; the mean is taken of the text
    … + visual embeddings              the same, and it knows the visual mean (for mean_shift) and the real scale factor
  visual embeddings + text mean        features for `ezhoi-diffusion train FEATURES --recipe guide`: directions, norms are lost
    … + text embeddings                the same, for every recipe (embeddings_for_viz.pkl serves as text too)
  a mean or a text alone, an EZ-HOI checkpoint: nothing to make; it says what is missing

Normalised text (…_normalized.pkl) has lost its mean: give the text mean with it. Text of CLIP itself (not adapted by the
host's prompts) is refused unless --force. No file says which EZ-HOI checkpoint it was made with, so on the host an imported
bridge needs --force.

examples:
  ezhoi-diffusion import hicodet_pkl_files/*.pkl hoi_diffusion_results/model-50.pt      # what are these?
  ezhoi-diffusion import model-50.pt hoi_text_mean_adapted_….pkl --out BRIDGE
  ezhoi-diffusion import hoi_visual_embeddings_….pkl hoi_text_mean_adapted_….pkl --out FEATURES
"""
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="files of the guide's scripts")
    parser.add_argument("--out", type=Path, metavar="DIR", help="new folder for the bridge or the features")
    parser.add_argument(
        "--weights", choices=("ema", "online"), default="ema", help="of a model: the averaged ones (default)"
    )
    parser.add_argument("--scale-factor", type=float, help="of a model, where no file tells it (5)")
    parser.add_argument("--force", action="store_true", help="go on where files do not fit; the result says so")


def run(args: argparse.Namespace) -> int:
    """Report, and convert."""
    from ezhoi_diffusion.guide.reading import GuideFileError

    try:
        return _import(args)
    except OSError as error:
        raise GuideFileError(
            f"{error.filename or args.out} cannot be read or written ({error.strerror}): see what it is, and give the command "
            f"again"
        ) from error


def _import(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from ezhoi_diffusion.files import require_unused
    from ezhoi_diffusion.guide.convert import Bundle, make_bridge, make_store, save_bridge
    from ezhoi_diffusion.guide.formats import read_guide_file
    from ezhoi_diffusion.guide.reading import GuideFileError

    if args.out is not None:
        args.out = args.out.resolve()
        require_unused(args.out, GuideFileError)
    files: list[GuideFile] = []
    size = sum(path.stat().st_size for path in args.files if path.is_file())
    with tqdm(total=size, unit="B", unit_scale=True, desc="reading", disable=None, leave=False) as progress:
        for path in args.files:
            files.append(read_guide_file(path))
            progress.write(_report(files[-1]))
            progress.update(path.stat().st_size)
    if args.out is None:
        return 0
    bundle = Bundle.from_files(files, force=args.force)
    if bundle.model is not None:
        bridge = make_bridge(bundle, weights=args.weights, scale_factor=args.scale_factor)
        save_bridge(bridge, args.out)
        made = f"bridge: {args.out}"
    else:
        store = make_store(bundle, args.out)
        made = f"features: {args.out} ({len(store)} directions of {len(store.images)} images)"
    own = {f"{file.path.name}: {warning}" for file in files for warning in file.warnings}
    for note in bundle.notes:
        if note not in own:
            print(f"note: {note}")
    print(made, flush=True)
    return 0


def _report(file: GuideFile) -> str:
    lines = [str(file.path), f"  {file.kind}: {file.contents}"]
    if file.facts:
        lines.append("  it says: " + ", ".join(f"{key} {value}" for key, value in file.facts.items()))
    return "\n".join([*lines, *(f"  warning: {warning}" for warning in file.warnings)])
