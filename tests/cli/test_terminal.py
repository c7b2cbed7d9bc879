"""What the command line prints, whatever files and plugins say and whatever the terminal can show."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys

import pytest

from ezhoi_diffusion.cli import command, main
from ezhoi_diffusion.cli.terminal import escaped_stdout, log_warnings, print_table
from ezhoi_diffusion.errors import EzhoiDiffusionError, printable
from ezhoi_diffusion.testing import synthetic_store

ESCAPE, TURN = "\x1b[2J\x1b]0;title\x07", "\u202egnp.exe\u2066"


@pytest.mark.parametrize("text", [ESCAPE, TURN, "\x1b[31m", "\x1b[8m", "\r", "\x9b", "\x00", "\ud800", "\u2028"])
def test_control_characters_and_those_that_turn_the_writing_are_escaped(text, capsys):
    assert printable(text).isprintable()
    assert printable(printable(text)) == printable(text)
    assert str(EzhoiDiffusionError(f"bad {text}")).isprintable()
    with escaped_stdout():
        print(text, end="")
        print_table(["name"], [[text]])
    assert all(c.isprintable() or c == "\n" for c in capsys.readouterr().out)


def test_what_is_printable_stays():
    assert printable("köln 手 👩‍🍳\n\t".replace("\u200d", "")) == "köln 手 👩🍳\n\t"


def test_colours_reach_a_terminal_and_nothing_else_does(mocker):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    mocker.patch("sys.stdout", terminal)
    mocker.patch.dict("os.environ", {"TERM": "xterm-256color", "NO_COLOR": "", "COLORTERM": ""})
    with escaped_stdout():
        print_table(["name"], [["\x1b[2J\x1b[8mevil"]])
        print("\x1b[8mevil")
    found = terminal.getvalue()
    assert "\x1b[1m" in found
    assert "\x1b[2J" not in found
    assert "\x1b[8m" not in found
    assert found.count("evil") == 2


def test_help_errors_and_warnings_are_escaped_too(tmp_path, monkeypatch):
    info = tmp_path / "odd-1.dist-info"
    info.mkdir()
    (tmp_path / "odd.py").write_text(
        "import warnings; from ezhoi_diffusion import hookimpl; warnings.warn('warned \\x1b[32m')\n"
        "@hookimpl\ndef register_fits(register): register('odd', lambda features: 0)\n"
    )
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: odd\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[ezhoi_diffusion]\n\x1b[31modd = odd\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    said = b""
    for words in (["train", "--help"], ["plugins"], ["compare", "folder", "listed by *: \x1b[33m"]):
        line = [sys.executable, "-m", "ezhoi_diffusion", *words]
        done = subprocess.run(line, capture_output=True, env=environment, check=False)
        said += done.stdout + done.stderr
    assert b"\x1b" not in said
    assert all(rf"\x1b[{colour}m".encode() in said for colour in (31, 32, 33))


def test_a_warning_of_a_plugin_is_escaped_and_the_root_logger_is_left_to_the_script():
    code = (
        "import logging, sys; from ezhoi_diffusion.cli.terminal import log_warnings; log_warnings(); log_warnings()\n"
        "assert not logging.root.handlers\n"
        "logging.getLogger('ezhoi_diffusion.plugins').warning('bad \\x1b[2J')\n"
        "logging.basicConfig(format='script: %(message)s', stream=sys.stdout)\n"
        "logging.getLogger('ezhoi_diffusion.plugins').warning('second')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "ezhoi-diffusion: bad \\x1b[2J\n"
    assert done.stdout == "script: second\n"


def test_a_terminal_of_ascii_shows_escapes(tmp_path):
    folder = tmp_path / "köln"
    synthetic_store(folder, images=8)
    done = subprocess.run(
        [sys.executable, "-m", "ezhoi_diffusion", "doctor", str(folder)],
        capture_output=True,
        env={"PYTHONIOENCODING": "ascii", "PATH": "", "PYTHONPATH": ":".join(sys.path)},
        check=False,
    )
    assert b"UnicodeEncodeError" not in done.stderr
    assert b"features.files" in done.stdout


def test_a_thread_that_somebody_leaves_behind_is_named_and_does_not_hold_the_process(tmp_path):
    (tmp_path / "stuck.py").write_text(
        "import threading, time\n"
        "from ezhoi_diffusion import hookimpl\n"
        "threading.Thread(target=time.sleep, args=(600,), name='mine\\x1b').start()\n"
        "@hookimpl\ndef on_attach(run): pass\n"
    )
    info = tmp_path / "stuck-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stuck\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[ezhoi_diffusion]\nstuck = stuck\n")
    done = subprocess.run(
        [sys.executable, "-m", "ezhoi_diffusion", "plugins"],
        capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "stuck" in done.stdout
    assert "ended although threads of a plugin go on: mine\\x1b" in done.stderr


def test_without_a_standard_output_a_command_does_its_work(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "ezhoi_diffusion", "plugins"],
        stderr=subprocess.PIPE, text=True, check=False, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        preexec_fn=lambda: os.close(1),
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


def test_our_warnings_are_not_printed_twice(capsys):
    log_warnings()
    assert main(["plugins"]) == 0
    logger = logging.getLogger("ezhoi_diffusion")
    log_warnings()
    assert len([handler for handler in logger.handlers if type(handler).__name__ == "_Warnings"]) == 1


@pytest.mark.parametrize(
    ("words", "set_by_user", "expected"),
    [
        (["train", "FEATURES"], None, "PASSIVE"),
        (["train", "FEATURES"], "ACTIVE", "ACTIVE"),
        (["run", "script.py"], None, None),
    ],
)
def test_threads_that_wait_sleep_unless_the_user_or_ezhoi_decides(words, set_by_user, expected, monkeypatch):
    environment = {} if set_by_user is None else {"OMP_WAIT_POLICY": set_by_user}
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr(sys, "argv", ["ezhoi-diffusion", *words])
    found = []
    monkeypatch.setattr("ezhoi_diffusion.cli.main", lambda: found.append(environment.get("OMP_WAIT_POLICY")) or 0)
    monkeypatch.setattr("ezhoi_diffusion.cli.GRACE", 0.0)
    monkeypatch.setattr("ezhoi_diffusion.cli._end", lambda status: None)
    with pytest.raises(SystemExit):
        command()
    assert found == [expected], "when the command begins, and torch is not imported yet"
