"""The hooks: the contract between an EZ-HOI run and its plugins.

A plugin is a module, or an instance of a class, whose functions carry `@hookimpl` and the name of a hook below. Arguments
are passed by keyword, and a function may leave out those it does not need.

    from ezhoi_diffusion import hookimpl

    @hookimpl
    def post_adapter_feat(adapter_feat, pairs):
        return adapter_feat - adapter_feat.mean(0)

The name of a hook says how it is called:

* `register_*` contributes. Every installed plugin is asked.
* `locate_*` answers. The first answer counts.
* `on_*` observes.
* `post_*` may replace. Each plugin gets what the one before it returned.

Apart from `register_*`, only plugins enabled with `--plugin NAME` take part, in the order of the flags. The built-in
text_cache follows them; it is on by default. An error never passes silently: it names the plugin.
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
    from ezhoi_diffusion.bridge import Bridge
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
    """Add flags to EZ-HOI's command line.

    Since: 0.1. Mode: notify. When: before the script's parser reads the command line.

    Args:
        group: A group of the script's own argparse parser, titled with the plugin's name.

    Return: nothing. The values arrive as `run.args` in `on_attach`.
    Errors: an exception, or a flag that exists already, ends the run.
    """


@hookspec
def register_bridges(
    register: Register[Callable[[Path | None], Bridge | Callable[[Tensor], Tensor]]], plugins: PluginManager
) -> None:
    """Contribute bridges, for `--compare none,NAME=DIR` and `--plugin NAME=DIR`.

    Since: 0.1. Mode: notify. When: before the first bridge is looked up.

    Args:
        register: Call it as `register(name, load)`. `load(folder)` returns a `Bridge`, or a plain function on features
            [P, D]. `folder` is the artefact's folder, or None where the user names none.
        plugins: The plugin manager, for a bridge that needs what other plugins contribute.

    Return: nothing.
    Errors: an exception, or a name that is taken, ends the command.
    """


@hookspec
def register_fits(register: Register[Callable[..., Artifact]]) -> None:
    """Contribute how a bridge is fitted, for `ezhoi-diffusion train FEATURES --bridge NAME --set KEY=VALUE --out DIR`.

    Since: 0.1. Mode: notify. When: before a fit is looked up.

    Args:
        register: Call it as `register(name, fit)`. `fit(features, **options)` gets a FeatureStore of training images and
            returns an Artifact that the bridge of the same name loads. Take labels from `seen_pairs` alone. The keyword
            arguments are the options of `--set`; the docstring is shown in the help. A fit that is marked with
            `features.unlabelled.learns_from_test_images` gets test images without annotations.

    Return: nothing.
    Errors: an exception, or a name that is taken, ends the command.
    """


@hookspec
def register_denoisers(register: Register[Callable[..., nn.Module]]) -> None:
    """Contribute denoisers, for `ezhoi-diffusion train --denoiser NAME`.

    Since: 0.1. Mode: notify. When: before a bridge is trained or loaded.

    Args:
        register: Call it as `register(name, build)`. `ezhoi_diffusion.diffusion.denoiser` has the signature of `build`.
            A denoiser that derives from `FittedDenoiser`, also there, is fitted instead of trained.

    Return: nothing.
    Errors: an exception, or a name that is taken, ends the command.
    """


@hookspec
def register_samplers(register: Register[Callable[..., Tensor]]) -> None:
    """Contribute samplers, for `--sampler NAME` and `--set sampler=NAME`.

    Since: 0.1. Mode: notify. When: before a bridge is trained or loaded.

    Args:
        register: Call it as `register(name, sample)`. `ezhoi_diffusion.diffusion.samplers` has the signature of `sample`.

    Return: nothing.
    Errors: an exception, or a name that is taken, ends the command.
    """


@hookspec(firstresult=True)
def locate_adapter_feat(model: nn.Module) -> tuple[str, nn.Module] | None:
    """Say where a fork computes adapter_feat, if not where the published model does.

    Since: 0.1. Mode: first. When: on attach; the first plugin that returns something decides.

    Args:
        model: EZ-HOI's detector, unwrapped.

    Return: (name, module). The module's output is [P, D] or [P, 1, D], once for every image that has pairs. None leaves
        the decision to the next plugin and, in the end, to the package.
    Errors: an exception ends the run.
    """


@hookspec
def on_attach(run: EzHoiRun) -> None:
    """The model is built and its weights are loaded. No image has been seen.

    Since: 0.1. Mode: notify. When: once a process.

    Args:
        run: `run.model`, `run.args`, `run.engine` (None under inference.py), `run.fingerprint`, `run.device`,
            `run.rank`, `run.world_size`. A plugin that stored part of a split before sets `run.images_done[NAME]` to the
            position of the first image it still needs. One that has nothing left to do sets `run.finished`: the run then
            ends with status 0. The model is only read: its weights, buffers and mode stay as they are.

    Return: nothing.
    Errors: an exception ends the run, and so do SystemExit and a write into the model.
    """


@hookspec
def on_detach(run: EzHoiRun) -> None:
    """The run is over, or failed. Close what `on_attach` opened.

    Since: 0.1. Mode: notify. When: once a process, after on_attach, also where that or the run failed.

    Args:
        run: As in on_attach. `run.failed` tells whether the run ended with an error.

    Return: nothing.
    Errors: an exception ends the run. The other plugins are still detached.
    """


@hookspec
def on_train_batch(batch: FeatureBatch) -> None:
    """Observe one image's features in a pass over a split, in eval mode, with the evaluation transform.

    Since: 0.1. Mode: notify. When: for each image in order. Enabling a plugin with this hook makes the pass; the run then
    ends without training or evaluating.

    Args:
        batch: adapter_feat [P, D], pairs, logits, labels, text features, annotations. P may be 0. Do not write into it.

    Return: nothing.
    Errors: an exception ends the run, and so does a batch that was written into.
    """


@hookspec
def post_adapter_feat(adapter_feat: Tensor, pairs: Pairs) -> Tensor | None:
    """Replace the pair features of one image at eval time.

    Since: 0.1. Mode: fold. When: once for every image that has pairs, with the model in eval mode.

    Args:
        adapter_feat: [P, D]. Do not write into it.
        pairs: The image's pairs: boxes, detector scores, object classes.

    Return: a plain tensor, no subclass, of the same shape, dtype and device, all finite. None leaves the features as they are.
    Errors: an exception, or what breaks these rules, ends the run. With `--plugin-errors disable` it is logged
        once, the plugin is off for the rest of the run, its input passes through, and every report says DEGRADED.
    """


@hookspec
def on_comparison(comparison: Comparison) -> None:
    """Observe the results of a `--compare` run.

    Since: 0.1. Mode: notify. When: on rank 0, after the table is printed.

    Args:
        comparison: Per-class AP of every variant, groups, timings, and what was forced or degraded.

    Return: nothing.
    Errors: an exception ends the run.
    """


HOOKS: dict[str, Any] = {name: value for name, value in list(globals().items()) if hasattr(value, f"{PROJECT}_spec")}
