"""What commands take at HICO-DET's size: CPU seconds, peak memory, how both grow, and how near the network's floor."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from ezhoi_diffusion.artifact import CONFIG
from ezhoi_diffusion.bench.measure import BenchError, busy, machine
from ezhoi_diffusion.diffusion.bridge import BridgeConfig, build_denoiser
from ezhoi_diffusion.diffusion.recipes import DEFAULT_RECIPE
from ezhoi_diffusion.features.store import INDEX, FeatureStore
from ezhoi_diffusion.features.unlabelled import split_of
from ezhoi_diffusion.plugins import PluginManager
from ezhoi_diffusion.testing import hicodet_store
from ezhoi_diffusion.testing.synthetic import NUM_IMAGES
from ezhoi_diffusion.training.config import TrainConfig
from ezhoi_diffusion.training.fitted import known_fits

SIZES = (0.01, 0.1, 1.0)
TRAIN_STEPS = 200  # their cost does not depend on the size
DIM = 512
SIDE = 1024  # of the matrices whose product tells what the processor can do
# Runs a command, and prints its CPU seconds, peak resident bytes and exit status. A process of its own, because on Linux a
# process begins with the peak of the one that started it.
LAUNCH = """\
import os, subprocess, sys
child = subprocess.Popen(sys.argv[2:], stdout=open(sys.argv[1], "ab"), stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
_, status, used = os.wait4(child.pid, 0)
peak = used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
print(used.ru_utime + used.ru_stime, peak, os.waitstatus_to_exitcode(status))
"""


@dataclass(frozen=True)
class Command:
    """One command that is measured.

    Attributes:
        words: Its arguments. {train}, {test}, {bridge} and {out} are folders.
        split: Whose pairs it reads.
        evaluations: Pairs -> evaluations of the network, for the floor; a backward pass counts twice as much as a forward one.
    """

    words: str
    split: str = "train"
    evaluations: Callable[[int], int] | None = None


def _training(recipe: str) -> Command:
    words = f"train {{train}} --recipe {recipe} --train-steps {TRAIN_STEPS} --out {{out}}"
    return Command(words, evaluations=lambda pairs: 3 * TRAIN_STEPS * TrainConfig.batch_size)


COMMANDS = {
    "compare": Command(
        "compare {test} --bridge {bridge} --bridges none,identity,mean_shift,diffusion --replicates 1000 --out {out}",
        "test",
        lambda pairs: 5 * pairs,
    ),
    "sweep": Command(
        "compare {test} --bridge {bridge} --bridges none,diffusion --replicates 1000 --out {out} "
        "--sweep start_timestep=50,100,200 --sweep blend=0.1,0.3,0.6,1",
        "test",
        lambda pairs: 3 * 5 * pairs,
    ),
    "tune": Command("tune {train} --bridge {bridge} --out {out}"),
    "statistics": Command("doctor {train}"),
    "statistics and pictures": Command("doctor {train} --out {out}"),
    "distill": Command("train {train} --student-of {bridge} --train-steps 200 --min-cosine 0 --out {out}"),
    "train gentle": _training("gentle"),
    "train guide": _training("guide"),
    "train paired": _training("paired"),
    "train scored": Command(f"train {{train}} --recipe scored --train-steps {TRAIN_STEPS} --out {{out}}"),
}
FITS = (
    "procrustes", "softmax", "standardize", "interactive", "compete", "eszsl", "gaussian_classes", "pseudo", "test_time_cache",
    "residual",
)  # fmt: skip


def commands(plugins: PluginManager) -> dict[str, Command]:
    """What can be measured, by name. Fits of packages are there where these are installed."""
    known = known_fits(plugins)
    splits = {name: split_of(known[name]) for name in FITS if name in known.names()}
    return COMMANDS | {
        f"fit {name}": Command(f"train {{{split}}} --bridge {name} --out {{out}}", split)
        for name, split in splits.items()
    }


def measure_scale(
    sizes: Sequence[float], names: Sequence[str], plugins: PluginManager, out: Path | None
) -> dict[str, Any]:
    """Run commands one after the other on made-up captures of several sizes, one thread each.

    Args:
        sizes: Shares of HICO-DET's images.
        names: Keys of `commands`; empty for all but `tune`, which takes hours at full size.
        plugins: The plugin manager.
        out: Keeps the captures in `features/` and what commands print in `logs/`. A capture that is there is used again.

    Raises:
        BenchError: A name is unknown, a size is not positive, or a command fails.
    """
    known = commands(plugins)
    chosen = [*names] or [name for name in known if name != "tune"]
    if unknown := sorted({*chosen} - known.keys()):
        raise BenchError(f"there is no command {', '.join(unknown)}; known are {', '.join(known)}")
    if not sizes or not all(0 < size < math.inf for size in sizes):
        raise BenchError(f"sizes are shares of HICO-DET's images above 0, not {', '.join(map(str, sizes))}")
    facts = machine(torch.device("cpu"))
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in chosen}
    with ExitStack() as stack:
        folder = out if out is not None else Path(stack.enter_context(TemporaryDirectory()))
        for what in ("features", "logs", "results"):
            (folder / what).mkdir(parents=True, exist_ok=True)
        rate, flops = _flop_rate(), _flops_of_evaluation()
        progress = stack.enter_context(tqdm(total=len(sizes) * (len(chosen) + 1), unit="run", desc="scale"))
        bridge = folder / "results" / "bridge"
        for size in sorted(sizes):
            progress.set_postfix_str(f"captures of size {size:g}")
            stores = {split: _capture(folder / "features" / f"{split}-{size:g}", split, size) for split in NUM_IMAGES}
            if not (bridge / CONFIG).exists() and any("{bridge}" in known[name].words for name in chosen):
                _run(
                    f"train {stores['train'].folder} --out {bridge} --train-steps {TRAIN_STEPS}",
                    folder / "logs" / "bridge",
                )
            progress.update()
            for name in chosen:
                progress.set_postfix_str(f"{name}, size {size:g}")
                with TemporaryDirectory(dir=folder / "results") as result:
                    words = known[name].words.format(
                        **{split: store.folder for split, store in stores.items()},
                        bridge=bridge,
                        out=Path(result) / "out",
                    )
                    used = _run(words, folder / "logs" / f"{name}-{size:g}".replace(" ", "-"))
                pairs, evaluations = len(stores[known[name].split]), known[name].evaluations
                floor = evaluations(pairs) * flops / rate if evaluations is not None else None
                rows[name].append({"size": size, "pairs": pairs, **used, "floor_seconds": floor})
                progress.update()
    warning = busy(facts)
    return {
        "machine": facts,
        "warnings": [warning] if warning else [],
        "flops_per_second": rate,
        "commands": [{"name": name, "runs": runs, **_growth(runs)} for name, runs in rows.items()],
    }


def _capture(folder: Path, split: str, size: float) -> FeatureStore:
    if (folder / INDEX).exists():
        return FeatureStore(folder)
    return hicodet_store(
        folder, split="train" if split == "train" else "test", images=max(20, round(size * NUM_IMAGES[split]))
    )


def _run(words: str, log: Path) -> dict[str, float]:
    """Run a command in one thread. Returns CPU seconds, seconds and peak bytes. Raises BenchError where it fails."""
    log.unlink(missing_ok=True)
    environment = {**os.environ, **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")}
    line = [sys.executable, "-c", LAUNCH, str(log), sys.executable, "-m", "ezhoi_diffusion", *words.split()]
    began = time.monotonic()
    done = subprocess.run(line, capture_output=True, text=True, env=environment, check=False)
    seconds = time.monotonic() - began
    fields = done.stdout.split()
    if done.returncode or len(fields) != 3 or fields[2] not in ("0", "1" if words.startswith("doctor") else "0"):
        said = log.read_text(errors="replace")[-600:] if log.exists() else done.stderr[-600:]
        raise BenchError(f"`ezhoi-diffusion {words}` failed:\n{said}")
    return {"cpu_seconds": float(fields[0]), "seconds": seconds, "peak_bytes": int(fields[1])}


def _growth(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Exponent of the CPU seconds, and factor of the memory, from each size to the next; empty for one size."""
    return {
        "exponents": [
            math.log(b["cpu_seconds"] / a["cpu_seconds"]) / math.log(b["pairs"] / a["pairs"]) for a, b in pairwise(runs)
        ],
        "memory_factors": [b["peak_bytes"] / a["peak_bytes"] for a, b in pairwise(runs)],
    }


def _flop_rate() -> float:
    """FLOP a second of a matrix product in one thread: the best of a few."""
    threads, a = torch.get_num_threads(), torch.randn(SIDE, SIDE)
    torch.set_num_threads(1)
    try:
        taken = []
        for _ in range(10):
            began = time.perf_counter()
            _ = a @ a
            taken.append(time.perf_counter() - began)
    finally:
        torch.set_num_threads(threads)
    return 2 * SIDE**3 / min(taken)


def _flops_of_evaluation() -> float:
    """FLOP of the default network for one pair."""
    network = build_denoiser(BridgeConfig(DIM, DEFAULT_RECIPE, "mlp", {}))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.randn(SIDE, DIM), torch.tensor([0]))
    return float(counter.get_total_flops()) / SIDE


def scale_table(result: dict[str, Any]) -> tuple[str, list[str], list[list[str]]]:
    """Caption, titles and rows of the result."""
    rows = []
    for command in result["commands"]:
        exponents, factors = (["", *command[key]] for key in ("exponents", "memory_factors"))
        for run, exponent, factor in zip(command["runs"], exponents, factors, strict=True):
            floor = run["floor_seconds"]
            rows.append(
                [
                    command["name"],
                    f"{run['size']:g}",
                    f"{run['pairs']:,}",
                    f"{run['cpu_seconds']:.1f}",
                    f"{run['seconds']:.1f}",
                    f"{run['peak_bytes'] / 1e6:.0f}",
                    f"{exponent:.2f}" if exponent != "" else "",
                    f"{factor:.2f}" if factor != "" else "",
                    f"{floor / run['cpu_seconds']:.0%}" if floor is not None else "",
                ]
            )
    caption = (
        "Commands on made-up captures in HICO-DET's shape, one thread each. Exponent: of the CPU seconds, from the size before. "
        f"Floor: share of the time that the network's products take at {result['flops_per_second'] / 1e9:.0f} GFLOP/s."
    )
    head = ["command", "size", "pairs", "CPU s", "s", "peak MB", "exponent", "memory x", "floor"]
    return caption, head, rows
