"""The bridge: takes visual features and returns them, moved towards what its denoiser learned."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from ezhoi_diffusion.artifact import CONTEXT
from ezhoi_diffusion.bridge import Bridge, BridgeError
from ezhoi_diffusion.diffusion.artifact import MODEL, STATISTICS, BridgeConfig, read_artifact, write_artifact
from ezhoi_diffusion.diffusion.components import Components
from ezhoi_diffusion.diffusion.normalization import normalize, uncenter
from ezhoi_diffusion.diffusion.recipes import Recipe, Side
from ezhoi_diffusion.diffusion.samplers import Sampler, ddim, make_timesteps
from ezhoi_diffusion.errors import EzhoiDiffusionError
from ezhoi_diffusion.features.batch import Pairs
from ezhoi_diffusion.features.statistics import ModalityStatistics, unit
from ezhoi_diffusion.hub import local, push

APPLICATION = (
    "start_timestep",
    "num_steps",
    "spacing",
    "blend",
    "output",
)  # fields of a recipe that no weight depends on
__all__ = ["BridgeConfig", "BridgeError", "DiffusionBridge", "build_denoiser"]

_Sampled = dict[tuple[int, int, str], tuple[weakref.ref[Tensor], Tensor]]
"""(start_timestep, steps, grid) -> the rows that were sampled last, and what became of them."""


def build_denoiser(config: BridgeConfig, registry: Components | None = None) -> nn.Module:
    """The configured denoiser with fresh weights, drawn from the global generator.

    Raises BridgeError for options it does not take, and what the registry and the builder raise.
    """
    build = (registry or Components()).denoisers[config.denoiser]
    try:
        return build(
            config.dim, config.schedule(), config.objective, config.recipe.scale_factor, **config.denoiser_options
        )
    except TypeError as error:
        raise BridgeError(f"denoiser {config.denoiser!r} does not take {config.denoiser_options}: {error}") from error


def _means_in_use(recipe: Recipe) -> set[Side]:
    return {recipe.input_mean} | ({recipe.restored_mean} if recipe.output == "keep_norm" else set())


def _require_means(recipe: Recipe, statistics: ModalityStatistics) -> None:
    if not statistics.visual_known and "visual" in _means_in_use(recipe):
        raise BridgeError(
            f"recipe {recipe.name!r} uses the visual mean, which is not known here: the files that this comes "
            f"from held the text mean alone. Use recipe 'guide', or capture features and train on them"
        )


class DiffusionBridge(Bridge):
    """Bridges visual features [N, D]: deterministic, row by row, in float32, without gradient.

    With a denoiser that returns its input, and the input mean given back, the result is the input to
    rounding.
    """

    row_by_row = True  # many images may be bridged in one call
    seeded = True
    input_mean: Tensor
    restored_mean: Tensor
    every_level: Tensor

    def __init__(
        self,
        config: BridgeConfig,
        denoiser: nn.Module,
        statistics: ModalityStatistics,
        *,
        sampler: Sampler = ddim,
        context: Mapping[str, Tensor] | None = None,
        chunk_rows: int = 1024,
    ) -> None:
        """`context` holds the host's context vectors; it is stored with the bridge and not used by it.

        `chunk_rows` bounds memory, and changes the result by rounding only; it is halved where a device has too little.
        Raises BridgeError where the statistics do not fit the configuration.
        """
        super().__init__()
        _require_means(config.recipe, statistics)
        for side, mean in (("visual", statistics.visual_mean), ("text", statistics.text_mean)):
            if mean.shape != (config.dim,) or not mean.square().sum() < 1:
                raise BridgeError(
                    f"the {side} mean must have shape [{config.dim}] and a norm below 1; it has shape "
                    f"{list(mean.shape)} and norm {mean.norm():.4f} (a norm of 1: all rows were the same)"
                )
        self.config = config
        self.denoiser = denoiser.eval().requires_grad_(False)
        self.statistics = statistics
        self.sampler = sampler
        self.context = context or {}
        self.provenance: dict[str, Any] = dict(config.provenance)
        self.settings = APPLICATION if config.student_of is None else ("blend", "output")
        self.chunk_rows = chunk_rows
        self._sampled: _Sampled | None = None
        self._schedule = config.schedule()
        means = {"visual": statistics.visual_mean, "text": statistics.text_mean}
        self.register_buffer("input_mean", means[config.recipe.input_mean].float(), persistent=False)
        self.register_buffer("restored_mean", means[config.recipe.restored_mean].float(), persistent=False)
        # on the device once: a level made there in every evaluation would be a copy that waits
        self.register_buffer("every_level", torch.arange(config.timesteps), persistent=False)

    def apply_settings(self, settings: Mapping[str, Any]) -> None:
        """Apply the same weights in another way.

        Raises:
            BridgeError: A value is out of range, or needs a mean that is not known.
        """
        try:
            config = replace(self.config, recipe=replace(self.config.recipe, **settings))
        except (TypeError, ValueError) as error:
            raise BridgeError(f"this bridge cannot be applied with {dict(settings)}: {error}") from error
        _require_means(config.recipe, self.statistics)
        self.config, self._sampled = config, None

    def sweep(self, points: Sequence[Mapping[str, Any]]) -> list[DiffusionBridge]:
        """One `override` for each point; points that differ in blend and output alone sample once for all.

        The tensor they are given one after the other must not be written into meanwhile.
        """
        shared: _Sampled = {}
        bridges = super().sweep(points)
        for bridge in bridges:
            bridge._sampled = shared
        return bridges

    @torch.no_grad()
    def forward(self, adapter_feat: Tensor, pairs: Pairs | None = None) -> Tensor:
        """Bridged rows [N, D] of x [N, D], in its dtype and on its device; rows of norm zero stay.

        Nothing in it waits for a device. Raises BridgeError unless x is a floating-point matrix of width D, and on a CPU
        where it is not finite; on another device such rows come back without a finite value, and nothing is said.
        """
        x = adapter_feat
        if x.ndim != 2 or x.shape[1] != self.config.dim or not x.is_floating_point():
            raise BridgeError(
                f"the bridge takes floating-point rows [N, {self.config.dim}], not {x.dtype} of shape {list(x.shape)}"
            )
        if x.device.type == "cpu" and not torch.isfinite(x).all():
            bad = int((~torch.isfinite(x)).any(dim=1).sum())
            raise BridgeError(f"{bad} of {len(x)} rows hold NaN or infinity: the host's features are broken")
        if len(x) == 0:
            return x.clone()
        with torch.autocast(x.device.type, enabled=False):
            z, norm = normalize(x.float(), self.input_mean, self.config.recipe.scale_factor)
            return self._compose(x.float(), z, norm, self._bridged(x, z)).to(x.dtype)

    def _bridged(self, x: Tensor, z: Tensor) -> Tensor:
        """What the sampler makes of z [N, D], that is of rows x, or made of them for another point of the same sweep."""
        recipe = self.config.recipe
        key = (recipe.start_timestep, recipe.num_steps, recipe.spacing)
        held = self._sampled.get(key) if self._sampled is not None else None
        if held is not None and held[0]() is x:
            return held[1]
        bridged = self._in_chunks(z)
        if self._sampled is not None:
            self._sampled[key] = weakref.ref(x), bridged
        return bridged

    def _in_chunks(self, z: Tensor) -> Tensor:
        while True:
            try:
                return torch.cat([self.sample(rows) for rows in z.split(self.chunk_rows)])
            except torch.OutOfMemoryError:
                if min(self.chunk_rows, len(z)) == 1:
                    raise
            self.chunk_rows = -(-min(self.chunk_rows, len(z)) // 2)  # from now on, lest every image fails first

    @torch.no_grad()
    def sample(self, z: Tensor) -> Tensor:
        """What the sampler makes of rows z [N, D], which are centred and have the norm `scale`: rows [N, D] of any norm."""
        recipe = self.config.recipe
        return self.sampler(
            self._predict_x0,
            z,
            schedule=self._schedule,
            levels=make_timesteps(recipe.spacing, recipe.num_steps, recipe.start_timestep),
            scale_factor=recipe.scale_factor,
        )

    def _compose(self, x: Tensor, z: Tensor, norm: Tensor, bridged: Tensor) -> Tensor:
        recipe = self.config.recipe
        # Unit rows on both sides: a denoiser's estimate is shorter the less it knows, and would count for
        # less.
        direction = unit((1 - recipe.blend) * unit(z) + recipe.blend * unit(bridged))
        result = norm * uncenter(direction, self.restored_mean) if recipe.output == "keep_norm" else direction
        return torch.where(norm > 0, result, x)

    def _predict_x0(self, x: Tensor, t: int) -> Tensor:
        output: Tensor = self.denoiser(x, self.every_level[t : t + 1])
        if self.config.objective == "pred_x0":
            return output
        # ε and v lead back to x0 only from x_t itself. Its norm was taken off for the network, and is known.
        x_t, scale_factor = x, self.config.recipe.scale_factor
        if self.config.recipe.noisy_norm == "expected":
            x_t = x * (self._schedule.expected_norm(t, self.config.dim, scale_factor) / scale_factor)
        return self._schedule.to_x0(self.config.objective, output, x_t, t)

    def save_pretrained(self, folder: str | PathLike[str]) -> None:
        """Write the artefact into `folder`, all of it or nothing; an older one goes, other files stay."""
        files = {MODEL: self.denoiser.state_dict(), STATISTICS: self.statistics.tensors()}
        if self.context:
            files[CONTEXT] = dict(self.context)
        write_artifact(Path(folder), replace(self.config, provenance=self.provenance), files)

    def push_to_hub(
        self, repo_id: str, *, comparison: Path | None = None, private: bool = False, license: str | None = None
    ) -> str:
        """Upload the artefact and a model card to USER/NAME on the Hugging Face Hub; returns the commit's URL.

        The arguments are those of `ezhoi_diffusion.hub.push`. Raises BridgeError, SharingError.
        """
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return push(Path(folder), repo_id, comparison=comparison, private=private, license=license)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | PathLike[str],
        *,
        revision: str | None = None,
        registry: Components | None = None,
        device: torch.device | str | None = None,
        chunk_rows: int = 1024,
    ) -> DiffusionBridge:
        """The bridge stored in `folder`. Executes nothing from it, draws no global random number.

        A string USER/NAME that is no folder here is a repository of the Hugging Face Hub, at `revision` (branch, tag or
        commit). Raises BridgeError, which names the file and what to do, for anything but a complete artefact, and
        SharingError where the Hub does not give it.
        """
        registry = registry or Components()
        config, files = read_artifact(local(folder, revision, bare=True))
        try:
            with torch.random.fork_rng(devices=[]):
                denoiser = build_denoiser(config, registry)
            denoiser.load_state_dict(files[MODEL])
            bridge = cls(
                config,
                denoiser,
                ModalityStatistics.from_tensors(files[STATISTICS]),
                sampler=registry.samplers[config.recipe.sampler],
                context=files.get(CONTEXT),
                chunk_rows=chunk_rows,
            )
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError, EzhoiDiffusionError) as error:
            raise BridgeError(f"the artefact in {folder} cannot be used: {error}") from error
        return bridge.to(device)
