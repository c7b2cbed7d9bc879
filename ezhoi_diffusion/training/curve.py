"""Notes on the curve of a training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def notes(facts: Mapping[str, Any]) -> list[str]:
    """List what a user should know before using the bridge, from the content of its training.json."""
    recipe, best, baseline = facts["config"]["recipe"], facts["best_val_loss"], facts["isotropic_val_loss"]
    found = []
    if best >= baseline:
        why, remedy = unlearned(facts["history"], recipe["trained_on"])
        found.append(
            f"the lowest validation loss, {best:.4f}, is not below {baseline:.4f}, the loss of the isotropic estimate, which "
            f"knows no data: {why}; {remedy}"
        )
    ranges = zip(facts["ranges"], facts["val_loss_by_range"], facts["isotropic_val_loss_by_range"], strict=True)
    above = [f"{low}-{high}" for (low, high), loss, estimate in ranges if loss >= estimate]
    if above:
        found.append(
            f"at timesteps {', '.join(above)} the network is no better than the isotropic estimate, which knows no data; "
            f"this bridge uses the timesteps below {recipe['start_timestep']}"
        )
    return found


def unlearned(history: Sequence[Mapping[str, Any]], trained_on: str) -> tuple[str, str]:
    """Return why a training probably learned nothing that generalises, and what to do."""
    losses = [record["loss"] for record in history]
    validations = [record["val_loss"] for record in history if "val_loss" in record]
    if losses and not losses[-1] <= losses[0]:
        return "the training loss rose", "lower --learning-rate"
    if not validations or validations[-1] == min(validations):
        return "it is under-trained", "give more --train-steps; if that does not help, try another --learning-rate"
    closed_form = ", or use --denoiser gaussian, which needs no training" if trained_on in ("text", "visual") else ""
    return "the network memorised its features", f"capture more of them{closed_form}"
