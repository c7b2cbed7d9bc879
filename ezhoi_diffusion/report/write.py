"""Results as files: a page for the eye, JSON for programs, and the page's pictures by themselves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ezhoi_diffusion.errors import EzhoiDiffusionError
from ezhoi_diffusion.evaluation.comparison import Comparison
from ezhoi_diffusion.files import make_folder, replaced_files, write_atomic, write_json
from ezhoi_diffusion.locks import locked
from ezhoi_diffusion.report.headline import headline
from ezhoi_diffusion.report.png import drawn

if TYPE_CHECKING:
    from PIL.Image import Image

    from ezhoi_diffusion.report.figures import Panel

PICTURES = {  # file -> pictures in it
    "comparison": ("comparison",),
    "forest": ("forest",),
    "per_class": ("per_class",),
    "cost": ("cost",),
    "alignment": ("histograms", "measures"),
    "embedding": ("embedding",),
}


@contextmanager
def report_folder(folder: Path, pictures: Sequence[str] = ()) -> Iterator[Path]:
    """Yield a folder to write into; its files replace those in `folder` together, once nobody else writes there.

    Args:
        folder: The report's folder.
        pictures: Files that may be missing this time; those of an earlier report are then removed.

    Raises:
        EzhoiDiffusionError: The disk refuses.
    """
    try:
        make_folder(folder)
        with locked(folder, EzhoiDiffusionError, wait=True):
            with replaced_files(folder) as staged:
                yield staged
                missing = [name for name in pictures if not (staged / name).exists()]
            for name in missing:
                (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise EzhoiDiffusionError(
            f"{folder} cannot hold results ({error}): give another folder, or free space there"
        ) from error


def write_report(comparison: Comparison, folder: Path, notes: Sequence[str] = ()) -> None:
    """Write report.html, report.json and, for all that the comparison has figures for, pictures into `folder`.

    notes: sentences on where alignment and mean AP disagree. Raises EzhoiDiffusionError where the disk refuses.
    """
    from ezhoi_diffusion.report.figures import joined, pictures, png, render
    from ezhoi_diffusion.report.page import page

    made: dict[str, list[tuple[Panel, Image]]] = {}

    def draw() -> None:
        found = {name: [(panel, render(panel)) for panel in panels] for name, panels in pictures(comparison).items()}
        made.update(found)

    has_pictures = drawn("the report's pictures", draw)
    found = headline(comparison)
    said = {"headline": found.text, "details": found.details, "notes": [*notes]}
    with report_folder(folder, [f"{name}.png" for name in PICTURES]) as staged:
        write_json(staged / "report.json", {**said, **comparison.to_dict()})
        for name, parts in PICTURES.items():
            if drawings := [drawing for part in parts for _, drawing in made.get(part, [])]:
                write_atomic(staged / f"{name}.png", png(joined(drawings)))
        inline = {name: [(panel.alt, png(drawing)) for panel, drawing in panels] for name, panels in made.items()}
        write_atomic(staged / "report.html", page(comparison, inline, notes).encode(errors="xmlcharrefreplace"))
    beside = ", its pictures beside it" if has_pictures else ""
    print(f"report: {folder / 'report.html'}; its figures are in report.json{beside}", flush=True)
