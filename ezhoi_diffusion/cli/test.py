"""`ezhoi-diffusion test FEATURES --bridge BRIDGE --out DIR`: a bridge on a few images. It is `compare --num-images 20`."""

from __future__ import annotations

import argparse

from ezhoi_diffusion.cli import compare

DESCRIPTION = """\
Look at what a bridge does on a few test images, in EZ-HOI's own space and score. DIR gets diffusion_effect.png (similarity to
the texts, norms, each pair, top class), effect.json (each image's top 5 before and after, a verdict) and the report of
`compare`. It is `compare --num-images 20` with the bridges none,diffusion."""
EPILOG = """\
how to read it:
  Similarity can rise while detections get worse: EZ-HOI's score is a plain dot product, trained with what all features share
  still in them. The verdict warns where similarity rose and mAP did not.
  Accuracy counts annotated pairs only: IoU of at least 0.5 with an annotation, as EZ-HOI matches them.
  A few images cannot show a gain: use `ezhoi-diffusion compare` for a result.

example:
  ezhoi-diffusion test TEST_FEATURES --bridge BRIDGE --out LOOK
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    compare.add_flags(parser, bridges="none,diffusion", num_images=20)


run = compare.run
