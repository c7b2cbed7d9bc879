"""Tensors that code of third parties may read, and must not write into."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING

from ezhoi_diffusion.errors import EzhoiDiffusionError

if TYPE_CHECKING:
    from torch import Tensor


class InputWrittenError(EzhoiDiffusionError):
    """A bridge or plugin wrote into a tensor that others read too. It has its old values again."""


@contextmanager
def read_only(who: str, **values: object) -> Iterator[None]:
    """Put back what the code inside writes into tensors, and raise.

    On the CPU values are compared, so a write through numpy is noticed too. On another device, which a comparison would wait
    for, the version counters of the tensors are.

    Args:
        who: Whose code it is, for the message.
        values: Tensors, or dataclasses of tensors.

    Raises:
        InputWrittenError: The code inside wrote into one of them, and raised nothing itself.
    """
    if "torch" not in sys.modules:  # then there is no tensor, and nobody waits for its import
        yield
        return
    import torch

    before = [(name, x, None if x.is_inference() else x._version, x.detach().clone()) for name, x in _tensors(values)]
    written = []
    try:
        yield
    finally:
        for name, x, version, copy in before:
            if _is_changed(x, version, copy):
                written.append(name)
                with torch.inference_mode(x.is_inference()), torch.no_grad():
                    if x.shape != copy.shape:
                        x.resize_(copy.shape)
                    x.copy_(copy)
    if written:
        raise InputWrittenError(
            f"{who} writes into {', '.join(written)}, which others read too: it has to leave what it gets, and return a new tensor"
        )


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors on the CPU have the same shape and the same bits, NaN included."""
    import torch

    if one.shape != other.shape:
        return False
    a, b = (x.detach().contiguous().view(-1).view(torch.uint8) for x in (one, other))
    return torch.equal(a, b)


def _is_changed(x: Tensor, version: int | None, copy: Tensor) -> bool:
    if x.device.type == "cpu" or version is None:
        return not _same_bits(x.cpu(), copy.cpu())
    return x._version != version


def _tensors(values: Mapping[str, object]) -> Iterator[tuple[str, Tensor]]:
    from torch import Tensor

    for name, value in values.items():
        if isinstance(value, Tensor):
            yield name, value
        elif is_dataclass(value) and not isinstance(value, type):
            inner = {f"{name}.{one.name}": getattr(value, one.name) for one in fields(value)}
            yield from _tensors(inner)
