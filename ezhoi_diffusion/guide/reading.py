"""Reads pickles and torch files from elsewhere without running anything that is in them.

A pickle is a program. The one that runs here knows tensors, numpy arrays and plain containers, and nothing else; what a
file claims to hold is held against the file's own size before memory is taken for it.
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
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar, TypeGuard

import numpy as np
import psutil
import torch
from torch import Tensor, nn

from ezhoi_diffusion.errors import EzhoiDiffusionError

TORCH_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle in a file of torch.save before 1.6, and in pickled tensors
COPIES, SMALL = 4, 1 << 24  # a file may make four times its size, as bytes on the way to arrays do, and 16 MiB
ENTRY_BYTES, CONTAINER_BYTES, CALL_BYTES = 100, 200, 400  # what these are taken to cost: a set has 216 bytes
MAX_DIMS, MAX_SIZE = 16, 1 << 62
MAX_LIST = 1 << 20
READ_FACTOR = 5  # memory at the peak of reading visual rows [N, 512] and their metadata, in sizes of the file; measured
STORAGE_BYTES = {
    **dict.fromkeys(("Bool", "Byte", "Char", "Untyped"), 1),
    **dict.fromkeys(("Half", "BFloat16", "Short"), 2),
    **dict.fromkeys(("Float", "Int"), 4),
    **dict.fromkeys(("Double", "Long", "ComplexFloat"), 8),
    "ComplexDouble": 16,
}
NUMPY_MODULES = ("numpy.core", "numpy._core")  # before version 2, and since
INSTRUCTIONS: dict[int, Callable[[Any], None]] = pickle._Unpickler.dispatch


class LegacyFileError(EzhoiDiffusionError):
    """A file of the guide cannot be read, or is not what is needed."""


class UnsafeFileError(LegacyFileError):
    """A file would run code when it is unpickled. It was not run."""


def read_untrusted(path: Path) -> Any:
    """What a pickle or a torch file holds: tensors on the CPU, numpy arrays and plain containers.

    Raises UnsafeFileError, which names the file and what it asks for, where it holds anything else; LegacyFileError where
    it is empty, cut short, damaged, claims more than it holds, or is no such file.
    """
    data = _content(path)
    try:
        if data.startswith(b"PK\x03\x04"):
            return _load_torch_archive(data, path)
        if not data.startswith((b"\x80", b"(", b"}", b"]", b"c")):
            raise LegacyFileError(f"{path} is neither a pickle nor a torch file (it starts with {data[:16]!r})")
        if _is_old_torch(data):
            return _load_old_torch(data, path)
        file = io.BytesIO(data)
        value = _Unpickler(file, path, size=len(data)).load()
    except LegacyFileError:
        raise
    except Exception as error:  # whatever a malformed program can bring about
        raise damaged(path, error) from error
    if left := len(data) - file.tell():
        raise LegacyFileError(f"{path} goes on for {left} bytes after its end: it is damaged; copy or make it again")
    return value


def _content(path: Path) -> bytes:
    try:
        if path.is_dir():
            raise LegacyFileError(f"{path} is a folder: give files of the guide, .pkl or .pt")
        size = path.stat().st_size
        if size == 0:
            raise LegacyFileError(
                f"{path} is empty (0 bytes): the program that wrote it crashed; run that program again"
            )
        if READ_FACTOR * size > (available := psutil.virtual_memory().available):
            raise LegacyFileError(
                f"{path} has {size / 1e9:.1f} GB and takes {READ_FACTOR} times that to read, where {available / 1e9:.1f} GB are "
                f"free: use a machine with more memory"
            )
        return path.read_bytes()
    except OSError as error:
        raise LegacyFileError(f"{path} cannot be read ({error})") from error


def damaged(path: Path, error: Exception) -> LegacyFileError:
    """The error for a file whose content brought about `error`."""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return LegacyFileError(f"{path} is damaged or cut short ({printable(reason)}): copy or make it again")


def printable(text: str, limit: int = 200) -> str:
    """The beginning of a string from elsewhere, with escapes for what would steer a terminal or is no character."""
    return repr(text[:limit])[1:-1]


# Plain pickles


class _Dtype:
    """Stands for numpy.dtype: only plain numbers, truth values and strings."""

    def __init__(self, name: str, align: bool = False, copy: bool = False) -> None:
        if not isinstance(name, str):
            raise TypeError(f"numpy data of a type that is a {type(name).__name__}")
        if not re.fullmatch(r"[|<>=]?[biufSU][1-9]\d{0,8}", name):
            raise TypeError(f"numpy data of the type {printable(name, 50)}, which is not numeric")
        self.value = np.dtype(name)

    def set_state(self, state: Any) -> None:
        order = state[1]
        if order not in ("<", ">", "|", "=") or any(part is not None for part in state[2:5]):
            raise TypeError("structured numpy data")
        self.value = self.value.newbyteorder(order)


class _Array(np.ndarray[Any, Any]):
    """An array that is still to be filled."""


class _Claim:
    """A tensor storage that a torch file announces; its data are not read yet."""

    def __init__(self, numel: int) -> None:
        self.numel = numel


def _are_sizes(numbers: Any) -> TypeGuard[tuple[int, ...]]:
    """Few and not large: multiplying numbers of any length can take for ever."""
    return (
        isinstance(numbers, tuple)
        and len(numbers) <= MAX_DIMS
        and all(type(number) is int and 0 <= number < MAX_SIZE for number in numbers)
    )


def _shown(shape: Any) -> str:
    return str(list(shape)) if _are_sizes(shape) else "that no array has"


def _priced(code: int, cost: int) -> Callable[[Any], None]:
    """An instruction that takes memory: it is paid first."""

    def load(machine: _Unpickler) -> None:
        machine.spend(cost)
        INSTRUCTIONS[code](machine)

    return load


def _keyed(code: bytes, step: int) -> Callable[[Any], None]:
    """An instruction whose keys lie on the stack down to the last mark: every one of it, or every other."""

    def load(machine: _Unpickler) -> None:
        keys = machine.stack[::step]
        machine.spend(ENTRY_BYTES * len(keys))
        for key in keys:
            machine._key(key)
        INSTRUCTIONS[code[0]](machine)

    return load


PRICES = {
    pickle.PUT + pickle.BINPUT + pickle.LONG_BINPUT + pickle.MEMOIZE: ENTRY_BYTES,
    pickle.MARK + pickle.EMPTY_LIST + pickle.EMPTY_DICT + pickle.EMPTY_SET: CONTAINER_BYTES,
    pickle.TUPLE1 + pickle.TUPLE2 + pickle.TUPLE3: ENTRY_BYTES,
    pickle.REDUCE: CALL_BYTES,
}
REFUSED = (
    pickle.EXT1
    + pickle.EXT2
    + pickle.EXT4
    + pickle.FROZENSET
    + pickle.NEWOBJ
    + pickle.NEWOBJ_EX
    + pickle.OBJ
    + pickle.INST
)


class _Unpickler(pickle._Unpickler):
    """The pickle machine with a closed list of what it may call, and a budget of bytes that it may make.

    Python's own implementation in Python: that in C takes memory for lengths and positions that it has only read.
    `storage` makes something of a torch file's references to its data.
    """

    stack: list[Any]
    append: Callable[[Any], None]
    read: Callable[[int], bytes]

    def __init__(self, file: io.BytesIO, path: Path, *, size: int, storage: Callable[[Any], Any] | None = None) -> None:
        super().__init__(file)
        self.path, self.size, self.storage = path, size, storage
        self.budget = COPIES * size + SMALL
        self.arrays = False
        self.known: dict[str, Any] = {
            "collections.OrderedDict": self._ordered_dict,
            "collections.Counter": self._counter,
            "torch.Size": self._tuple,
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch._utils._rebuild_parameter": self._parameter,
            "_codecs.encode": self._encode,
            "numpy.ndarray": "ndarray",
            "numpy.dtype": _Dtype,
        }
        for builtins in ("builtins", "__builtin__"):
            self.known |= {
                f"{builtins}.set": self._set,
                f"{builtins}.bytes": self._bytes,
                f"{builtins}.bytearray": self._bytes,
            }
        for module in NUMPY_MODULES:
            self.known |= {
                f"{module}.multiarray._reconstruct": self._array,
                f"{module}.multiarray.scalar": self._scalar,
                f"{module}.numeric._frombuffer": self._from_buffer,
            }
        if storage is None:
            self.known["torch.storage._load_from_bytes"] = self._storage_from_bytes

    def find_class(self, module: str, name: str) -> Any:
        """What a file's program may name."""
        wanted = f"{module}.{name}"
        if wanted in self.known:
            return self.known[wanted]
        if module in ("torch", "torch.cuda", "torch.storage") and name.removesuffix("Storage") in STORAGE_BYTES:
            return _StorageType(STORAGE_BYTES[name.removesuffix("Storage")])
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise UnsafeFileError(
            f"{self.path} asks for {printable(wanted)}, which is no tensor, array or plain container: opening it could run code. It was "
            f"refused and nothing of it was run. Do not open it with pickle.load"
        )

    def persistent_load(self, pid: Any) -> Any:
        """A reference to data outside of the pickle."""
        if self.storage is None:
            raise LegacyFileError(f"{self.path} refers to data that are not in it: it is a part of a torch file")
        return self.storage(pid)

    def spend(self, count: int) -> None:
        """Take `count` bytes of the budget, before they are taken of memory."""
        self.budget -= count
        if count < 0 or self.budget < 0:
            raise LegacyFileError(
                f"{self.path} has {self.size} bytes and claims to hold more than that: it is damaged or made to fill memory"
            )

    # what is known

    def _ordered_dict(self, items: Any = ()) -> OrderedDict[Any, Any]:
        self.spend(CONTAINER_BYTES * len(items))
        return OrderedDict((self._key(key), value) for key, value in items)

    def _counter(self, counts: dict[Any, int]) -> Counter[Any]:
        if type(counts) is not dict:  # its keys are checked
            raise TypeError(f"a Counter of a {type(counts).__name__}")
        self.spend(CONTAINER_BYTES * len(counts))
        return Counter(counts)

    def _tuple(self, items: Any = ()) -> tuple[Any, ...]:
        self.spend(CONTAINER_BYTES * len(items))
        return tuple(items)

    def _set(self, items: Any = ()) -> set[Any]:
        self.spend(CONTAINER_BYTES * len(items))
        return {self._key(item) for item in items}

    def _encode(self, text: str, encoding: str) -> bytes:
        self.spend(len(text) if encoding == "latin1" else -1)
        return text.encode("latin1")

    def _bytes(self, data: bytes | bytearray = b"") -> bytes:
        self.spend(len(data))  # bytearray(n) would be n zeros: len refuses a number
        return bytes(data)

    def _array(self, _kind: Any, shape: Any, _code: Any) -> Any:
        if shape != (0,):
            self.spend(-1)
        return np.ndarray.__new__(_Array, (0,), np.uint8)

    def _require_fit(self, data: Any, dtype: _Dtype, shape: tuple[int, ...]) -> None:
        self.arrays = True
        if not _are_sizes(shape) or math.prod(shape) * dtype.value.itemsize != len(data):
            raise LegacyFileError(
                f"{self.path} is damaged: an array of shape {_shown(shape)} does not fit its {len(data)} bytes"
            )
        self.spend(len(data))

    def _from_buffer(self, data: Any, dtype: _Dtype, shape: Any, order: str) -> Any:
        self._require_fit(data, dtype, shape)
        return np.frombuffer(bytearray(data), dtype.value).reshape(shape, order="F" if order == "F" else "C")

    def _scalar(self, dtype: _Dtype, data: bytes) -> Any:
        self._require_fit(data, dtype, ())
        return np.frombuffer(data, dtype.value).item()

    def _storage_from_bytes(self, data: bytes) -> Tensor:
        """A tensor pickled without torch.save: its storage is a torch file of its own, in the format before 1.6."""
        self.spend(len(data))
        stored = _load_old_torch(data, self.path)
        if isinstance(stored, torch.UntypedStorage):
            return torch.empty(0, dtype=torch.uint8).set_(stored)
        if not isinstance(stored, torch.TypedStorage):
            raise LegacyFileError(f"{self.path} is damaged: {type(stored).__name__} in the place of a tensor's data")
        untyped = stored._untyped_storage  # the public way to it warns that typed storages are deprecated
        return torch.empty(0, dtype=stored.dtype).set_(untyped, 0, (untyped.nbytes() // stored.dtype.itemsize,), (1,))

    def _tensor(self, storage: Any, offset: int, shape: Any, stride: Any, _grad: bool = False, *_: Any) -> Any:
        if not (_are_sizes(shape) and _are_sizes(stride) and _are_sizes((offset,))):
            raise LegacyFileError(f"{self.path} is damaged: a tensor of shape {_shown(shape)}")
        count = math.prod(shape)
        last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) if count else -1
        held = storage.numel if isinstance(storage, _Claim) else len(storage)
        if last >= held or count > held:
            raise LegacyFileError(
                f"{self.path} is damaged: a tensor of shape {list(shape)} claims more than the {held} numbers stored for it"
            )
        return storage if isinstance(storage, _Claim) else storage.as_strided(shape, stride, offset)

    def _parameter(self, data: Any, *_: Any) -> Any:
        return data

    def _key(self, key: Any) -> Any:
        """A key that costs nothing to hash: nested tuples can take for ever, and large numbers share their hashes."""
        if not isinstance(key, str) and not (isinstance(key, int) and abs(key) < 1 << 31):
            raise LegacyFileError(
                f"{self.path} has a {type(key).__name__} as a key, of a kind or size which files of the guide do not have"
            )
        return key

    # opcodes that call, fill or copy

    def _load_build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is _Dtype:
            target.set_state(state)
        elif type(target) is _Array:
            *_, shape, dtype, fortran, data = state
            self._require_fit(data, dtype, shape)
            target.__setstate__((1, shape, dtype.value, bool(fortran), bytes(data)))  # type: ignore[arg-type]
        elif type(target) is not OrderedDict:  # that of a state dict has the versions of modules as an attribute
            raise LegacyFileError(f"{self.path} is damaged: it sets the attributes of {type(target).__name__}")

    def _load_setitem(self) -> None:
        self.spend(ENTRY_BYTES)
        self._key(self.stack[-2])
        INSTRUCTIONS[pickle.SETITEM[0]](self)

    def _load_bytearray8(self) -> None:
        (size,) = struct.unpack("<Q", self.read(8))
        self.append(self._bytes(self.read(min(size, self.size))))

    def _refuse(self) -> None:
        raise LegacyFileError(f"{self.path} is damaged: it holds an instruction that files of the guide do not have")

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        **INSTRUCTIONS,
        pickle.BUILD[0]: _load_build,
        pickle.SETITEM[0]: _load_setitem,
        pickle.BYTEARRAY8[0]: _load_bytearray8,
        **{code: _priced(code, cost) for codes, cost in PRICES.items() for code in codes},
        **{
            code[0]: _keyed(code, step) for code, step in ((pickle.DICT, 2), (pickle.SETITEMS, 2), (pickle.ADDITEMS, 1))
        },
        **dict.fromkeys(REFUSED, _refuse),
    }


# Files of torch.save: what they claim is checked first, then torch reads them with weights_only


class _StorageType:
    def __init__(self, itemsize: int) -> None:
        self.itemsize = itemsize


def _claimed(pid: Any) -> tuple[str, int, int]:
    """Key, number of elements and bytes of ("storage", type, key, location, numel, …)."""
    kind, storage, key, _, numel, *_ = pid
    if kind != "storage" or not isinstance(storage, _StorageType) or not _are_sizes((numel,)) or type(key) is not str:
        raise ValueError("a reference to something else where one to a tensor's data should be")
    return key, numel, numel * storage.itemsize


def _load_torch_archive(data: bytes, path: Path) -> Any:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = archive.infolist()
        members = {entry.filename: entry for entry in entries}
        # torch finds names in either case, and takes another of two alike than Python does
        if len({name.lower() for name in members}) < len(entries):
            raise LegacyFileError(f"{path} has two members of one name, which torch.save does not write")
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries) or (
            sum(entry.file_size for entry in entries) > len(data)
        ):
            raise LegacyFileError(
                f"{path} is compressed, which torch.save does not do: it could be made to fill memory"
            )
        if broken := archive.testzip():
            raise LegacyFileError(
                f"{path} is damaged: {printable(broken)} is not what was written; copy or make it again"
            )
        programs = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
        folder = programs[0].removesuffix("data.pkl") if len(programs) == 1 else ""
        if not folder or not all(name.startswith(folder) and not name.endswith("/constants.pkl") for name in members):
            raise LegacyFileError(f"{path} is a zip file, but none that torch.save wrote")

        def storage(pid: Any) -> _Claim:
            key, numel, size = _claimed(pid)
            entry = members.get(f"{folder}data/{key}")
            if entry is None or size > entry.file_size:
                raise LegacyFileError(
                    f"{path} is damaged: its data {printable(key, 50)} claim {size} bytes and have {entry.file_size if entry else 0}"
                )
            return _Claim(numel)

        scan = _Unpickler(io.BytesIO(archive.read(programs[0])), path, size=len(data), storage=storage)
        scan.load()
    return _torch_load(data, arrays=scan.arrays)


def _is_old_torch(data: bytes) -> bool:
    """Whether the first pickle is torch's magic number, written by protocol 2."""
    return data[:14] == pickle.dumps(TORCH_MAGIC, protocol=2)[:14]


def _load_old_torch(data: bytes, path: Path) -> Any:
    if not _is_old_torch(data):
        raise LegacyFileError(f"{path} is damaged: bytes in the place of a tensor's data are no torch file")
    claims: Counter[str] = Counter()
    total = 0

    def storage(pid: Any) -> _Claim:
        nonlocal total
        key, numel, size = _claimed(pid)
        total += max(0, size - claims[key])
        claims[key] = max(size, claims[key])
        if total > len(data):
            raise LegacyFileError(f"{path} is damaged: its tensors claim more than its {len(data)} bytes")
        return _Claim(numel)

    file = io.BytesIO(data)
    arrays = False
    for _ in range(5):  # magic number, protocol, system, the object, the keys of its data
        scan = _Unpickler(file, path, size=len(data), storage=storage)
        scan.load()
        arrays |= scan.arrays
    return _torch_load(data, arrays=arrays)


def _torch_load(data: bytes, *, arrays: bool) -> Any:
    with torch.serialization.safe_globals(_numpy_globals()) if arrays else nullcontext():
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _numpy_globals() -> list[Any]:
    """What torch has to admit for arrays, which it does not know by itself; the scan has checked what they are called with."""
    builders = [np.zeros(1).__reduce__()[0], np.float64(1).__reduce__()[0]]
    named = [(build, f"{module}.multiarray.{build.__name__}") for module in NUMPY_MODULES for build in builders]
    kinds = {type(np.dtype(code)) for code in "?bhilqBHILQefdSU"}
    return [*named, np.ndarray, np.dtype, *kinds]


def to_tensor(value: Any) -> Tensor | None:
    """A tensor, array, parameter or flat list of numbers as a detached CPU tensor of its own dtype; None for anything else."""
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
