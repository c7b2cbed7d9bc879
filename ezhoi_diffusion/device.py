"""Which device the work runs on."""

from __future__ import annotations

import torch

from ezhoi_diffusion.errors import EzhoiDiffusionError


def pick_device(name: str | None = None) -> torch.device:
    """The device called `name`; by default the first GPU, or the CPU where there is none.

    Raises:
        EzhoiDiffusionError: PyTorch does not know the name, or this machine lacks the device.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()  # `meta` has shapes and no values
    except (RuntimeError, AssertionError, ImportError) as error:  # PyTorch without CUDA raises AssertionError
        raise EzhoiDiffusionError(
            f"--device {name} cannot be used here ({str(error).splitlines()[0]}): give cpu, cuda or cuda:N, or leave it out"
        ) from error
    return device
