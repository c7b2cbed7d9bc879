"""The module that scripts of the guide import, around a bridge."""

from __future__ import annotations

import math
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ezhoi_diffusion.diffusion.bridge import DiffusionBridge
from ezhoi_diffusion.diffusion.networks import CLOSED_FORMS
from ezhoi_diffusion.guide.convert import Bundle, ImportFilesError, make_bridge
from ezhoi_diffusion.guide.formats import LegacyFile, read_legacy


class DiffusionBridgeHOI(nn.Module):
    """adapter_feat [N, D] -> [N, D], from a folder of `ezhoi-diffusion train` or from the guide's own files.

    `diffusion_path` is such a folder, and nothing else is needed (`text_mean_path` is not read: a folder has its means); or the guide's model-k.pt, and then `text_mean_path` is
    its text mean (or its text embeddings), .pkl or .pt. The guide's files give the guide's behaviour: the EMA weights, the
    text mean taken off visual rows, and *unit rows in the centred space* as result, which EZ-HOI's text features are not in.
    A folder does what its recipe says.

    `inference_steps` is, as in the guide, two things at once: the level at which a row enters, which is how strongly it is
    bridged, and the number of network evaluations that takes. Left out it is 600 for the guide's files, and for a folder
    what its recipe says. `scale_factor`, the norm of the network's input, is 5 if left out; a folder knows its own.
    `verbose` prints what was loaded.

    Its weights are fixed and are no part of the module around it: they follow it to another device, and leave its
    state_dict, its parameters and their precision alone. No code from a file is run. Raises LegacyFileError,
    UnsafeFileError, ImportFilesError and BridgeError, which say what is wrong with which file.
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
        if path.is_dir():
            bridge, notes = _from_folder(path, inference_steps, scale_factor), []
        else:
            files: list[LegacyFile] = [read_legacy(path)]
            if text_mean_path is not None:
                files.append(read_legacy(Path(text_mean_path)))
            bundle = Bundle.of(files)
            bridge, notes = make_bridge(bundle, scale=scale_factor, num_steps=inference_steps), bundle.notes
        self._unregistered = (bridge,)
        if verbose:
            print("\n".join((f"DiffusionBridgeHOI: {path}", *_story(bridge), *notes)), flush=True)

    @property
    def bridge(self) -> DiffusionBridge:
        """What does the work."""
        return self._unregistered[0]

    def forward(self, adapter_feat: Tensor) -> Tensor:
        """Bridged rows [N, D] of adapter_feat [N, D], in its dtype and on its device."""
        bridged: Tensor = self.bridge(adapter_feat)
        return bridged

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DiffusionBridgeHOI:
        """Follow to a device, and to nothing else: the bridge computes in float32 whatever the host does."""
        self.bridge.to(fn(torch.empty(0)).device)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


def _from_folder(folder: Path, num_steps: int | None, scale: float | None) -> DiffusionBridge:
    bridge = DiffusionBridge.from_pretrained(folder)
    recipe = bridge.config.recipe
    if scale is not None and not math.isclose(scale, recipe.scale_factor, rel_tol=1e-3):
        raise ImportFilesError(
            f"scale_factor is {scale:g}, and the network in {folder} was trained with {recipe.scale_factor:g}: leave scale_factor out"
        )
    if num_steps is None:
        return bridge
    return bridge.override(start_timestep=num_steps, num_steps=num_steps)


def _story(bridge: DiffusionBridge) -> list[str]:
    config, recipe = bridge.config, bridge.config.recipe
    facts: dict[str, Any] = config.provenance
    weights = facts.get("imported", {}).get("weights", "ema")
    made = f"{weights} weights of step {facts.get('training', {}).get('step', 'unknown')}"
    if config.student_of is not None:
        made = f"a student of {config.student_of.get('denoiser')} with {config.student_of.get('steps')} evaluations"
    elif config.denoiser in CLOSED_FORMS:
        made = "a closed form"
    return [
        f"  D = {config.dim}, {config.denoiser} {config.denoiser_options or ''}",
        f"  {config.objective}, T = {config.timesteps}, {made}",
        f"  recipe {recipe.name}: enters at level {recipe.start_timestep}, {recipe.num_steps} evaluations, input norm {recipe.scale_factor:g}, "
        f"output {recipe.output}",
    ]
