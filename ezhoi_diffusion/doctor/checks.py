"""All checks in their order; it looks at the environment before it imports torch itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from ezhoi_diffusion.doctor import environment
from ezhoi_diffusion.doctor.finding import BRIDGE, CAPTURE, FEATURES, TRAIN, Finding, run_check


def run_checks(folders: Sequence[Path], host_line: Sequence[str]) -> Iterator[Finding]:
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

    broken = set()
    for finding in run_check(
        "environment", lambda: environment.packages(host=bool(host_line)), "reinstall this package"
    ):
        broken |= {finding.name} if finding.level == "problem" else set()
        yield finding
    # What is broken there may end this process too, without an exception.
    torch_works, host_loads = "environment.torch" not in broken, "environment.torchvision" not in broken
    if torch_works:
        yield from run_check(
            "environment.plugins", environment.plugins, "`ezhoi-diffusion plugins` lists what is installed"
        )
    here = kinds.get(FEATURES, Path())
    yield from run_check("environment.disk", lambda: environment.space(here), "choose a folder that can be read")
    yield from strange
    if not torch_works:
        if kinds or host_line:
            yield Finding("input", "problem", "not examined: that takes torch", "mend environment.torch first")
        return
    if host_line and not host_loads:
        fix = "mend environment.torchvision first"
        yield Finding("host.flags", "problem", "not read: EZ-HOI's scripts import torchvision", fix)
    if kinds or host_line:
        from ezhoi_diffusion.doctor.inputs import check_inputs

        yield from check_inputs(kinds, host_line if host_loads else ())


def kind_of(folder: Path) -> str | Finding:
    """What a folder holds, by the names of its files, or a finding where it is neither kind."""
    makes = f"features come from `{CAPTURE}`, a bridge from `{TRAIN}`"
    try:
        if folder.is_file():
            fix = "give a folder; `ezhoi-diffusion import` turns the guide's .pkl and .pt files into ours"
            return Finding("input", "problem", f"{folder} is a file", fix)
        if not folder.is_dir():
            return Finding("input", "problem", f"{folder} does not exist", makes)
        names = {path.name for path in folder.iterdir()}
    except (OSError, ValueError) as error:
        return Finding("input", "problem", f"{folder} cannot be read ({error})", makes)
    if names & {"meta.json", "index.json", "ezhoi.safetensors"}:
        return FEATURES
    if names & {"config.json", "model.safetensors", ".committed", "checkpoints"}:
        return BRIDGE
    return Finding("input", "problem", f"{folder} holds neither features nor a bridge", makes)
