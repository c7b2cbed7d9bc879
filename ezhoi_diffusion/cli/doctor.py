"""`ezhoi-diffusion doctor [FEATURES] [BRIDGE] [-- SCRIPT …]`: what is wrong, and what to do."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

from ezhoi_diffusion.cli.arguments import add_out
from ezhoi_diffusion.cli.terminal import print_table

DESCRIPTION = """\
Check the environment and, where given, captured features, a bridge and the flags of a script, alone or together. Each line has
a level, a name, what was found and, after ->, what to do. Of features it also prints statistics. Nothing is changed, and EZ-HOI
does not run: its script is read up to its flags. Reading all features takes a while."""
EPILOG = """\
levels:
  ok, note (worth knowing), warning (may cost results, or stop some runs), problem (does not work)
exit status:
  1 if there is a problem, otherwise 0

statistics of features:
  pairs              at least 15 an image, most of them background: EZ-HOI keeps at least three humans and three objects whatever
                     their score. That is 570,000 or more on HICO-DET's 38,000 training images, not the guide's 50-100,000
  norm of the mean   about 0.7-0.9 for CLIP text; the guide's 0.01-0.05 is impossible
  shared direction   small after the visual mean. Where it is large after the text mean, subtracting that mean (recipe guide)
                     leaves a common vector in the features, and such bridges hurt wherever they were measured

examples, in an EZ-HOI folder:
  ezhoi-diffusion doctor
  ezhoi-diffusion doctor FEATURES BRIDGE
  ezhoi-diffusion doctor FEATURES --out STATISTICS
  ezhoi-diffusion doctor BRIDGE -- main_tip_finetune.py … --eval --resume CKPT
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.usage = "%(prog)s [-h] [--json] [--out DIR] [FEATURES] [BRIDGE] [-- SCRIPT …]"
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.add_argument(
        "folders", nargs="*", type=Path, metavar="FEATURES, BRIDGE", help="folders; their contents say which is which"
    )
    parser.add_argument("--json", action="store_true", help="print the findings as a list of name, level, found, fix")
    add_out(parser, "write statistics.json and statistics.png of FEATURES there")


def run(args: argparse.Namespace) -> int:
    """Print the findings, then the statistics."""
    from dataclasses import asdict

    from ezhoi_diffusion.doctor.checks import kind_of, run_checks
    from ezhoi_diffusion.doctor.finding import FEATURES
    from ezhoi_diffusion.errors import EzhoiDiffusionError
    from ezhoi_diffusion.files import check_writable

    features = next((folder for folder in args.folders if kind_of(folder) == FEATURES), None)
    if args.out is not None:
        if features is None:
            raise EzhoiDiffusionError("--out is for statistics of captured features: give their folder too")
        check_writable(args.out)
    findings = []
    for finding in run_checks(args.folders, args.script_line):
        findings.append(finding)
        if not args.json:
            fix = f" -> {finding.fix}" if finding.fix else ""
            print(f"{finding.level:8} {finding.name:25} {finding.found}{fix}".replace("\n", " "), flush=True)
    count = Counter(finding.level for finding in findings)
    if args.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        print(f"\n{count['problem']} problems, {count['warning']} warnings, {count['note']} notes, {count['ok']} ok")
    problems = {finding.name for finding in findings if finding.level == "problem"}
    readable = not problems & {"features.open", "features.files", "input"}
    if features is not None and readable and (args.out is not None or not args.json):
        _statistics(features, None if args.json else print_table, args.out)
    return 1 if count["problem"] else 0


def _statistics(folder: Path, show: Any, out: Path | None) -> None:
    """Show the statistics of captured features, and write them into `out`."""
    import torch

    from ezhoi_diffusion.features.store import FeatureStore
    from ezhoi_diffusion.features.summary import drawn_cosines, summarize
    from ezhoi_diffusion.files import write_json
    from ezhoi_diffusion.report.plots import plot_statistics

    store = FeatureStore(folder)
    found = summarize(store)
    if show is not None:
        print()
        show(("statistics", ""), _rows(found))
    if out is not None:
        write_json(out / "statistics.json", found)
        norms = torch.cat([shard["adapter_feat"].norm(dim=1) for shard in store.shards()])
        plot_statistics((norms, store.text.norm(dim=1)), drawn_cosines(store), out / "statistics.png")


def _rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    per_image, shared = found["pairs_per_image"], found["shared"]
    return [
        (
            "pairs",
            f"{found['rows']} of {found['images']} {found['split']} images, {found['images_without_pairs']} without",
        ),
        ("pairs per image", f"median {per_image['median']:.0f}, at most {per_image['max']}"),
        ("texts", f"{found['text_rows']} of width {found['dim']}"),
        ("norm", f"visual {_range(found['visual_norm'])}, text {_range(found['text_norm'])}"),
        ("norm of the mean", f"visual {found['visual_mean_norm']:.3f}, text {found['text_mean_norm']:.3f}"),
        ("gap", f"{found['gap']:.3f} between the two means"),
        (
            "shared direction",
            f"{shared['after_visual_mean']:.3f} after the visual mean is subtracted, {shared['after_text_mean']:.3f} after "
            f"the text mean",
        ),
    ]


def _range(values: dict[str, float]) -> str:
    return f"{values['min']:.3g} to {values['max']:.3g}, median {values['median']:.3g}"
