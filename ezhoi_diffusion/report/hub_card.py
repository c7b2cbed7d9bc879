"""The model card of a bridge on the Hugging Face Hub: what was measured, for which run it is, how to use it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ezhoi_diffusion.artifact import CONTEXT, RESERVED, read_config
from ezhoi_diffusion.evaluation.comparison import FULL
from ezhoi_diffusion.evaluation.results import read_comparison
from ezhoi_diffusion.evaluation.variants import load_bridge
from ezhoi_diffusion.hub import PREFIX, SharingError, push
from ezhoi_diffusion.plugins import PluginManager

REPORT = "report.json"
NAME = re.compile(r"[\w.-]+", re.ASCII)
TAGS = ("human-object-interaction", "hoi-detection", "zero-shot", "ez-hoi")
MAX_VALUE = 300  # characters of a value in the card


def push_to_hub(
    folder: Path,
    repo_id: str,
    *,
    comparison: Path | None = None,
    private: bool = False,
    license: str | None = None,
) -> str:
    """Upload the artifact in `folder` with its model card, in one commit.

    Args:
        folder: Of a finished bridge.
        repo_id: USER/NAME; created if it does not exist.
        comparison: The report of a comparison of this bridge, for the card.
        private: Create a private repository, and refuse a public one.
        license: The Hub's name of a licence, e.g. mit.

    Returns:
        The URL of the commit.

    Raises:
        SharingError: The Hub refuses, or the report does not hold this bridge. Nothing was sent then.
        BridgeError: The artifact is not whole.
    """
    require_loadable(folder)
    report = None if comparison is None else read_report(comparison)
    return push(folder, repo_id, card=model_card(folder, report, repo_id=repo_id, license=license), private=private)


def require_loadable(folder: Path) -> None:
    """Load the bridge in `folder` as its users will. Raises EzhoiDiffusionError where they could not."""
    load_bridge(PluginManager(), read_config(folder)["bridge"], folder)


def read_report(path: Path) -> dict[str, Any]:
    """The comparison in a report's folder, or in its JSON file. Raises SharingError."""
    path = path / REPORT if path.is_dir() else path
    return read_comparison(path, SharingError, "give the folder of a report of `compare`")


def model_card(
    folder: Path, comparison: dict[str, Any] | None, *, repo_id: str = "USER/NAME", license: str | None = None
) -> str:
    """README.md of the artifact in `folder`. Values from files are shown as code, so they cannot be markup.

    Args:
        folder: Of a finished bridge.
        comparison: The JSON of a Comparison, or None where nothing was measured.
        repo_id: USER/NAME, for the commands.
        license: The Hub's name of a licence.

    Raises:
        SharingError: The comparison does not hold this bridge.
        BridgeError: `folder` holds no artifact.
    """
    config = read_config(folder)
    provenance = dict(config["provenance"])
    fingerprint = provenance.pop("fingerprint", {})
    recipe = {key: value for key, value in config.items() if key not in RESERVED}
    dataset = [name for name in [fingerprint.get("dataset")] if isinstance(name, str) and NAME.fullmatch(name)]
    measured = _measured(config, comparison) if comparison is not None else _UNMEASURED
    return "\n\n".join(
        [
            _front(license, [*TAGS, *dataset, config["bridge"]]),
            f"# {repo_id.partition('/')[2]}",
            f"A bridge, {_code(config['bridge'])}, for [EZ-HOI](https://github.com/ChelsieLei/EZ-HOI). At evaluation it replaces "
            f"the visual features (`adapter_feat`) of human-object pairs. `ezhoi-diffusion` applies it without editing EZ-HOI. "
            f"Its files are JSON and safetensors; nothing in them is executed.",
            *([] if license else ["The author states no licence."]),
            "## What it does to mAP",
            *measured,
            "## The run it is for",
            *_run(fingerprint, config["files"]),
            "## Use",
            *_use(config["bridge"], repo_id),
            "## How it is applied",
            _table(["setting", "value"], _flat(recipe)),
            "## How it was made",
            _table(["fact", "value"], _flat(provenance)) if provenance else "Its files do not state it.",
            "## Files",
            _table(
                ["file", "bytes", "SHA-256"],
                [[_code(name), _code(facts["bytes"]), _code(facts["sha256"])] for name, facts in config["files"].items()],
            ),
        ]
    ) + "\n"  # fmt: skip


_UNMEASURED = ["Nothing was measured: this card was written without a comparison with bare EZ-HOI."]


def _front(license: str | None, tags: Iterable[str]) -> str:
    """The YAML head that the Hub reads. A JSON string is a YAML string, whatever it contains."""
    facts = ["library_name: ezhoi-diffusion", *([f"license: {json.dumps(license)}"] if license else [])]
    return "\n".join(["---", *facts, "tags:", *(f"- {json.dumps(tag)}" for tag in dict.fromkeys(tags)), "---"])


def _measured(config: dict[str, Any], comparison: dict[str, Any]) -> list[str]:
    """The effect of this bridge in words, the table of the comparison, and its circumstances."""
    variants = comparison["variants"]
    reference, *others = variants
    groups, bootstrap = list(reference["mean_ap"]), comparison["bootstrap"]
    own, recorded = _own_variants(config, others)
    rows = [[_code(v["name"]), *(f"{float(v['mean_ap'][g]):.2f}" for g in groups)] for v in variants]
    bridges = {v["seed_group"] or v["name"]: _claimed(v, comparison) for v in others}
    primary = comparison.get("primary")

    def p_key(name: str, group: str) -> str:
        """Which p-value counts: that of the primary endpoint needs no adjustment for the other bridges."""
        return "p" if name == primary and group == FULL else "p_adjusted"

    rows += [
        [
            f"{_code(v['name'])} − {_code(reference['name'])}",
            *(_cell(v["difference"][g], _interval(v, g, reference["name"]), p_key(name, g)) for g in groups),
        ]
        for name, v in bridges.items()
    ]
    counts = ", ".join(f"{_code(group)} {len(comparison['classes'][group])}" for group in groups)
    facts = [
        f"- {int(comparison['images'])} images, {int(comparison['pairs'])} pairs, all variants on the same pairs; AP in percent, "
        f"{_code(comparison['algorithm'])}, setting {_code(comparison['setting'])}; classes: {counts}",
        f"- Intervals and p-values: paired bootstrap over images, and over seeds where there are several, "
        f"{int(bootstrap['replicates'])} replicates, {float(bootstrap['level']):.0%} intervals; p is adjusted for all bridges "
        f"together{f', save for full mAP of {_code(primary)}, the primary endpoint' if primary else ''}."
        if bootstrap
        else "- One run, one seed, no intervals: small differences may be chance.",
    ]
    baselines = [name for name, v in bridges.items() if v["baseline"]]
    if baselines:
        facts.append(f"- Baselines: {', '.join(map(_code, baselines))}. A gain is a gain over all of them.")
    facts += [f"- **Caveat:** {_code(message)}" for message in comparison["caveats"]]
    if not recorded:
        facts.append("- The report does not record which files were measured.")
    for v in own:
        applied = (v["provenance"] or {}).get("overridden")
        facts += [f"- **Not as stored:** {_code(v['name'])} was applied with {_code(applied)}"] if applied else []
    facts += [f"- **Forced:** {_code(message)}" for message in comparison["forced"]]
    facts += [f"- **Degraded:** {_code(message)}" for message in comparison["degraded"].values()]
    claimed = {v["seed_group"] or v["name"]: _claimed(v, comparison) for v in own}
    words = [
        f"- {_code(v['name'])}, {_code(g)}: {_words(v, g, reference['name'], baselines, bootstrap, p_key(name, g))}"
        for name, v in claimed.items()
        for g in groups
    ]
    return [
        "Compared with bare EZ-HOI:",
        "\n".join(words),
        _table(["mAP", *map(_code, groups)], rows),
        "\n".join(facts),
    ]


def _own_variants(config: dict[str, Any], variants: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], bool]:
    """The variants that are this artifact, and whether the report records it.

    Other variants, such as mean_shift, may come from the same files. So the name of a variant has to begin with the name of
    the bridge.

    Raises:
        SharingError: There is none.
    """
    called = re.compile(re.escape(config["bridge"]) + r"(?![\w-])")
    origin = _origin(config["provenance"])
    own = [v for v in variants if called.match(v["name"]) and _origin(v["provenance"]) in (None, origin)]
    if not own:
        raise SharingError(
            f"the report compares {', '.join(v['name'] for v in variants)}, and none of them is the bridge "
            f"{config['bridge']!r} of these files: compare it (ezhoi-diffusion compare TEST_FEATURES --bridge BRIDGE --out "
            f"DIR), or leave --report out"
        )
    return own, all(v["provenance"] is not None for v in own)


def _origin(provenance: dict[str, Any] | None) -> dict[str, Any] | None:
    return None if provenance is None else {k: v for k, v in provenance.items() if k != "overridden"}


def _claimed(variant: dict[str, Any], comparison: dict[str, Any]) -> dict[str, Any]:
    """What may be claimed about a variant: the results of all seeds of its training, or its own."""
    group = comparison["seed_groups"].get(variant["seed_group"])
    if group is None or len(group["variants"]) == 1:
        return variant
    name = f"{variant['seed_group']} (mean of {len(group['variants'])} seeds)"
    return {**variant, "name": name, "difference": group["difference"], "bootstrap": group["bootstrap"]}


def _interval(variant: dict[str, Any], group: str, over: str) -> dict[str, float] | None:
    """Interval and p-values of a bridge's difference to another, as JSON."""
    bootstrap = variant["bootstrap"]
    found: dict[str, float] | None = bootstrap["over"].get(over, {}).get(group) if bootstrap else None
    return found


def _cell(points: float, interval: dict[str, float] | None, p_key: str) -> str:
    if not interval:
        return f"{float(points):+.2f}"
    return (
        f"{float(points):+.2f} ({float(interval['low']):+.2f} to {float(interval['high']):+.2f}, "
        f"p {float(interval[p_key]):.3f})"
    )


def _words(
    variant: dict[str, Any],
    group: str,
    reference: str,
    baselines: list[str],
    bootstrap: dict[str, Any] | None,
    p_key: str,
) -> str:
    """A difference to bare EZ-HOI as a sentence. A loss is called a loss, and a gain one only over every baseline."""
    points, interval = float(variant["difference"][group]), _interval(variant, group, reference)
    if points != points:
        return "not measured, because nothing is annotated."
    if not interval or not bootstrap:
        direction = "no change" if round(points, 2) == 0 else "higher" if points > 0 else "lower"
        return f"{points:+.2f} points of mAP ({direction}); there are no intervals, so it may be chance."
    low, high, p = (float(interval[key]) for key in ("low", "high", p_key))
    level = float(bootstrap["level"])
    verdict = "may be chance"
    if _is_significant(interval, level, p_key):
        verdict = "**a gain**" if points > 0 else "**a loss**"
    unbeaten = [b for b in baselines if not _beats(_interval(variant, group, b), level, p_key)] if points > 0 else []
    if verdict == "**a gain**" and unbeaten:
        verdict = f"higher than bare EZ-HOI, but no sure gain over {', '.join(map(_code, unbeaten))}"
    return f"{points:+.2f} points of mAP, {level:.0%} interval {low:+.2f} to {high:+.2f}, p {p:.3f}: {verdict}."


def _is_significant(found: dict[str, float], level: float, p_key: str) -> bool:
    return float(found[p_key]) < 1 - level and not float(found["low"]) <= 0 <= float(found["high"])


def _beats(found: dict[str, float] | None, level: float, p_key: str) -> bool:
    return found is not None and _is_significant(found, level, p_key) and float(found["low"]) > 0


def _run(fingerprint: dict[str, Any], files: Iterable[str]) -> list[str]:
    if not fingerprint:
        return [
            "Its files do not state the run it was made for. Every run refuses it unless `--force` is given; every report then "
            "says so."
        ]
    context = (
        "EZ-HOI draws new context vectors in every process, and no checkpoint holds them. `--restore-context` loads those "
        f"of `{CONTEXT}` into the run."
    )
    return [
        "It fits this run alone. A run with another flag, weight or context vector refuses it and shows both values, unless "
        "`--force` is given; every report then says so.",
        _table(["fact", "value"], _flat(fingerprint)),
        *([context] if CONTEXT in files else []),
    ]


def _use(bridge: str, repo_id: str) -> list[str]:
    """Commands and code. `…` stands for the flags of EZ-HOI's test script."""
    run, at = "ezhoi-diffusion run main_tip_finetune.py … --eval --resume CKPT", f"{PREFIX}{repo_id}"
    flags = "`…` are the flags of EZ-HOI's test script"
    if bridge != "diffusion":
        return [
            f"In the EZ-HOI folder, with `ezhoi-diffusion` and the package that contributes the bridge {_code(bridge)} "
            f"installed; {flags}:",
            f"    {run} --compare none,identity,{bridge}={at}",
        ]
    return [
        f"In the EZ-HOI folder, with `ezhoi-diffusion` installed; {flags}. Compare it with bare EZ-HOI, or evaluate with it:",
        f"    {run} --compare none,identity,mean_shift,diffusion --bridge {at}\n    {run} --plugin diffusion={at}",
        "In Python, `bridge(adapter_feat)` maps features [N, D] to features [N, D]:",
        f"    from ezhoi_diffusion import DiffusionBridge\n    bridge = DiffusionBridge.from_pretrained({repo_id!r})",
    ]


def _flat(facts: dict[str, Any], prefix: str = "") -> list[list[str]]:
    """Rows of a table, nested names joined by dots."""
    rows: list[list[str]] = []
    for key, value in facts.items():
        if isinstance(value, dict) and value:
            rows += _flat(value, f"{prefix}{key}.")
        else:
            rows.append([_code(f"{prefix}{key}"), _code(value)])
    return rows


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _code(value: Any) -> str:
    """A value from a file as Markdown that only shows it."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split()) or '""'
    text = text if len(text) <= MAX_VALUE else f"{text[:MAX_VALUE]}…"
    if "`" in text or "|" in text:  # no code span in a table can hold these
        return "".join(c if c.isalnum() or c == " " else f"&#{ord(c)};" for c in text)
    return f"`{text}`"
