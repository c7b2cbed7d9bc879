"""The help is grouped by task, quick and complete."""

from __future__ import annotations

import subprocess
import sys

import pytest

from ezhoi_diffusion.cli import COMMANDS, GROUPS, HIDDEN, main


def shown(capsys, *words):
    with pytest.raises(SystemExit) as ended:
        main([*words, "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_the_main_help_lists_each_command_once_under_its_task(capsys):
    text = shown(capsys)
    for title, group in GROUPS.items():
        assert f"\n{title}:\n" in text
        for name, summary in group.items():
            assert text.count(f"\n  {name:10} {summary}\n") == 1
    for name in HIDDEN:
        assert f"\n  {name}" not in text


LIGHT = [["--help"], *([command, "--help"] for command in COMMANDS), ["plugins"], ["plugins", "--json"]]


@pytest.mark.parametrize("words", LIGHT, ids=" ".join)
def test_help_and_the_list_of_plugins_import_nothing_heavy(words, monkeypatch):
    monkeypatch.setenv("EZHOI_DIFFUSION_DISABLE", "*")  # installed packages may import what they like
    code = (
        "import sys; from ezhoi_diffusion.cli import main\n"
        f"try: main({words})\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'matplotlib', 'rich', 'accelerate'} & set(sys.modules)\n"
        "sys.exit(' '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_describes_it(command, capsys):
    text = shown(capsys, command)
    assert text.startswith(f"usage: ezhoi-diffusion {command}")
    flags = [line.split()[0] for line in text.splitlines() if line.startswith("  --")]
    assert not any("_" in flag for flag in flags), "flags are shown with dashes"


def test_a_missing_or_unknown_command_is_refused(capsys):
    for words in ([], ["unheard"]):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 2
    assert "unheard" in capsys.readouterr().err
