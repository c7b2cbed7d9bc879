"""Results as files: JSON, and pictures beside it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ezhoi_diffusion.errors import EzhoiDiffusionError
from ezhoi_diffusion.evaluation.comparison import Comparison
from ezhoi_diffusion.evaluation.plots import plot_comparison
from ezhoi_diffusion.files import write_json


@contextmanager
def report_folder(folder: Path) -> Iterator[None]:
    """Make the folder, and let results be written there. Raises EzhoiDiffusionError where the disk refuses either."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise EzhoiDiffusionError(
            f"{folder} cannot hold results ({error}): give another folder, or free space there"
        ) from error


def write_report(comparison: Comparison, folder: Path) -> None:
    """Write comparison.json and comparison.png into `folder`. Raises EzhoiDiffusionError where the disk refuses."""
    with report_folder(folder):
        write_json(folder / "comparison.json", comparison.to_dict())
        plot_comparison(comparison, folder / "comparison.png")
    print(f"report: {folder / 'comparison.json'}, {folder / 'comparison.png'}", flush=True)
