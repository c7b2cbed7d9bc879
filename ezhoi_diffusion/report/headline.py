"""One-sentence summary of a comparison: a gain, a loss, or nothing that chance cannot explain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ezhoi_diffusion.evaluation.bootstrap import POWER
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
        tone: `gain` needs a gain over bare EZ-HOI and over every baseline, and no warning.
    """

    text: str
    details: list[str]
    tone: Tone


def headline(comparison: Comparison) -> Headline:
    """Summarise one bridge: the primary one if there is one, else the best by full mean AP, a sure gain first.

    It is compared with bare EZ-HOI, and on the same resamplings with every baseline. A bridge of several seeds is their
    mean; no seed is picked.
    """
    baselines = comparison.baselines
    bridges = [name for name in comparison.ranked() if name not in baselines]
    if bridges:
        best = main_bridge(comparison) or bridges[0]
        text, tone = _sentence(comparison, best, baselines)
        details = [
            *_rank(comparison, best, bridges), _figures(comparison, best), *_power(comparison, best), *_over_seeds(comparison, best)
        ]  # fmt: skip
    else:
        text, tone, details = ONLY_BASELINES, UNKNOWN, []
    details += [_figures(comparison, name) for name in baselines]
    if comparison.warnings():
        caveats = [caveat for caveat in comparison.sweep_caveat() if caveat in comparison.caveats]
        return Headline(" ".join(["See the warnings first.", *caveats, text]), details, UNKNOWN)
    return Headline(text, details, tone)


def main_bridge(comparison: Comparison) -> str | None:
    """The bridge that the headline is about; None where only baselines were compared."""
    baselines = comparison.baselines
    bridges = [name for name in comparison.ranked() if name not in baselines]
    if comparison.primary in bridges:
        return comparison.primary
    over_all = [name for name in bridges if all(_gains(comparison, name, base) for base in (REFERENCE, *baselines))]
    over_none = [name for name in bridges if _gains(comparison, name)]
    return next(iter([*over_all, *over_none, *bridges]), None)


def _gains(comparison: Comparison, name: str, over: str = REFERENCE) -> bool:
    return comparison.is_significant(name, FULL, over) and comparison.difference(name, FULL, over) > 0


def _called(comparison: Comparison, name: str) -> str:
    seeds = len(comparison.seed_groups.get(name, []))
    return f"{name} (mean of {seeds} seeds)" if seeds > 1 else name


def _rank(comparison: Comparison, best: str, bridges: list[str]) -> list[str]:
    if len(bridges) == 1:
        return []
    if best == bridges[0]:
        return [f"{best} has the highest full mAP of {len(bridges)} bridges."]
    if best == comparison.primary:
        return [f"{best} was chosen before these images were seen. {bridges[0]} has a higher full mAP here."]
    return [
        f"{bridges[0]} has the highest full mAP of {len(bridges)} bridges, and is no sure gain over {REFERENCE} and every baseline."
    ]


def _sentence(comparison: Comparison, best: str, baselines: list[str]) -> tuple[str, Tone]:
    change, called = comparison.difference(best, FULL), _called(comparison, best)
    if comparison.found(best, FULL) is None:
        side = "above" if change >= 0 else "below"
        return (
            f"{called} ends {abs(change):.2f} points of full mAP {side} bare EZ-HOI. There are no intervals, and one run alone "
            f"says nothing about chance.",
            UNKNOWN,
        )
    gains = _gains(comparison, best)
    loses = comparison.is_significant(best, FULL) and not gains
    tone: Tone = "loss" if loses else UNKNOWN
    if gains:
        text = f"{called} gains {change:.2f} points of full mAP over bare EZ-HOI"
    elif loses:
        text = f"{called} loses {-change:.2f} points of full mAP against bare EZ-HOI"
    else:
        text = f"No gain can be told from chance: {called} changes full mAP by {change:+.2f} points"
    excluded = "" if gains or loses else f" {_excluded(comparison, best)}"
    if not baselines:
        return f"{text}. No baseline was compared, and one may do as much.{excluded}", tone
    better = [base for base in baselines if _gains(comparison, best, base)]
    worse = [b for b in baselines if comparison.is_significant(best, FULL, b) and b not in better]
    unclear = [base for base in baselines if base not in better and base not in worse]
    if len(better) == len(baselines):
        every = "the baseline" if len(baselines) == 1 else "every baseline:"
        return f"{text}, and does better than {every} {', '.join(baselines)}.{excluded}", "gain" if gains else tone
    against = [f"does worse than {', '.join(worse)}"] if worse else []
    against += [f"cannot be told from {', '.join(unclear)}"] if unclear else []
    joint = "but" if gains else "and"
    return f"{text}, {joint} {' and '.join(against)} (baseline{'s' * (len(worse + unclear) > 1)}).{excluded}", tone


def _excluded(comparison: Comparison, best: str) -> str:
    """The changes that chance alone does not explain away: what is no difference worth its name has narrow bounds."""
    found = comparison.found(best, FULL)
    assert found is not None
    low, high = (found.low, found.high) if _alone(comparison, best) else (found.joint_low, found.joint_high)
    loss = f"a loss larger than {-low:.2f}" if low < 0 else "any loss"
    gain = f"a gain larger than {high:.2f}" if high > 0 else "any gain"
    return f"Excluded at {100 * comparison.level:g} %: {loss} and {gain} points."


def _alone(comparison: Comparison, name: str) -> bool:
    """Whether no other bridge makes the test of its full mAP stricter."""
    return comparison.is_primary(name, FULL) or len(comparison.bridges) == 2


def _figures(comparison: Comparison, name: str) -> str:
    change = f"{name}: {comparison.difference(name, FULL):+.2f} points"
    bounds, p = comparison.bounds(name, FULL), comparison.p(name, FULL)
    if bounds is None or p is None:
        return f"{change}."
    kind = "simultaneous interval" if comparison.swept else "interval"
    what = "p (primary endpoint, not adjusted)" if comparison.is_primary(name, FULL) else "adjusted p"
    return f"{change}, {100 * comparison.level:g} % {kind} {bounds[0]:+.2f} to {bounds[1]:+.2f}, {what} {p_text(p)}."


def _power(comparison: Comparison, name: str) -> list[str]:
    """The smallest change that this comparison was likely to find."""
    found = comparison.found(name, FULL)
    if found is None:
        return []
    what = "this comparison" if _alone(comparison, name) else f"a test of {name} alone"
    stricter = "" if _alone(comparison, name) else " p is adjusted for all bridges here, which takes a larger one."
    return [
        f"With {100 * POWER:g} % power, {what} finds a true change of {found.detectable(comparison.level):.2f} points or "
        f"more (minimal detectable effect); a smaller one may stay unseen.{stricter}"
    ]


def _over_seeds(comparison: Comparison, name: str) -> list[str]:
    """Mean and deviation over the seeds of the bridge."""
    if name not in comparison.seed_groups:
        return []
    mean, deviation = comparison.spread(name, FULL)
    if deviation is None:
        return [f"{name} was trained with one seed. Another seed may give another result."]
    return [
        f"Over its {len(comparison.seed_groups[name])} seeds, {name} has {mean:.2f} ± {deviation:.2f} (mean and standard "
        f"deviation of full mAP); bare EZ-HOI has {comparison.mean_ap(REFERENCE, FULL):.2f}."
    ]
