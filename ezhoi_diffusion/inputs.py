"""Tensors that code of third parties may read, and must not write into."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

from ezhoi_diffusion.errors import EzhoiDiffusionError

if TYPE_CHECKING:
    from torch import Tensor, nn


class InputWrittenError(EzhoiDiffusionError):
    """A bridge or plugin wrote into something that others read too. Tensors have their old values again, models have not."""


@contextmanager
def read_only(who: str, **values: object) -> Iterator[None]:
    """Put back what the code inside writes into tensors, and raise.

    On the CPU values are compared, so a write through numpy is noticed too. On another device, which a comparison would wait
    for, the version counters of the tensors are.

    Args:
        who: Whose code it is, for the message.
        values: Tensors and models; dataclasses, mappings and lists of them.

    Raises:
        InputWrittenError: The code inside wrote into one of them, and raised nothing itself.
    """
    if "torch" not in sys.modules:  # then there is no tensor, and nobody waits for its import
        yield
        return
    import torch

    tensors = [(name, x) for name, x in _leaves(values) if isinstance(x, torch.Tensor)]
    before = [(name, x, _version(x), x.detach().clone()) for name, x in tensors]
    models = [(name, x, _state_of(x)) for name, x in _leaves(values) if isinstance(x, torch.nn.Module)]
    records = [(name, x, dict(vars(x))) for name, x in _leaves(values) if _is_frozen(x)]
    written = []
    try:
        yield
    finally:
        for name, record, entries in records:
            changed = [key for key, one in entries.items() if vars(record).get(key) is not one]
            written += [f"{name}.{key}" for key in changed]
            vars(record).update({key: entries[key] for key in changed})
        for name, x, version, copy in before:
            if _is_changed(x, version, copy):
                written.append(name)
                with torch.inference_mode(x.is_inference()), torch.no_grad():
                    if x.dtype != copy.dtype:
                        x.data = copy.clone()
                    if x.shape != copy.shape:
                        x.resize_(copy.shape)
                    x.copy_(copy)
    for name, model, state in models:
        now = _state_of(model)
        written += [f"{name}.{part}" for part in {**state, **now} if state.get(part) != now.get(part)][:1]
    if written:
        raise InputWrittenError(
            f"{who} writes into {', '.join(written)}, which others read too: it has to leave what it gets, and return a new tensor"
        )


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors on the CPU have the same shape and the same bits, NaN included."""
    import numpy as np

    # numpy compares bytes in an eighth of the time that torch.equal takes
    return one.shape == other.shape and np.array_equal(_bytes(one).numpy(), _bytes(other).numpy())


def _bytes(x: Tensor) -> Tensor:
    import torch

    return x.detach().contiguous().view(-1).view(torch.uint8)


def _version(x: Tensor) -> int | None:
    return None if x.is_inference() else x._version


def _is_changed(x: Tensor, version: int | None, copy: Tensor) -> bool:
    if x.device.type == "cpu" or version is None:
        return not _same_bits(x.cpu(), copy.cpu())
    return x._version != version


def _state_of(model: nn.Module) -> dict[str, Any]:
    """What tells whether somebody wrote into a model. Its tensors are too large to be copied."""
    import torch

    state: dict[str, Any] = {f"{name}.training".lstrip("."): part.training for name, part in model.named_modules()}
    for name, x in model.state_dict(keep_vars=True).items():
        if isinstance(x, torch.Tensor):
            content = zlib.crc32(_bytes(x).numpy().data) if x.device.type == "cpu" else 0
            state[name] = id(x), x.dtype, x.shape, _version(x), content
    return state


def _is_frozen(value: object) -> bool:
    return bool(getattr(getattr(type(value), "__dataclass_params__", None), "frozen", False))


def _leaves(values: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    for name, value in values.items():
        if is_dataclass(value) and not isinstance(value, type):
            yield name, value
            yield from _leaves({f"{name}.{one.name}": getattr(value, one.name) for one in fields(value)})
        elif isinstance(value, Mapping):
            yield from _leaves({f"{name}[{key!r}]": one for key, one in value.items()})
        elif isinstance(value, (list, tuple)):
            yield from _leaves({f"{name}[{position}]": one for position, one in enumerate(value)})
        else:
            yield name, value
