"""The diffusion bridge: moves features towards what its denoiser learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from typing_extensions import Self

from ezhoi_diffusion.artifact import CONTEXT
from ezhoi_diffusion.bridge import Bridge, BridgeError
from ezhoi_diffusion.defaults import torch_defaults
from ezhoi_diffusion.diffusion.artifact import MODEL, STATISTICS, BridgeConfig, read_artifact, write_artifact
from ezhoi_diffusion.diffusion.components import Components
from ezhoi_diffusion.diffusion.normalization import normalize, shift, uncenter
from ezhoi_diffusion.diffusion.recipes import Recipe, Side
from ezhoi_diffusion.diffusion.timesteps import make_timesteps
from ezhoi_diffusion.errors import EzhoiDiffusionError
from ezhoi_diffusion.features.statistics import ModalityStatistics
from ezhoi_diffusion.hub import resolve_path
from ezhoi_diffusion.schema import all_finite, table_of, tensors_problem

if TYPE_CHECKING:
    from ezhoi_diffusion.features.batch import Pairs

SETTINGS = ("start_timestep", "num_steps", "spacing", "sampler", "blend", "output")  # no weight depends on them
GRID: Mapping[str, Sequence[Any]] = {"blend": (0.1, 0.3, 1.0), "start_timestep": (50, 200, 1000)}
STUDENT_SETTINGS = ("blend", "output")  # a student has learned one result of its teacher's sampler
__all__ = ["BridgeConfig", "BridgeError", "DiffusionBridge", "build_denoiser"]


class _Samples(WeakTensorKeyDictionary):
    """Features, while they are in use -> (start_timestep, num_steps, spacing, sampler) -> their sample."""

    def __reduce__(self) -> tuple[type[_Samples], tuple[()]]:
        return _Samples, ()  # samples stay in their process


def build_denoiser(config: BridgeConfig, registry: Components | None = None) -> nn.Module:
    """Build the configured denoiser; its weights are drawn from the global generator.

    Raises:
        BridgeError: The denoiser does not take the options. What registry and builder raise passes as it is.
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
            f"recipe {recipe.name!r} uses the visual mean, which is not known: the imported files held the text mean only. "
            f"Use recipe 'guide', or capture features and train on them"
        )


class DiffusionBridge(Bridge):
    """Bridges features with a denoiser and a sampler.

    With a denoiser that returns its input, and the input mean restored, the result is the input to rounding.
    """

    row_by_row = True
    seeded = True
    grid = GRID
    provenance: dict[str, Any]
    input_mean: Tensor
    restored_mean: Tensor
    all_timesteps: Tensor

    def __init__(
        self,
        config: BridgeConfig,
        denoiser: nn.Module,
        statistics: ModalityStatistics,
        *,
        registry: Components | None = None,
        provenance: dict[str, Any] | None = None,
        context: Mapping[str, Tensor] | None = None,
        chunk_size: int = 1024,
    ) -> None:
        """Assemble a bridge.

        Args:
            config: Its configuration.
            denoiser: A module as `ezhoi_diffusion.diffusion.denoiser` describes.
            statistics: The means.
            registry: Where the recipe's sampler is looked up; by default the samplers that ship.
            provenance: Where it comes from, as JSON.
            context: EZ-HOI's context vectors. They are stored with the bridge, which does not use them.
            chunk_size: How many features go through the denoiser at once. It bounds memory, changes results by rounding only,
                and is halved where a device has too little memory.

        Raises:
            BridgeError: The statistics do not fit the configuration.
            RegistryError: The sampler is not registered.
        """
        super().__init__()
        _require_means(config.recipe, statistics)
        for side, mean in (("visual", statistics.visual_mean), ("text", statistics.text_mean)):
            if mean.shape != (config.dim,) or not mean.square().sum() < 1:
                raise BridgeError(
                    f"the {side} mean must have shape [{config.dim}] and a norm below 1; it has shape "
                    f"{list(mean.shape)} and norm {mean.norm():.4f} (a norm of 1: all features were equal)"
                )
        self.config = config
        self.denoiser = denoiser.eval().requires_grad_(False)
        self.statistics = statistics
        self.registry = registry or Components()
        self.sampler = self.registry.samplers[config.recipe.sampler]
        self.settings = SETTINGS if config.student_of is None else STUDENT_SETTINGS
        self.provenance = provenance or {}
        self.context = context or {}
        self.chunk_size = chunk_size
        self.schedule = config.schedule()
        self._samples: _Samples | None = None
        means = {"visual": statistics.visual_mean, "text": statistics.text_mean}
        self.register_buffer("input_mean", means[config.recipe.input_mean].float(), persistent=False)
        self.register_buffer("restored_mean", means[config.recipe.restored_mean].float(), persistent=False)
        # on the device from the start: a timestep created at every evaluation would be a copy that waits
        self.register_buffer("all_timesteps", torch.arange(config.num_timesteps), persistent=False)

    def apply_settings(self, settings: Mapping[str, Any]) -> None:
        """Change the recipe. Raises BridgeError for values out of range, and for a mean that is not known."""
        try:
            recipe = replace(self.config.recipe, **settings)
            config = replace(self.config, recipe=recipe)
            sampler = self.registry.samplers[recipe.sampler]
        except (EzhoiDiffusionError, TypeError, ValueError) as error:
            raise BridgeError(f"this bridge cannot be applied with {dict(settings)}: {error}") from error
        _require_means(recipe, self.statistics)
        self.config, self.sampler, self._samples = config, sampler, None

    def sweep(self, points: Sequence[Mapping[str, Any]]) -> list[Self]:
        """One `override` for each point. Points that differ only in blend and output sample the same tensor once.

        The tensor must not be written into between the calls.
        """
        shared = _Samples()
        bridges = super().sweep(points)
        for bridge in bridges:
            bridge._samples = shared
        return bridges

    @torch.no_grad()
    def forward(self, adapter_feat: Tensor, pairs: Pairs | None = None) -> Tensor:
        """Bridge features without waiting for a device. Features of norm zero stay.

        Args:
            adapter_feat: Features [N, D] of any floating-point dtype; they are bridged in float32.
            pairs: Not used.

        Returns:
            [N, D], of the dtype and on the device of `adapter_feat`.

        Raises:
            BridgeError: Not a floating-point matrix of width D, or not finite. Finiteness is checked on the CPU only; on a GPU
                the result is not finite either.
        """
        x = adapter_feat
        if x.ndim != 2 or x.shape[1] != self.config.dim or not x.is_floating_point():
            raise BridgeError(
                f"the bridge takes floating-point features [N, {self.config.dim}], not {x.dtype} of shape {list(x.shape)}"
            )
        if x.device.type == "cpu" and not all_finite(x):
            bad = int((~torch.isfinite(x)).any(dim=1).sum())
            raise BridgeError(f"{bad} of {len(x)} features hold NaN or infinity: what computed them is broken")
        if len(x) == 0:
            return x.clone()
        with torch.autocast(x.device.type, enabled=False):
            z, norm = normalize(x.float(), self.input_mean, self.config.recipe.scale_factor)
            return self._compose(x.float(), z, norm, self._bridged(x, z)).to(x.dtype)

    def _bridged(self, x: Tensor, z: Tensor) -> Tensor:
        """Sample z [N, D], the centred x, unless another point of the same sweep has sampled x already."""
        if self._samples is None:
            return self._in_chunks(z)
        recipe = self.config.recipe
        key = (recipe.start_timestep, recipe.num_steps, recipe.spacing, recipe.sampler)
        held: dict[tuple[int, int, str, str], Tensor] = self._samples.setdefault(x, {})  # type: ignore[no-untyped-call]
        if key not in held:
            held[key] = self._in_chunks(z)
        return held[key]

    def _in_chunks(self, z: Tensor) -> Tensor:
        while True:
            try:
                # a plugin's denoiser or sampler may return another dtype
                return torch.cat([self.sample(chunk) for chunk in z.split(self.chunk_size)]).to(z.dtype)
            except torch.OutOfMemoryError:
                if min(self.chunk_size, len(z)) == 1:
                    raise
            self.chunk_size = -(-min(self.chunk_size, len(z)) // 2)  # it stays, or every image would fail first

    @torch.no_grad()
    def sample(self, z: Tensor) -> Tensor:
        """Sample from centred features z [N, D] of norm `scale_factor`. Returns [N, D] of any norm."""
        recipe = self.config.recipe
        return self.sampler(
            self.predict_x0,
            z,
            schedule=self.schedule,
            timesteps=make_timesteps(recipe.spacing, recipe.num_steps, recipe.start_timestep),
            scale_factor=recipe.scale_factor,
        )

    def predict_x0(self, x: Tensor, t: int) -> Tensor:
        """Estimate x0 [N, D] from x [N, D] of norm `scale_factor` at timestep t."""
        output: Tensor = self.denoiser(x, self.all_timesteps[t : t + 1])
        if self.config.objective == "pred_x0":
            return output
        # ε and v lead back to x0 only from x_t itself. The denoiser saw it without its norm, which is known.
        x_t, scale_factor = x, self.config.recipe.scale_factor
        if self.config.recipe.noisy_norm == "expected":
            x_t = x * (self.schedule.expected_norm(t, self.config.dim, scale_factor) / scale_factor)
        return self.schedule.to_x0(self.config.objective, output, x_t, t)

    def _compose(self, x: Tensor, z: Tensor, norm: Tensor, bridged: Tensor) -> Tensor:
        recipe = self.config.recipe
        if recipe.output == "free_norm":
            return torch.lerp(x, torch.where(norm > 0, shift(x, self.input_mean, z, bridged), x), recipe.blend)
        # Unit vectors on both sides: an estimate is shorter the less the denoiser knows, and would count for less.
        mixed = torch.lerp(F.normalize(z, dim=-1), F.normalize(bridged, dim=-1), recipe.blend)
        if recipe.output == "keep_norm":
            result = norm * uncenter(mixed, self.restored_mean)
        else:
            result = F.normalize(mixed, dim=-1)
        return torch.where(norm > 0, result, x)

    def save_pretrained(self, folder: str | PathLike[str]) -> None:
        """Write the artefact into `folder`, all of it or nothing. It replaces an older one; other files stay."""
        files = {MODEL: self.denoiser.state_dict(), STATISTICS: self.statistics.tensors()}
        if self.context:
            files[CONTEXT] = dict(self.context)
        write_artifact(Path(folder), self.config, files, self.provenance)

    @classmethod
    @torch_defaults()
    def from_pretrained(
        cls,
        folder: str | PathLike[str],
        *,
        revision: str | None = None,
        registry: Components | None = None,
        device: torch.device | str | None = None,
        chunk_size: int = 1024,
    ) -> DiffusionBridge:
        """Load a bridge. Nothing from the artefact is executed, and no global random number is drawn.

        Args:
            folder: A folder, or USER/NAME of a repository on the Hugging Face Hub where there is no folder of that name.
            revision: Branch, tag or commit of the repository.
            registry: Denoisers and samplers; by default those that ship.
            device: Where the bridge goes; by default the CPU.
            chunk_size: As for the constructor.

        Raises:
            BridgeError: The artefact is incomplete or cannot be used; the message names the file and what to do.
            SharingError: The Hub does not give it.
        """
        registry = registry or Components()
        config, artifact = read_artifact(resolve_path(folder, revision, bare=True))
        try:
            with torch.random.fork_rng(devices=[]):
                denoiser = build_denoiser(config, registry)
            problem = tensors_problem(artifact.files[MODEL], table_of(denoiser.state_dict()))
            if problem:
                raise ValueError(f"{MODEL}: {problem}")
            denoiser.load_state_dict(artifact.files[MODEL])
            bridge = cls(
                config,
                denoiser,
                ModalityStatistics.from_tensors(artifact.files[STATISTICS]),
                registry=registry,
                provenance=artifact.provenance,
                context=artifact.context,
                chunk_size=chunk_size,
            )
        except (RuntimeError, TypeError, ValueError, EzhoiDiffusionError) as error:  # of a denoiser of a plugin, too
            raise BridgeError(f"the artefact in {folder} cannot be used: {error}") from error
        return bridge.to(device)
