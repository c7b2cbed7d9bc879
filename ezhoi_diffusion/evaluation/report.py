"""A comparison as files: comparison.json and pictures."""

from __future__ import annotations

from pathlib import Path

from ezhoi_diffusion.errors import EzhoiDiffusionError
from ezhoi_diffusion.evaluation.comparison import Comparison
from ezhoi_diffusion.evaluation.plots import plot_comparison
from ezhoi_diffusion.files import write_json


def make_report_folder(folder: Path) -> None:
    """Make the folder, before the work that fills it. Raises EzhoiDiffusionError where that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EzhoiDiffusionError(f"{folder} cannot hold a report ({error}): give another --report") from error


def write_report(comparison: Comparison, folder: Path) -> None:
    """Write comparison.json and comparison.png into `folder`. Raises EzhoiDiffusionError where the disk refuses."""
    try:
        write_json(folder / "comparison.json", comparison.to_dict())
        plot_comparison(comparison, folder / "comparison.png")
    except OSError as error:
        raise EzhoiDiffusionError(
            f"the report cannot be written to {folder} ({error}): give another --report"
        ) from error
    print(f"report: {folder / 'comparison.json'}, {folder / 'comparison.png'}", flush=True)
