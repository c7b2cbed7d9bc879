"""The steps of a pipeline: what each runs, and what its result depends on."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ezhoi_diffusion.errors import EzhoiDiffusionError
from ezhoi_diffusion.pipeline.record import Step, content

TUNED = "tuned"  # the bridge that `tune` writes
REFERENCE = "none"
# Flags of EZ-HOI that change no feature
NO_INPUT = ("output_dir", "port", "num_workers", "print_interval")


def make_steps(
    script: Path,
    flags: Sequence[str],
    out: Path,
    *,
    training: Sequence[str],
    bridges: str,
    num_images: int,
    folds: int,
    max_images: int | None = None,
) -> list[Step]:
    """The steps from an EZ-HOI checkpoint to a report.

    Args:
        script: EZ-HOI's script.
        flags: Its flags, with `--eval` and `--resume`.
        out: The folder of the pipeline.
        training: Flags of `ezhoi-diffusion train`.
        bridges: What to compare beside the tuned bridge, as for `ezhoi-diffusion compare --bridges`.
        num_images: Images of the test step.
        folds: Of the choice.
        max_images: Only the first images of each split are captured.

    Raises:
        EzhoiDiffusionError: A later step would refuse a flag.
    """
    from ezhoi_diffusion.ezhoi.launch import read_flags

    given = vars(read_flags(script, flags))  # its defaults as well
    _require_usable(given)
    features, bridge, tuned, test_features, test, report = (
        out / name for name in ("features", "bridge", TUNED, "features-test", "test", "report")
    )
    compared = ",".join(
        [REFERENCE, f"{TUNED}={tuned}", *(item for item in bridges.split(",") if item.strip() != REFERENCE)]
    )
    package = {"package": version("ezhoi-diffusion")}
    run = {**package, "sources of EZ-HOI": source_digest(script)}
    run |= {f"--{name}": content(value, out) for name, value in given.items() if name not in NO_INPUT}
    limit = [] if max_images is None else ["--max-images", str(max_images)]
    blocked = [word for name in given.get("no_plugin", []) for word in ("--no-plugin", name)]
    folders = {f"contents of {folder}": content(folder, out) for folder in bridge_folders(bridges, given["no_plugin"])}

    def capture(folder: Path, split: str) -> Step:
        own = ["--out", str(folder.resolve()), "--split", split, *limit]
        return Step(
            folder.name, f"capture the {split} images", folder, ["capture", str(script), *flags, *own],
            {**run, "split": split, "max_images": max_images},
        )  # fmt: skip

    return [
        capture(features, "train"),
        Step(
            "bridge", "train the bridge", bridge,
            ["train", str(features), "--out", str(bridge), *training, *blocked],
            {**package, "flags": [*training]}, ["features"], ["--resume"],
        ),
        Step(
            TUNED, "choose bridges and settings by cross-validation on training images", tuned,
            ["tune", str(features), "--bridge", str(bridge), "--out", str(tuned), "--folds", str(folds), *blocked],
            {**package, "folds": folds, "plugins with bridges": bridge_plugins(given["no_plugin"])}, ["features", "bridge"],
            whole=True,
        ),
        capture(test_features, "test"),
        Step(
            "test", "test on a few images", test,
            ["test", str(test_features), "--bridge", str(bridge), "--num-images", str(num_images), "--out", str(test), *blocked],
            {**package, "images": num_images}, ["bridge", "features-test"],
        ),
        Step(
            "report", "compare on all test images", report,
            ["compare", str(test_features), "--bridge", str(bridge), "--bridges", compared, "--out", str(report), *blocked],
            {**package, "bridges": bridges, **folders}, ["bridge", TUNED, "features-test"],
        ),
    ]  # fmt: skip


def _require_usable(given: Mapping[str, Any]) -> None:
    """Raise EzhoiDiffusionError for flags of EZ-HOI that would fail hours later, or give nothing of value."""
    if given.get("dataset") != "hicodet":
        raise EzhoiDiffusionError(
            f"EZ-HOI has no evaluation of {given.get('dataset')} to compare by: run capture, train and compare --vcoco one by one"
        )
    if not given.get("resume") or not Path(given["resume"]).is_file():
        raise EzhoiDiffusionError(
            f"--resume must name a trained checkpoint, not {given.get('resume')!r}: without one EZ-HOI starts from random weights"
        )


def bridge_folders(bridges: str, blocked: Sequence[str]) -> list[str]:
    """The folders that a list of bridges names.

    Raises:
        EzhoiDiffusionError: A name is unknown, or a folder does not exist.
    """
    from ezhoi_diffusion.evaluation.variants import known_bridges, parse_bridges
    from ezhoi_diffusion.hub import resolve_path
    from ezhoi_diffusion.plugins import PluginManager

    known = known_bridges(PluginManager(blocked))
    folders = []
    for one in itertools.chain.from_iterable(parse_bridges(bridges, known.names()).values()):
        _ = known[one.name]
        if one.folder:
            path = resolve_path(one.folder)
            if not path.is_dir():
                raise EzhoiDiffusionError(f"--bridges: there is no folder {one.folder}")
            folders.append(str(path))
    return folders


def bridge_plugins(blocked: Sequence[str]) -> dict[str, str]:
    """Name -> version of the plugins whose bridges `tune` tries."""
    from ezhoi_diffusion.plugins import PluginManager

    found = PluginManager(blocked).found.values()
    return {one.name: one.version for one in found if one.status == "loaded" and "register_bridges" in one.hooks}


def source_digest(script: Path) -> str:
    """SHA-256 over the Python files in the script's folder, by name and content, without the lines that `patch` writes."""
    from ezhoi_diffusion.ezhoi.patch import PatchError, reverted

    digest, folder = hashlib.sha256(), script.resolve().parent
    for path in sorted(folder.rglob("*.py")):
        name = path.relative_to(folder)
        if not path.is_file() or any(part.startswith(".") for part in name.parts):
            continue
        data = path.read_bytes()
        with contextlib.suppress(PatchError):
            data = reverted(data)
        digest.update(f"{name} {hashlib.sha256(data).hexdigest()}\n".encode())
    return digest.hexdigest()
