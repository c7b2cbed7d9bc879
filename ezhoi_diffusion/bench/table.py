"""A bench's result as tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

UNTIMED = "*"


def table(result: dict[str, Any]) -> str:
    """All that was measured, as text that is Markdown too."""
    machine, subject = result["machine"], result["subject"]
    parts = [
        f"{machine['device']}{'' if machine['device'] == 'CPU' else ', CPU'} {machine['cpu']}, {machine['cores']} cores, "
        f"threads {machine['threads']}, torch {machine['torch']}, load average {machine['load']:.2f} at the start\n"
        f"rows: {subject['rows']} of width {subject['dim']}, {subject['texts']} texts, {subject['origin']}; bridge: {subject['bridge']}",
        *([f"warning: {warning}" for warning in result["warnings"]]),
        _sampler(result),
        _training(result),
        *_closed_form(result),
        _memory(result),
        f"measured in {result['seconds']:.0f} s",
    ]
    return "\n\n".join(parts)


def _sampler(result: dict[str, Any]) -> str:
    sizes, entries = result["effort"]["sizes"], result["sampler"]
    head = [
        "bridge", "t0", "S", *(f"ms, {pairs} pairs" for pairs in sizes), *(f"x, {pairs}" for pairs in sizes),
        "cosine, mean", "cosine, min", "top-1",
    ]  # fmt: skip
    rows = []
    for entry in entries:
        near, mark = entry["fidelity"], UNTIMED if entry["timed_evaluations"] < entry["evaluations"] else ""
        rows.append(
            [
                f"{entry['name']}{mark}",
                str(entry["start_timestep"]),
                str(entry["evaluations"]),
                *(_spread(entry["ms"][str(pairs)]) for pairs in sizes),
                *(f"{_figure(entry['ratio'][str(pairs)])}" for pairs in sizes),
                *(
                    [f"{near['cosine']:.4f}", f"{near['cosine_min']:.4f}", f"{near['top1']:.3f}"]
                    if near
                    else ["", "", ""]
                ),
            ]
        )
    slow = next(entry for entry in entries if entry["timed_evaluations"] < entry["evaluations"])
    swept = sum(entry["fidelity"] is not None for entry in entries) > 1
    reached = ", ".join(f"{least}: {steps or 'not reached'}" for least, steps in result["fewest"].items())
    return "\n".join(
        [
            "Bridging the pairs of an image: median of the milliseconds [quartiles]; how often that goes into the guide's; and how "
            "near the result is to that of the same network with an evaluation at every level below t0 (of a student: its teacher's)",
            "",
            _grid(head, rows),
            "",
            f"{UNTIMED} timed on {slow['timed_evaluations']} of its {slow['evaluations']} evaluations, times "
            f"{slow['evaluations'] / slow['timed_evaluations']:g}",
            *([f"fewest of the evaluations S measured from level 600 by mean cosine: {reached}"] if swept else []),
        ]
    )


def _closed_form(result: dict[str, Any]) -> list[str]:
    """None where no bridge was trained."""
    facts = result["closed_form"]
    if facts is None:
        return []
    when = (
        f"not reached in {facts['steps']} steps, {facts['seconds']:.0f} s: {facts['val_loss']:.4f}"
        if facts["reached_at_step"] is None
        else f"below it after {facts['reached_at_step']} steps, {facts['reached_after_seconds']:.0f} s"
    )
    return [
        f"Loss of the closed-form Gaussian (wiener) on held-out texts {facts['wiener_val_loss']:.4f}; our training: {when}"
    ]


def _training(result: dict[str, Any]) -> str:
    rows = [
        [entry["name"], str(entry["batch"]), _spread(entry["steps_per_second"]), f"{_figure(entry['ratio'])}"]
        for entry in result["training"]
    ]
    return "\n".join(
        [
            "Training: median of the steps a second [quartiles]; Trainer1D is that of denoising-diffusion-pytorch, as published, "
            "with a data loader's worker for every core",
            "",
            _grid(["trainer, network", "batch", "steps/s", "x Trainer1D, unet1d"], rows),
        ]
    )


def _memory(result: dict[str, Any]) -> str:
    rows = [[entry["of"], entry["name"], f"{entry['bytes'] / 2**20:.0f}"] for entry in result["memory"]]
    how = (
        "allocated on the GPU at most"
        if result["machine"]["device"] != "CPU"
        else "growth of the process's largest resident size"
    )
    return "\n".join([f"Peak memory, each in a process of its own: {how}", "", _grid(["of", "network", "MiB"], rows)])


def _spread(values: dict[str, float]) -> str:
    return f"{_figure(values['median'])} [{_figure(values['low'])}, {_figure(values['high'])}]"


def _figure(value: float) -> str:
    """Three digits, and no exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}".rstrip(".")


def _grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in lines
    )
