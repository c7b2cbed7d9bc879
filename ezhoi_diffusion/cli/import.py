"""`ezhoi-diffusion import FILE… --out DIR`: convert files of the training guide."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ezhoi_diffusion.cli.arguments import add_out

if TYPE_CHECKING:
    from ezhoi_diffusion.guide.kinds import GuideFile

DESCRIPTION = """\
Identify files of the training guide (.pkl, .pt) by their content, and with --out convert them into a bridge or into features.
Nothing in them is executed: a file that would run code is refused and named."""
EPILOG = """\
what --out makes:
  model-k.pt + text mean               a bridge: recipe guide, 600 evaluations from timestep 600, unit norm, EMA weights
  model-k.pt + raw text embeddings     the same; the mean is computed from the texts
    … + visual embeddings              the same, with the visual mean (for mean_shift) and the real scale factor
  visual embeddings + text mean        features for `ezhoi-diffusion train FEATURES --recipe guide`: directions without norms
    … + text embeddings                the same, for every recipe (embeddings_for_viz.pkl is text too)
  a mean or texts alone, a checkpoint of EZ-HOI: nothing; the message says what is missing

Normalised text (…_normalized.pkl) has lost its mean: give the text mean with it. Text of CLIP itself, which EZ-HOI's prompts
did not adapt, is refused unless --force. No file names its EZ-HOI checkpoint, so a run needs --force for an imported bridge.

examples:
  ezhoi-diffusion import hicodet_pkl_files/*.pkl hoi_diffusion_results/model-50.pt      # what are these?
  ezhoi-diffusion import model-50.pt hoi_text_mean_adapted_….pkl --out BRIDGE
  ezhoi-diffusion import hoi_visual_embeddings_….pkl hoi_text_mean_adapted_….pkl --out FEATURES
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="files of the guide's scripts")
    add_out(parser, "new folder for the bridge or the features")
    parser.add_argument(
        "--weights",
        choices=("ema", "online"),
        default="ema",
        help="weights of a model: averaged (ema, the default) or not",
    )
    parser.add_argument(
        "--scale-factor", type=float, metavar="S", help="scale factor of a model, where no file has it (5)"
    )
    parser.add_argument(
        "--force", action="store_true", help="convert files that do not fit together; the result says so"
    )


def run(args: argparse.Namespace) -> int:
    """Identify, and convert."""
    from ezhoi_diffusion.guide.reading import GuideFileError

    try:
        return _import(args)
    except OSError as error:
        raise GuideFileError(
            f"{error.filename or args.out} cannot be read or written ({error.strerror}): check the path and its permissions"
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
