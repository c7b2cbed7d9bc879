"""Folders and files that are written whole, by one writer at a time."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import os
import signal
import stat
import subprocess
import sys
import threading
import time

import pytest

from ezhoi_diffusion.cli import main
from ezhoi_diffusion.errors import EzhoiDiffusionError
from ezhoi_diffusion.files import new_result, read_bytes, require_unchanged, sync_folder, write_atomic
from ezhoi_diffusion.locks import locked
from ezhoi_diffusion.testing import synthetic_store
from helpers.disk import watched


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    folder = tmp_path_factory.mktemp("features") / "train"
    return synthetic_store(folder, images=40).folder


def test_an_empty_folder_is_a_place_for_a_result_whenever_its_writer_is_killed(tmp_path):
    deaths = 0
    for call in itertools.count():
        out = tmp_path / str(call) / "out"
        out.mkdir(parents=True)
        with watched(tmp_path) as disk, disk.dying(call), new_result(out, EzhoiDiffusionError) as staged:
            (staged / "part").write_text("1")
        with contextlib.suppress(EzhoiDiffusionError), new_result(out, EzhoiDiffusionError) as staged:
            (staged / "part").write_text("1")
        assert names(out.parent) == ["out"]
        assert names(out) == ["part"]
        if not disk.deaths:
            break
        deaths += 1
    assert deaths > 8


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_flushes_no_folder_is_no_error(tmp_path, mocker, code):
    fsync = os.fsync

    def refuse(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(code, os.strerror(code))
        fsync(handle)

    mocker.patch("os.fsync", refuse)
    write_atomic(tmp_path / "file", b"data")
    assert (tmp_path / "file").read_bytes() == b"data"


def test_a_disk_that_fails_is_an_error(tmp_path, mocker):
    mocker.patch("os.fsync", side_effect=OSError(errno.EIO, os.strerror(errno.EIO)))
    with pytest.raises(OSError, match="Input/output"):
        sync_folder(tmp_path)


def test_a_link_at_the_temporary_name_is_not_followed(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("mine")
    (tmp_path / f".file.{os.getpid()}.tmp").symlink_to(precious)
    write_atomic(tmp_path / "file", b"data")
    assert precious.read_text() == "mine"
    assert (tmp_path / "file").read_bytes() == b"data"
    assert not (tmp_path / "file").is_symlink()


def test_a_file_is_hashed_once_in_a_process_and_again_once_it_was_touched(tmp_path, mocker):
    path = tmp_path / "file"
    facts = write_atomic(path, bytes(1000))
    before = path.stat()
    time.sleep(0.05)  # the clock of the file system goes on
    hashed = mocker.spy(hashlib, "sha256")
    for _ in range(3):
        assert read_bytes(path, facts, EzhoiDiffusionError, "") == bytes(1000)
        require_unchanged(path, facts, EzhoiDiffusionError, "")
    assert hashed.call_count <= 1
    with path.open("r+b") as file:
        file.write(b"x")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    for read in (read_bytes, require_unchanged):
        with pytest.raises(EzhoiDiffusionError, match="was changed after it was written"):
            read(path, facts, EzhoiDiffusionError, "")


def test_a_change_right_after_the_writing_is_noticed(tmp_path):
    path = tmp_path / "file"
    for number in range(50):
        facts = write_atomic(path, bytes(1000))
        with path.open("r+b") as file:
            file.write(b"x")
        with pytest.raises(EzhoiDiffusionError, match="was changed after it was written"):
            (read_bytes, require_unchanged)[number % 2](path, facts, EzhoiDiffusionError, "")


def test_a_folder_has_one_writer_in_this_process_too(tmp_path):
    entered, leave = threading.Event(), threading.Event()

    def write():
        with locked(tmp_path, EzhoiDiffusionError):
            entered.set()
            leave.wait(60)

    writer = threading.Thread(target=write)
    writer.start()
    assert entered.wait(60)
    for _ in range(2):  # the first that is refused must not end the writer's lock
        with (
            pytest.raises(EzhoiDiffusionError, match="somebody else is writing"),
            locked(tmp_path, EzhoiDiffusionError),
        ):
            pass
    leave.set()
    writer.join()
    with locked(tmp_path, EzhoiDiffusionError):
        pass


def test_a_process_that_was_forked_does_not_hold_the_lock_of_its_parent(tmp_path):
    with locked(tmp_path, EzhoiDiffusionError):
        child = os.fork()
        if child == 0:
            time.sleep(30)
            os._exit(0)
    try:
        code = "import sys; from pathlib import Path; from ezhoi_diffusion.files import locked\nwith locked(Path(sys.argv[1]), SystemExit): pass"
        subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=60)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_training_that_begins_in_the_folder_meanwhile_is_not_replaced(tmp_path):
    out = tmp_path / "out"

    def write():
        with new_result(out, EzhoiDiffusionError) as staged:
            (staged / "part").write_text("1")
            out.mkdir()
            (out / "checkpoints").mkdir()

    with pytest.raises(EzhoiDiffusionError, match="is in use"):
        write()
    assert names(tmp_path) == ["out"]
    assert names(out) == ["checkpoints"]


def test_a_result_has_one_writer_and_is_there_whole_or_not_at_all(tmp_path):
    out = tmp_path / "out"
    with new_result(out, EzhoiDiffusionError) as staged:
        (staged / "part").write_text("1")
        assert not out.exists()
        with pytest.raises(EzhoiDiffusionError, match="somebody else"), new_result(out, EzhoiDiffusionError):
            pass
    assert (out / "part").read_text() == "1"
    with pytest.raises(EzhoiDiffusionError, match="is in use"), new_result(out, EzhoiDiffusionError):
        pass
    assert names(tmp_path) == ["out"]
    with pytest.raises(ZeroDivisionError), new_result(tmp_path / "other", EzhoiDiffusionError) as staged:
        (staged / "part").write_text(str(1 / 0))
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize(
    "line",
    [
        ["train", "--bridge", "residual"],
        ["tune", "--bridges", "mean_shift", "--folds", "3"],
    ],
)
def test_a_command_that_was_killed_while_it_wrote_can_be_given_again(features, tmp_path, mocker, line):
    command = [line[0], str(features), *line[1:], "--out", str(tmp_path / "out")]

    class Killed(BaseException):
        """As SIGKILL: no clean-up may count on it."""

    def die(*args, **kwargs):
        raise Killed

    mocker.patch("os.fsync", die)
    with pytest.raises(Killed):
        main(command)
    (tmp_path / "out.staged").mkdir(exist_ok=True)  # a kill leaves it
    (tmp_path / "out.staged" / "part").write_text("1")
    (tmp_path / ".out.lock").touch()
    mocker.stopall()
    assert main(command) == 0
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("damage", ["pipe", "device"])
def test_a_script_that_never_ends_is_refused(tmp_path, capsys, monkeypatch, damage):
    script = tmp_path / "main_tip_finetune.py"
    if damage == "pipe":
        os.mkfifo(script)
    else:
        script.symlink_to("/dev/zero")
    monkeypatch.chdir(tmp_path)
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    for command in (["patch", "."], ["run", script.name], ["capture", script.name, "--out", "f"]):
        signal.alarm(20)
        try:
            assert main(command) == 2
        finally:
            signal.alarm(0)
        assert "not a regular file" in capsys.readouterr().err
