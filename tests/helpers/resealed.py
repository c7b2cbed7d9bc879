"""Change one value of a JSON or safetensors file, and renew every checksum that knows it."""

from __future__ import annotations

import copy
import json
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ezhoi_diffusion.errors import EzhoiDiffusionError
from ezhoi_diffusion.files import write_json, write_tensors

DELETED = object()
VALUES = {
    "null": None, "a text": "something", "-1": -1, "2**70": 2**70, "1e308": 1e308, "[]": [], "{}": {}, "true": True,
    "deleted": DELETED,
}  # fmt: skip
SUBJECTS = ("cannot resume", "the report compares", "bridge '")  # messages about what a command was given
SECONDS, BYTES = 60, 1 << 30  # what a reader of small files may take


def leaves(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The path of every value of a JSON object that is not itself a filled object or list."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if not items or not value:
        yield path
        return
    for key, one in items:
        yield from leaves(one, (*path, key))


def mutated_json(content: dict[str, Any], path: tuple[str | int, ...], value: Any) -> dict[str, Any]:
    """A copy with another value at `path`."""
    changed = copy.deepcopy(content)
    at: Any = changed
    for key in path[:-1]:
        at = at[key]
    if value is DELETED:
        del at[path[-1]]
    else:
        at[path[-1]] = copy.deepcopy(value)
    return changed


def _filled(value: float) -> Callable[[Tensor], Tensor]:
    def change(x: Tensor) -> Tensor:
        x = x.clone()
        x.view(-1)[:1] = value if x.dtype != torch.uint8 else abs(value)
        return x

    return change


def _other_dtype(x: Tensor) -> Tensor:
    return x.double() if x.dtype == torch.float32 else x.float()


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "flat": lambda x: x.reshape(-1) if x.ndim != 1 else x.unsqueeze(0),
    "another dtype": _other_dtype,
    "half": lambda x: x[: len(x) // 2] if x.ndim else x.unsqueeze(0).repeat(2),
    "below": _filled(-3),
    "above": lambda x: (
        _filled(200 if x.dtype == torch.uint8 else 2**31 - 1)(x) if x.dtype != torch.bool else x.to(torch.uint8) * 7
    ),
    "huge": lambda x: (
        _filled(float(torch.finfo(x.dtype).max) if x.is_floating_point() else torch.iinfo(x.dtype).max)(x)
        if x.dtype != torch.bool
        else x.to(torch.int64) * 2**62
    ),
}


def mutated_tensors(tensors: dict[str, Tensor]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """(what was done, the tensors), with one of them dropped, reshaped, of another dtype or with another value."""
    for name, x in tensors.items():
        yield f"{name} dropped", {key: other for key, other in tensors.items() if key != name}
        for what, change in CHANGES.items():
            changed = change(x)
            if changed.shape != x.shape or changed.dtype != x.dtype or not torch.equal(changed, x):
                yield f"{name} {what}", {**tensors, name: changed.contiguous()}


@dataclass(frozen=True)
class Case:
    """A file with one wrong value, and what was done to it."""

    kind: str
    file: str
    what: str
    write: Callable[[Path], None]


def json_cases(kind: str, folder: Path, file: str, reseal: Callable[[Path, str], None]) -> Iterator[Case]:
    """One case for each leaf of a JSON file and each of `VALUES`."""
    found = content(folder / file)
    for path in leaves(found):
        for name, value in VALUES.items():
            if value is not DELETED and type(at(found, path)) is type(value) and at(found, path) == value:
                continue

            def write(target: Path, path=path, value=value) -> None:
                write_json(target / file, mutated_json(found, path, value))
                reseal(target, file)

            yield Case(kind, file, f"{'.'.join(map(str, path))} {name}", write)


def content(path: Path) -> dict[str, Any]:
    """A JSON object without its checksum."""
    found = json.loads(path.read_text())
    found.pop("checksum")
    return found


def at(value: Any, path: tuple[str | int, ...]) -> Any:
    """The value at `path`."""
    for key in path:
        value = value[key]
    return value


def tensor_cases(kind: str, folder: Path, file: str, reseal: Callable[[Path, str], None]) -> Iterator[Case]:
    """One case for each tensor of a safetensors file and each of `CHANGES`, and for each without it."""
    for what, tensors in mutated_tensors(load_file(folder / file)):

        def write(target: Path, tensors=tensors) -> None:
            write_tensors(target / file, tensors)
            reseal(target, file)

        yield Case(kind, file, what, write)


@contextmanager
def limited() -> Iterator[None]:
    """Let the block take a minute and a gigabyte."""

    def end(*_: object) -> None:
        raise TimeoutError(f"more than {SECONDS} s")

    own = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, end)
    signal.alarm(SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (own + BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)


def outcome(read: Callable[[Path], Any], folder: Path, file: str, right: Any) -> str:
    """What a reader makes of a file: `refused`, `same`, or a sentence about what it should not have done."""
    try:
        with limited():
            found = read(folder)
    except EzhoiDiffusionError as error:
        named = (Path(file).name, str(folder), *SUBJECTS)
        return "refused" if any(name in str(error) for name in named) else f"does not name the file: {error}"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return f"traceback {type(error).__name__}: {error!s:.200}"
    return "same" if equal(found, right) else "accepted, with another result"


def equal(a: Any, b: Any) -> bool:
    """Whether two results of a reader are equal, bit for bit."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)
