"""The module that scripts of the guide import."""

from __future__ import annotations

import math
from collections.abc import Callable
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor, nn

from ezhoi_diffusion.diffusion.bridge import DiffusionBridge
from ezhoi_diffusion.guide.convert import Bundle, make_bridge
from ezhoi_diffusion.guide.formats import read_guide_file
from ezhoi_diffusion.guide.reading import GuideFileError


class DiffusionBridgeHOI(nn.Module):
    """The guide's module: pair features [N, D] -> [N, D].

    Its weights are no part of the module around it. They follow it to another device; its state_dict, its parameters and
    their precision do not include them. No code from a file is run.

    Args:
        diffusion_path: A folder of `ezhoi-diffusion train`, which does what its recipe says. Or the guide's model-k.pt, which
            does what the guide does: EMA weights, the text mean subtracted from visual features, and results of norm 1 in
            the centred space. EZ-HOI's text features are not in that space.
        text_mean_path: The guide's file of the text mean or of the text embeddings. Not read for a folder.
        inference_steps: Both the timestep at which a feature enters and the number of network evaluations. By default 600
            for the guide's files, and what its recipe says for a folder.
        scale_factor: The norm of the network's input. By default 5, or what a folder's recipe says.
        verbose: Print what was loaded.

    Raises:
        GuideFileError: A file is missing, damaged or does not fit.
        UnsafeFileError: A file would run code.
        BridgeError: A folder cannot be read, or `inference_steps` exceeds its schedule.
    """

    def __init__(
        self,
        diffusion_path: str | PathLike[str],
        text_mean_path: str | PathLike[str] | None = None,
        inference_steps: int | None = None,
        scale_factor: float | None = None,
        verbose: bool = False,
    ) -> None:
        super().__init__()
        path = Path(diffusion_path)
        notes: list[str] = []
        if path.is_dir():
            bridge = _from_folder(path, inference_steps, scale_factor)
        else:
            paths = [path] if text_mean_path is None else [path, Path(text_mean_path)]
            bundle = Bundle.from_files([read_guide_file(file) for file in paths])
            bridge, notes = make_bridge(bundle, scale_factor=scale_factor, num_steps=inference_steps), bundle.notes
        self._unregistered = (bridge,)
        if verbose:
            print("\n".join((f"DiffusionBridgeHOI: {path}", *_describe(bridge), *notes)), flush=True)

    @property
    def bridge(self) -> DiffusionBridge:
        """The bridge inside."""
        return self._unregistered[0]

    def forward(self, adapter_feat: Tensor) -> Tensor:
        """Bridge the features [N, D], in their dtype and on their device."""
        bridged: Tensor = self.bridge(adapter_feat)
        return bridged

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DiffusionBridgeHOI:
        """Follow to a device but not to a dtype: the bridge computes in float32."""
        self.bridge.to(fn(torch.empty(0)).device)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


def _from_folder(folder: Path, num_steps: int | None, scale_factor: float | None) -> DiffusionBridge:
    bridge = DiffusionBridge.from_pretrained(folder)
    trained = bridge.config.recipe.scale_factor
    if scale_factor is not None and not math.isclose(scale_factor, trained, rel_tol=1e-3):
        raise GuideFileError(
            f"scale_factor is {scale_factor:g}, and the network in {folder} was trained with {trained:g}: leave scale_factor out"
        )
    return bridge if num_steps is None else bridge.override(start_timestep=num_steps, num_steps=num_steps)


def _describe(bridge: DiffusionBridge) -> list[str]:
    config, recipe = bridge.config, bridge.config.recipe
    imported = bridge.provenance.get("imported")
    made = f"{imported['weights']} weights of " if imported else ""
    made += f"step {bridge.provenance.get('training', {}).get('step', 'unknown')}"
    return [
        f"  D = {config.dim}, {config.denoiser} {config.denoiser_options or ''}",
        f"  {config.objective}, T = {config.num_timesteps}, {made}",
        f"  recipe {recipe.name}: start_timestep {recipe.start_timestep}, {recipe.num_steps} evaluations, scale_factor "
        f"{recipe.scale_factor:g}, output {recipe.output}",
    ]
