"""Run the miniature EZ-HOI as a script, and read what it prints."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

import ezhoi_diffusion.demo
from ezhoi_diffusion.demo import world
from ezhoi_diffusion.demo.vocabulary import VERBS
from ezhoi_diffusion.errors import EzhoiDiffusionError
from ezhoi_diffusion.files import read_json, write_json

MINIATURE = Path(ezhoi_diffusion.demo.__file__).parent / "miniature"


DUMP_SCRIPT = Path(__file__).with_name("dump.py")


VCOCO_ACTIONS = [f"{verb.replace(' ', '_')} {('obj', 'instr')[i % 2]}" for i, verb in enumerate(VERBS)]


def free_port() -> str:
    """A port that no other process listens on."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return str(s.getsockname()[1])


def ezhoi_flags(folder: Path, *, evaluate: bool, **kwargs) -> list[str]:
    """Flags of the miniature on the world in `folder`, with an output folder and a free port."""
    return [
        *world.ezhoi_args(folder, evaluate=evaluate, **kwargs),
        "--output-dir",
        str(folder / "out"),
        "--port",
        free_port(),
    ]


def vcoco_flags(folder: Path, out: Path, *, cache: bool) -> list[str]:
    """Flags of the miniature on V-COCO, with the CLIP features that --cache or a training needs."""
    clip = folder / "data" / f"clip_img_vcoco_{'val' if cache else 'train'}"
    return [
        *ezhoi_flags(folder, evaluate=False, zs_type=None),
        "--dataset", "vcoco", "--partitions", "trainval", "test", "--clip_img_file", str(clip),
        "--output-dir", str(out), *(["--cache"] if cache else []),
    ]  # fmt: skip


def run_in_miniature(*command: str, timeout: int = 240, **env: str) -> subprocess.CompletedProcess[str]:
    """Run python with `command` in the miniature's folder."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", **env}
    return subprocess.run(
        [sys.executable, *command],
        cwd=MINIATURE,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def launch(*flags: str, **kwargs) -> subprocess.CompletedProcess[str]:
    """`ezhoi-diffusion run main_tip_finetune.py flags…` on the miniature."""
    return run_in_miniature("-m", "ezhoi_diffusion", "run", "main_tip_finetune.py", *flags, **kwargs)


def rewrite(path: Path, **changes) -> None:
    """Change entries of a JSON file and keep its checksum valid; None deletes an entry."""
    content = {**read_json(path, dict, EzhoiDiffusionError, ""), **changes}
    write_json(path, {key: x for key, x in content.items() if x is not None or key not in changes})


def dump(out: Path, how: str, *flags: str):
    """Run the miniature `bare` or `launched`. Returns the process, and what dump.py wrote into `out`."""
    done = run_in_miniature(str(DUMP_SCRIPT), str(out), how, "main_tip_finetune.py", *flags)
    return done, load_file(out) if out.exists() else {}


def same(a, b):
    """Whether two dicts of tensors are equal bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def printed_by_ezhoi(text: str) -> dict[str, str]:
    """The mAP that the script prints at its end, by group."""
    full, rare, non_rare, _, unseen, seen = re.findall(r"\d+\.\d\d|nan", text[text.index("The mAP is") :])
    return {"full": full, "rare": rare, "non-rare": non_rare, "unseen": unseen, "seen": seen}


def rows_of(table: str) -> dict[str, dict[str, str]]:
    """Variant -> group -> mAP of a printed comparison."""
    lines = [re.split(r"\s{2,}", line.strip()) for line in table[table.index("mAP ") :].splitlines()]
    head = lines[0][1:-1]
    return {line[0]: dict(zip(head, line[1:], strict=False)) for line in lines if len(line) == len(lines[0])}


def same_figures(row: dict[str, str], printed: dict[str, str]) -> bool:
    """Whether all printed digits agree. A group without classes is nan in EZ-HOI and absent in the table."""
    return row == {group: value for group, value in printed.items() if value != "nan"}
