"""What may be said of a comparison in a sentence: gain, loss, or nothing that can be told from chance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ezhoi_diffusion.evaluation.comparison import FULL, REFERENCE, Comparison, p_text

Tone = Literal["gain", "loss", "unknown"]
UNKNOWN: Tone = "unknown"
ONLY_CONTROLS = "Only controls were compared: this says nothing of a bridge."


@dataclass(frozen=True)
class Headline:
    """The sentence, the figures behind it, and what it comes to.

    A gain is one over the bare host and over the best control, without a warning.
    """

    text: str
    details: list[str]
    tone: Tone


def headline(comparison: Comparison) -> Headline:
    """The best bridge by full mean AP, of those whose gain can be told from chance if there are any.

    It is held against the bare host, and on the same draws against the best control.
    """
    bridges = [variant for variant in comparison.ranked() if variant not in comparison.controls]
    control = next((variant for variant in comparison.ranked() if variant in comparison.controls), None)
    if bridges:
        best = next((variant for variant in bridges if _gains(comparison, variant)), bridges[0])
        text, tone = _sentence(comparison, best, control)
        details = [*_rank(best, bridges), _figures(comparison, best), *_over_seeds(comparison, best)]
    else:
        text, tone, details = ONLY_CONTROLS, UNKNOWN, []
    details += [_figures(comparison, control)] if control is not None else []
    if comparison.warnings():
        return Headline(f"See the warnings first. {text}", details, UNKNOWN)
    return Headline(text, details, tone)


def _gains(comparison: Comparison, variant: str) -> bool:
    return comparison.is_significant(variant, FULL) and comparison.difference(variant, FULL) > 0


def _rank(best: str, bridges: list[str]) -> list[str]:
    if len(bridges) == 1:
        return []
    if best == bridges[0]:
        return [f"{best} has the highest full mAP of {len(bridges)} bridges."]
    return [f"{bridges[0]} has the highest full mAP of {len(bridges)} bridges, and cannot be told from chance."]


def _sentence(comparison: Comparison, best: str, control: str | None) -> tuple[str, Tone]:
    change = comparison.difference(best, FULL)
    if comparison.significance is None:
        side = "above" if change >= 0 else "below"
        return (
            f"{best} ends {abs(change):.2f} points of full mAP {side} the bare host. There are no intervals, and one run by "
            f"itself shows nothing of chance.",
            UNKNOWN,
        )
    gains = _gains(comparison, best)
    loses = comparison.is_significant(best, FULL) and not gains
    if gains:
        text = f"{best} gains {change:.2f} points of full mAP over the bare host"
    elif loses:
        text = f"{best} loses {-change:.2f} points of full mAP against the bare host"
    else:
        text = f"No gain can be told from chance: {best} changes full mAP by {change:+.2f} points"
    tone: Tone = "loss" if loses else UNKNOWN
    if control is None:
        return f"{text}. No control was compared, and one may do as much.", tone
    is_significant, over = (
        comparison.is_significant(best, FULL, over=control),
        comparison.significance.over[control][best][FULL],
    )
    better, worse = is_significant and over.low > 0, is_significant and over.high < 0
    against = "does better than" if better else "does worse than" if worse else "cannot be told from"
    joint = "but" if gains and not better else "and"
    return f"{text}, {joint} {against} the best control, {control}.", "gain" if gains and better else tone


def _figures(comparison: Comparison, variant: str) -> str:
    change = f"{variant}: {comparison.difference(variant, FULL):+.2f} points"
    if comparison.significance is None:
        return f"{change}."
    found = comparison.significance.difference[variant][FULL]
    return (
        f"{change}, {100 * comparison.significance.level:g} % interval {found.low:+.2f} to {found.high:+.2f}, "
        f"adjusted p {p_text(found.p_adjusted)}."
    )


def _over_seeds(comparison: Comparison, variant: str) -> list[str]:
    """What the other seeds of the same bridge say."""
    return [
        f"Over its {len(variants)} seeds, {name} has {mean:.2f} ± {deviation:.2f} (mean and standard deviation of full mAP); "
        f"the bare host has {comparison.mean_ap(REFERENCE, FULL):.2f}."
        for name, variants in comparison.seed_groups.items()
        for mean, deviation in [comparison.spread(name, FULL)]
        if variant in variants and deviation is not None
    ]
