"""One random generator for each purpose: independent of global state, which stays as it is."""

from __future__ import annotations

import hashlib

import torch


def generator(seed: int, purpose: str, number: int = 0) -> torch.Generator:
    """Return a CPU generator that depends on (seed, purpose, number) alone."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{number}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
