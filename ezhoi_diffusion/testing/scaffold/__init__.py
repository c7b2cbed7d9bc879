"""The package of a new plugin, from templates: a bridge that works, its tests, README.md and pyproject.toml."""

from __future__ import annotations

import keyword
import os
import re
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from string import Template

from ezhoi_diffusion.errors import EzhoiDiffusionError

NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,38}[A-Za-z0-9])?")
FILES = {
    "pyproject.toml.template": "pyproject.toml",
    "README.md.template": "README.md",
    "module.py.template": "$name.py",
    "test_module.py.template": "tests/test_$name.py",
}


class ScaffoldError(EzhoiDiffusionError):
    """A plugin cannot have that name, or its package that folder."""


def new_plugin(name: str, out: Path | None = None) -> tuple[str, Path]:
    """Write the package of a plugin, whole or not at all.

    Args:
        name: Of the package. Bridge, plugin and module have it with underscores.
        out: The package's folder; the normalised name (PEP 503) by default.

    Returns:
        What the bridge is called, and the folder.

    Raises:
        ScaffoldError: The name is invalid or taken, or the folder exists.
        OSError: The disk refuses.
    """
    from ezhoi_diffusion.files import new_folder

    if not NAME.fullmatch(name):
        raise ScaffoldError(
            f"{name!r} cannot be a plugin's name: give at most 40 letters, digits, - and _, with a letter or digit at either end"
        )
    distribution = re.sub(r"[-_.]+", "-", name).lower()
    module = distribution.replace("-", "_")
    folder = out or Path(distribution)
    if os.path.lexists(folder):
        raise ScaffoldError(f"{folder} exists: give another name, or another --out; nothing was written")
    problem = _taken(module, distribution)
    if problem:
        raise ScaffoldError(f"{name!r} cannot be a plugin's name: {problem}; choose another one")
    with new_folder(folder) as staged:
        for template, path in FILES.items():
            text = Template((Path(__file__).parent / template).read_text(encoding="utf-8"))
            target = staged / Template(path).substitute(name=module)
            target.parent.mkdir(exist_ok=True)
            target.write_text(text.substitute(name=module, distribution=distribution), encoding="utf-8")
    return module, folder


def _taken(module: str, distribution: str) -> str | None:
    """Why a name cannot be used, or None."""
    from ezhoi_diffusion.evaluation.comparison import REFERENCE
    from ezhoi_diffusion.evaluation.variants import known_bridges
    from ezhoi_diffusion.plugins import PluginManager

    if not module.isidentifier() or keyword.iskeyword(module):
        return f"a module cannot be called {module!r} in Python"
    if module == REFERENCE:
        return f"in a comparison {REFERENCE!r} is EZ-HOI without a bridge"
    plugins = PluginManager()
    if module in {*plugins.found, *known_bridges(plugins).names()}:
        return f"an installed plugin is called, or brings a bridge called {module!r}"
    found = find_spec(module)
    if found is not None and found.origin is not None:  # else it is only a folder
        return f"a module {module!r} is there already ({found.origin}), and one would hide the other"
    try:
        return f"a distribution {distribution!r} {version(distribution)} is installed"
    except PackageNotFoundError:
        return None
