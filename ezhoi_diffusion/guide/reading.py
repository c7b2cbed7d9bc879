"""Read pickles and torch files from elsewhere without running anything that is in them.

A pickle is a program. The interpreter here knows the instructions and the few calls that make tensors, numpy arrays and
plain containers; it refuses all others. It checks each size that a file claims against the file before it takes memory.

Torch files take the same road, not `torch.load(weights_only=True)`. torch believes the claimed sizes, and torch 2.5 runs
TorchScript in that mode (CVE-2025-32434). One reader also leaves no room for two that read a file differently.
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor, nn

from ezhoi_diffusion.guide.unpickler import (
    OLD_TORCH_START,
    GuideFileError,
    Unpickler,
    UnsafeFileError,
    damaged,
    printable,
    read_old_torch,
)

__all__ = ["GuideFileError", "UnsafeFileError", "damaged", "printable", "read_untrusted", "to_tensor"]
MAX_LIST = 1 << 20
READ_FACTOR = 5  # peak memory to read visual features [N, 512] and their metadata, in sizes of the file; measured


def read_untrusted(path: Path) -> Any:
    """Read a pickle (protocol 2 to 5) or a torch file.

    Returns:
        Tensors on the CPU, numpy arrays and plain containers.

    Raises:
        UnsafeFileError: The file asks for anything else. The message names the file and what it asks for.
        GuideFileError: The file is empty, cut short, damaged, of another kind, or claims more than it holds.
    """
    data = _content(path)
    try:
        if data.startswith(b"PK\x03\x04"):
            return _read_torch_archive(data, path)
        if data.startswith(OLD_TORCH_START):
            return read_old_torch(data, path)
        if not data.startswith(b"\x80"):
            raise GuideFileError(f"{path} is neither a pickle nor a torch file (it starts with {data[:16]!r})")
        file = io.BytesIO(data)
        value = Unpickler(file, path, size=len(data)).load()
    except GuideFileError:
        raise
    except Exception as error:  # a malformed program can raise anything
        raise damaged(path, error) from error
    if left := len(data) - file.tell():
        raise GuideFileError(f"{path} goes on for {left} bytes after its end: it is damaged; copy or make it again")
    return value


def _content(path: Path) -> bytes:
    try:
        if path.is_dir():
            raise GuideFileError(f"{path} is a folder: give files of the guide, .pkl or .pt")
        size = path.stat().st_size
        if size == 0:
            raise GuideFileError(
                f"{path} is empty (0 bytes): the program that wrote it crashed; run that program again"
            )
        if READ_FACTOR * size > (available := psutil.virtual_memory().available):
            raise GuideFileError(
                f"{path} has {size / 1e9:.1f} GB and takes {READ_FACTOR} times that to read, and {available / 1e9:.1f} GB "
                f"are free: use a machine with more memory"
            )
        return path.read_bytes()
    except OSError as error:
        raise GuideFileError(f"{path} cannot be read ({error})") from error


def to_tensor(value: Any) -> Tensor | None:
    """Convert a tensor, an array or a flat list of numbers to a detached CPU tensor of its own dtype.

    Returns:
        None for anything else.
    """
    if isinstance(value, (Tensor, nn.Parameter)):
        return value.detach().cpu()
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return torch.from_numpy(np.require(value, value.dtype.newbyteorder("="), ["C", "W", "E"]))
    if isinstance(value, list) and 0 < len(value) <= MAX_LIST and all(type(number) in (int, float) for number in value):
        try:
            return torch.tensor(value, dtype=torch.float32)
        except (RuntimeError, OverflowError):
            return None
    return None


def _read_torch_archive(data: bytes, path: Path) -> Any:
    """Read a file of torch.save since 1.6: a zip archive of a pickle and of one member for each tensor storage."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries) or (
            sum(entry.file_size for entry in entries) > len(data)
        ):
            raise GuideFileError(f"{path} is compressed, which torch.save does not do: it could be made to fill memory")
        programs = [entry.filename for entry in entries if entry.filename.endswith("/data.pkl")]
        if len(programs) != 1:
            raise GuideFileError(f"{path} is a zip file, but torch.save did not write it")
        folder = programs[0].removesuffix("data.pkl")
        if f"{folder}byteorder" in archive.namelist() and archive.read(f"{folder}byteorder") != b"little":
            raise GuideFileError(f"{path} comes from a big-endian machine: load and save it on another one")
        storages: dict[str, Tensor] = {}

        def read_storage(dtype: torch.dtype, key: str, numel: int) -> Tensor:
            if key not in storages:
                content = bytearray(archive.read(f"{folder}data/{key}"))  # zipfile compares the checksum
                if len(content) != numel * dtype.itemsize:
                    raise GuideFileError(
                        f"{path} is damaged: its data {printable(key, 50)} claim {numel * dtype.itemsize} bytes and have "
                        f"{len(content)}"
                    )
                storages[key] = torch.frombuffer(content, dtype=dtype) if numel else torch.empty(0, dtype=dtype)
            return storages[key]

        program = io.BytesIO(archive.read(programs[0]))
        return Unpickler(program, path, size=len(data), read_storage=read_storage).load()
