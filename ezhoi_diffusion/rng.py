"""Random generators of their own for every purpose: what is drawn depends on no state, and changes none."""

from __future__ import annotations

import hashlib

import torch


def generator(seed: int, purpose: str, number: int = 0) -> torch.Generator:
    """A CPU generator of its own for every (seed, purpose, number)."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{number}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
