"""An unpickler for files from elsewhere: it knows the calls that make tensors, arrays and plain containers, and no others.

It counts the memory that a file asks for, and checks each size that the file claims before it takes memory.
"""

from __future__ import annotations

import io
import math
import pickle
import re
import struct
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, TypeGuard

import numpy as np
import torch
from torch import Tensor

from ezhoi_diffusion.errors import EzhoiDiffusionError

OLD_TORCH_START = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)[
    :14
]  # of torch.save before 1.6, and in pickled tensors
COPIES, SMALL = 4, 1 << 24  # a file may make four times its size, and 16 MiB
ITEM_BYTES = 100  # counted for each instruction, and for each item that a call copies
COSTS = {"EMPTY_SET": 220, "REDUCE": 400}  # bytes counted for instructions that take more
MAX_DIMS, MAX_SIZE = 16, 1 << 62
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


def damaged(path: Path, error: Exception) -> GuideFileError:
    """Make the error for a file whose content caused `error`."""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return GuideFileError(f"{path} is damaged or cut short ({printable(reason)}): copy or make it again")


def printable(text: str, limit: int = 200) -> str:
    """Escape the beginning of a string from elsewhere, so that it cannot steer a terminal."""
    return repr(text[:limit])[1:-1]


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


class Unpickler(pickle._Unpickler):
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
        storage = read_old_torch(data, self.path)
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
    "BUILD": Unpickler._load_build,
    "SETITEM": Unpickler._load_setitem,
    "SETITEMS": Unpickler._load_setitems,
    "ADDITEMS": Unpickler._load_additems,
    "BYTEARRAY8": Unpickler._load_bytearray8,
}


def _counted(load: Callable[[Any], None], cost: int) -> Callable[[Any], None]:
    def run(machine: Unpickler) -> None:
        machine.spend(cost)
        load(machine)

    return run


for _name in (*PLAIN.split(), *CHECKED):
    _code = getattr(pickle, _name)[0]
    Unpickler.dispatch[_code] = _counted(
        CHECKED.get(_name) or pickle._Unpickler.dispatch[_code], COSTS.get(_name, ITEM_BYTES)
    )


# -- torch files before 1.6 ------------------------------------------------------------------------------------


def read_old_torch(data: bytes, path: Path) -> Any:
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
        Unpickler(file, path, size=len(data), read_storage=make_storage).load() for _ in range(5)
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
