"""What files may hold: the entries of a JSON object as a type, the tensors of a safetensors file as a table.

Each type and each table stands next to the code that writes the file. A checksum says that nothing changed since a file was
written, not that what wrote it was right: every number is checked before it sizes, indexes or loops.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import chain
from typing import Annotated, Any, NamedTuple

import msgspec
import torch
from torch import Tensor
from typing_extensions import TypedDict

LARGEST = 1e12  # of a float: products of three still have a float32
NUM_NAMED = 5  # tensors in a message
Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
Finite = Annotated[float, msgspec.Meta(ge=-LARGEST, le=LARGEST)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Sha256 = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]


class FileFacts(TypedDict):
    """A file as `files.write_atomic` wrote it."""

    file: str
    bytes: Count
    sha256: Sha256


class TensorSpec(NamedTuple):
    """What one tensor of a file is.

    Attributes:
        dtype: Exactly that.
        shape: Its sizes by name or number, e.g. "N 2"; empty for a scalar. A name has one value in all tensors of a file.
        low: The least value.
        high: The greatest value. The name of a size is for indices, which are below it.
        optional: The file may lack it.
    """

    dtype: torch.dtype
    shape: str
    low: float = -LARGEST
    high: float | str = LARGEST
    optional: bool = False


Table = Mapping[str, TensorSpec]


def json_problem(value: object, schema: Any) -> str | None:
    """Where a JSON value differs from a type, or None. Entries that a TypedDict does not name may be anything."""
    try:
        msgspec.convert(value, schema)
    except msgspec.ValidationError as error:
        return str(error)
    return None


def table_of(state: Mapping[str, Tensor]) -> dict[str, TensorSpec]:
    """The table of files that hold the same tensors as `state`, e.g. those of a network."""
    return {name: TensorSpec(x.dtype, " ".join(map(str, x.shape))) for name, x in state.items()}


def tensors_problem(tensors: Mapping[str, Tensor], table: Table, sizes: dict[str, int] | None = None) -> str | None:
    """Where tensors differ from a table, or None.

    Args:
        tensors: What a file holds, by name.
        table: What it should hold, and nothing else.
        sizes: Sizes that are known, by name. Those that the tensors tell are added.
    """
    sizes = {} if sizes is None else sizes
    missing = {name for name, spec in table.items() if not spec.optional} - tensors.keys()
    unknown = tensors.keys() - table.keys()
    for what, names in (("lacks", missing), ("should not hold", unknown)):
        if names:
            more = f" and {len(names) - NUM_NAMED} more" if len(names) > NUM_NAMED else ""
            return f"it {what} {', '.join(sorted(names)[:NUM_NAMED])}{more}"
    present = {name: spec for name, spec in table.items() if name in tensors}
    of_shape = (_shape_problem(name, tensors[name], spec, sizes) for name, spec in present.items())
    # after all shapes, because a range may be a size
    of_values = (range_problem(name, tensors[name], spec, sizes) for name, spec in present.items())
    return next(filter(None, chain(of_shape, of_values)), None)


def _shape_problem(name: str, x: Tensor, spec: TensorSpec, sizes: dict[str, int]) -> str | None:
    wanted = spec.shape.split()
    fits = x.dtype == spec.dtype and x.ndim == len(wanted)
    if not fits or any(n != (int(key) if key.isdigit() else sizes.setdefault(key, n)) for key, n in zip(wanted, x.shape, strict=True)):  # fmt: skip
        shape = ", ".join(f"{key} = {sizes[key]}" if key in sizes else key for key in wanted)
        return f"{name} is {x.dtype} {list(x.shape)} instead of {spec.dtype} [{shape}]"
    return None


def range_problem(name: str, x: Tensor, spec: TensorSpec, sizes: Mapping[str, int]) -> str | None:
    """The problem with the values of a tensor, or None. `sizes` has the size that the range names, if it names one."""
    if x.numel() == 0 or x.dtype == torch.bool:
        return None
    low, high = (bound.item() for bound in x.aminmax())
    if not math.isfinite(low) or not math.isfinite(high):
        return f"{name} has values that are not finite"
    limit = sizes[spec.high] - 1 if isinstance(spec.high, str) else spec.high
    if spec.low <= low and high <= limit:
        return None
    return f"{name} has values from {low:.6g} to {high:.6g} instead of {spec.low:.6g} to {limit:.6g}"


def all_finite(x: Tensor) -> bool:
    """Whether no value of a floating-point tensor is NaN or infinite. Its extremes tell: NaN is one too."""
    return x.numel() == 0 or bool(torch.stack(x.detach().aminmax()).isfinite().all())


def box_problem(name: str, boxes: Tensor) -> str | None:
    """The problem with boxes [..., 4], xyxy, of which one ends before it begins, or None."""
    if (boxes[..., :2] <= boxes[..., 2:]).all():
        return None
    return f"{name} has boxes that end before they begin (x2 < x1 or y2 < y1)"
