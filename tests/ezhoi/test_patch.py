"""Writing the three lines into a script and removing them, byte for byte."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import ezhoi_diffusion
from ezhoi_diffusion.cli import main
from ezhoi_diffusion.ezhoi.patch import MARK, PatchError, patched, reverted, write_script
from ezhoi_diffusion.features.store import FeatureStore
from helpers.miniature import DUMP_SCRIPT, MINIATURE, ezhoi_flags, run_in_miniature

NAME = "main_tip_finetune.py"
MINIATURE_SCRIPT = (MINIATURE / NAME).read_bytes()
# what the description is about, and little else
SCRIPT = b"""\
import argparse
from model import build_detector
from engine import CustomisedDLE

def main(rank, args):
    upt = build_detector(args, [])
    upt.load_state_dict({})
    engine = CustomisedDLE(upt, None)
    if args.tpt:
        engine = CustomisedDLE(upt, 1)
    upt.scale = 2
    if args.cache:
        engine.cache()
        return
    engine.test_hico()

if __name__ == '__main__':
    parser = argparse.ArgumentParser()
    args = parser.parse_args()
    main(0, args)
"""


def ours(data: bytes) -> list[str]:
    """The marked lines, each with the line that follows it."""
    lines = data.decode().splitlines()
    return [
        line.removesuffix(MARK) + " | " + after.strip()
        for line, after in itertools.pairwise(lines)
        if line.endswith(MARK)
    ]


@pytest.fixture
def fork(tmp_path):
    """A copy of the miniature, to patch."""
    folder = tmp_path / "fork"
    shutil.copytree(MINIATURE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


# -- where the lines go ----------------------------------------------------------------------------------------


def test_places_of_the_three_lines():
    assert ours(patched(SCRIPT)) == [
        "from ezhoi_diffusion import add_arguments, attach | from engine import CustomisedDLE",
        "    attach(upt, args, engine) | if args.cache:",
        "    add_arguments(parser) | args = parser.parse_args()",
    ]
    assert len(patched(SCRIPT).splitlines()) == len(SCRIPT.splitlines()) + 3


def test_other_names():
    renamed = SCRIPT.replace(b"upt", b"net").replace(b"engine =", b"runner =").replace(b"engine.", b"runner.")
    renamed = renamed.replace(b"args)", b"opt)").replace(b"args.", b"opt.").replace(b"args,", b"opt,")
    renamed = renamed.replace(b"parser", b"cmd").replace(b"import build_detector", b"import build_detector as build")
    renamed = renamed.replace(b"build_detector(", b"build(").replace(b"from runner", b"from engine")
    assert [line.partition(" | ")[0].strip() for line in ours(patched(renamed))] == [
        "from ezhoi_diffusion import add_arguments, attach",
        "attach(net, opt, runner)",
        "add_arguments(cmd)",
    ]


VARIANTS = {
    "crlf": SCRIPT.replace(b"\n", b"\r\n"),
    "old mac": SCRIPT.replace(b"\n", b"\r"),
    "tabs": SCRIPT.replace(b"    ", b"\t"),
    "no newline at the end": SCRIPT.rstrip(b"\n"),
    "byte order mark": b"\xef\xbb\xbf" + SCRIPT,
    "latin-1": b"# -*- coding: latin-1 -*-\n# na\xefve\n" + SCRIPT,
    "utf-8 and a form feed": "# 我们 \u2028 \f\n".encode() + SCRIPT,
    "a blank line of spaces": SCRIPT.replace(b"    upt.scale", b"      \n    upt.scale"),
    "an import over several lines": SCRIPT.replace(b"import build_detector", b"import (\n    build_detector,\n)"),
    "two imports on a line": SCRIPT.replace(b"build_detector\n", b"build_detector; import os\n", 1),
    "the flags in a function": SCRIPT.replace(b"if __name__ == '__main__':", b"def start():"),
    "two line endings": SCRIPT.replace(b"\n", b"\r\n", 8),
    "the miniature": MINIATURE_SCRIPT,
}


@pytest.mark.parametrize("data", VARIANTS.values(), ids=VARIANTS)
def test_patch_and_revert_keep_every_byte(data):
    after = patched(data)
    assert len(after) > len(data)
    assert patched(after) == after
    assert reverted(after) == data
    compile(after, NAME, "exec")
    original = re.split(rb"(?<=\n)|(?<=\r)(?!\n)", data)
    kept = iter(re.split(rb"(?<=\n)|(?<=\r)(?!\n)", after))
    assert all(line in kept for line in original), "in the same order"
    added = [line for line in re.split(rb"(?<=\n)|(?<=\r)(?!\n)", after) if MARK.encode() in line]
    for line in added:  # an ending that the script has there
        ending = line[len(line.rstrip(b"\r\n")) :]
        assert ending
        assert data.count(ending) >= 3
    if b"\t" in data:
        assert added[1].startswith(b"\tattach")


def test_revert_keeps_later_edits(fork):
    script = fork / NAME
    assert main(["patch", str(fork)]) == 0
    lines = script.read_text().splitlines(keepends=True)
    mine = ["# mine\n", *lines[:40], "VALUE = 1\n", *lines[40:]]
    at = next(i for i, line in enumerate(mine) if "attach(upt" in line)
    mine.insert(at, mine.pop(at).replace("attach", "attach"))
    script.write_text("".join(mine))
    assert main(["patch", str(fork), "--revert"]) == 0
    assert script.read_text() == "".join(line for line in mine if MARK not in line)


def test_patch_repairs_lost_and_moved_lines(fork):
    script = fork / NAME
    main(["patch", str(fork)])
    whole = script.read_text()
    lines = whole.splitlines(keepends=True)
    at = next(i for i, line in enumerate(lines) if "attach(upt" in line)
    for other in ([*lines[:at], *lines[at + 1 :]], [*lines[:at], lines[at + 1], lines[at], *lines[at + 2 :]]):
        script.write_text("".join(other))
        if "    attach" in "".join(other):
            script.write_text("".join([*lines[: at - 1], lines[at], lines[at - 1], *lines[at + 1 :]]))
        assert main(["patch", str(fork), "--check"]) == 1
        assert main(["patch", str(fork)]) == 0
        assert script.read_text() == whole


# -- what is refused -------------------------------------------------------------------------------------------

REFUSED = {
    "no build_detector": (b"from model import build_detector", b"import model", "import of build_detector"),
    "build_detector twice": (b"import argparse", b"from other import build_detector", "import of build_detector"),
    "no parser": (b"parser.parse_args()", b"None", "exactly one call of parse_args is needed, and there are 0"),
    "two parsers": (b"main(0, args)", b"parser.parse_args()", "exactly one call of parse_args"),
    "a parser without a name": (b"parser.parse_args", b"make().parse_args", "on something that has no name"),
    "not the first on its line": (b"    args = parser", b"    import os; args = parser", "does not begin its line"),
    "no engine": (b"CustomisedDLE(", b"Other(", "exactly one function that assigns CustomisedDLE"),
    "engine and model apart": (b"build_detector(args", b"make(args", "variable for build_detector"),
    "two engines": (b"        engine =", b"        other =", "exactly one variable for the engine in main"),
    "flags without a name": (b"build_detector(args", b"build_detector(get()", "first argument of build_detector"),
    "used before it is whole": (
        b"    upt.load_state",
        b"    engine.x\n    upt.load_state",
        "no statement stands between",
    ),
    "never used": (b"engine.", b"upt.", "no statement stands between"),
    "weights too late": (
        b"    engine.test_hico()",
        b"    engine.test_hico()\n    upt.load_state_dict(2)",
        "loads weights",
    ),
    "joined by hand": (b"import argparse", b"import argparse, ezhoi_diffusion.ezhoi", "was joined by hand"),
    "a name of its own": (b"import argparse", b"import argparse\ndef attach(): pass", "has a name `attach` of its own"),
    "a name from elsewhere": (b"import argparse", b"from x import y as add_arguments", "has a name `add_arguments`"),
    "no Python": (b"import argparse", b"import argparse (", "no valid Python"),
    "another Python": (b"import argparse", b"print 1", "no valid Python"),
    "a null byte": (b"import argparse", b"import argparse\0", "no valid Python"),
    "no encoding": (b"import argparse", b"# coding: nonsense\nimport argparse", "no valid Python"),
}


@pytest.mark.parametrize(("old", "new", "reason"), REFUSED.values(), ids=REFUSED)
def test_other_structures_are_refused(old, new, reason, tmp_path, capsys):
    assert old in SCRIPT
    data = SCRIPT.replace(old, new)
    script = tmp_path / NAME
    script.write_bytes(data)
    for how in ([], ["--check"]):
        assert main(["patch", str(tmp_path), *how]) == 2
        message = capsys.readouterr().err
        assert str(script) in message
        assert reason in message
    if "needed" in reason or "exactly" in reason:
        assert "By hand: add `" in message
    assert script.read_bytes() == data
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_edited_line_is_refused():
    changed = patched(SCRIPT).replace(b"    attach(upt, args, engine)", b"    with attach(upt, args, engine): main()")
    for work in (patched, reverted):
        with pytest.raises(PatchError, match="is marked as ours, but was changed"):
            work(changed)


def test_revert_refuses_to_leave_an_empty_block():
    alone = patched(SCRIPT).replace(b"    attach(upt", b"    if args.plugin:\n        attach(upt")
    with pytest.raises(PatchError, match="no valid Python any more"):
        reverted(alone)


def test_revert_of_a_broken_script():
    broken = patched(SCRIPT) + b"def (:\n"
    assert reverted(broken) == SCRIPT + b"def (:\n"


def test_folder_without_the_script(tmp_path, capsys):
    assert main(["patch", str(tmp_path / "nowhere")]) == 2
    assert "give the EZ-HOI folder" in capsys.readouterr().err


# -- the file --------------------------------------------------------------------------------------------------


def test_command_output_and_exit_codes(fork, capsys):
    script = fork / NAME
    assert main(["patch", str(fork), "--check"]) == 1
    assert "not patched" in capsys.readouterr().out
    assert script.read_bytes() == MINIATURE_SCRIPT
    assert main(["patch", str(fork)]) == 0
    shown = capsys.readouterr().out
    assert [line for line in shown.splitlines() if re.match(r"\+[^+]|-[^-]", line)] == [
        "+" + line.partition(" | ")[0] + MARK for line in ours(script.read_bytes())
    ]
    after = script.read_bytes()
    assert main(["patch", str(fork)]) == 0
    assert "already patched" in capsys.readouterr().out
    assert main(["patch", str(fork), "--check"]) == 0
    assert main(["patch", str(fork), "--revert"]) == 0
    assert "-    attach(upt, args, engine)" in capsys.readouterr().out
    assert script.read_bytes() == MINIATURE_SCRIPT != after
    assert main(["patch", str(fork), "--revert"]) == 0
    assert "has none of our lines" in capsys.readouterr().out


def test_only_the_script_changes_and_keeps_mode_and_link(fork, tmp_path):
    real = tmp_path / "kept.py"
    (fork / NAME).rename(real)
    real.chmod(0o751)
    (fork / NAME).symlink_to(real)
    others = {path: path.read_bytes() for path in fork.iterdir() if path.name != NAME}
    assert main(["patch", str(fork)]) == 0
    assert (fork / NAME).is_symlink()
    assert stat.S_IMODE(real.stat().st_mode) == 0o751
    assert real.read_bytes() == patched(MINIATURE_SCRIPT)
    assert {path: path.read_bytes() for path in fork.iterdir() if path.name != NAME} == others
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fork", "kept.py"]


def test_failed_write_leaves_the_script_unchanged(fork, mocker, capsys):
    mocker.patch.object(os, "fsync", side_effect=OSError(28, "No space left on device"))
    before = sorted(path.name for path in fork.iterdir())
    assert main(["patch", str(fork)]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert (fork / NAME).read_bytes() == MINIATURE_SCRIPT
    assert sorted(path.name for path in fork.iterdir()) == before


@pytest.mark.parametrize("how", [[], ["--check"], ["--revert"]], ids=["patch", "check", "revert"])
def test_next_call_deletes_files_of_a_killed_write(fork, mocker, how):
    before = sorted(path.name for path in fork.iterdir())
    mocker.patch.object(shutil, "copymode", side_effect=KeyboardInterrupt)  # ends it where a kill would
    with contextlib.suppress(KeyboardInterrupt):
        write_script(fork / NAME, b"")
    mocker.stopall()
    (fork / f"..{NAME}.patch.17.tmp").write_bytes(b"half")  # a kill one step earlier
    assert len(list(fork.iterdir())) == len(before) + 2
    main(["patch", str(fork), *how])
    assert sorted(path.name for path in fork.iterdir()) == before


def test_package_includes_patches_and_every_folder():
    tomllib = pytest.importorskip("tomllib")
    root = Path(ezhoi_diffusion.__file__).parent.parent
    listed = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {
        ".".join(path.parent.relative_to(root).parts) for path in (root / "ezhoi_diffusion").rglob("__init__.py")
    }
    assert set(listed["packages"]) == folders | {"ezhoi_diffusion.patches"}
    assert listed["package-dir"] == {"ezhoi_diffusion.patches": "patches"}
    words = (root / "patches" / "README.md").read_text()
    assert all(
        line in words for line in ("import add_arguments, attach", "add_arguments(PARSER)", "attach(MODEL, ARGS")
    )


# -- the patched script ----------------------------------------------------------------------------------------


def dump(script: Path, out: Path, *flags: str):
    done = run_in_miniature(str(DUMP_SCRIPT), str(out), "bare", str(script), *flags)
    assert done.returncode == 0, done.stderr
    return done.stdout, load_file(out)


def printed(text: str) -> str:
    return text[text.index("The mAP is") :]


@pytest.fixture(scope="module")
def patched_fork(tmp_path_factory):
    folder = tmp_path_factory.mktemp("patched") / "fork"
    shutil.copytree(MINIATURE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    assert main(["patch", str(folder)]) == 0
    return folder / NAME


def test_patched_run_without_our_flags_is_unchanged(patched_fork, small_world, tmp_path):
    flags = ezhoi_flags(small_world, evaluate=True)
    before, bare = dump(MINIATURE / NAME, tmp_path / "bare.safetensors", *flags)
    after, same = dump(patched_fork, tmp_path / "patched.safetensors", *flags)
    assert bare.keys() == same.keys()
    assert all(torch.equal(bare[key], same[key]) for key in bare)
    assert printed(before) == printed(after)


@pytest.fixture(scope="module")
def bridge(patched_fork, small_world, tmp_path_factory):
    """Captured by the patched script itself, and trained."""
    folder = tmp_path_factory.mktemp("bridge")
    flags = ezhoi_flags(small_world, evaluate=False)
    done = run_in_miniature(str(patched_fork), *flags, "--plugin", "capture", "--capture", str(folder / "features"))
    assert done.returncode == 0, done.stderr
    assert (
        main(
            [
                "train",
                str(folder / "features"),
                "--out",
                str(folder / "bridge"),
                "--train-steps",
                "20",
                "--learning-rate",
                "0.01",
            ]
        )
        == 0
    )
    return folder / "bridge"


def test_patched_run_captures_injects_and_compares(patched_fork, small_world, bridge):
    flags = [*ezhoi_flags(small_world, evaluate=True), "--bridge", str(bridge)]
    bare = run_in_miniature(str(MINIATURE / NAME), *flags[:-2])
    compared = run_in_miniature(str(patched_fork), *flags, "--compare", "none,identity,diffusion")
    assert compared.returncode == 0, compared.stderr
    assert "diffusion - none" in compared.stdout
    assert printed(compared.stdout) == printed(bare.stdout), "EZ-HOI prints what it would print alone"
    injected = run_in_miniature(
        str(patched_fork), *flags, "--plugin", "diffusion", "--set", "blend=1", "--set", "output=unit_norm"
    )
    assert injected.returncode == 0, injected.stderr
    assert printed(injected.stdout) != printed(bare.stdout)


@pytest.mark.slow
def test_patched_run_in_two_processes(patched_fork, small_world, bridge):
    flags = [*ezhoi_flags(small_world, evaluate=True), "--bridge", str(bridge)]
    one = run_in_miniature(str(patched_fork), *flags, "--plugin", "diffusion")
    two = run_in_miniature(str(patched_fork), *flags, "--plugin", "diffusion", "--world-size", "2")
    assert two.returncode == 0, two.stderr
    # both write to one pipe: a line of the one may end behind a line of the other
    assert two.stdout.count(printed(one.stdout).splitlines()[0]) == 2


def launched(script: Path, *flags: str):
    return run_in_miniature("-m", "ezhoi_diffusion", "run", str(script), *flags)


def test_launched_patched_script_equals_the_original(patched_fork, small_world, bridge, tmp_path):
    train, flags = (ezhoi_flags(small_world, evaluate=evaluate) for evaluate in (False, True))
    for script, name in ((MINIATURE / NAME, "stock"), (patched_fork, "patched")):
        done = launched(script, *train, "--plugin", "capture", "--capture", str(tmp_path / name))
        assert done.returncode == 0, done.stderr
    stock, same = (FeatureStore(tmp_path / name) for name in ("stock", "patched"))
    assert stock.fingerprint == same.fingerprint
    assert torch.equal(stock.text, same.text)
    assert torch.equal(stock.adapter_feat(), same.adapter_feat())
    inject = ["--plugin", "diffusion", "--bridge", str(bridge)]
    found = [launched(script, *flags, *inject) for script in (MINIATURE / NAME, patched_fork)]
    assert found[0].returncode == found[1].returncode == 0, found[1].stderr
    assert printed(found[0].stdout) == printed(found[1].stdout)


def test_launched_patched_script_trains(patched_fork, small_world):
    flags = [*ezhoi_flags(small_world, evaluate=False), "--epochs", "1"]
    done = launched(patched_fork, *flags)
    assert done.returncode == 0, done.stderr


def test_launched_errors_of_processes_print_one_line(patched_fork, small_world):
    done = launched(
        patched_fork, *ezhoi_flags(small_world, evaluate=True), "--world-size", "2", "--plugin", "diffusion"
    )
    assert done.returncode == 2
    assert "the diffusion bridge needs its folder" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--plugin", "difusion"], "there is no plugin 'difusion'; did you mean 'diffusion'? Installed: "),
        (["--plugin", "zzz"], "there is no plugin 'zzz'. Installed: "),
        (["--diffusion_bridge", "x"], "--diffusion_bridge: flags of the guide's edited EZ-HOI"),
    ],
)
def test_plain_python_prints_one_line_for_a_user_error(patched_fork, small_world, flags, message):
    done = run_in_miniature(str(patched_fork), *ezhoi_flags(small_world, evaluate=True), *flags)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    # inside a process group, torch puts [rank0] before each line
    assert re.search(rf"^(\[rank0\]: ?)?ezhoi-diffusion: error: {re.escape(message)}", done.stderr, re.MULTILINE)


def test_plain_python_prints_other_errors_in_full(patched_fork, small_world):
    done = run_in_miniature(str(patched_fork), *ezhoi_flags(small_world, evaluate=True), "--data-root", "nowhere")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "ezhoi-diffusion: error" not in done.stderr


def test_doctor_reads_flags_of_a_patched_script(patched_fork, small_world, capsys):
    line = [str(patched_fork), *ezhoi_flags(small_world, evaluate=True)]
    main(["doctor", "--json", "--", *line, "--plugin", "diffusion"])
    found = {finding["name"]: finding for finding in json.loads(capsys.readouterr().out)}
    assert "ezhoi.flags" not in found, "a finding is made where there is something to say"
    assert main(["doctor", "--json", "--", *line, "--diffusion_bridge", "x"]) == 1
    found = {finding["name"]: finding for finding in json.loads(capsys.readouterr().out)}
    assert "flags of the guide's edited EZ-HOI" in found["ezhoi.flags"]["found"]
