"""All checks in order. The environment comes first, before torch is imported here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from ezhoi_diffusion.doctor import environment
from ezhoi_diffusion.doctor.finding import BRIDGE, CAPTURE, FEATURES, TRAIN, Finding, run_check


def run_checks(folders: Sequence[Path], script_line: Sequence[str], out: Path | None = None) -> Iterator[Finding]:
    """Yield findings as they come.

    Args:
        folders: Features and a bridge, in any order; either alone; or neither.
        script_line: An EZ-HOI script and its flags; may be empty.
        out: Where to write statistics.json and statistics.png of the features.
    """
    kinds: dict[str, Path] = {}
    misplaced: list[Finding] = []
    for folder in folders:
        kind = kind_of(folder)
        if isinstance(kind, Finding):
            misplaced.append(kind)
        elif kind in kinds:
            found = f"{kinds[kind]} and {folder} both hold {kind}"
            misplaced.append(Finding(kind, "problem", found, "give one of each kind at a time"))
        else:
            kinds[kind] = folder

    broken = set()
    checks = run_check("environment", lambda: environment.packages(ezhoi=bool(script_line)), "reinstall this package")
    for finding in checks:
        broken |= {finding.name} if finding.level == "problem" else set()
        yield finding
    # what is broken there may end this process too, without an exception
    torch_works, scripts_load = "environment.torch" not in broken, "environment.torchvision" not in broken
    if torch_works:
        fix = "`ezhoi-diffusion plugins` lists what is installed"
        yield from run_check("environment.plugins", environment.plugins, fix)
    place = kinds.get(FEATURES, Path())
    yield from run_check("environment.disk", lambda: environment.space(place), "choose a folder that can be read")
    yield from misplaced
    if not kinds and not script_line:
        return
    if not torch_works:
        yield Finding("input", "problem", "not examined: that takes torch", "fix environment.torch first")
        return
    if script_line and not scripts_load:
        found = "not read: EZ-HOI's scripts import torchvision"
        yield Finding("ezhoi.flags", "problem", found, "fix environment.torchvision first")
    from ezhoi_diffusion.doctor.inputs import check_inputs

    yield from check_inputs(kinds, script_line if scripts_load else (), out)


def kind_of(folder: Path) -> str | Finding:
    """Recognise features or a bridge by the names of the files; a finding for any other folder."""
    sources = f"features come from `{CAPTURE}`, a bridge from `{TRAIN}`"
    try:
        if folder.is_file():
            fix = "give a folder; `ezhoi-diffusion import` converts the guide's .pkl and .pt files"
            return Finding("input", "problem", f"{folder} is a file", fix)
        if not folder.is_dir():
            return Finding("input", "problem", f"{folder} does not exist", sources)
        names = {path.name for path in folder.iterdir()}
    except (OSError, ValueError) as error:
        return Finding("input", "problem", f"{folder} cannot be read ({error})", sources)
    if names & {"meta.json", "index.json", "ezhoi.safetensors"}:
        return FEATURES
    if names & {"config.json", "model.safetensors", ".committed", "checkpoints"}:
        return BRIDGE
    return Finding("input", "problem", f"{folder} holds neither features nor a bridge", sources)
