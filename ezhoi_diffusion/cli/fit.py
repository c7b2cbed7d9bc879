"""`ezhoi-diffusion fit NAME FEATURES --out DIR`: a bridge of an installed plugin, fitted to captured features."""

from __future__ import annotations

import argparse
import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ezhoi_diffusion.errors import EzhoiDiffusionError

if TYPE_CHECKING:
    from collections.abc import Callable

    from ezhoi_diffusion.artifact import Artifact
    from ezhoi_diffusion.registry import Registry

DESCRIPTION = """\
Fit a bridge that an installed plugin brings to captured features of training images, and write it as an artefact: config.json
and safetensors, with the fingerprint of the host. Labels of the held-out tenth of the images stay unread, so that
`ezhoi-diffusion tune` may choose by them. (The diffusion bridge itself is trained with `ezhoi-diffusion train`.)"""
EXAMPLE = """\
example:
  ezhoi-diffusion fit procrustes FEATURES --out BRIDGE --option mode=ridge
  ezhoi-diffusion compare TEST_FEATURES --bridges none,identity,procrustes=BRIDGE
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the flags, and list what is installed."""
    from ezhoi_diffusion.plugins import PluginManager

    fits = known_fits(PluginManager())
    listed = (
        "\n\n".join(f"  {_described(name, fits[name])}" for name in fits.names()) or "  none: install a plugin first"
    )
    parser.description, parser.epilog = DESCRIPTION, f"what can be fitted here, and its options:\n{listed}\n\n{EXAMPLE}"
    parser.add_argument("name", metavar="NAME", help="the bridge, see below")
    parser.add_argument("features", type=Path, metavar="FEATURES", help="the folder of a capture of the train split")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the bridge")
    parser.add_argument(
        "--option", action="append", default=[], metavar="KEY=VALUE", help="an option of that bridge; may be repeated"
    )


def run(args: argparse.Namespace) -> int:
    """Fit and write."""
    from ezhoi_diffusion.features.store import FeatureStore
    from ezhoi_diffusion.files import require_unused
    from ezhoi_diffusion.plugins import PluginManager

    fit = known_fits(PluginManager())[args.name]
    options = _options(args.name, fit, args.option)
    store = FeatureStore(args.features)
    store.require_training_images("a bridge is fitted to")
    require_unused(args.out, EzhoiDiffusionError)
    try:
        artifact = fit(store, **options)
    except EzhoiDiffusionError:
        raise
    except Exception as error:  # a third party's, which may raise anything
        raise EzhoiDiffusionError(f"fit '{args.name}' raised {type(error).__name__}: {error}") from error
    from_host(artifact, store, args.name, options).save(args.out)
    print(f"bridge: {args.out}; compare it with --bridges none,identity,{args.name}={args.out}", flush=True)
    return 0


def known_fits(plugins: Any) -> Registry[Callable[..., Artifact]]:
    """The fits that installed plugins contribute, by name."""
    from ezhoi_diffusion.registry import Registry

    return plugins.collect("register_fits", Registry("fit", {}))  # type: ignore[no-any-return]


def from_host(artifact: Any, store: Any, name: str, options: dict[str, Any]) -> Artifact:
    """A fitted artefact with where it comes from: the host's fingerprint and context vectors, and the options.

    Raises EzhoiDiffusionError where it is none, or none of that name.
    """
    from ezhoi_diffusion.artifact import CONTEXT, Artifact

    if not isinstance(artifact, Artifact) or artifact.bridge != name:
        found = artifact.bridge if isinstance(artifact, Artifact) else type(artifact).__name__
        raise EzhoiDiffusionError(f"fit '{name}' returned {found!r} instead of an Artifact of bridge '{name}'")
    provenance = {
        **artifact.provenance,
        "fingerprint": store.fingerprint,
        "features": {"rows": len(store), "images": len(store.images)},
        "fit": {"name": name, "options": options},
    }
    context = {CONTEXT: store.context} if store.context else {}
    return Artifact(name, artifact.config, {**artifact.files, **context}, provenance)


def _options(name: str, fit: Callable[..., Any], words: list[str]) -> dict[str, Any]:
    from ezhoi_diffusion.evaluation.variants import parse_value

    known = list(inspect.signature(fit).parameters)[1:]
    options: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or key not in known or key in options:
            raise EzhoiDiffusionError(
                f"--option {word}: give each option of '{name}' once, as KEY=VALUE; it has {', '.join(known) or 'none'}"
            )
        options[key] = parse_value(value)
    return options


def _described(name: str, fit: Callable[..., Any]) -> str:
    parameters = list(inspect.signature(fit).parameters.values())[1:]
    options = " ".join(f"[{p.name}={p.default}]" for p in parameters)
    text = (inspect.getdoc(fit) or "").replace("\n", "\n      ")
    return f"{name} {options}\n      {text}"
