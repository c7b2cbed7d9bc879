"""Bridges on the Hugging Face Hub: an artefact's own files and a model card go there, the same files come back.

Only what config.json names is sent or fetched, whatever else lies in a folder or a repository: JSON and safetensors.
Whether what came is whole is decided by the bridge's own reading, as for any folder.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from errno import ENOSPC
from os import PathLike
from pathlib import Path
from typing import Any

from ezhoi_diffusion.artifact import CONFIG, CONTEXT, OURS, describe
from ezhoi_diffusion.errors import EzhoiDiffusionError
from ezhoi_diffusion.files import current, read_bytes, read_json, read_tensors, sealed

CARD, REPORT = "README.md", "report.json"
PREFIX = "hf:"
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
NAME = re.compile(r"[\w.-]+", re.ASCII)
NOT_WHOLE = "give the folder of a finished bridge"
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"
TAGS = ("human-object-interaction", "hoi-detection", "zero-shot", "ez-hoi")
LONGEST = 300  # characters of a value in the card


class SharingError(EzhoiDiffusionError):
    """A bridge cannot be pushed to the Hub or fetched from it: not whole, no network, no right, no such repository."""


def push(
    folder: Path,
    repo_id: str,
    *,
    comparison: Path | None = None,
    private: bool = False,
    license: str | None = None,
) -> str:
    """Upload the artefact in `folder` with a model card, in one commit; returns the commit's URL.

    repo_id: USER/NAME, made if it is not there. comparison: a report of `compare` on this very bridge, for the card.
    license: the Hub's name of one, e.g. mit. Raises SharingError before anything is sent where the artefact is not whole,
    the report is of other bridges, or `private` is asked of a repository that is public.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    files = package(folder, repo_id, comparison=comparison, license=license)
    with _hub(f"{repo_id} did not take the bridge"):
        api = HfApi()
        if private:
            api.create_repo(repo_id, exist_ok=True, private=True)
            if not api.model_info(repo_id).private:
                raise SharingError(
                    f"{repo_id} exists and is public, so nothing was uploaded: make it private on the Hub, or give another name"
                )
        else:
            api.create_repo(repo_id, exist_ok=True)  # its owner's default: an organisation's may be private
        operations = [CommitOperationAdd(name, content) for name, content in files.items()]
        return str(api.create_commit(repo_id, operations, commit_message="A bridge of ezhoi-diffusion").commit_url)


def package(
    folder: Path, repo_id: str, *, comparison: Path | None = None, license: str | None = None
) -> dict[str, bytes]:
    """What `push` uploads, by file name; all of it was read and is whole. Raises SharingError."""
    if not REPOSITORY.fullmatch(repo_id):
        raise SharingError(f"{repo_id!r} names no repository of the Hub: give USER/NAME")
    config = describe(folder)
    if config["bridge"] == "tuned":
        raise SharingError(
            f"{folder} is a choice, not a bridge: push the bridge in {folder / 'bridge'}, and say with which settings it was chosen"
        )
    files = {CONFIG: sealed(config)}
    for name, facts in config["files"].items():
        path = current(folder, name)
        read_tensors(path, facts, SharingError, NOT_WHOLE)  # refused here as its reader would refuse it
        files[name] = read_bytes(path, facts, SharingError, NOT_WHOLE)
    report = read_report(comparison) if comparison is not None else None
    return {**files, CARD: model_card(folder, report, repo_id=repo_id, license=license).encode()}


def fetch(repo_id: str, revision: str | None = None) -> Path:
    """The folder of the cache with the artefact of USER/NAME: config.json and the safetensors that it names, no more.

    revision: a branch, tag or commit; all files are of the commit that it is now. Without a network, what was fetched
    before is taken. Raises SharingError.
    """
    from huggingface_hub import hf_hub_download

    if not REPOSITORY.fullmatch(repo_id):
        raise SharingError(f"{repo_id!r} names no repository of the Hub: give USER/NAME")
    with _hub(f"{repo_id}{f' at {revision}' if revision else ''} cannot be fetched"):
        folder = Path(hf_hub_download(repo_id, CONFIG, revision=revision)).parent
        for name in describe(folder)["files"]:
            hf_hub_download(repo_id, name, revision=folder.name)
    return folder


def local(where: str | PathLike[str], revision: str | None = None, *, bare: bool = False) -> Path:
    """The folder that is meant: `where`, or that of the Hub's hf:USER/NAME[@REVISION], fetched. Raises SharingError.

    bare: a string USER/NAME[@REVISION] is the Hub's too, where there is no such folder.
    """
    name, _, tag = os.fspath(where).removeprefix(PREFIX).partition("@")
    named = os.fspath(where).startswith(PREFIX)
    if named or (bare and isinstance(where, str) and REPOSITORY.fullmatch(name) and not Path(where).exists()):
        return fetch(name, revision or tag or None)
    if revision is not None:
        raise SharingError(f"revision {revision!r} is one of a bridge on the Hub, and {where} is a folder here")
    return Path(where)


@contextmanager
def _hub(what: str) -> Iterator[None]:
    """Whatever the Hub's client raises, as SharingError: its HTTP library differs between its versions."""
    from huggingface_hub import errors

    try:
        yield
    except EzhoiDiffusionError:
        raise
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        said = " ".join(f"{type(error).__name__}: {error}".split())[:LONGEST]
        if isinstance(error, errors.RevisionNotFoundError):
            why = "the repository has no such revision: give a branch, a tag or a commit of it"
        elif isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
            why = f"the repository lacks {CONFIG} or a file that it names: it holds no whole bridge of ezhoi-diffusion"
        elif isinstance(error, errors.RepositoryNotFoundError) or status == 404:
            why = (
                f"the Hub shows no such repository: see whether the name is right; for a private or gated one {LOG_IN}"
            )
        elif status in (401, 403):
            why = f"the Hub refused the token, or that there is none: {LOG_IN} to one that may do this ({said})"
        elif isinstance(error, OSError) and (error.filename is not None or error.errno == ENOSPC):
            why = f"the disk refused ({error}): free space there, or set HF_HOME to another folder"
        elif isinstance(error, errors.HFValidationError) or isinstance(error.__cause__, errors.HfHubHTTPError):
            why = f"the Hub does not accept that: mend what it names ({said})"
        else:
            why = f"see whether network, HF_ENDPOINT and HF_HUB_OFFLINE are as they should be, and try again ({said})"
        raise SharingError(f"{what}: {why}") from error


def read_report(path: Path) -> dict[str, Any]:
    """The comparison in a report's folder, or in its JSON file. Raises SharingError."""
    return read_json(path / REPORT if path.is_dir() else path, SharingError, "give the folder of a --report")


# The card


def model_card(
    folder: Path, comparison: dict[str, Any] | None, *, repo_id: str = "USER/NAME", license: str | None = None
) -> str:
    """README.md of the artefact in `folder`: what was measured, the host it is for, how to use it, how it was made.

    comparison: the JSON of a Comparison, or None where nothing was measured. What comes from files is shown as code, so that
    it can be no markup. Raises SharingError where the comparison does not hold this bridge.
    """
    config = describe(folder)
    provenance = dict(config.get("provenance", {}))
    host = provenance.pop("fingerprint", None)
    host = host if isinstance(host, dict) else {}
    recipe = {key: value for key, value in config.items() if key not in OURS}
    dataset = [name for name in [host.get("dataset")] if isinstance(name, str) and NAME.fullmatch(name)]
    try:
        measured = _measured(config, comparison) if comparison is not None else _UNMEASURED
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise SharingError(f"the report is not that of a comparison ({type(error).__name__}: {error})") from error
    return "\n\n".join(
        [
            _front(license, [*TAGS, *dataset, config["bridge"]]),
            f"# {repo_id.partition('/')[2]}",
            f"A bridge, {_code(config['bridge'])}, for [EZ-HOI](https://github.com/ChelsieLei/EZ-HOI): at evaluation it takes "
            f"the visual features (`adapter_feat`) of human-object pairs and returns them changed. It is used with "
            f"`ezhoi-diffusion`, without an edit of EZ-HOI. Its files are JSON and safetensors; nothing in them is executed.",
            *([] if license else ["The author has stated no licence."]),
            "## What it does to mAP",
            *measured,
            "## The host it is for",
            *_host(host, config["files"]),
            "## Use",
            *_use(config["bridge"], repo_id),
            "## How it is applied",
            _table(["setting", "value"], _flat(recipe)),
            "## How it was made",
            _table(["fact", "value"], _flat(provenance)) if provenance else "Its files do not say.",
            "## Files",
            _table(
                ["file", "bytes", "SHA-256"],
                [[_code(name), _code(facts["bytes"]), _code(facts["sha256"])] for name, facts in config["files"].items()],
            ),
        ]
    ) + "\n"  # fmt: skip


_UNMEASURED = ["Nothing was measured: no comparison with the bare host was given when this card was written."]


def _front(license: str | None, tags: Iterable[str]) -> str:
    """The YAML that the Hub reads. A JSON string is a YAML string, whatever it holds."""
    facts = ["library_name: ezhoi-diffusion", *([f"license: {json.dumps(license)}"] if license else [])]
    return "\n".join(["---", *facts, "tags:", *(f"- {json.dumps(tag)}" for tag in dict.fromkeys(tags)), "---"])


def _measured(config: dict[str, Any], comparison: dict[str, Any]) -> list[str]:
    """The table of a comparison, in words what became of this bridge, and under which circumstances."""
    mean_ap, difference = comparison["mean_ap"], comparison["difference"]
    own, recorded = _own_variants(config, comparison)
    reference, groups = next(iter(mean_ap)), list(next(iter(mean_ap.values())))
    found = comparison.get("significance") or {}
    chance = found.get("difference", {})
    rows = [[_code(v), *(f"{float(mean_ap[v][g]):.2f}" for g in groups)] for v in mean_ap]
    rows += [
        [f"{_code(v)} − {_code(reference)}", *(_cell(difference[v][g], chance.get(v, {}).get(g)) for g in groups)]
        for v in difference
    ]
    algorithm, setting = comparison.get("algorithm", "11P"), comparison.get("setting", "default")
    counts = ", ".join(f"{_code(group)} {len(comparison['classes'][group])}" for group in groups)
    facts = [
        f"- {int(comparison['images'])} images, {int(comparison['pairs'])} pairs, all rows on the same pairs; AP in percent, "
        f"{_code(algorithm)}, setting {_code(setting)}; classes: {counts}",
        f"- Intervals and p-values: paired bootstrap over images, {int(found['replicates'])} replicates, "
        f"{float(found['level']):.0%} intervals; p is adjusted for all rows together. They are about other images, not about "
        f"another training."
        if found
        else "- One run, one seed, no intervals: small differences may be chance.",
    ]
    if {"identity", "mean_shift"} & mean_ap.keys():
        facts.append("- `identity` and `mean_shift` are controls: a bridge counts against the best of them.")
    if not recorded:
        facts.append("- The report does not record which files were measured.")
    for v in own:
        applied = (comparison.get("provenance", {}).get(v) or {}).get("overridden")
        facts += [f"- **Not as stored:** {_code(v)} was applied with {_code(applied)}"] if applied else []
    facts += [f"- **Forced:** {_code(message)}" for message in comparison.get("forced", [])]
    facts += [f"- **Degraded:** {_code(message)}" for message in comparison.get("degraded", {}).values()]
    words = [
        f"- {_code(v)}, {_code(g)}: {_words(float(difference[v][g]), chance.get(v, {}).get(g), found)}"
        for v in own
        for g in groups
    ]
    return ["Against the bare host:", "\n".join(words), _table(["mAP", *map(_code, groups)], rows), "\n".join(facts)]


def _own_variants(config: dict[str, Any], comparison: dict[str, Any]) -> tuple[list[str], bool]:
    """The variants of a comparison that are this artefact, and whether its report says so. Raises SharingError for none.

    Others may have been made from the same files, as mean_shift is: a variant is called by its bridge's name first.
    """
    called = re.compile(re.escape(config["bridge"]) + r"(?![\w-])")
    origin, recorded = _origin(config.get("provenance", {})), comparison.get("provenance", {})
    named = [v for v in comparison["difference"] if called.match(v)]
    own = [v for v in named if _origin(recorded.get(v)) in (None, origin)]
    if not own:
        raise SharingError(
            f"the report compares {', '.join(comparison['mean_ap'])}, and none of them is the bridge {config['bridge']!r} of "
            f"these files: compare it (ezhoi-diffusion compare TEST_FEATURES --bridge BRIDGE --report DIR), or leave --report out"
        )
    return own, all(recorded.get(v) is not None for v in own)


def _origin(provenance: dict[str, Any] | None) -> dict[str, Any] | None:
    return None if provenance is None else {k: v for k, v in provenance.items() if k != "overridden"}


def _cell(points: float, chance: dict[str, float] | None) -> str:
    if not chance:
        return f"{float(points):+.2f}"
    return (
        f"{float(points):+.2f} ({float(chance['low']):+.2f} to {float(chance['high']):+.2f}, "
        f"p {float(chance['p_adjusted']):.3f})"
    )


def _words(points: float, chance: dict[str, float] | None, found: dict[str, Any]) -> str:
    """A difference to the bare host as a sentence; a loss is a loss."""
    if points != points:
        return "not measured, for want of annotations."
    if not chance:
        direction = "no change" if round(points, 2) == 0 else "higher" if points > 0 else "lower"
        return f"{points:+.2f} points of mAP ({direction}); whether that is chance was not examined."
    low, high, p = (float(chance[key]) for key in ("low", "high", "p_adjusted"))
    told = p < 1 - float(found["level"]) and not low <= 0 <= high
    verdict = "not told apart from chance" if not told else "**a gain**" if points > 0 else "**a loss**"
    return f"{points:+.2f} points of mAP, {float(found['level']):.0%} interval {low:+.2f} to {high:+.2f}, p {p:.3f}: {verdict}."


def _host(fingerprint: dict[str, Any], files: Iterable[str]) -> list[str]:
    if not fingerprint:
        return [
            "Its files do not say which host it was made for, so every host refuses it unless `--force` is given, and "
            "then every report says so."
        ]
    context = (
        "The context vectors are drawn anew in every process of EZ-HOI and held by no checkpoint; `--restore-context` puts "
        f"those of `{CONTEXT}` into the host."
    )
    return [
        "It is valid for this host alone: any other, be it in a flag, a weight or a context vector, is refused with both values "
        "shown, unless `--force` is given, and then every report says so.",
        _table(["fact", "value"], _flat(fingerprint)),
        *([context] if CONTEXT in files else []),
    ]


def _use(bridge: str, repo_id: str) -> list[str]:
    """Commands and code; `…` stands for the flags of EZ-HOI's own test script."""
    run, hub = "ezhoi-diffusion run main_tip_finetune.py … --eval --resume CKPT", f"--bridge {PREFIX}{repo_id}"
    if bridge != "diffusion":
        return [
            f"In the EZ-HOI folder, with `ezhoi-diffusion` and the package that contributes the bridge {_code(bridge)} "
            f"installed; `…` are the flags of EZ-HOI's test script:",
            f"    {run} --compare none,identity,{bridge} {hub}",
        ]
    return [
        "In the EZ-HOI folder, with `ezhoi-diffusion` installed; `…` are the flags of EZ-HOI's test script. Compare it with the "
        "bare host, or evaluate with it:",
        f"    {run} --compare none,identity,mean_shift,diffusion {hub}\n    {run} --plugin diffusion {hub}",
        "In Python, `bridge(adapter_feat)` takes and returns rows [N, D]:",
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
    """A value from a file as Markdown that shows it and does nothing else."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split()) or '""'
    text = text if len(text) <= LONGEST else f"{text[:LONGEST]}…"
    if "`" in text or "|" in text:  # what no code span in a table can hold
        return "".join(c if c.isalnum() or c == " " else f"&#{ord(c)};" for c in text)
    return f"`{text}`"
