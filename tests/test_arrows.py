"""Imports run one way through the package, and offline work does not know EZ-HOI."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import ezhoi_diffusion

ROOT = Path(ezhoi_diffusion.__file__).parent
# From the bottom up. A module may import from its own layer and from layers below, function-level imports included.
LAYERS = [
    ["errors"],
    ["checksums", "files", "locks", "schema", "defaults", "inputs", "rng", "signals", "registry", "device"],
    ["bridge", "hookspecs"],
    ["artifact", "plugins"],
    ["hub"],
    ["features"],
    ["diffusion", "scoring"],
    ["training", "evaluation"],
    ["report"],
    ["ezhoi"],
    ["builtin", "testing"],
    ["guide"],
    ["doctor", "bench", "pipeline", "demo"],
    ["cli"],
]
HEIGHT = {name: height for height, layer in enumerate(LAYERS) for name in layer}
OFFLINE = ("features", "diffusion", "scoring", "training", "evaluation", "report", "testing")


def part_of(module: str) -> str:
    """`ezhoi_diffusion.features.store` -> `features`."""
    return module.removeprefix("ezhoi_diffusion").strip(".").split(".")[0]


def imports() -> list[tuple[str, str, str]]:
    """(part, imported part, where) of every import in the package that is not for types alone."""
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        if "miniature" in path.parts or path == ROOT / "__init__.py":
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        typing_only = {
            id(inner)
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
            for inner in ast.walk(node)
        }
        own = path.relative_to(ROOT).with_suffix("").parts[0]
        for node in ast.walk(tree):
            if id(node) in typing_only:
                continue
            modules = []
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ezhoi_diffusion":
                modules = (
                    [node.module]
                    if node.module != "ezhoi_diffusion"
                    else [f"{node.module}.{a.name}" for a in node.names]
                )
            elif isinstance(node, ast.Import):
                modules = [a.name for a in node.names if a.name.split(".")[0] == "ezhoi_diffusion"]
            found += [(own, part_of(module), f"{path.relative_to(ROOT)}:{node.lineno}") for module in modules]
    return found


def test_every_part_has_a_layer():
    parts = {path.stem if path.is_file() else path.name for path in ROOT.iterdir() if path.suffix in ("", ".py")}
    assert parts - {"__init__", "__main__", "__pycache__"} == set(HEIGHT)


def test_imports_run_downwards():
    upward = [
        f"{where}: {own} imports {imported}"
        for own, imported, where in imports()
        if imported and own != "__main__" and HEIGHT[imported] > HEIGHT[own]
    ]
    assert not upward, "\n".join(upward)


def test_no_two_parts_import_each_other():
    pairs = {(own, imported) for own, imported, _ in imports() if own != imported}
    assert not {tuple(sorted(pair)) for pair in pairs if pair[::-1] in pairs}


@pytest.mark.parametrize("part", OFFLINE)
def test_offline_work_does_not_know_ez_hoi(part):
    assert not [where for own, imported, where in imports() if own == part and imported == "ezhoi"]
