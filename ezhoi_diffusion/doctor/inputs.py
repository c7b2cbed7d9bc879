"""Features, a bridge and EZ-HOI's flags: each check gets what an earlier one opened."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ezhoi_diffusion.artifact import CONFIG, read_config
from ezhoi_diffusion.builtin.diffusion import load
from ezhoi_diffusion.diffusion.artifact import BRIDGE as DIFFUSION
from ezhoi_diffusion.doctor import bridge as bridges
from ezhoi_diffusion.doctor import ezhoi, features
from ezhoi_diffusion.doctor.finding import BRIDGE, FEATURES, TRAIN, Finding, attempt, run_check
from ezhoi_diffusion.features.store import FeatureStore
from ezhoi_diffusion.plugins import PluginManager


def check_inputs(kinds: Mapping[str, Path], script_line: Sequence[str], out: Path | None) -> Iterator[Finding]:
    """Yield findings about a features folder and a bridge folder, by kind, and about a script with its flags."""
    fingerprints: dict[str, dict[str, Any]] = {}
    store, contents = None, None
    if FEATURES in kinds:
        folder = kinds[FEATURES]
        fix = "run the capture command again, it resumes" if features.is_unfinished(folder) else features.AGAIN
        opened = attempt("features.open", lambda: FeatureStore(folder), fix)
        if isinstance(opened, Finding):
            yield opened
        else:
            store = opened
            fingerprints[FEATURES] = opened.fingerprint
            yield from run_check("features.open", lambda: features.check_meta(opened), features.AGAIN)
            yield from run_check("features.text", lambda: [features.check_text(opened.text)], features.AGAIN)
            read = attempt("features.files", lambda: features.read_contents(opened), features.AGAIN)
            if isinstance(read, Finding):
                yield read
            else:
                contents = read
                yield from run_check(
                    "features.files", lambda: features.check_contents(opened, read, out), features.AGAIN
                )
    if BRIDGE in kinds:
        yield from _check_bridge(kinds[BRIDGE], store, contents, fingerprints)
    if script_line:
        yield from _check_flags(Path(script_line[0]), script_line[1:], fingerprints)


def _check_bridge(
    folder: Path,
    store: FeatureStore | None,
    contents: features.Contents | None,
    fingerprints: dict[str, dict[str, Any]],
) -> Iterator[Finding]:
    again = f"restore it from a copy, or {TRAIN}"
    kind = attempt(
        "bridge.open", lambda: read_config(folder)["bridge"] if (folder / CONFIG).exists() else DIFFUSION, again
    )
    if isinstance(kind, Finding):
        yield kind
        return
    if kind != DIFFUSION:
        yield Finding(
            "bridge.open", "note", f"{folder} holds a '{kind}' bridge; only its plugin can examine it",
            f"to see what it does: ezhoi-diffusion test TEST_FEATURES --bridges {kind}={folder} --out DIR",
        )  # fmt: skip
        return
    fix = "run the training command again with --resume" if bridges.is_unfinished(folder) else again
    bridge = attempt("bridge.open", lambda: load(folder, PluginManager()), fix)
    if isinstance(bridge, Finding):
        yield bridge
        return
    fingerprints[BRIDGE] = (bridge.provenance or {}).get("fingerprint") or {}
    yield from run_check("bridge.recipe", lambda: bridges.check_config(bridge), again)
    yield from run_check("bridge.training", lambda: bridges.check_training(bridge, folder), again)
    if store is not None and contents is not None:
        text, found = store, contents
        yield from run_check("bridge.features", lambda: bridges.check_features(bridge, text, found), again)
        yield from run_check("bridge.effect", lambda: [bridges.check_effect(bridge, found, text.text)], again)


def _check_flags(script: Path, argv: Sequence[str], fingerprints: dict[str, dict[str, Any]]) -> Iterator[Finding]:
    args = ezhoi.read(script, argv)
    if isinstance(args, Finding):
        yield args
        return
    again = "see EZ-HOI's scripts/ for flags that belong together"
    unreadable = "download or copy the checkpoint again; do not trust one that needs a pickle executed"
    strictest = fingerprints.get(BRIDGE) or fingerprints.get(FEATURES) or {}
    yield from run_check("ezhoi.options", lambda: ezhoi.check_options(args), again)
    yield from run_check("ezhoi.paths", lambda: ezhoi.check_paths(args), again)
    yield from run_check("ezhoi.data", lambda: ezhoi.check_data(args), again)
    yield from run_check("ezhoi.checkpoint", lambda: ezhoi.check_checkpoint(args, strictest), unreadable)
    for kind, known in fingerprints.items():
        yield from run_check(f"ezhoi.{kind}", lambda k=kind, f=known: [ezhoi.check_fingerprint(args, k, f)], again)  # type: ignore[misc]
