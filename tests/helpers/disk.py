"""Record what a workload does to a folder, and rebuild the states in which a kill or a power cut may leave it.

The model of the disk is that of ALICE (Pillai et al., "All File Systems Are Not Created Equal", OSDI 2014), with the entries of
a folder in order:

- What is written to a file may be lost, torn, or read as zeros until the file is flushed (fsync).
- An entry (create, rename, remove) may be lost until its folder is flushed. The entries of one folder reach the disk in order;
  those of different folders do not wait for each other. A rename between two folders is one step, in the order of both.
- Flushing a file does not flush its entry, and flushing a folder does not flush the folder's own entry above it.

ext4 and xfs promise more. POSIX does not.
"""

from __future__ import annotations

import itertools
import os
import random
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
ROOT = 0
State = dict[str, bytes | None]  # path -> content, None for a folder


class Killed(BaseException):
    """As SIGKILL: from then on no change reaches the folder, whatever a clean-up tries."""


@dataclass(frozen=True)
class Entries:
    """One change of entries: (folder, name, node or None)."""

    changes: tuple[tuple[int, str, int | None], ...]

    def folders(self) -> set[int]:
        return {folder for folder, _, _ in self.changes}


@dataclass(frozen=True)
class Data:
    node: int
    content: bytes


@dataclass(frozen=True)
class Flush:
    node: int


@dataclass(frozen=True)
class Promise:
    """The workload was told that everything up to here is stored."""

    value: Any


class Disk:
    """Watches a folder through the calls of this process, and notes what each one changed there.

    The log does not believe the calls. Before each it compares the folder with the last look, so nothing can be missed.
    """

    def __init__(self, root: Path) -> None:
        self.root = str(root)
        self.kill_at: int | None = None
        self.log: list[Entries | Data | Flush | Promise] = []
        self.calls, self.killed, self.deaths = 0, False, 0
        self.begin = 0  # the part of the log that is replayed
        self.contents: dict[int, bytes] = {}
        self.folders: set[int] = set()
        self._ids, self._lock = itertools.count(1), threading.RLock()
        self._tree: dict[int, dict[str, int]] = {ROOT: {}}
        self._inodes: dict[int, int] = {root.stat().st_ino: ROOT}
        self._flushed: dict[int, tuple[int, int]] = {}  # file -> size and time at its last flush
        self.watching = False
        self._look()
        self.log.clear()
        self.watching = True
        self.first = {folder: dict(entries) for folder, entries in self._tree.items()}
        self.first_contents = dict(self.contents)

    def promise(self, value: Any) -> None:
        """Note that the workload has been told of a success."""
        with self._lock:
            self._look()
            self.log.append(Promise(value))

    @contextmanager
    def dying(self, call: int) -> Iterator[None]:
        """The block dies before this change, counted from now; then another process goes on. Only what it leaves is replayed."""
        self.kill_at = self.calls + call
        with suppress(Killed):
            yield
        self.deaths += self.killed
        self.killed, self.kill_at, self.begin = False, None, len(self.log)

    def before(self) -> None:
        """Called before a change: note what the last one did, and die where it is time."""
        with self._lock:
            if not self.killed:
                self._look()
                self.killed = self.calls == self.kill_at
                self.calls += 1
            if self.killed:
                raise Killed

    def flushed(self, handle: int) -> None:
        """Called after a flush."""
        with self._lock:
            self._look()
            found = os.fstat(handle)
            node = self._inodes.get(found.st_ino)
            if node is not None:
                self.log.append(Flush(node))
                self._flushed[node] = (found.st_size, found.st_mtime_ns)

    def concerns(self, path: Any) -> bool:
        """Whether a call's path lies in the folder. rmtree gives names relative to a handle."""
        if isinstance(path, int):
            return False
        name = os.fsdecode(path)
        return not name.startswith("/") or name == self.root or name.startswith(self.root + "/")

    def _look(self) -> None:
        """Note what changed since the last look."""
        inodes: dict[int, int] = {Path(self.root).stat().st_ino: ROOT}
        tree: dict[int, dict[str, int]] = {}
        data: list[Data] = []
        self._walk(self.root, ROOT, tree, inodes, data)
        changed: dict[
            int, list[tuple[int, str, int | None]]
        ] = {}  # node -> its entries, so that a rename is one change
        for folder in {*tree, *self._tree}:
            old, new = self._tree.get(folder, {}), tree.get(folder, {})
            for name in {*old, *new}:
                if name not in new:
                    changed.setdefault(old[name], []).append((folder, name, None))
                elif old.get(name) != new[name]:
                    changed.setdefault(new[name], []).append((folder, name, new[name]))
        assert len(changed) <= 1 or not self.watching, f"two changes between two calls: {changed}"
        self.log += [Entries(tuple(one)) for one in changed.values()]
        self.log += data
        self._tree, self._inodes = tree, inodes

    def _walk(
        self, path: str, folder: int, tree: dict[int, dict[str, int]], inodes: dict[int, int], data: list[Data]
    ) -> None:
        entries = tree.setdefault(folder, {})
        with os.scandir(path) as found:
            for entry in found:
                facts = entry.stat(follow_symlinks=False)
                node = self._inodes.get(facts.st_ino)
                if node is None:
                    node = next(self._ids)
                entries[entry.name] = inodes[facts.st_ino] = node
                if entry.is_dir(follow_symlinks=False):
                    self.folders.add(node)
                    self._walk(entry.path, node, tree, inodes, data)
                elif self._flushed.get(node) != (facts.st_size, facts.st_mtime_ns):
                    content = Path(entry.path).read_bytes()
                    if content != self.contents.get(node, b""):
                        data.append(Data(node, content))
                    self.contents[node] = content


_watched: Disk | None = None
_hooked = False
_fsync = os.fsync


def _hook(event: str, args: tuple[Any, ...]) -> None:
    disk = _watched
    if disk is None or not (event in CHANGES or (event == "open" and isinstance(args[2], int) and args[2] & WRITING)):
        return
    if disk.concerns(args[0]):
        disk.before()


@contextmanager
def watched(root: Path) -> Iterator[Disk]:
    """Watch a folder while the block runs."""
    global _watched, _hooked
    if not _hooked:
        sys.addaudithook(_hook)  # for good: Python removes none
        _hooked = True
    disk = Disk(root)

    def fsync(handle: int) -> None:
        disk.before()
        _fsync(handle)
        disk.flushed(handle)

    os.fsync, _watched = fsync, disk
    try:
        yield disk
        disk._look()
    finally:
        os.fsync, _watched = _fsync, None


def crash_states(disk: Disk, chance: random.Random, samples: int = 2) -> Iterator[tuple[State, list[Any]]]:
    """Yield the states in which a power cut may leave the folder, each with what was promised before it.

    At every moment: nothing that was not flushed is on the disk; all of it; each single change with those that it needs; and
    `samples` drawn at random. Data of files are whole, lost, torn or zeros.
    """
    seen = set()
    for end in range(disk.begin, len(disk.log) + 1):
        for state, promised in _states_at(disk, disk.log[:end], chance, samples):
            key = (len(promised), hash(tuple(sorted(state.items(), key=lambda item: item[0]))))
            if key not in seen:
                seen.add(key)
                yield state, promised


def _states_at(disk: Disk, log: list[Any], chance: random.Random, samples: int) -> Iterator[tuple[State, list[Any]]]:
    promised = [one.value for one in log if isinstance(one, Promise)]
    entries = [one for one in log if isinstance(one, Entries)]
    needs = [
        {earlier for earlier in range(number) if entries[earlier].folders() & one.folders()}
        for number, one in enumerate(entries)
    ]

    def closed(chosen: set[int]) -> set[int]:
        whole, new = set(chosen), set(chosen)
        while new:
            new = {earlier for number in new for earlier in needs[number]} - whole
            whole |= new
        return whole

    stored: set[int] = set()
    safe, latest, count = dict(disk.first_contents), dict(disk.first_contents), 0
    for one in log:
        if isinstance(one, Entries):
            count += 1
        elif isinstance(one, Data):
            latest[one.node] = one.content
        elif isinstance(one, Flush):
            stored |= {number for number in range(count) if one.node in entries[number].folders()}
            if one.node in latest:
                safe[one.node] = latest[one.node]
    stored = closed(stored)
    pending = set(range(len(entries))) - stored
    unsafe = [node for node in latest if safe.get(node, b"") != latest[node]]

    ways: list[Callable[[bytes, bytes], bytes]] = [
        lambda old, new: new,
        lambda old, new: old,
        lambda old, new: new[: len(new) // 2],
        lambda old, new: bytes(len(new)),
    ]

    def state(chosen: set[int], way: Callable[[int], Callable[[bytes, bytes], bytes]]) -> State:
        tree = {folder: dict(names) for folder, names in disk.first.items()}
        for number in sorted(stored | chosen):
            for folder, name, node in entries[number].changes:
                if node is None:
                    tree.setdefault(folder, {}).pop(name, None)
                else:
                    tree.setdefault(folder, {})[name] = node
        contents = {**latest, **{node: way(node)(safe.get(node, b""), latest[node]) for node in unsafe}}
        return dict(_paths(tree, contents, disk, ROOT, ""))

    for way in ways if unsafe else ways[:1]:
        yield state(set(), lambda node, way=way: way), promised
        yield state(pending, lambda node, way=way: way), promised
    for number in pending:
        for way in ways[:2] if unsafe else ways[:1]:
            yield state(closed({number}), lambda node, way=way: way), promised
    for one in unsafe:
        yield state(pending, lambda node, one=one: ways[node == one]), promised
        yield state(pending, lambda node, one=one: ways[node != one]), promised
    if len(pending) > 1 or unsafe:
        for _ in range(samples):
            drawn = {number for number in pending if chance.random() < 0.5}
            picked = {node: chance.choice(ways) for node in unsafe}
            yield state(closed(drawn), picked.__getitem__), promised


def _paths(tree: dict[int, dict[str, int]], contents: dict[int, bytes], disk: Disk, folder: int, path: str) -> Any:
    for name, node in tree.get(folder, {}).items():
        inside = f"{path}/{name}" if path else name
        if node in disk.folders:
            yield inside, None
            yield from _paths(tree, contents, disk, node, inside)
        else:
            yield inside, contents.get(node, b"")


def rebuild(state: State, root: Path) -> None:
    """Write a state into a folder."""
    root.mkdir(parents=True, exist_ok=True)
    for path, content in sorted(state.items(), key=lambda item: item[0]):
        if content is None:
            (root / path).mkdir(exist_ok=True)
        else:
            (root / path).write_bytes(content)
