"""Writing folders so that a crash at any moment leaves the old state or the new one, and nothing between.

The files in them are to be written by `ezhoi_diffusion.files`, which flushes each to the disk.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ezhoi_diffusion.files import sync_folder

STAGED = ".staged"
COMMITTED = ".committed"


def sha256(path: Path) -> str:
    """Hex digest of a file's content, read in blocks. Raises OSError."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yields a folder to write into, which becomes `folder` by one rename if the block ends well.

    What an older `folder` held is lost. Parents are made.
    """
    staged = folder.with_name(folder.name + STAGED)
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    yield staged
    shutil.rmtree(folder, ignore_errors=True)
    staged.rename(folder)
    sync_folder(folder.parent)


@contextmanager
def replaced_files(folder: Path) -> Iterator[Path]:
    """Yields a folder whose files replace those of the same names in `folder` together, or not at all.

    Other entries of `folder` stay. One rename commits. From then on `current` finds the new files, even if
    moving them into place was interrupted; the next call finishes that.
    """
    staged, committed = folder / STAGED, folder / COMMITTED
    _finish(folder)
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    yield staged
    staged.rename(committed)
    sync_folder(folder)
    _finish(folder)


def current(folder: Path, name: str) -> Path:
    """Where the file `name` of a folder written by `replaced_files` is to be read."""
    committed = folder / COMMITTED / name
    return committed if committed.exists() else folder / name


def _finish(folder: Path) -> None:
    committed = folder / COMMITTED
    if committed.is_dir():
        for path in committed.iterdir():
            path.replace(folder / path.name)
        sync_folder(folder)
        committed.rmdir()
