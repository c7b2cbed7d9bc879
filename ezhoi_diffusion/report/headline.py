"""One-sentence summary of a comparison: a gain, a loss, or nothing that chance cannot explain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ezhoi_diffusion.evaluation.comparison import FULL, REFERENCE, Comparison, p_text

Tone = Literal["gain", "loss", "unknown"]
UNKNOWN: Tone = "unknown"
ONLY_BASELINES = "Only baselines were compared: this says nothing about a bridge."


@dataclass(frozen=True)
class Headline:
    """The summary of a comparison.

    Attributes:
        text: The sentence.
        details: The numbers behind it, a sentence each.
        tone: `gain` needs a gain over bare EZ-HOI and over the best baseline, and no warning.
    """

    text: str
    details: list[str]
    tone: Tone


def headline(comparison: Comparison) -> Headline:
    """Summarise the best bridge by full mean AP, a significant gain first.

    It is compared with bare EZ-HOI, and on the same resamplings with the best baseline.
    """
    ranked = comparison.ranked()
    bridges = [variant for variant in ranked if not comparison.variants[variant].baseline]
    baseline = next((variant for variant in ranked if comparison.variants[variant].baseline), None)
    if bridges:
        best = next((variant for variant in bridges if _gains(comparison, variant)), bridges[0])
        text, tone = _sentence(comparison, best, baseline)
        details = [*_rank(best, bridges), _figures(comparison, best), *_over_seeds(comparison, best)]
    else:
        text, tone, details = ONLY_BASELINES, UNKNOWN, []
    details += [_figures(comparison, baseline)] if baseline is not None else []
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


def _sentence(comparison: Comparison, best: str, baseline: str | None) -> tuple[str, Tone]:
    change = comparison.difference(best, FULL)
    bootstrap = comparison.variants[best].bootstrap
    if bootstrap is None:
        side = "above" if change >= 0 else "below"
        return (
            f"{best} ends {abs(change):.2f} points of full mAP {side} bare EZ-HOI. There are no intervals, and one run alone "
            f"says nothing about chance.",
            UNKNOWN,
        )
    gains = _gains(comparison, best)
    loses = comparison.is_significant(best, FULL) and not gains
    if gains:
        text = f"{best} gains {change:.2f} points of full mAP over bare EZ-HOI"
    elif loses:
        text = f"{best} loses {-change:.2f} points of full mAP against bare EZ-HOI"
    else:
        text = f"No gain can be told from chance: {best} changes full mAP by {change:+.2f} points"
    tone: Tone = "loss" if loses else UNKNOWN
    if baseline is None:
        return f"{text}. No baseline was compared, and one may do as much.", tone
    significant, over = comparison.is_significant(best, FULL, over=baseline), bootstrap.over[baseline][FULL]
    better, worse = significant and over.low > 0, significant and over.high < 0
    against = "does better than" if better else "does worse than" if worse else "cannot be told from"
    joint = "but" if gains and not better else "and"
    return f"{text}, {joint} {against} the best baseline, {baseline}.", "gain" if gains and better else tone


def _figures(comparison: Comparison, variant: str) -> str:
    change = f"{variant}: {comparison.difference(variant, FULL):+.2f} points"
    bootstrap = comparison.variants[variant].bootstrap
    if bootstrap is None:
        return f"{change}."
    found = bootstrap.difference[FULL]
    return (
        f"{change}, {100 * comparison.level:g} % interval {found.low:+.2f} to {found.high:+.2f}, "
        f"adjusted p {p_text(found.p_adjusted)}."
    )


def _over_seeds(comparison: Comparison, variant: str) -> list[str]:
    """Mean and deviation over the seeds of the same bridge."""
    return [
        f"Over its {len(variants)} seeds, {name} has {mean:.2f} ± {deviation:.2f} (mean and standard deviation of full mAP); "
        f"bare EZ-HOI has {comparison.mean_ap(REFERENCE, FULL):.2f}."
        for name, variants in comparison.seed_groups.items()
        for mean, deviation in [comparison.spread(name, FULL)]
        if variant in variants and deviation is not None
    ]
