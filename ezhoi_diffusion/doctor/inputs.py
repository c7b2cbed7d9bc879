"""Features, a bridge and a host's command line: what a later check needs, an earlier one has opened."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ezhoi_diffusion.artifact import CONFIG, describe
from ezhoi_diffusion.diffusion.artifact import BRIDGE as BRIDGE_KIND
from ezhoi_diffusion.diffusion.bridge import DiffusionBridge
from ezhoi_diffusion.doctor import bridge as bridges
from ezhoi_diffusion.doctor import ezhoi as host
from ezhoi_diffusion.doctor import features
from ezhoi_diffusion.doctor.finding import BRIDGE, FEATURES, TRAIN, Finding, run_check
from ezhoi_diffusion.features.store import FeatureStore


def check_inputs(kinds: Mapping[str, Path], host_line: Sequence[str]) -> Iterator[Finding]:
    """Findings about a features folder and a bridge folder, by kind, and about a script with its flags."""
    demanded: dict[str, dict[str, Any]] = {}
    store: FeatureStore | None = None
    found = features.Scan()
    if FEATURES in kinds:
        store, lines = _store(kinds[FEATURES])
        yield from lines
    if store is not None:
        opened = store
        demanded[FEATURES] = opened.fingerprint
        yield from run_check("features.text", lambda: features.text(opened), features.AGAIN)
        scans: list[features.Scan] = []
        yield from run_check("features.files", lambda: _rows(opened, scans), features.AGAIN)
        found = scans[0] if scans else found
    if BRIDGE in kinds:
        yield from _bridge(kinds[BRIDGE], store, found, demanded)
    if host_line:
        yield from _host(Path(host_line[0]), host_line[1:], demanded)


def _store(folder: Path) -> tuple[FeatureStore | None, list[Finding]]:
    stores: list[FeatureStore] = []

    def opening() -> Iterator[Finding]:
        stores.append(FeatureStore(folder))
        yield from features.meta(stores[0])

    fix = "give the capture command again, it goes on" if features.unfinished(folder) else features.AGAIN
    lines = run_check("features.open", opening, fix)
    return (stores[0] if stores else None), lines


def _rows(store: FeatureStore, scans: list[features.Scan]) -> Iterator[Finding]:
    scans.append(features.scan(store))
    yield from features.rows(store, scans[0])


def _bridge(
    folder: Path, store: FeatureStore | None, found: features.Scan, demanded: dict[str, dict[str, Any]]
) -> Iterator[Finding]:
    loaded: list[DiffusionBridge] = []

    def opening() -> Iterator[Finding]:
        kind = describe(folder)["bridge"] if (folder / CONFIG).exists() else BRIDGE_KIND
        if kind != BRIDGE_KIND:
            yield Finding(
                "bridge.open", "note", f"{folder} holds a '{kind}' bridge, which only the plugin that brings it knows",
                f"to see what it does: ezhoi-diffusion test TEST_FEATURES --name {kind} --bridge {folder} --out DIR",
            )  # fmt: skip
            return
        loaded.append(bridges.load(folder))
        yield from bridges.artefact(loaded[0])

    again = f"restore it from where it came, or {TRAIN}"
    fix = "give the training command again with --resume" if bridges.unfinished(folder) else again
    yield from run_check("bridge.open", opening, fix)
    if not loaded:
        return
    bridge = loaded[0]
    demanded[BRIDGE] = bridges.facts_for_host(bridge)
    yield from run_check("bridge.training", lambda: bridges.training(bridge, folder), again)
    if store is not None:
        opened = store
        yield from run_check("bridge.features", lambda: bridges.against_features(bridge, opened, found), again)
        if found.sample:
            sample = torch.cat(found.sample)
            yield from run_check("bridge.effect", lambda: bridges.effect(bridge, sample, opened.text), again)


def _host(script: Path, argv: Sequence[str], demanded: dict[str, dict[str, Any]]) -> Iterator[Finding]:
    read: list[Namespace] = []

    def reading() -> Iterator[Finding]:
        args, line = host.flags(script, argv)
        read.extend([args] if args else [])
        yield line

    yield from run_check("host.flags", reading, "give them as you give them to the script")
    if not read:
        return
    flags = read[0]
    again = "see EZ-HOI's scripts/ for flags that belong together"
    strictest = demanded.get(BRIDGE) or demanded.get(FEATURES) or {}
    yield from run_check("host.options", lambda: host.options(flags), again)
    yield from run_check("host.paths", lambda: host.paths(flags), again)
    yield from run_check("host.data", lambda: host.data(flags), again)
    unreadable = "download or copy the checkpoint again; one that needs a pickle executed is not to be trusted"
    yield from run_check("host.checkpoint", lambda: host.checkpoint(flags, strictest), unreadable)
    for what, fingerprint in demanded.items():
        yield from run_check(f"host.{what}", lambda w=what, f=fingerprint: iter([host.fits(flags, w, f)]), again)  # type: ignore[misc]
