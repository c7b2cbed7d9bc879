"""A comparison as a table: the same cells for files, pipes and terminals."""

from __future__ import annotations

from ezhoi_diffusion.evaluation.comparison import FULL, REFERENCE, Comparison, p_text

Cell = list[str]


def table_rows(comparison: Comparison) -> tuple[list[str], list[list[Cell]]]:
    """Titles, and a row for `none` and each bridge. A cell has mean AP, the difference with its interval, and p, where known."""
    head = ["mAP", *comparison.groups, "ms/image"]
    rows = []
    for name, result in comparison.bridges.items():
        time = ["-" if comparison.ezhoi_ms is None else f"{comparison.ezhoi_ms + result.added_ms:.2f}"]
        time += [] if name == REFERENCE else [f"{result.added_ms:+.2f}"]
        rows.append([[name], *(_cell(comparison, name, group) for group in comparison.groups), time])
    return head, rows


def _cell(comparison: Comparison, name: str, group: str) -> Cell:
    cell = [f"{comparison.mean_ap(name, group):.2f}"]
    if name != REFERENCE:
        bounds, p = comparison.bounds(name, group), comparison.p(name, group)
        interval = f" [{bounds[0]:+.2f} {bounds[1]:+.2f}]" if bounds else ""
        cell += [f"{comparison.difference(name, group):+.2f}{interval}", *([] if p is None else [f"p {p_text(p)}"])]
    return cell


def table_notes(comparison: Comparison) -> list[str]:
    """What the numbers of the table are about and what they leave out, then the warnings."""
    counts = "  ".join(f"{group} {len(index)}" for group, index in comparison.groups.items())
    return [
        f"{comparison.images} images, {comparison.pairs} pairs; classes: {counts}",
        *(
            f"{name}: mean of {len(seeds)} seeds, full mAP {mean:.2f} ± {deviation:.2f} (standard deviation)"
            for name, seeds in comparison.seed_groups.items()
            for mean, deviation in [comparison.spread(name, FULL)]
            if deviation is not None
        ),
        *interval_notes(comparison),
        *comparison.warnings(),
    ]


def interval_notes(comparison: Comparison) -> list[str]:
    """How to read intervals and p-values, a sentence each."""
    if not comparison.replicates:
        return ["One run without intervals: small differences may be chance."]
    number = len(comparison.bridges) - 1
    level = f"{100 * comparison.level:g} %"
    notes = []
    if comparison.swept:
        notes.append(f"Intervals are simultaneous: at {level} those of all {number} bridges hold at once (max-T).")
    else:
        notes.append(f"Each interval is the {level} interval of one difference by itself.")
    notes.append(f"p is adjusted for all {number} bridges (max-T)." if number > 1 else "p is that of this one bridge.")
    if comparison.primary is not None:
        notes.append(
            f"{comparison.primary} was chosen before these images were seen. Its full mAP is the primary endpoint: that p is "
            f"not adjusted."
        )
    several = any(len(seeds) > 1 for seeds in comparison.seed_groups.values())
    covered = "images and training seeds" if several else "images, not the training seed"
    notes.append(f"Intervals cover the choice of {covered} ({comparison.replicates} resamplings).")
    return notes


def as_text(comparison: Comparison) -> str:
    """The table as plain text: mean AP above, differences to bare EZ-HOI below, then the notes."""
    head, rows = table_rows(comparison)
    above = [[cell[0] for cell in row] for row in rows]
    below = [[f"{row[0][0]} - {REFERENCE}", *(" ".join(cell[1:]) for cell in row[1:])] for row in rows[1:]]
    lines = [*_block([head, *above]), *(_block([["difference", *head[1:]], *below]) if below else [])]
    return "\n".join([*lines, *table_notes(comparison)])


def _block(rows: list[list[str]]) -> list[str]:
    """Rows in columns, with a line below the first."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows = [rows[0], ["-" * width for width in widths], *rows[1:]]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
