"""The contract between an EZ-HOI run and its plugins.

A plugin is a module, or an instance of a class, whose functions carry `@hookimpl` and the name of a hook
below. A function may ask for fewer arguments than the hook offers; all of them are passed by keyword.

    from ezhoi_diffusion import hookimpl

    @hookimpl
    def post_adapter_feat(adapter_feat, pairs):
        return adapter_feat - adapter_feat.mean(0)

`register_*` contributes: it is called on every installed plugin. `locate_*` answers, `on_*` observes and `post_*`
may replace: these are called only on plugins enabled with `--plugin NAME`, in the order in which they were named, and
after them on the built-in text_cache, which is on by default.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    import argparse
    from pathlib import Path

    from torch import Tensor, nn

    from ezhoi_diffusion.artifact import Artifact
    from ezhoi_diffusion.evaluation.comparison import Comparison
    from ezhoi_diffusion.ezhoi.run import EzHoiRun
    from ezhoi_diffusion.features.batch import FeatureBatch, Pairs
    from ezhoi_diffusion.plugins import PluginManager
    from ezhoi_diffusion.registry import Register

PROJECT = "ezhoi_diffusion"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def register_options(group: argparse._ArgumentGroup) -> None:
    """Add flags of this plugin to the host's command line.

    Since: 0.1. Mode: notify. When: before the host's parser reads the command line.
    group: an argparse group of the host's own parser, titled with the plugin's name.
    Return: nothing; the values arrive as `host.args` in `on_attach`.
    Errors: an exception, or a flag that exists already, ends the run and names the plugin.
    """


@hookspec
def register_bridges(
    register: Register[Callable[[Path | None], Callable[[Tensor], Tensor]]], plugins: PluginManager
) -> None:
    """Contribute bridges by name, for `--compare none,NAME`.

    Since: 0.1. Mode: notify. When: before the first bridge is looked up.
    register: call it as `register(name, load)`. `load(folder)` gets the artefact folder of `--bridge`, or
        None where the user gave none, and returns a callable [P, D] -> [P, D]. It may have attributes:
        `provenance` (a dict with the host's `fingerprint`) and `context`, which are held against the host;
        `row_by_row = True`, no row depends on the others, so that rows of many images may come in one call;
        `control = True`, it is no bridge but what one has to beat: reports hold the others against the best control;
        `depends_on_seed = True`, a training with another seed is another bridge;
        `settings`, names of what `sweep(points)` takes: for each dict of them a callable that applies the bridge so, for
        `compare --sweep` and `tune`;
        `override(start_timestep=N, num_steps=N)`, the same for `--inference-steps N`.
    plugins: for a bridge that needs what other plugins contribute.
    Return: nothing.
    Errors: an exception, or a name that is taken, ends the run and names the plugin.
    """


@hookspec
def register_fits(register: Register[Callable[..., Artifact]]) -> None:
    """Contribute how a bridge is fitted, for `ezhoi-diffusion fit NAME FEATURES --out DIR --option KEY=VALUE`.

    Since: 0.1. Mode: notify. When: before a fit is looked up.
    register: call it as `register(name, fit)`. `fit(features, **options)` gets a FeatureStore of training images, and
        returns an Artifact that the bridge of the same name loads; see `seen_pairs` for labels. Its keyword arguments
        are the options; its docstring is shown by `ezhoi-diffusion fit NAME --help`.
    Return: nothing.
    Errors: an exception, or a name that is taken, ends the run and names the plugin.
    """


@hookspec
def register_denoisers(register: Register[Callable[..., nn.Module]]) -> None:
    """Contribute denoisers by name, for `ezhoi-diffusion train --denoiser NAME`.

    Since: 0.1. Mode: notify. When: before a bridge is trained or loaded.
    register: call it as `register(name, build)`; see `ezhoi_diffusion.diffusion.networks` for the signature.
    Return: nothing.
    Errors: an exception, or a name that is taken, ends the run and names the plugin.
    """


@hookspec
def register_samplers(register: Register[Callable[..., Tensor]]) -> None:
    """Contribute samplers by name.

    Since: 0.1. Mode: notify. When: before a bridge is loaded.
    register: call it as `register(name, sample)`; see `ezhoi_diffusion.diffusion.samplers` for the signature.
    Return: nothing.
    Errors: an exception, or a name that is taken, ends the run and names the plugin.
    """


@hookspec(firstresult=True)
def locate_adapter_feat(model: nn.Module) -> tuple[str, nn.Module] | None:
    """Say where a fork computes adapter_feat, if not where the published model does.

    Since: 0.1. Mode: first. When: on attach; the first plugin that returns something decides.
    model: the host's detector, unwrapped.
    Return: (name, module), the module's output being [P, D] or [P, 1, D] once for every image that has
        pairs; or None to leave it to the next plugin and, in the end, to the package.
    Errors: an exception ends the run and names the plugin.
    """


@hookspec
def on_attach(run: EzHoiRun) -> None:
    """The model is built, its weights are loaded, and no image has been seen.

    Since: 0.1. Mode: notify. When: once a process.
    host: the run: `host.model`, `host.args`, `host.engine` (None under inference.py), `host.fingerprint`,
        `host.rank`, `host.world_size`. A plugin that stored part of a split before sets `host.done[NAME]` to the
        position of the first image it still needs.
    Return: nothing.
    Errors: an exception ends the run and names the plugin.
    """


@hookspec
def on_detach(run: EzHoiRun) -> None:
    """The run is over, or failed: close what `on_attach` opened.

    Since: 0.1. Mode: notify. When: once a process, after on_attach, also where that or the run failed.
    host: as in on_attach; `host.failed` tells whether the run ended with an error.
    Return: nothing.
    Errors: an exception ends the run and names the plugin; the other plugins are still detached.
    """


@hookspec
def on_train_batch(batch: FeatureBatch) -> None:
    """One image's features in a pass over a split, in eval mode, with the evaluation transform.

    Since: 0.1. Mode: notify. When: for each image in order; enabling a plugin with this hook makes the pass,
    after which the run ends without training or evaluating.
    batch: adapter_feat [P, D], pairs, boxes, scores, object classes, labels, text; P may be zero.
    Return: nothing.
    Errors: an exception ends the run and names the plugin.
    """


@hookspec
def post_adapter_feat(adapter_feat: Tensor, pairs: Pairs) -> Tensor | None:
    """Replace the visual feature of one image, at eval time.

    Since: 0.1. Mode: fold: each plugin gets what the one before returned. When: once for every image that
    has pairs, with the model in eval mode.
    adapter_feat: [P, D]; do not write into it.
    context: the image's pairs, boxes, scores and object classes.
    Return: a tensor of the same shape, dtype and device, all finite; or None to leave it as it is.
    Errors: an exception or a value that breaks these rules ends the run and names the plugin; with
        `--plugin-errors disable` it is logged once, the plugin is off for the rest of the run, the feature
        goes through unchanged, and every report of the run says `degraded`.
    """


@hookspec
def on_comparison(comparison: Comparison) -> None:
    """The results of a `--compare` run.

    Since: 0.1. Mode: notify. When: on rank 0, once the table is printed.
    comparison: per-class AP of every variant, groups, timings, whether anything was forced or degraded.
    Return: nothing.
    Errors: an exception ends the run and names the plugin.
    """


HOOKS: dict[str, Any] = {name: value for name, value in list(globals().items()) if hasattr(value, f"{PROJECT}_spec")}
