"""All checks in their order: what a later one needs, an earlier one has opened."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ezhoi_diffusion.diffusion.bridge import DiffusionBridge
from ezhoi_diffusion.doctor import bridge as bridges
from ezhoi_diffusion.doctor import environment, features, host
from ezhoi_diffusion.doctor.finding import Finding, guarded
from ezhoi_diffusion.features.store import FeatureStore

FEATURES, BRIDGE = "features", "bridge"


def examine(folders: Sequence[Path], host_line: Sequence[str]) -> Iterator[Finding]:
    """Findings as they come: environment, folders (features and a bridge, in any order), script and flags if given."""
    kinds: dict[str, Path] = {}
    strange: list[Finding] = []
    for folder in folders:
        kind = kind_of(folder)
        if isinstance(kind, Finding):
            strange.append(kind)
        elif kind in kinds:
            fix = "give one of each kind at a time"
            strange.append(Finding(kind, "problem", f"{kinds[kind]} and {folder} both hold {kind}", fix))
        else:
            kinds[kind] = folder

    yield from guarded("environment", lambda: environment.packages(host=bool(host_line)), "reinstall this package")
    yield from guarded("environment.plugins", environment.plugins, "`ezhoi-diffusion plugins` lists what is installed")
    here = kinds.get(FEATURES, Path.cwd())
    yield from guarded("environment.disk", lambda: environment.space(here), "choose a folder that can be read")
    yield from strange

    demanded: dict[str, dict[str, Any]] = {}
    store: FeatureStore | None = None
    found = features.Scan()
    if FEATURES in kinds:
        store, lines = _store(kinds[FEATURES])
        yield from lines
    if store is not None:
        opened = store
        demanded[FEATURES] = opened.fingerprint
        yield from guarded("features.text", lambda: features.text(opened), features.AGAIN)
        scans: list[features.Scan] = []
        yield from guarded("features.files", lambda: _rows(opened, scans), features.AGAIN)
        found = scans[0] if scans else found
    if BRIDGE in kinds:
        yield from _bridge(kinds[BRIDGE], store, found, demanded)
    if host_line:
        yield from _host(Path(host_line[0]), host_line[1:], demanded)


def kind_of(folder: Path) -> str | Finding:
    """What a folder holds, by the names of its files, or a finding where it is neither kind."""
    makes = f"features come from `{features.CAPTURE}`, a bridge from `{bridges.TRAIN}`"
    try:
        if folder.is_file():
            fix = "give a folder; `ezhoi-diffusion import` turns the guide's .pkl and .pt files into ours"
            return Finding("input", "problem", f"{folder} is a file", fix)
        if not folder.is_dir():
            return Finding("input", "problem", f"{folder} does not exist", makes)
        names = {path.name for path in folder.iterdir()}
    except (OSError, ValueError) as error:
        return Finding("input", "problem", f"{folder} cannot be read ({error})", makes)
    if names & {"meta.json", "index.json", "host.safetensors"}:
        return FEATURES
    if names & {"config.json", "model.safetensors", ".committed", "checkpoints"}:
        return BRIDGE
    return Finding("input", "problem", f"{folder} holds neither features nor a bridge", makes)


def _store(folder: Path) -> tuple[FeatureStore | None, list[Finding]]:
    stores: list[FeatureStore] = []

    def opening() -> Iterator[Finding]:
        stores.append(FeatureStore(folder))
        yield from features.meta(stores[0])

    fix = "give the capture command again, it goes on" if features.unfinished(folder) else features.AGAIN
    lines = guarded("features.open", opening, fix)
    return (stores[0] if stores else None), lines


def _rows(store: FeatureStore, scans: list[features.Scan]) -> Iterator[Finding]:
    scans.append(features.scan(store))
    yield from features.rows(store, scans[0])


def _bridge(
    folder: Path, store: FeatureStore | None, found: features.Scan, demanded: dict[str, dict[str, Any]]
) -> Iterator[Finding]:
    loaded: list[DiffusionBridge] = []

    def opening() -> Iterator[Finding]:
        loaded.append(bridges.load(folder))
        yield from bridges.artefact(loaded[0])

    again = f"restore it from where it came, or {bridges.TRAIN}"
    fix = "give the training command again with --resume" if bridges.unfinished(folder) else again
    yield from guarded("bridge.open", opening, fix)
    if not loaded:
        return
    bridge = loaded[0]
    demanded[BRIDGE] = bridges.facts_for_host(bridge)
    yield from guarded("bridge.training", lambda: bridges.training(bridge, folder), again)
    if store is not None:
        opened = store
        yield from guarded("bridge.features", lambda: bridges.against_features(bridge, opened, found), again)
        if found.sample:
            sample = torch.cat(found.sample)
            yield from guarded("bridge.effect", lambda: bridges.effect(bridge, sample, opened.text), again)


def _host(script: Path, argv: Sequence[str], demanded: dict[str, dict[str, Any]]) -> Iterator[Finding]:
    args, line = host.flags(script, argv)
    yield line
    if args is None:
        return
    flags = args
    again = "see EZ-HOI's scripts/ for flags that belong together"
    strictest = demanded.get(BRIDGE) or demanded.get(FEATURES) or {}
    yield from guarded("host.options", lambda: host.options(flags), again)
    yield from guarded("host.paths", lambda: host.paths(flags), again)
    yield from guarded("host.data", lambda: host.data(flags), again)
    unreadable = "download or copy the checkpoint again; one that needs a pickle executed is not to be trusted"
    yield from guarded("host.checkpoint", lambda: host.checkpoint(flags, strictest), unreadable)
    for what, fingerprint in demanded.items():
        yield from guarded(f"host.{what}", lambda w=what, f=fingerprint: iter([host.fits(flags, w, f)]), again)  # type: ignore[misc]
