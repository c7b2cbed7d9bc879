"""Read pickles and torch files from elsewhere without running anything that is in them.

A pickle is a program. The interpreter here knows the instructions and the few calls that make tensors, numpy arrays and
plain containers; it refuses all others. It checks each size that a file claims against the file before it takes memory.

Torch files take the same road, not `torch.load(weights_only=True)`. torch believes the claimed sizes, and torch 2.5 runs
TorchScript in that mode (CVE-2025-32434). One reader also leaves no room for two that read a file differently.
"""

from __future__ import annotations

import io
import math
import pickle
import re
import struct
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, TypeGuard

import numpy as np
import psutil
import torch
from torch import Tensor, nn

from ezhoi_diffusion.errors import EzhoiDiffusionError

OLD_TORCH_START = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)[
    :14
]  # of torch.save before 1.6, and in pickled tensors
COPIES, SMALL = 4, 1 << 24  # a file may make four times its size, and 16 MiB
ITEM_BYTES = 100  # counted for each instruction, and for each item that a call copies
COSTS = {"EMPTY_SET": 220, "REDUCE": 400}  # bytes counted for instructions that take more
MAX_DIMS, MAX_SIZE = 16, 1 << 62
MAX_LIST = 1 << 20
READ_FACTOR = 5  # peak memory to read visual features [N, 512] and their metadata, in sizes of the file; measured
STORAGES = {
    "BoolStorage": torch.bool, "ByteStorage": torch.uint8, "CharStorage": torch.int8, "ShortStorage": torch.int16,
    "IntStorage": torch.int32, "LongStorage": torch.int64, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16,
    "FloatStorage": torch.float32, "DoubleStorage": torch.float64, "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128, "UntypedStorage": torch.uint8,
}  # fmt: skip
SAME_MODULE = {"numpy._core": "numpy.core", "__builtin__": "builtins"}  # names by numpy >= 2, and by protocol 2

StorageReader = Callable[[torch.dtype, str, int], Tensor]


class GuideFileError(EzhoiDiffusionError):
    """A file of the guide cannot be read, or is not what is needed."""


class UnsafeFileError(GuideFileError):
    """A file would run code when it is unpickled. Nothing of it was run."""


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
            return _read_old_torch(data, path)
        if not data.startswith(b"\x80"):
            raise GuideFileError(f"{path} is neither a pickle nor a torch file (it starts with {data[:16]!r})")
        file = io.BytesIO(data)
        value = _Unpickler(file, path, size=len(data)).load()
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


def damaged(path: Path, error: Exception) -> GuideFileError:
    """Make the error for a file whose content caused `error`."""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return GuideFileError(f"{path} is damaged or cut short ({printable(reason)}): copy or make it again")


def printable(text: str, limit: int = 200) -> str:
    """Escape the beginning of a string from elsewhere, so that it cannot steer a terminal."""
    return repr(text[:limit])[1:-1]


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


# -- torch files -------------------------------------------------------------------------------------------------


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
        return _Unpickler(program, path, size=len(data), read_storage=read_storage).load()


def _read_old_torch(data: bytes, path: Path) -> Any:
    """Read a file of torch.save before 1.6: five pickles, then for each storage its length and its bytes."""
    if not data.startswith(OLD_TORCH_START):
        raise GuideFileError(f"{path} is damaged: bytes in the place of a tensor's data are no torch file")
    storages: dict[str, Tensor] = {}
    claimed = 0

    def make_storage(dtype: torch.dtype, key: str, numel: int) -> Tensor:
        nonlocal claimed
        if key not in storages:
            claimed += numel * dtype.itemsize
            if claimed > len(data):
                raise GuideFileError(f"{path} is damaged: its tensors claim more than its {len(data)} bytes")
            storages[key] = torch.empty(numel, dtype=dtype)
        return storages[key]

    file = io.BytesIO(data)
    _magic, _protocol, _system, value, keys = (
        _Unpickler(file, path, size=len(data), read_storage=make_storage).load() for _ in range(5)
    )
    if type(keys) is not list or not all(type(key) is str for key in keys) or sorted(keys) != sorted(storages):
        raise GuideFileError(f"{path} is damaged: it does not hold the data that it refers to")
    for key in keys:
        (numel,) = struct.unpack("<q", file.read(8))
        content = bytearray(file.read(storages[key].nbytes))
        if numel != len(storages[key]) or len(content) != storages[key].nbytes:
            raise GuideFileError(f"{path} is damaged: data {printable(key, 50)} are cut short")
        if numel:
            storages[key].copy_(torch.frombuffer(content, dtype=storages[key].dtype))
    return value


# -- pickles -----------------------------------------------------------------------------------------------------


class _Dtype:
    """Stands for numpy.dtype, which a pickle makes first and completes later: numbers, truth values and text only."""

    def __init__(self, name: str, _align: bool = False, _copy: bool = False) -> None:
        if type(name) is not str or not re.fullmatch(r"[|<>=]?[biufSU][1-9]\d{0,8}", name):
            raise TypeError("numpy data that are neither numbers nor text")
        self.value = np.dtype(name)

    def set_state(self, state: Any) -> None:
        if state[1] not in ("<", ">", "|", "=") or any(part is not None for part in state[2:5]):
            raise TypeError("structured numpy data")
        self.value = self.value.newbyteorder(state[1])


def _are_sizes(numbers: Any) -> TypeGuard[tuple[int, ...]]:
    """Whether these are a few numbers of bounded length, which can be multiplied quickly."""
    return (
        isinstance(numbers, tuple)
        and len(numbers) <= MAX_DIMS
        and all(type(number) is int and 0 <= number < MAX_SIZE for number in numbers)
    )


class _Storage:
    """The data of tensors, as a flat tensor. Only files make one, so a view cannot take its place."""

    def __init__(self, flat: Tensor) -> None:
        self.flat = flat


class _Unpickler(pickle._Unpickler):
    """Python's unpickler with a closed list of instructions and calls, and a budget of bytes.

    It is the one written in Python: the one in C takes memory for lengths and positions before it checks them.

    Args:
        file: Where the pickle starts.
        path: The file to name in errors.
        size: Size of that file in bytes. The budget follows from it.
        read_storage: Returns a storage of a torch file as a flat tensor, from its dtype, key and number of elements.
    """

    stack: list[Any]
    append: Callable[[Any], None]
    read: Callable[[int], bytes]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, file: io.BytesIO, path: Path, *, size: int, read_storage: StorageReader | None = None) -> None:
        super().__init__(file)
        self.path, self.size, self.read_storage = path, size, read_storage
        self.budget = COPIES * size + SMALL
        self.known: dict[str, Any] = {
            "collections.OrderedDict": self._ordered_dict,
            "collections.Counter": self._counter,
            "builtins.set": self._set,
            "builtins.bytes": self._bytes,
            "builtins.bytearray": self._bytes,
            "_codecs.encode": self._encode,
            "torch.Size": self._tuple,
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch._utils._rebuild_parameter": lambda data, *_: data,
            "numpy.ndarray": "ndarray",
            "numpy.dtype": _Dtype,
            "numpy.core.multiarray._reconstruct": self._empty_array,
            "numpy.core.multiarray.scalar": lambda dtype, data: self._array(data, dtype, ()).item(),
            "numpy.core.numeric._frombuffer": self._array,
        }
        if read_storage is None:
            self.known["torch.storage._load_from_bytes"] = self._storage_from_bytes

    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in of a name that the pickle may use."""
        if module in ("torch", "torch.cuda", "torch.storage") and name in STORAGES:
            return STORAGES[name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        for new, old in SAME_MODULE.items():
            module = module.replace(new, old)
        wanted = f"{module}.{name}"
        if wanted not in self.known:
            raise UnsafeFileError(
                f"{self.path} asks for {printable(wanted)}, which is no tensor, array or plain container: opening it could "
                f"run code. It was refused and nothing of it was run. Do not open it with pickle.load"
            )
        return self.known[wanted]

    def persistent_load(self, pid: Any) -> _Storage:
        """The data of a tensor, which a torch file keeps outside of the pickle."""
        kind, dtype, key, _device, numel, *view = pid
        if (
            self.read_storage is None
            or kind != "storage"
            or not isinstance(dtype, torch.dtype)
            or view not in ([], [None])
        ):
            raise GuideFileError(f"{self.path} is damaged: it refers to data that are not in it")
        if type(key) is not str or not _are_sizes((numel,)):
            raise GuideFileError(f"{self.path} is damaged: a reference to a tensor's data has no key or no size")
        storage = self.read_storage(dtype, key, numel)
        if storage.dtype != dtype or len(storage) != numel:
            raise GuideFileError(f"{self.path} is damaged: it claims two sizes of one tensor's data")
        return _Storage(storage)

    def spend(self, count: int) -> None:
        """Take `count` bytes from the budget, before memory is taken for them."""
        self.budget -= count
        if self.budget < 0:
            raise GuideFileError(
                f"{self.path} has {self.size} bytes and claims to hold more than that: it is damaged or made to fill memory"
            )

    # Calls

    def _tuple(self, items: Any = ()) -> tuple[Any, ...]:
        self.spend(ITEM_BYTES * len(items))
        return tuple(items)

    def _ordered_dict(self, items: Any = ()) -> OrderedDict[Any, Any]:
        self.spend(ITEM_BYTES * len(items))
        return OrderedDict((self._key(key), value) for key, value in items)

    def _counter(self, counts: dict[Any, int]) -> Counter[Any]:
        if type(counts) is not dict:  # the keys of a dict are checked
            raise TypeError(f"a Counter of a {type(counts).__name__}")
        self.spend(ITEM_BYTES * len(counts))
        return Counter(counts)

    def _set(self, items: Any = ()) -> set[Any]:
        self.spend(ITEM_BYTES * len(items))
        return {self._key(item) for item in items}

    def _encode(self, text: str, encoding: str) -> bytes:
        if encoding != "latin1":
            raise TypeError("text in the place of bytes")
        self.spend(len(text))
        return text.encode("latin1")

    def _require_bytes(self, data: Any) -> bytes | bytearray:
        """Refuse a number and a tensor of one number: of these, bytes(n) and bytearray(n) make n zeros."""
        if not isinstance(data, (bytes, bytearray)):
            raise GuideFileError(f"{self.path} is damaged: {type(data).__name__} in the place of bytes")
        return data

    def _bytes(self, data: Any = b"") -> bytes:
        self.spend(len(self._require_bytes(data)))
        return bytes(data)

    def _empty_array(self, _kind: Any, shape: Any, _code: Any) -> Any:
        if shape != (0,):
            raise TypeError("an array that is not empty before it is filled")
        return np.empty(0, np.uint8)

    def _array(self, data: Any, dtype: _Dtype, shape: Any, order: str = "C") -> Any:
        self._require_bytes(data)
        if not _are_sizes(shape) or math.prod(shape) * dtype.value.itemsize != len(data):
            shown = list(shape) if _are_sizes(shape) else "that no array has"
            raise GuideFileError(
                f"{self.path} is damaged: an array of shape {shown} does not fit its {len(data)} bytes"
            )
        self.spend(len(data))
        return np.frombuffer(bytearray(data), dtype.value).reshape(shape, order="F" if order == "F" else "C")

    def _storage_from_bytes(self, data: bytes) -> _Storage:
        """The data of a tensor that was pickled without torch.save: a torch file in the old format."""
        self.spend(len(self._require_bytes(data)))
        storage = _read_old_torch(data, self.path)
        return self._require_storage(storage)

    def _require_storage(self, value: Any) -> _Storage:
        """Refuse a view, which can claim more numbers than are stored, and anything else that is no storage."""
        if not isinstance(value, _Storage):
            raise GuideFileError(f"{self.path} is damaged: {type(value).__name__} in the place of a tensor's data")
        return value

    def _tensor(self, storage: Any, offset: int, shape: Any, stride: Any, *_: Any) -> Tensor:
        if not (_are_sizes(shape) and _are_sizes(stride) and _are_sizes((offset,))):
            raise GuideFileError(f"{self.path} is damaged: a tensor of a shape that no tensor has")
        flat = self._require_storage(storage).flat
        count = math.prod(shape)
        last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) if count else -1
        if max(last + 1, count) > len(flat):
            raise GuideFileError(
                f"{self.path} is damaged: a tensor of shape {list(shape)} claims more than the {len(flat)} numbers stored "
                f"for it"
            )
        return flat.as_strided(shape, stride, offset)

    def _key(self, key: Any) -> Any:
        """Check that a key hashes quickly: nested tuples can take for ever, and large numbers share their hashes."""
        if not isinstance(key, str) and not (isinstance(key, int) and abs(key) < 1 << 31):
            raise GuideFileError(f"{self.path} has a key that files of the guide do not have: a {type(key).__name__}")
        return key

    # Instructions that call, fill or copy

    def _load_build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is _Dtype:
            target.set_state(state)
        elif isinstance(target, np.ndarray):
            *_, shape, dtype, fortran, data = state
            filled = self._array(data, dtype, shape)
            target.__setstate__((1, filled.shape, filled.dtype, bool(fortran), filled.tobytes()))  # type: ignore[arg-type]
        elif type(target) is not OrderedDict:  # a state dict carries the versions of modules, which nobody needs
            raise GuideFileError(f"{self.path} is damaged: it sets the attributes of {type(target).__name__}")

    def _load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set_items([key, value])

    def _load_setitems(self) -> None:
        self._set_items(self.pop_mark())

    def _set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict):
            raise TypeError(f"items of a {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[self._key(key)] = value

    def _load_additems(self) -> None:
        items, target = self.pop_mark(), self.stack[-1]
        if not isinstance(target, set):
            raise TypeError(f"members of a {type(target).__name__}")
        target.update([self._key(item) for item in items])

    def _load_bytearray8(self) -> None:
        (size,) = struct.unpack("<Q", self.read(8))
        self.append(self._bytes(self.read(min(size, self.size))))

    def _refuse(self) -> None:
        raise GuideFileError(f"{self.path} is damaged: it holds an instruction that files of the guide do not have")

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict.fromkeys(range(256), _refuse)


PLAIN = (
    "PROTO FRAME STOP NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT BINUNICODE SHORT_BINUNICODE "
    "BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 MARK EMPTY_LIST APPEND APPENDS EMPTY_DICT EMPTY_SET EMPTY_TUPLE TUPLE "
    "TUPLE1 TUPLE2 TUPLE3 BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET GLOBAL STACK_GLOBAL BINPERSID REDUCE"
)
CHECKED: dict[str, Callable[[Any], None]] = {
    "BUILD": _Unpickler._load_build,
    "SETITEM": _Unpickler._load_setitem,
    "SETITEMS": _Unpickler._load_setitems,
    "ADDITEMS": _Unpickler._load_additems,
    "BYTEARRAY8": _Unpickler._load_bytearray8,
}


def _counted(load: Callable[[Any], None], cost: int) -> Callable[[Any], None]:
    def run(machine: _Unpickler) -> None:
        machine.spend(cost)
        load(machine)

    return run


for _name in (*PLAIN.split(), *CHECKED):
    _code = getattr(pickle, _name)[0]
    _Unpickler.dispatch[_code] = _counted(
        CHECKED.get(_name) or pickle._Unpickler.dispatch[_code], COSTS.get(_name, ITEM_BYTES)
    )
